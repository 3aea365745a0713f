"""Where a number comes from: versions, commit, machine."""

from __future__ import annotations

import functools
import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from kbit.version import find_version

_PACKAGES: Final = ("torch", "transformers", "lm-eval", "datasets", "numba", "numpy")


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers, by name."""
    own = {"python": platform.python_version(), "kbit": find_version()}
    return own | {name: version(name) for name in _PACKAGES}


@functools.cache
def git_commit() -> str:
    """Return kbit's commit, with "+changes" if files differ from it. Outside a checkout the text is empty."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return ""
    head = _git(folder, "rev-parse", "HEAD")
    return head + "+changes" if head and _git(folder, "status", "--porcelain", "--untracked-files=no") else head


def describe_device(device: str) -> str:
    """Return the name of the card, or the CPU's architecture and the number of threads that torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory so far, in bytes: of the allocators of all used cards, or of this process on the CPU."""
    if device == "cuda":
        return sum(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return done.stdout.strip()
