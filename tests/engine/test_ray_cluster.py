"""Ray workers: what fits on a cluster, and that a worker that dies costs one experiment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.engine.machine import count_fitting, count_workers
from kbit.engine.outcome import Outcome
from kbit.engine.plan import make_plan
from kbit.engine.ray_cluster import (
    GPU_SHARE,
    choose_gpus,
    dispatch,
    list_nodes,
    start_ray,
)
from kbit.engine.ray_private import silence_raylet
from kbit.engine.worker import check_gpus
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RayConfig
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.readers import list_keys, read_failures
from kbit.store.store import Store

GB = 10**9
NICENESS = 3  # neither Ray's default nor kbit's


def make_experiment(bits: int) -> Experiment:
    """One of the smallest model."""
    return Experiment(ModelConfig(), QuantConfig(bits=bits), EvalConfig(tasks=(), perplexity_windows=4))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray as a sweep starts it, with two CPUs and no GPU."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbit.engine.ray_cluster.count_cpus", lambda: 2)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        start_ray(RayConfig(niceness=NICENESS), announce=print)
        yield ray
        ray.shutdown()


def test_workers_have_the_niceness_asked_for(cluster: Any) -> None:
    """Ray's own default is 15, which leaves a worker a third of the time beside other work."""

    def ask() -> int:  # in a function, as above
        return os.nice(0)

    assert cluster.get(cluster.remote(ask).remote()) - os.nice(0) == NICENESS


def test_a_worker_imports_and_uses_no_more_than_it_should(cluster: Any) -> None:
    """Each of these packages takes a part of a second or more to import, in every worker. See kbit.lean_private."""

    def ask() -> tuple[list[str], int, int, bool]:  # in a function, as above
        import gc
        import importlib
        import sys

        import numba
        import torch

        from kbit.engine.worker import Worker
        from kbit.lean_private import UNUSED

        Worker("memory://imports", "cpu", 1)
        importlib.import_module("kbit.models.loading").load_model("nano-opt-98k")  # as its first experiment does
        found = [name for name in UNUSED if name in sys.modules]
        importlib.import_module("kbit.models.loading").load_model("nano-neox-98k")  # whose rotary positions need sympy
        found += [name for name in UNUSED if name in sys.modules and name != "sympy"]
        return [*found], torch.get_num_threads(), vars(numba.config)["NUMBA_NUM_THREADS"], gc.isenabled()

    assert cluster.get(cluster.remote(ask).options(num_cpus=1).remote()) == ([], 1, 1, True)


def test_no_process_of_ray_runs_that_a_sweep_does_not_use(cluster: Any) -> None:
    lines = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert [line for line in lines if "raylet/raylet" in line]  # the processes are seen
    unused = ("dashboard/dashboard.py", "log_monitor.py", "autoscaler")
    assert not [line for line in lines if any(name in line for name in unused)]


def make_fragile_actor(ray: Any, poisoned: str) -> Any:
    """An actor class like Worker, which ends its own process at one experiment; its result is its process id."""

    class Fragile:  # in a function, so that Ray sends the class itself: workers cannot import this file
        def run(self, experiment: Experiment, key: str, goals: Mapping[str, int] | None = None) -> Outcome:
            if key == poisoned:
                os._exit(9)
            return Outcome(experiment, "")

    return ray.remote(Fragile).options(num_cpus=1, max_restarts=0)


def test_experiment_that_kills_its_worker_twice_fails_and_the_others_finish(cluster: Any, tmp_path: Path) -> None:
    experiments = [make_experiment(bits) for bits in (3, 4, 5, 6)]
    plan = make_plan(experiments, tmp_path)
    poisoned = plan.keys[experiments[1]]
    actor = make_fragile_actor(cluster, poisoned=poisoned)
    started: list[Any] = []

    def start_worker() -> Any:
        started.append(actor.remote())
        return started[-1]

    outcomes = list(dispatch(plan, start_worker, 2, Store(tmp_path)))
    failed = {plan.keys[outcome.experiment]: outcome.error for outcome in outcomes if outcome.error}
    assert failed.keys() == {poisoned}
    assert "the worker died 2 times" in failed[poisoned]
    assert {outcome.experiment for outcome in outcomes} == set(experiments)
    assert list_keys(tmp_path) == (set(), {poisoned})
    assert len(started) == 4  # two at the start, and one for each death
    assert read_failures(tmp_path)["state"].tolist() == ["crashed"]
    assert make_plan([experiments[1]], tmp_path).to_run == (experiments[1],)


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
        count_workers(config, list_nodes())


def test_workers_default_to_what_the_cpus_allow(cluster: Any) -> None:
    assert [count_workers(RayConfig(cpus_per_worker=cpus), list_nodes()) for cpus in (1, 2)] == [2, 1]


def test_ray_that_does_not_start_is_named_with_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.init", time_out)
    with pytest.raises(
        ConnectionError, match=r"Ray does not start \(The current node timed out .*hydra/launcher=basic"
    ):
        start_ray(RayConfig(), announce=print)


def test_ray_does_not_tell_of_deaths_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "_worker_logs_enabled", True)
    told = [{"lines": [f"a worker died {n}"], "pid": "raylet", "is_err": False} for n in range(2)]
    worker.print_to_stdstream(told[0], ignore_prefix=False)
    assert "a worker died 0" in capsys.readouterr().out
    silence_raylet()
    worker.print_to_stdstream(told[1], ignore_prefix=False)
    assert capsys.readouterr() == ("", "")


def test_a_worker_that_cannot_start_ends_the_sweep_and_no_experiment_has_failed(cluster: Any, tmp_path: Path) -> None:
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no GPU was given")

        def run(self, experiment: Experiment, key: str, goals: Mapping[str, int] | None = None) -> Outcome:
            return Outcome(experiment, "")

    actor = cluster.remote(Broken).options(num_cpus=1, max_restarts=0)
    plan = make_plan([make_experiment(bits) for bits in (3, 4, 5)], tmp_path)
    with pytest.raises(ValueError, match="a worker cannot start: ValueError: no GPU was given"):
        list(dispatch(plan, actor.remote, 2, Store(tmp_path)))
    assert list_keys(tmp_path) == (set(), set())


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "fitting"),
    [
        ({"CPU": 8}, 3, 0, 2),
        ({"CPU": 8}, 1, 0.5, 0),
        ({"CPU": 8, "GPU": 2}, 1, 0.5, 4),
        ({"CPU": 8, "GPU": 2}, 1, 0.4, 4),  # a fifth one would lie on both
        ({"CPU": 8, "GPU": 3}, 1, 2, 1),
        ({"CPU": 8, "GPU": 3}, 1, 4, 0),
        ({"CPU": 3, "GPU": 8}, 2, 0.1, 1),
        ({}, 1, 0, 0),
    ],
)
def test_workers_fit_on_a_node_and_shares_on_a_gpu(
    node: dict[str, float], cpus: int, gpus: float, fitting: int
) -> None:
    assert count_fitting(node, cpus, gpus) == fitting


@pytest.mark.parametrize("workers", range(1, 60))
def test_a_share_is_met_so_often(workers: int) -> None:
    assert count_fitting({"CPU": 100, "GPU": 1}, 1, 1 / workers) == workers


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            RayConfig(cpus_per_worker=6),
            "has 8 CPUs and 4 GPUs, on 2 nodes of 4 CPUs and 4 GPUs; 4 CPUs and 0 GPUs; 0 s",
        ),
        (RayConfig(gpus_per_worker=2, num_workers=3), "3 workers .*ray.gpus_per_worker=2 .*; 2 such workers would fit"),
    ],
    ids=["CPUs of two nodes", "GPUs"],
)
def test_a_worker_must_fit_on_one_node(config: RayConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        count_workers(config, [{"CPU": 4.0, "GPU": 4.0}, {"CPU": 4.0}])


@given(st.integers(1, 10**12), st.integers(GB, 200 * GB))
def test_workers_that_share_a_gpu_fit_in_its_memory(worker_bytes: int, gpu_bytes: int) -> None:
    gpus = choose_gpus(worker_bytes, gpu_bytes)
    usable = GPU_SHARE * gpu_bytes
    if gpus < 1:
        assert round(1 / gpus) * worker_bytes <= usable < (round(1 / gpus) + 1) * worker_bytes
    else:
        assert (gpus - 1) * usable < worker_bytes <= gpus * usable
    RayConfig(gpus_per_worker=gpus)  # accepts it


@pytest.mark.parametrize(
    ("given_ids", "visible", "asked"), [([0], "0", 0.25), (["3"], "3", 1), ([2, 3], "2,3", 2), (["GPU-a"], "GPU-a", 1)]
)
def test_a_worker_with_its_gpus_starts(given_ids: list[object], visible: str, asked: float) -> None:
    check_gpus(given_ids, visible, asked)


@pytest.mark.parametrize(
    ("given_ids", "visible", "asked", "words"),
    [
        ([], "", 1, r"GPUs \[\], where ray.gpus_per_worker=1 asks for more"),
        ([], None, 0.5, "asks for more"),
        ([0], "0", 2, "asks for more"),
        ([1], "0,1", 1, "CUDA_VISIBLE_DEVICES=0,1 .*another worker"),
        ([1], None, 1, "CUDA_VISIBLE_DEVICES=None"),
    ],
)
def test_a_worker_without_its_gpus_does_not(
    given_ids: list[object], visible: str | None, asked: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_gpus(given_ids, visible, asked)
