"""What this machine gives to a sweep: CPUs that the process may use, and GPUs. Asked without torch and without Ray."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def count_cpus(root: Path = _ROOT) -> int:
    """Return the number of CPUs that this process may use: by its affinity, and by the quota of its control group.

    Args:
        root: the folder in which proc and sys lie.
    """
    quotas = [quota for quota in _read_quotas(root) if quota > 0]
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in quotas)]))


def _read_quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs that the process' control groups, and those around them, allow (versions 1 and 2)."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            base = root / "sys/fs/cgroup"
            if controllers:
                base = base / controllers if (base / controllers).is_dir() else base / "cpu"
            if not controllers or "cpu" in controllers.split(","):
                place = Path(group.lstrip("/"))
                for folder in (place, *place.parents):  # a container sees its own group at the top
                    yield from _read_quota(base / folder)


def _read_quota(folder: Path) -> Iterator[float]:
    """Yield the quota of one control group in CPUs, if it has one."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        yield int(quota) / int(period)  # "max" is no number
    with suppress(OSError, ValueError):
        period = (folder / "cpu.cfs_period_us").read_text()
        yield int((folder / "cpu.cfs_quota_us").read_text()) / int(period)  # -1 is no quota


def count_gpus() -> int:
    """Return the number of GPUs that torch can use. torch is imported only if there is a driver."""
    if not has_driver(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return 0
    import torch

    return torch.cuda.device_count()


def has_driver(visible: str | None) -> bool:
    """Whether a GPU's driver is installed, and CUDA_VISIBLE_DEVICES does not hide all GPUs."""
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    for library in ("libcuda.so.1", "libamdhip64.so"):
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    return False
