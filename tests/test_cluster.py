"""Ray workers: what fits on a cluster, and that a worker that dies costs one experiment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbit.cluster import _count_workers, _dispatch
from kbit.config import EvalConfig, Experiment, ModelConfig, RayConfig
from kbit.quantconfig import QuantConfig
from kbit.store import Store, list_keys
from kbit.sweep import Outcome

GB = 10**9


def make_experiment(bits: int) -> Experiment:
    """One of the smallest model."""
    return Experiment(ModelConfig(), QuantConfig(bits=bits), EvalConfig(tasks=(), perplexity_windows=4))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray with two CPUs and no GPU."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def make_fragile_actor(ray: Any, poisoned: str) -> Any:
    """An actor class like Worker, which ends its own process at one experiment; its result is its process id."""

    class Fragile:  # in a function, so that Ray sends the class itself: workers cannot import this file
        def run(self, experiment: Experiment) -> Outcome:
            if experiment.key == poisoned:
                os._exit(9)
            return Outcome(experiment, "")

    return ray.remote(Fragile).options(num_cpus=1, max_restarts=0)


def test_experiment_that_kills_its_worker_twice_fails_and_the_others_finish(cluster: Any, tmp_path: Path) -> None:
    experiments = [make_experiment(bits) for bits in (3, 4, 5, 6)]
    actor = make_fragile_actor(cluster, poisoned=experiments[1].key)
    started: list[Any] = []

    def start_worker() -> Any:
        started.append(actor.remote())
        return started[-1]

    outcomes = list(_dispatch(list(experiments), start_worker, 2, Store(tmp_path)))
    failed = {outcome.experiment.key: outcome.error for outcome in outcomes if outcome.error}
    assert failed.keys() == {experiments[1].key}
    assert "the worker died 2 times" in failed[experiments[1].key]
    assert {outcome.experiment.key for outcome in outcomes} == {experiment.key for experiment in experiments}
    assert list_keys(tmp_path) == (set(), {experiments[1].key})
    assert len(started) == 4  # two at the start, and one for each death


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RayConfig(gpus_per_worker=1), "1 workers .*ray.gpus_per_worker=1 .* 2 CPUs and 0 GPUs"),
        (RayConfig(num_workers=100), "100 workers .* 2 CPUs and 0 GPUs"),
        (RayConfig(cpus_per_worker=64), "ray.cpus_per_worker=64 .* 2 CPUs and 0 GPUs"),
    ],
    ids=["a GPU", "100 workers", "64 CPUs"],
)
def test_more_than_the_cluster_has_is_refused(cluster: Any, config: RayConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _count_workers(config)


def test_workers_default_to_what_the_cpus_allow(cluster: Any) -> None:
    assert (_count_workers(RayConfig()), _count_workers(RayConfig(cpus_per_worker=2))) == (2, 1)
