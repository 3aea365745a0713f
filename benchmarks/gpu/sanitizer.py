"""Stage 6: NVIDIA's compute-sanitizer over a few cases of stage 1: wrong addresses, barriers and races."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card import Card, Report

TOOLS = ("memcheck", "synccheck", "racecheck")
TOOLKIT = "/usr/local/cuda/bin"
CASES = Path(__file__).with_name("kernel_results.py")


@dataclass(frozen=True)
class Sizes:
    """The program, and the seconds that a tool may take."""

    program: str
    limit: float


FULL = Sizes("compute-sanitizer", 100)
READY = Sizes("no such program", 1)


def run(card: Card, report: Report, sizes: Sizes) -> None:
    """Run the tools, one after the other, or say that they are not there."""
    program = shutil.which(sizes.program) or shutil.which(sizes.program, path=TOOLKIT)
    if program is None:
        report.add(tool=sizes.program, seconds=0.0, wrong=[], note="not found")
        return
    for tool in TOOLS:
        start = time.perf_counter()
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(CASES)]
        wrong, note = find_errors(command, sizes.limit)
        report.add(tool=tool, seconds=time.perf_counter() - start, wrong=wrong, note=note)


def find_errors(command: list[str], limit: float) -> tuple[list[str], str]:
    """Return the end of what the program prints, if it finds something, and a note if it does not come to its end.

    Without torch's cache each tensor has memory of its own, beyond which an address is wrong.
    """
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as done:
        try:
            printed, _ = done.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)  # the program that is examined, too
            return [], f"not done in {limit:g} s"
    return ([printed[-4000:]] if done.returncode else []), ""


def summarize(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what each tool found."""
    for row in rows:
        yield f"{row['tool']}: {row['note'] or ('see the record' if row['wrong'] else 'nothing found')}"
