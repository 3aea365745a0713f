"""The sweep engine: plan a list of experiments, run what is missing on Ray workers or in process, report.

A worker keeps one model loaded and runs its experiments one after the other, writing each result itself the moment it
exists; the driver only hands out work and counts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from kbit.config import Experiment, RayConfig
from kbit.families import locate_model
from kbit.logfile import log_output
from kbit.store import MANY_FILES, Store, list_keys
from kbit.taskfiles import find_local_tasks
from kbit.textdata import check_text, locate_text

if TYPE_CHECKING:
    from kbit.evaluation import Prepared
    from kbit.experiment import Result, Session

WORKER_TRIES: Final = 2  # a worker that dies (killed, out of memory) loses the experiment once; then it has failed


@dataclass(frozen=True)
class Plan:
    """What a sweep would do.

    Attributes:
        asked: experiments asked for, repeats included.
        distinct: the distinct ones, in the order asked.
        done: how many of them have a result.
        failed: how many of them are recorded as failed and will not be tried again.
        to_run: the rest, grouped by model, largest model first.
    """

    asked: int
    distinct: tuple[Experiment, ...]
    done: int
    failed: int
    to_run: tuple[Experiment, ...]

    def describe(self) -> str:
        """Return the plan as one line."""
        failed = f", {self.failed} failed before (retry_failed=true runs them again)" if self.failed else ""
        return f"{self.asked} asked, {len(self.distinct)} distinct, {self.done} done{failed}, {len(self.to_run)} to run"


@dataclass(frozen=True)
class Outcome:
    """How one experiment ended.

    Attributes:
        experiment: it.
        error: empty if its result is in the store.
        stored: whether the store took the result or the failure; if not, to go on would waste work.
        working: labels of the experiments that other workers are at.
    """

    experiment: Experiment
    error: str
    stored: bool = True
    working: tuple[str, ...] = ()


def make_plan(experiments: Sequence[Experiment], store_path: str | Path, *, retry_failed: bool = False) -> Plan:
    """De-duplicate by key, drop what the store has, group by model; the store need not exist yet."""
    distinct = {experiment.key: experiment for experiment in experiments}
    finished, failures = list_keys(store_path)
    done, failed = finished & distinct.keys(), failures & distinct.keys()
    skip = done if retry_failed else done | failed
    to_run = [experiment for key, experiment in distinct.items() if key not in skip]
    # a worker keeps one model, and of the 16-bit model the states on one text
    to_run.sort(key=lambda e: (-_weight_bytes(e.model.name), e.model.name, e.model.dtype, e.eval.perplexity or ""))
    failed_count = 0 if retry_failed else len(failed)
    return Plan(len(experiments), tuple(distinct.values()), len(done), failed_count, tuple(to_run))


def check_experiment(experiment: Experiment, *, planned_only: bool = False) -> None:
    """Raise the error that an unknown model, task or text would give later, before any work.

    What is only planned need not be here: a study of the hub's texts is planned offline.
    """
    locate_model(experiment.model.name)
    for text in experiment.texts:
        (locate_text if planned_only else check_text)(text)
    experiment.check_texts()
    if set(experiment.eval.tasks) - find_local_tasks(experiment.eval.task_path).keys():
        from kbit.tasks import load_tasks  # takes seconds, and a study of local tasks need not wait to be planned

        load_tasks(experiment.eval.tasks, experiment.eval.task_path)


class Worker:
    """Runs experiments and writes their results; keeps the model of the last one loaded, and tasks for the next.

    Args:
        store_path: of the store.
        device: to run on.
        threads: of torch and the kernels; None leaves them as they are.
        own_process: whether all that the process prints belongs to the experiment.
    """

    def __init__(self, store_path: str, device: str, threads: int | None = None, *, own_process: bool = False) -> None:
        from kbit.quiet import silence_libraries

        silence_libraries()
        if threads is not None:
            import torch

            torch.set_num_threads(threads)  # the kernels follow: see kbit.backend.torch_threads_kept
        self._store = Store(store_path)
        self._device = device
        self._own_process = own_process
        self._session: Session | None = None
        self._prepared: Prepared | None = None

    def run(self, experiment: Experiment) -> Outcome:
        """Run one experiment; an error becomes a recorded failure, never a number."""
        if self._store.has(experiment.key):  # another driver on this store has finished it since the plan
            return Outcome(experiment, "")
        log = self._store.log_path(experiment.key)
        try:
            with log_output(log, experiment.label(), redirect=self._own_process):
                result, reason = self._try(experiment)
            if result is not None:
                self._store.write(result)
            else:
                self._store.write_failure(experiment, *reason)
        except OSError as error:  # a full disk, or a store out of reach
            return Outcome(experiment, f"{self._store.root} cannot be written: {error}", stored=False)
        return Outcome(experiment, reason[0])

    def _try(self, experiment: Experiment) -> tuple[Result | None, tuple[str, str]]:
        """Return the result, or the reason and traceback of why there is none."""
        from kbit.evaluation import Prepared
        from kbit.experiment import Session

        try:
            if self._session is None or not self._session.holds(experiment.model):
                self._session = None  # free the old model before loading the next
                self._prepared = self._prepared or Prepared()
                self._session = Session(experiment.model, self._device, self._prepared)
            return self._session.run(experiment), ("", "")
        except Exception as error:  # whatever it was, the sweep goes on and the reason is kept
            trace = traceback.format_exc()
            if self._own_process:
                print(trace, file=sys.stderr)  # into the log
            return None, (f"{type(error).__name__}: {error}", trace)


def run_in_process(experiments: Iterable[Experiment], store_path: str, device: str) -> Generator[Outcome]:
    """Run the experiments one after the other in this process, with all of torch's threads."""
    worker = Worker(store_path, device)
    for experiment in experiments:
        yield worker.run(experiment)


def run_on_ray(
    experiments: Sequence[Experiment], store_path: str, device: str, config: RayConfig
) -> Generator[Outcome]:
    """Run the experiments on Ray workers, each keeping its model loaded.

    Raises:
        ValueError: the cluster has not the resources that one worker asks for.
        ConnectionError: no cluster at config.address.
    """
    import ray

    print("starting Ray ..." if config.address == "local" else f"joining Ray at {config.address} ...", file=sys.stderr)
    _start_ray(config)
    try:
        count = min(_count_workers(config), len(experiments))
        remote = ray.remote(Worker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            max_restarts=0,
            runtime_env={"env_vars": {"NUMBA_NUM_THREADS": str(config.cpus_per_worker)}},
        )

        def start_worker() -> Any:
            return remote.remote(store_path, device, config.cpus_per_worker, own_process=True)

        yield from _dispatch(list(experiments), start_worker, count, Store(store_path))
    finally:
        ray.shutdown()


def finish(outcomes: Generator[Outcome], plan: Plan, *, fail_fast: bool, store: Store | None = None) -> list[Outcome]:
    """Consume the outcomes, show progress, return the failures; close the generator, so that Ray ends at once.

    Args:
        outcomes: as they come; plan: what they are outcomes of.
        fail_fast: stop at the first failure.
        store: to compact now and then.

    Raises:
        OSError: the store no longer takes results.
    """
    failures: list[Outcome] = []
    # On a terminal one bar; elsewhere (a log file) one line for each experiment.
    bar = tqdm(total=len(plan.to_run), unit="exp", disable=None, mininterval=1.0, dynamic_ncols=True)
    start = time.monotonic()  # which no change of the clock moves
    try:
        for number, outcome in enumerate(outcomes, start=1):
            label = outcome.experiment.label()
            if not outcome.stored:
                raise OSError(outcome.error)
            if outcome.error:
                failures.append(outcome)
            if outcome.error or bar.disable:
                tqdm.write(f"[{number}/{len(plan.to_run)}] {label}: {outcome.error or 'done'}", file=sys.stderr)
            speed = 60 * number / (time.monotonic() - start)
            doing = f"now: {' | '.join(outcome.working)}" if outcome.working else f"last: {label}"
            bar.set_postfix_str(f"{len(failures)} failed, {speed:.1f}/min, {doing}", refresh=False)
            bar.update()
            if failures and fail_fast:
                break
            if store is not None and number % MANY_FILES == 0:
                compact_quietly(store)
    finally:
        bar.close()
        outcomes.close()
    return failures


def compact_quietly(store: Store) -> None:
    """Compact a store of many files; that it cannot be is no reason to stop a sweep."""
    try:
        store.compact(MANY_FILES)
    except (ValueError, OSError) as error:
        tqdm.write(f"{store.root} was not compacted: {error}", file=sys.stderr)


def _dispatch(
    pending: list[Experiment], start_worker: Callable[[], Any], count: int, store: Store
) -> Generator[Outcome]:
    """Keep `count` actors busy until nothing is pending; replace an actor that died."""
    import ray

    tries: dict[str, int] = {}
    holding: dict[Any, object] = {}  # the model that each worker has loaded
    running: dict[Any, tuple[Any, Experiment]] = {}
    idle: deque[Any] = deque(start_worker() for _ in range(count))
    while pending or running:
        while pending and idle:
            worker = idle.popleft()
            experiment = _take(pending, holding.get(worker), set(holding.values()))
            holding[worker] = experiment.model
            running[worker.run.remote(experiment)] = (worker, experiment)
        ready, _ = ray.wait(list(running), num_returns=1)
        worker, experiment = running.pop(ready[0])
        working = tuple(other.label() for _, other in running.values())
        try:
            yield dataclasses.replace(ray.get(ready[0]), working=working)
            idle.append(worker)
        except ray.exceptions.RayTaskError as error:  # not the experiment: recording its end failed
            idle.append(worker)
            yield Outcome(experiment, f"its end could not be recorded: {error.cause}", working=working)
        except ray.exceptions.RayError as error:  # the worker died: killed, out of memory, could not start
            holding.pop(worker, None)
            idle.append(start_worker())
            tries[experiment.key] = tries.get(experiment.key, 0) + 1
            if tries[experiment.key] < WORKER_TRIES:
                pending.append(experiment)
                continue
            if store.has(experiment.key):  # it died after its work was done
                yield Outcome(experiment, "", working=working)
                continue
            reason = f"the worker died {WORKER_TRIES} times: {str(error).splitlines()[0]}"
            store.write_failure(experiment, reason, str(error))
            yield Outcome(experiment, reason, working=working)


def _take(pending: list[Experiment], mine: object, held: set[object]) -> Experiment:
    """Remove and return the next experiment: of the model the worker holds, else of one no worker holds, else any."""
    by_preference = [
        next((i for i, e in enumerate(pending) if e.model == mine), None),
        next((i for i, e in enumerate(pending) if e.model not in held), None),
        0,
    ]
    return pending.pop(next(i for i in by_preference if i is not None))


def _start_ray(config: RayConfig) -> None:
    """Start or join Ray, quietly; say which cluster was joined."""
    import ray

    # Workers must not send this process' output twice, and Ray's usage pings have no place in an offline study.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local = config.address == "local"
    if ":" in config.address and "://" not in config.address:
        _check_reachable(config.address)
    context: Any = ray.init(
        address=config.address,
        include_dashboard=False if local else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    if not local:
        print(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}")
        if context.dashboard_url:
            print(f"its dashboard: http://{context.dashboard_url}")


def _check_reachable(address: str) -> None:
    """Raise ConnectionError if nothing answers at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at ray.address={address}: {error}") from None


def _count_workers(config: RayConfig) -> int:
    """Return how many workers to start.

    Raises:
        ValueError: not even one fits; names what was asked and what there is.
    """
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    fitting = int(cpus // config.cpus_per_worker)
    if config.gpus_per_worker:
        fitting = min(fitting, int(gpus // config.gpus_per_worker))
    wanted = config.num_workers or max(fitting, 1)
    if wanted > fitting:
        raise ValueError(
            f"{wanted} workers with ray.cpus_per_worker={config.cpus_per_worker} and ray.gpus_per_worker="
            f"{config.gpus_per_worker:g} do not fit: the cluster has {cpus:g} CPUs and {gpus:g} GPUs"
        )
    return wanted


def _weight_bytes(name: str) -> int:
    """Size of a local model's weight files; 0 for a hub model, whose size is not known before it is downloaded."""
    folder = Path(locate_model(name))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
