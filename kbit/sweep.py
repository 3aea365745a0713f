"""The sweep engine: plan a list of experiments, run what is missing, report; kbit.cluster has the Ray workers.

A worker keeps one model loaded and runs its experiments one after the other, writing each result itself the moment it
exists; the driver only hands out work and counts.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from kbit.config import EvalConfig, Experiment, FeatureConfig
from kbit.estimate import Alike, Estimator
from kbit.families import locate_model
from kbit.logfile import log_output
from kbit.quantconfig import differences
from kbit.sizes import find_size
from kbit.store import MANY_FILES, Store, list_keys
from kbit.taskfiles import find_local_tasks
from kbit.textdata import check_text, locate_text

if TYPE_CHECKING:
    from kbit.experiment import Result, Session


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
        working: the experiments that other workers are at.
        seconds: that it took, the model's loading included if it had to be; 0 if it was not run.
        tokens: see Result.
    """

    experiment: Experiment
    error: str
    stored: bool = True
    working: tuple[Experiment, ...] = ()
    seconds: float = 0.0
    tokens: int = 0


def make_plan(experiments: Sequence[Experiment], store_path: str | Path, *, retry_failed: bool = False) -> Plan:
    """De-duplicate by key, drop what the store has, group by model; the store need not exist yet."""
    distinct = {experiment.key: experiment for experiment in experiments}
    finished, failures = list_keys(store_path)
    done, failed = finished & distinct.keys(), failures & distinct.keys()
    skip = done if retry_failed else done | failed
    to_run = [experiment for key, experiment in distinct.items() if key not in skip]
    # a worker keeps one model, and of the 16-bit model the states on one text
    sizes = {name: find_size(name) for name in {experiment.model.name for experiment in to_run}}
    parameters = {name: 0 if size is None else size.parameters for name, size in sizes.items()}
    to_run.sort(key=lambda e: (-parameters[e.model.name], e.model.name, e.model.dtype, e.eval.perplexity or ""))
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
        gpus: over which to spread a model.
    """

    def __init__(
        self, store_path: str, device: str, threads: int | None = None, *, own_process: bool = False, gpus: int = 1
    ) -> None:
        from kbit.quiet import silence_libraries

        self._store = Store(store_path)
        silence_libraries()
        # here, as it takes seconds: the first experiment's time is to tell the next ones'
        from kbit.evaluation import Prepared
        from kbit.experiment import Session

        if threads is not None:
            import torch

            torch.set_num_threads(threads)  # the kernels follow: see kbit.backend.torch_threads_kept
        self._own_process = own_process
        self._open_session = functools.partial(Session, device=device, prepared=Prepared(), gpus=gpus)
        self._session: Session | None = None

    def run(self, experiment: Experiment) -> Outcome:
        """Run one experiment; an error becomes a recorded failure, never a number."""
        if self._store.has(experiment.key):  # another driver on this store has finished it since the plan
            return Outcome(experiment, "")
        log = self._store.log_path(experiment.key)
        start = time.monotonic()
        try:
            with log_output(log, experiment.label(), redirect=self._own_process):
                result, reason = self._try(experiment)
            if result is not None:
                self._store.write(result)
            else:
                self._store.write_failure(experiment, *reason)
        except OSError as error:  # a full disk, or a store out of reach
            return Outcome(experiment, f"{self._store.root} cannot be written: {error}", stored=False)
        tokens = 0 if result is None else result.tokens
        return Outcome(experiment, reason[0], seconds=time.monotonic() - start, tokens=tokens)

    def _try(self, experiment: Experiment) -> tuple[Result | None, tuple[str, str]]:
        """Return the result, or the reason and traceback of why there is none."""
        try:
            if self._session is None or not self._session.holds(experiment.model):
                self._session = None  # free the old model before loading the next
                self._session = self._open_session(experiment.model)
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


def finish(
    outcomes: Generator[Outcome],
    plan: Plan,
    *,
    fail_fast: bool,
    store: Store | None = None,
    estimator: Estimator | None = None,
) -> list[Outcome]:
    """Consume the outcomes, show progress, return the failures; close the generator, so that Ray ends at once.

    Args:
        outcomes: as they come; plan: what they are outcomes of.
        fail_fast: stop at the first failure.
        store: to compact now and then.
        estimator: of the time left; learns from each outcome.

    Raises:
        OSError: the store no longer takes results.
    """
    failures: list[Outcome] = []
    progress = Progress(plan.to_run, estimator or Estimator())
    try:
        for number, outcome in enumerate(outcomes, start=1):
            if not outcome.stored:
                raise OSError(outcome.error)
            if outcome.error:
                failures.append(outcome)
            progress.show(outcome)
            if failures and fail_fast:
                break
            if store is not None and number % MANY_FILES == 0:
                compact_quietly(store)
    finally:
        progress.close()
        outcomes.close()
    return failures


class Progress:
    """On a terminal one bar; elsewhere (a log file) one line for each experiment."""

    def __init__(self, experiments: Sequence[Experiment], estimator: Estimator) -> None:
        self._total = len(experiments)
        self._left = Counter(map(Alike.of, experiments))
        self._varied = find_varied(experiments)
        self._estimator = estimator
        self._start = time.monotonic()  # which no change of the clock moves
        self._shown: float | None = None
        self._began: dict[Experiment, float] = {}
        self._failed = 0
        self._bar = tqdm(
            total=self._total, unit="exp", disable=None, mininterval=1.0, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # tqdm's time left counts
        )  # fmt: skip

    def show(self, outcome: Outcome) -> None:
        """Show that an experiment ended, what the others do, and how long the rest will take."""
        done = self._total - self._left.total() + 1
        self._left[Alike.of(outcome.experiment)] -= 1
        if outcome.seconds and not outcome.error:
            self._estimator.learn(outcome.experiment, outcome.seconds, outcome.tokens)
        time_left = self._predict_time(outcome)
        label = self._name(outcome.experiment)
        self._failed += bool(outcome.error)
        if outcome.error or self._bar.disable:
            how = outcome.error or ("done, " + time_left).removesuffix(", ")
            tqdm.write(f"[{done}/{self._total}] {label}: {how}", file=sys.stderr)
        speed = 60 * done / (time.monotonic() - self._start)
        doing = f"now: {' | '.join(map(self._name, outcome.working))}" if outcome.working else f"last: {label}"
        self._bar.set_postfix_str(f"{time_left}{self._failed} failed, {speed:.1f}/min, {doing}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _predict_time(self, outcome: Outcome) -> str:
        """Return for example "about 12 min left, "; what is seen for the first time began as the last outcome came."""
        now = time.monotonic()
        began = now - outcome.seconds if self._shown is None else self._shown  # before the first one workers start
        self._began = {experiment: self._began.get(experiment, began) for experiment in outcome.working}
        self._shown = now
        running = [(Alike.of(experiment), now - start) for experiment, start in self._began.items()]
        time_left = self._estimator.predict_time(self._left, len(outcome.working) + 1, running)
        return f"{time_left} left, " if time_left else ""

    def _name(self, experiment: Experiment) -> str:
        """Return the label, and what of the evaluation differs within the sweep."""
        values = {name: getattr(experiment.eval, name) for name in self._varied}
        return experiment.label() + "".join(f" {name}={show_value(value)}" for name, value in values.items())


def find_varied(experiments: Iterable[Experiment]) -> list[str]:
    """Return the fields of the evaluation that tell experiments apart and that their labels leave out."""
    evaluations = {experiment.eval for experiment in experiments}
    told = ("task_path", "batch_size")  # in the label; no part of an experiment's content
    names = [field.name for field in dataclasses.fields(EvalConfig) if field.name not in told]
    return [name for name in names if len({getattr(evaluation, name) for evaluation in evaluations}) > 1]


def show_value(value: object) -> str:
    """Return a value of a configuration in a few characters: of a list its items, of a section what is not default."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, FeatureConfig):
        return ",".join(f"{name}={item}" for name, item in differences(value, FeatureConfig()).items()) or "default"
    return str(value)


def compact_quietly(store: Store) -> None:
    """Compact a store of many files; that it cannot be is no reason to stop a sweep."""
    try:
        store.compact(MANY_FILES)
    except (ValueError, OSError) as error:
        tqdm.write(f"{store.root} was not compacted: {error}", file=sys.stderr)
