"""The progress of a sweep on the terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from kbit.experiments.names import find_varied, name_experiment
from kbit.store.store import MANY_FILES, Store

if TYPE_CHECKING:
    from kbit.engine.estimate import Estimator
    from kbit.engine.outcome import Outcome
    from kbit.experiments.config import Experiment


class Progress:
    """Shows the outcomes of a sweep: as one bar on a terminal, as one line for each experiment in a log file.

    Args:
        experiments: the experiments of the sweep.
        estimator: the estimator of the time left, which learns from each outcome.
        store: the store, which is compacted now and then.
    """

    def __init__(self, experiments: Sequence[Experiment], estimator: Estimator, store: Store | None = None) -> None:
        self._total = len(experiments)
        self._left = Counter(map(estimator.classify, experiments))
        self._varied = find_varied(experiments)
        self._estimator = estimator
        self._store = store
        self._start = time.monotonic()  # which no change of the clock moves
        self._shown: float | None = None
        self._began: dict[Experiment, float] = {}
        self._failed = 0
        self._bar = tqdm(
            total=self._total, unit="exp", disable=None, mininterval=1.0, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # tqdm's time left counts
        )  # fmt: skip

    def take(self, outcome: Outcome) -> None:
        """Show that an experiment ended, what the other workers do, and how long the rest will take.

        Raises:
            OSError: the store no longer takes results, so that going on would waste work.
        """
        if not outcome.stored:
            raise OSError(outcome.error)
        done = self._total - self._left.total() + 1
        self._left[self._estimator.classify(outcome.experiment)] -= 1
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
        if self._store is not None and done % MANY_FILES == 0:
            compact_quietly(self._store)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _predict_time(self, outcome: Outcome) -> str:
        """Return the time left, such as "about 12 min left, ".

        An experiment that is seen for the first time began when the last outcome came.
        """
        now = time.monotonic()
        began = now - outcome.seconds if self._shown is None else self._shown  # workers start before the first one
        self._began = {experiment: self._began.get(experiment, began) for experiment in outcome.working}
        self._shown = now
        running = [(self._estimator.classify(experiment), now - start) for experiment, start in self._began.items()]
        time_left = self._estimator.predict_time(self._left, len(outcome.working) + 1, running)
        return f"{time_left} left, " if time_left else ""

    def _name(self, experiment: Experiment) -> str:
        """Return the name of an experiment, with the settings of the evaluation that differ within the sweep."""
        return name_experiment(experiment, self._varied)


def compact_quietly(store: Store) -> None:
    """Compact a store if it has many files. A store that cannot be compacted is no reason to stop a sweep."""
    try:
        store.compact(MANY_FILES)
    except (ValueError, OSError) as error:
        tqdm.write(f"{store.root} was not compacted: {error}", file=sys.stderr)
