"""A sweep as it runs: its progress on the terminal, and its failures."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence

from tqdm import tqdm

from kbit.checks import non_defaults
from kbit.engine.estimate import CostClass, Estimator
from kbit.engine.plan import Outcome, Plan
from kbit.evaluation.config import EvalConfig, FeatureConfig
from kbit.experiments.config import Experiment
from kbit.store.store import MANY_FILES, Store


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
        self._left = Counter(map(CostClass.of, experiments))
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
        self._left[CostClass.of(outcome.experiment)] -= 1
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
        running = [(CostClass.of(experiment), now - start) for experiment, start in self._began.items()]
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
        return ",".join(f"{name}={item}" for name, item in non_defaults(value, FeatureConfig()).items()) or "default"
    return str(value)


def compact_quietly(store: Store) -> None:
    """Compact a store of many files; that it cannot be is no reason to stop a sweep."""
    try:
        store.compact(MANY_FILES)
    except (ValueError, OSError) as error:
        tqdm.write(f"{store.root} was not compacted: {error}", file=sys.stderr)
