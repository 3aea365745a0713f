"""A worker runs experiments one after the other on one model. It writes each result itself as soon as it exists."""

from __future__ import annotations

import functools
import math
import os
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from kbit.engine.outcome import Outcome
from kbit.engine.rounds import Rounds
from kbit.engine.worker_log import log_output
from kbit.experiments.config import Experiment, RayConfig
from kbit.experiments.result import CRASHED, FAILED
from kbit.store.store import Store

if TYPE_CHECKING:
    from kbit.engine.plan import Plan
    from kbit.experiments.result import Result
    from kbit.experiments.session import Session


class Worker:
    """Runs experiments and writes their results. It keeps the last model loaded, and the tasks for the next model.

    Args:
        store_path: the folder or URL of the store.
        device: the device to run on.
        threads: the number of threads of torch and the kernels. None leaves it as it is.
        own_process: whether all that the process prints belongs to the experiment.
        gpus: the number of GPUs to spread a model over.
    """

    def __init__(
        self, store_path: str, device: str, threads: int | None = None, *, own_process: bool = False, gpus: int = 1
    ) -> None:
        from kbit.lean_private import collected_later, import_lean

        self._store = Store(store_path)
        # The imports take seconds. They are done here, because the first experiment's time predicts the next ones'.
        with collected_later():
            import_lean()
            from kbit.evaluation.measure import Memory
            from kbit.experiments.session import Session
            from kbit.silence import silence_libraries
        silence_libraries()

        if threads is not None:
            import torch

            torch.set_num_threads(threads)  # the kernels follow (kbit.numerics.backend.torch_threads_kept)
        self._own_process = own_process
        self._open_session = functools.partial(Session, device=device, lasting=Memory(), gpus=gpus)
        self._session: Session | None = None

    def run(self, experiment: Experiment, key: str, goals: Mapping[str, int] | None = None) -> Outcome:
        """Run one experiment under its planned key. An error becomes a recorded failure, never a number.

        Args:
            experiment: the experiment.
            key: its key.
            goals: the rounds that each part is to have been measured in (kbit.experiments.rounds). None: all.
        """
        from kbit.experiments.rounds import is_reached

        if self._store.has(key):  # another driver on this store has finished it since the plan
            return Outcome(experiment, "")
        stopped = self._store.find_stopped(key)
        done = None if stopped is None else [part.rounds for part in stopped.sampled]
        if done is not None and goals is not None and is_reached(experiment, goals, done):  # or has come as far
            return Outcome(experiment, "")
        log = self._store.log_path(key)
        start = time.monotonic()
        try:
            with log_output(log, experiment.label(), redirect=self._own_process):
                result, (reason, *details) = self._try(experiment, key, goals, stopped)
            if result is not None:
                self._store.write(result)
                self._store.forget_training(key)
            else:
                self._store.write_failure(key, experiment, reason, *details)
        except OSError as error:  # the disk is full, or the store is out of reach
            return Outcome(experiment, f"{self._store.root} cannot be written: {error}", stored=False)
        tokens = 0 if result is None or goals is not None else result.tokens  # those of a round say nothing of all
        return Outcome(experiment, reason, seconds=time.monotonic() - start, tokens=tokens)

    def _try(
        self, experiment: Experiment, key: str, goals: Mapping[str, int] | None, stopped: Result | None
    ) -> tuple[Result | None, tuple[str, str, str]]:
        """Return the result, or None with the reason, the traceback and the state (see Failure)."""
        from kbit.evaluation.rounds.sample import RoundsError
        from kbit.evaluation.token_budget import is_out_of_memory  # imports torch, as the session did
        from kbit.experiments.rounds import join_costs, make_sample

        try:
            sample = make_sample(experiment, goals, stopped)
            if self._session is None or not self._session.holds(experiment.model, experiment.packed_as):
                self._session = None  # free the old model before loading the next
                self._session = self._open_session(experiment.model, packed_as=experiment.packed_as)
            result = self._session.run(experiment, key, self._store.training_files(key), sample)
            return join_costs(result, stopped), ("", "", "")
        except Exception as error:  # whatever it was, the sweep goes on and the reason is kept
            if self._own_process:
                traceback.print_exc()  # to standard error, which is the log
            # there may be more memory next time, and without rounds it is no failure
            state = CRASHED if is_out_of_memory(error) or isinstance(error, RoundsError) else FAILED
            return None, (f"{type(error).__name__}: {error}", traceback.format_exc(), state)


def run_in_process(plan: Plan, store_path: str, device: str, rounds: Rounds | None = None) -> Generator[Outcome]:
    """Run a plan's experiments one after the other in this process, with all of torch's threads.

    Args:
        plan: the plan.
        store_path: the folder or URL of the store.
        device: the device to run on.
        rounds: the rounds. None: one.
    """
    worker, rounds = Worker(store_path, device), rounds or Rounds(plan)
    while waiting := rounds.start_next():
        for experiment in waiting:
            yield worker.run(experiment, plan.keys[experiment], rounds.find_goals(experiment))


class RayWorker(Worker):
    """A worker in a process of its own, with the CPUs and GPUs that Ray gave it.

    Args:
        store_path: the folder or URL of the store.
        device: the device to run on.
        config: the resources that each worker asks for.

    Raises:
        ValueError: the worker should have GPUs and Ray gave it none, or the store cannot be opened.
    """

    def __init__(self, store_path: str, device: str, config: RayConfig) -> None:
        gpus = config.gpus_per_worker or 0
        if device != "cpu":
            import ray

            check_gpus(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"), gpus)
        super().__init__(store_path, device, config.cpus_per_worker, own_process=True, gpus=max(1, math.floor(gpus)))


def check_gpus(given: Sequence[object], visible: str | None, asked: float) -> None:
    """Raise ValueError if a worker does not have the GPUs that it should have.

    Args:
        given: the ids of the GPUs that Ray says it gave.
        visible: CUDA_VISIBLE_DEVICES of the worker's process.
        asked: ray.gpus_per_worker.
    """
    ids = [str(gpu) for gpu in given]
    if len(ids) < max(1, math.floor(asked)):
        raise ValueError(f"Ray gave this worker the GPUs {ids}, where ray.gpus_per_worker={asked:g} asks for more")
    if visible is None or visible.split(",") != ids:
        raise ValueError(
            f"Ray gave this worker the GPUs {ids}, but CUDA_VISIBLE_DEVICES={visible} in its process: another worker "
            "may be on the same GPU; unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
        )
