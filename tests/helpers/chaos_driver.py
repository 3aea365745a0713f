"""Run a sweep of short experiments whose results follow from their keys.

    python chaos_driver.py STORE FIRST LAST

The engine and the store are kbit's. Only the worker is light, so that losing it costs a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import field
from pathlib import Path
from typing import Any

from kbit.engine.estimate import Estimator
from kbit.engine.outcome import Outcome
from kbit.engine.plan import make_plan
from kbit.engine.progress import Progress, compact_quietly
from kbit.engine.ray_cluster import dispatch, start_ray
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RayConfig
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.store import Store

SECONDS = 0.2  # duration of an experiment


@dataclasses.dataclass(frozen=True)
class Record:
    """The stored record of an experiment. It holds only what follows from the experiment's key."""

    key: str
    value: str
    experiment: Experiment = field(default_factory=Experiment)
    sampled: tuple[str, ...] = ()


def list_experiments(first: int, last: int) -> list[Experiment]:
    """Return the experiments first to last - 1 of a numbered grid."""
    models = ("nano-neox-98k", "nano-neox-332k", "nano-neox-1m")
    evaluation = EvalConfig(tasks=())
    return [
        Experiment(ModelConfig(models[n % 3]), QuantConfig(block_size=n + 1), evaluation) for n in range(first, last)
    ]


def make_record(key: str) -> Record:
    """Return the record of the experiment with this key."""
    return Record(key, hashlib.sha256(key.encode()).hexdigest())


class LightWorker:
    """A stand-in for kbit.engine.worker.Worker. It leaves a file for every experiment that it starts."""

    def __init__(self, store_path: str) -> None:
        self._store = Store(store_path)
        (self._store.path / "pids").mkdir(exist_ok=True)
        (self._store.path / "pids" / str(os.getpid())).touch()

    def run(self, experiment: Experiment, key: str, goals: Mapping[str, int] | None = None) -> Outcome:
        """Take a moment, then store the result."""
        if self._store.has(key):
            return Outcome(experiment, "")
        started = self._store.path / "started"
        started.mkdir(exist_ok=True)
        (started / f"{key}-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(SECONDS)
        self._store.write(make_record(key))  # type: ignore[arg-type]
        return Outcome(experiment, "")


def run_sweep(store_path: str, first: int, last: int) -> None:
    """Plan and run the experiments first to last - 1, as kbit.cli.run does."""
    import ray

    plan = make_plan(list_experiments(first, last), store_path)
    print(plan.describe(), flush=True)
    store = Store(store_path)
    start_ray(RayConfig(), announce=print)
    remote: Any = ray.remote(LightWorker).options(num_cpus=1, max_restarts=0)
    outcomes = dispatch(plan, lambda: remote.remote(store_path), 2, store)
    with closing(outcomes), closing(Progress(plan.to_run, Estimator(), store)) as progress:
        for outcome in outcomes:
            progress.take(outcome)
    ray.shutdown()
    compact_quietly(store)


if __name__ == "__main__":
    run_sweep(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]), int(sys.argv[3]))
