"""Everything that only a card can settle, in eight minutes: stage after stage, the most important first.

    benchmarks/gpu/run.sh [FOLDER] [--only STAGE ...]

Each stage runs in a process of its own, so that a kernel that ends the process' use of the card ends one stage. It is
stopped at its time limit, and all together at eight minutes. What it has found by then is in FOLDER/STAGE.json. The
table at the end says how each went. Exit code 1: a stage found something wrong, or did not come to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parent / "results" / "gpu"
WHOLE = 480.0  # seconds
LEAST = 5.0  # of a stage: less is not worth a start
# stage and its limit in seconds
LIMITS = {
    "kernel_results": 120.0,
    "kernel_speed": 90.0,
    "products": 60.0,
    "study": 150.0,
    "models": 90.0,
    "sanitizer": 300.0,
}


def main() -> int:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), metavar="STAGE")
    parser.add_argument("--ready", action="store_true", help="tiny sizes on the CPU, all stages in one process")
    options = parser.parse_args()
    command = [sys.executable, str(HERE / "stage.py"), str(options.folder.resolve())]
    for name in options.only:
        (options.folder / f"{name}.json").unlink(missing_ok=True)  # of an earlier day
    if options.ready:
        run_limited([*command, *options.only, "--ready"], WHOLE)
    else:
        run_stages(command, options.only, time.monotonic() + WHOLE)
    states = {name: read_state(options.folder / f"{name}.json") for name in options.only}
    print("\n" + "\n".join(list_lines(states)), flush=True)
    return int(any(state != "done" for state, _, _ in states.values()))


def run_stages(command: Sequence[str], names: Sequence[str], end: float) -> None:
    """Run each stage in its own process, while there is time."""
    for name in names:
        limit = min(LIMITS[name], end - time.monotonic())
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        if limit >= LEAST:
            run_limited([*command, name], limit)


def run_limited(command: Sequence[str], limit: float) -> None:
    """Run a command, and kill it and its children at the limit. How it went is in the records it leaves."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit:.0f} s", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its processes too, which have its group


def read_state(path: Path) -> tuple[str, float, list[str]]:
    """Return how a stage went, its seconds, and its summary."""
    if not path.exists():
        return "not started, or ended before its first record", 0.0, []
    record = json.loads(path.read_text())
    return record["state"], record["seconds"], record["summary"]


def list_lines(states: dict[str, tuple[str, float, list[str]]]) -> Iterator[str]:
    """Yield the table's lines."""
    for name, (state, seconds, summary) in states.items():
        yield f"{name:16}{seconds:7.1f} s  {state}"
        yield from (f"    {line}" for line in summary)


if __name__ == "__main__":
    sys.exit(main())
