"""What starting takes: a worker's imports, `kbit run` of one nano model, and Ray until both workers have begun.

    git worktree add ../before COMMIT
    python benchmarks/startup.py ../before [--rounds 3]

Both checkouts run in turn, in processes of their own. The numbers are CPU seconds (user and system) of all processes
of a command, because a busy machine changes the time on the clock. On two idle cores it shows at least half of them.
The results of `kbit run` must be equal in both checkouts, or the exit code is 1. Of the sweep the script also records
how many threads each worker may use, and what share of two cores the workers had after the start. Writes
benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]
RECORD: Final = Path(__file__).parent / "results" / "startup.json"
POLL: Final = 0.1  # s
IMPORTS: Final = """
import sys, time
from kbit.engine.worker import Worker
Worker("memory://imports", "cpu", 1)
import kbit
print(time.process_time(), len(sys.modules), kbit.__file__)
"""
ONE: Final = ("model.name=nano-neox-98k", "eval.limit=100", "eval.perplexity_windows=32")
STUDY: Final = ("-m", "quant.bits=3,4", "model.name=nano-neox-98k,nano-opt-98k", "ray.num_workers=2")
Measured = dict[str, Any]


def measure_imports(environment: dict[str, str]) -> Measured:
    """Import what a worker imports."""
    command = [sys.executable, "-P", "-c", IMPORTS]  # -P: not what lies in this folder
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    cpu, modules, file = done.stdout.split()
    if Path(environment["PYTHONPATH"]) not in Path(file).parents:
        raise RuntimeError(f"the process imported {file}, not kbit of {environment['PYTHONPATH']}")
    return {"cpu_seconds": float(cpu), "modules": int(modules)}


def measure_run(environment: dict[str, str]) -> Measured:
    """Run one experiment, and return the numbers that it found, too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kbit", "run", *ONE, f"results={folder}/results"]
        done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "found": [line for line in done.stdout.splitlines() if line.startswith(" ")]}


def measure_sweep(environment: dict[str, str]) -> Measured:
    """Run a study on two workers. Count each process' CPU time until both have begun, and until the end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kbit", "run", *STUDY, f"results={folder}/results"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        clock = _ProcessClock(process.pid)
        begun: Measured = {}
        while process.poll() is None:
            clock.look()
            if not begun and len(list(Path(folder, "results", "logs").glob("*.log"))) >= 2:
                begun = {
                    "cpu_seconds": sum(clock.seconds.values()),
                    "wall_seconds": time.perf_counter() - start,
                    "cpu_seconds_by_process": dict(clock.by_name()),
                    "workers": clock.workers,
                }
                workers_before = clock.seconds_of_workers()
            time.sleep(POLL)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        wall = time.perf_counter() - start - begun["wall_seconds"]
        share = (clock.seconds_of_workers() - workers_before) / (2 * wall)
    return {**begun, "busy_share_of_two_cores_after_start": share, "load_average": os.getloadavg()[0]}


class _ProcessClock:
    """Sums the CPU time of a process and of all that it started, by looking at them again and again."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.seconds: dict[int, float] = {}
        self.names: dict[int, str] = {}
        self.workers: dict[str, Measured] = {}

    def look(self) -> None:
        """Read the CPU time of each process."""
        with contextlib.suppress(psutil.Error):
            for process in (self._root, *self._root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self.seconds[process.pid] = times.user + times.system
                    self.names[process.pid] = name = _name_process(process)
                    if name == "worker":
                        values = process.environ()
                        limits = {key: values.get(key) for key in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
                        self.workers[str(process.pid)] = {"niceness": process.nice(), **limits}

    def by_name(self) -> dict[str, float]:
        """Return the CPU seconds by the kind of process."""
        sums: dict[str, float] = defaultdict(float)
        for pid, seconds in self.seconds.items():
            sums[self.names[pid]] += round(seconds, 2)
        return sums

    def seconds_of_workers(self) -> float:
        """Return the CPU seconds of all workers."""
        return self.by_name()["worker"]


def _name_process(process: psutil.Process) -> str:
    """Return what a process of Ray is."""
    line = " ".join(process.cmdline())
    kinds = {
        "ray::": "worker", "default_worker": "worker", "gcs_server": "gcs_server",
        "dashboard/agent": "agent of the node",
        "dashboard/dashboard": "dashboard", "runtime_env/agent": "agent of environments", "log_monitor": "log monitor",
        "autoscaler": "monitor of machines", "raylet/raylet": "raylet", "-m kbit run": "driver",
    }  # fmt: skip
    return next((kind for sign, kind in kinds.items() if sign in line), "other")


PARTS: Final = {"imports": measure_imports, "run": measure_run, "sweep": measure_sweep}


def main() -> None:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="how often each checkout is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    options = parser.parse_args()
    record: Measured = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for part in options.parts:
        runs: dict[str, list[Measured]] = {"before": [], "after": []}
        for _ in range(options.rounds):
            for name, checkout in (("before", options.before.resolve()), ("after", ROOT)):
                environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
                runs[name].append(PARTS[part](environment))
                print(part, name, {k: v for k, v in runs[name][-1].items() if k != "found"}, flush=True)
        found = {str(run.pop("found", None)) for several in runs.values() for run in several}
        if len(found) > 1:
            sys.exit(f"{part}: the checkouts found different numbers:\n" + "\n".join(found))
        best = {name: min(several, key=lambda run: run["cpu_seconds"]) for name, several in runs.items()}
        ratio = best["before"]["cpu_seconds"] / best["after"]["cpu_seconds"]
        print(f"{part}: {best['before']['cpu_seconds']:.2f} s before, {best['after']['cpu_seconds']:.2f} s after")
        record[part] = {**best, "ratio": ratio, "all": {n: [r["cpu_seconds"] for r in s] for n, s in runs.items()}}
    record["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
