"""Experiments on Ray workers: the cluster, the workers that fit on it, and the loop that keeps them busy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from kbit.engine.machine import count_cpus, count_workers, find_free_memory, limit_by_memory
from kbit.engine.outcome import Outcome
from kbit.engine.ray_private import silence_raylet, started_bare
from kbit.engine.rounds import Rounds
from kbit.engine.schedule import Schedule
from kbit.experiments.config import Experiment, RayConfig
from kbit.experiments.result import CRASHED
from kbit.store.store import Store

if TYPE_CHECKING:
    from kbit.engine.plan import Plan

# An experiment is tried again if its worker dies (killed, out of memory). If the second one dies too, it has crashed,
# and the next run tries it again.
WORKER_TRIES: Final = 2
GPU_SHARE: Final = 0.9  # share of a GPU's memory to fill by estimate, which leaves something out
_NICENESS: Final = "RAY_worker_niceness"  # Ray reads the environment of whoever starts it, and takes 15 by itself
_PROBE_GPUS: Final = 0.001  # share of a GPU that the question for its size asks for
_PROBE_SECONDS: Final = 60  # time limit of that question, importing torch included


def run_on_ray(
    plan: Plan,
    worker: Callable[[str, str, RayConfig], Any],
    store_path: str,
    device: str,
    config: RayConfig,
    *,
    cost: Callable[[Experiment], float],
    worker_bytes: int | None,
    announce: Callable[[str], None],
    notify: Callable[[str], None],
    rounds: Rounds | None = None,
) -> Generator[Outcome]:
    """Run a plan's experiments on Ray workers, each of which keeps its model loaded.

    Args:
        plan, rounds: the plan, and its rounds (None: one).
        worker: the class of the workers, such as kbit.engine.worker.RayWorker.
        store_path, device: the folder or URL of the store, and the device to run on.
        config: the resources that a worker asks for. On a GPU, worker_bytes decides gpus_per_worker if it is None.
        cost: a function that returns the cost of an experiment (see Schedule).
        worker_bytes: the estimated memory of a worker, or None if it is not known.
        announce: a function that tells the user a fact in a line, such as which cluster was joined.
        notify: a function that shows the user what goes on until the first experiment ends.

    Raises:
        ValueError: the cluster does not have the resources that the workers ask for, or a worker cannot be set up.
        ConnectionError: there is no cluster at config.address, or Ray does not start.
    """
    import ray

    notify("starting Ray" if config.address == "local" else f"joining Ray at {config.address}")
    start_ray(config, announce)
    try:
        if config.gpus_per_worker is None:
            config = dataclasses.replace(config, gpus_per_worker=_choose_gpus(plan, device, worker_bytes, announce))
        count = _count_workers(plan, device, config, worker_bytes, announce)
        remote = ray.remote(worker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            max_restarts=0,
            runtime_env=None if config.address == "local" else {"env_vars": _limit_threads(config)},
        )
        notify(f"starting {count} worker{'s' if count > 1 else ''}")
        start = functools.partial(remote.remote, store_path, device, config)
        yield from dispatch(plan, start, count, Store(store_path), cost, rounds)
    finally:
        ray.shutdown()


def dispatch(
    plan: Plan,
    start_worker: Callable[[], Any],
    count: int,
    store: Store,
    cost: Callable[[Experiment], float] = lambda _: 1.0,
    rounds: Rounds | None = None,
) -> Generator[Outcome]:
    """Keep actors busy until no experiment waits, and replace an actor that died. ValueError if one cannot start.

    Args:
        plan, rounds: the plan, and its rounds (None: one).
        start_worker, count: starts an actor with run(experiment, key, goals) -> Outcome, and how many to start.
        store: the store, which gets the failure of an experiment whose actors died.
        cost: a function that returns the cost of an experiment (see Schedule).
    """
    import ray

    waiting = Schedule((rounds := rounds or Rounds(plan)).start_next(), cost)
    tries: Counter[Experiment] = Counter()
    last: dict[Any, Experiment] = {}  # the experiment that each worker was given last, whose model it holds
    running: dict[Any, tuple[Any, Experiment]] = {}
    idle: deque[Any] = deque(start_worker() for _ in range(count))
    while waiting or running:
        while waiting and idle:
            worker = idle.popleft()
            experiment = last[worker] = waiting.take(last.get(worker), Counter(e.model for e in last.values()))
            goals = rounds.find_goals(experiment)
            running[worker.run.remote(experiment, plan.keys[experiment], goals)] = (worker, experiment)
        ready, _ = ray.wait(list(running), num_returns=1)
        worker, experiment = running.pop(ready[0])
        working = tuple(other for _, other in running.values())
        try:
            yield dataclasses.replace(ray.get(ready[0]), working=working)
            idle.append(worker)
        except ray.exceptions.RayTaskError as error:  # recording the experiment's end failed
            idle.append(worker)
            yield Outcome(experiment, f"its end could not be recorded: {error.cause}", working=working)
        except ray.exceptions.RayError as error:  # the worker died: killed, out of memory, could not start
            _check_started(error)
            last.pop(worker, None)
            idle.append(start_worker())
            tries[experiment] += 1
            if tries[experiment] < WORKER_TRIES:
                waiting.add(experiment)
                continue
            yield Outcome(experiment, _record_death(plan.keys[experiment], experiment, error, store), working=working)
        if not waiting and not running:
            waiting = Schedule(rounds.start_next(), cost)
            tries.clear()  # one death in each of two rounds is no crash


def _check_started(error: Exception) -> None:
    """Raise ValueError if a worker died because it could not be set up: the next one could not be, either."""
    if getattr(error, "actor_init_failed", False):
        raise ValueError(f"a worker cannot start: {str(error).strip().splitlines()[-1]}") from None


def _record_death(key: str, experiment: Experiment, error: Exception, store: Store) -> str:
    """Record that an experiment's workers died, and return the reason, or "" if the last one died after its work."""
    if store.has(key):
        return ""
    reason = f"the worker died {WORKER_TRIES} times: {str(error).splitlines()[0]}"
    store.write_failure(key, experiment, reason, str(error), CRASHED)
    return reason


def start_ray(config: RayConfig, announce: Callable[[str], None]) -> None:
    """Start or join Ray, quietly.

    Args:
        config: the address of the cluster.
        announce: a function that tells the user which cluster was joined.

    Raises:
        ConnectionError: there is no cluster at config.address, or Ray does not start.
        ValueError: Ray does not know such an address.
    """
    import ray

    # Workers must not send this process' output twice, and Ray's usage pings have no place in an offline study.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ[_NICENESS] = str(config.niceness)
    local = config.address == "local"
    if ":" in config.address and "://" not in config.address:
        _check_reachable(config.address)
    try:
        with started_bare(local), _changed_environment(_limit_threads(config)):
            context: Any = ray.init(
                address=config.address,
                num_cpus=count_cpus() if local else None,  # Ray would count those of the whole machine
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        silence_raylet()
    except (ValueError, OSError):
        raise
    except Exception as error:  # a bare one where its processes take too long, as on a machine with much other work
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"Ray does not start ({reason}); hydra/launcher=basic runs without it") from error
    if not local:
        announce(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}")
        if context.dashboard_url:
            announce(f"its dashboard: http://{context.dashboard_url}")


def _limit_threads(config: RayConfig) -> dict[str, str]:
    """Return the variables that keep a worker's pools of threads within its CPUs: those of numba, torch, tokenizers.

    Where Ray starts here, its workers inherit them. Ray has workers ready by then, which an environment of their own
    would leave unused. The workers of a running cluster get them as an environment.
    """
    return dict.fromkeys(("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(config.cpus_per_worker))


@contextlib.contextmanager
def _changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let the processes that the block starts have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_reachable(address: str) -> None:
    """Raise ConnectionError if nothing answers at host:port. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at ray.address={address}: {error}") from None


def list_nodes() -> list[Mapping[str, float]]:
    """Return the resources of each node of the cluster."""
    import ray

    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def choose_gpus(worker_bytes: int, gpu_bytes: int) -> float:
    """Return the GPUs of a worker: 1/n if n workers fit on one GPU, else as many whole ones as it needs."""
    usable = GPU_SHARE * gpu_bytes
    return 1 / math.floor(usable / worker_bytes) if worker_bytes <= usable else math.ceil(worker_bytes / usable)


def _count_workers(
    plan: Plan, device: str, config: RayConfig, worker_bytes: int | None, announce: Callable[[str], None]
) -> int:
    """Return how many workers to start: one an experiment at most, and as many as have room in this machine's memory.

    A cluster and GPUs have memory of their own, and a number of workers that was asked for stays.
    """
    count = min(count_workers(config, list_nodes()), len(plan.to_run))
    free = find_free_memory()
    if config.address != "local" or config.num_workers is not None or device != "cpu":
        return count
    fitting = limit_by_memory(count, worker_bytes, free)
    if fitting < count and worker_bytes and free is not None:
        announce(
            f"ray.num_workers={fitting} of {count} that the CPUs allow: a worker takes up to "
            f"{worker_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free (ray.num_workers={count} starts all)"
        )
    return fitting


def _choose_gpus(plan: Plan, device: str, worker_bytes: int | None, announce: Callable[[str], None]) -> float:
    """Return the GPUs of a worker by the memory that it needs and that of the smallest GPU. On a CPU it has none.

    Raises:
        ValueError: the memory that a worker needs is not known, there is no GPU, or a packed model needs several.
    """
    if device == "cpu":
        return 0.0
    if worker_bytes is None:
        raise ValueError("a model's size is not known before it is downloaded: give ray.gpus_per_worker, such as 1")
    sizes = _measure_gpus()
    if not sizes:
        raise ValueError(f"device={device}: no node of the cluster has a GPU that Ray knows of")
    gpus = choose_gpus(worker_bytes, min(sizes))
    if gpus > 1 and (packed := next((e for e in plan.to_run if e.packed_as), None)) is not None:
        raise ValueError(
            f"packed=true ({packed.label()}) loads onto one GPU, which has {min(sizes) / 1e9:.1f} GB, and the largest "
            f"worker takes about {worker_bytes / 1e9:.1f} GB: run what is not packed by itself, or a smaller model"
        )
    announce(
        f"ray.gpus_per_worker={gpus:.3g}: a worker takes about {worker_bytes / 1e9:.1f} GB, a GPU has "
        f"{min(sizes) / 1e9:.1f} GB (estimated from parameters, dtype and batch size)"
    )
    return gpus


def _measure_gpus() -> list[int]:
    """Return the memory in bytes of one GPU of each node that has any."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def measure() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    ids = [node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("GPU")]
    probe: Any = ray.remote(measure)
    asked = [
        probe.options(
            num_cpus=0, num_gpus=_PROBE_GPUS, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node in ids
    ]
    try:
        sizes: list[int] = ray.get(asked, timeout=_PROBE_SECONDS)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"the GPUs' memory cannot be read ({reason}): give ray.gpus_per_worker, such as 1") from None
    return sizes
