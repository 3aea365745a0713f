"""The progress of a sweep on the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from kbit.experiments.names import find_varied, name_experiment
from kbit.store.store import MANY_FILES, Store

if TYPE_CHECKING:
    from kbit.engine.estimate import Estimator
    from kbit.engine.outcome import Outcome
    from kbit.experiments.config import Experiment


_TICK: Final = 1.0  # seconds between two looks at the clock, as long as nothing else moves the bar


class Progress:
    """Shows the outcomes of a sweep: as one bar on a terminal, as one line for each experiment in a log file.

    The bar's clock runs while nothing ends, as when Ray starts. Whatever Python code prints meanwhile stands above it.

    Args:
        experiments: the experiments of the sweep.
        estimator: the estimator of the time left, which learns from each outcome.
        store: the store, which is compacted now and then.
        expected: the time that the whole sweep will take, such as "about 12 min", or "" if it is unknown.

    Attributes:
        estimator: the estimator.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        estimator: Estimator,
        store: Store | None = None,
        expected: str = "",
    ) -> None:
        self._total = len(experiments)
        self._left = Counter(map(estimator.classify, experiments))
        self._varied = find_varied(experiments)
        self.estimator = estimator
        self._store = store
        self._start = time.monotonic()  # which no change of the clock moves
        self._shown: float | None = None
        self._share = 1.0  # of an experiment's items that is measured of each now
        self._began: dict[Experiment, float] = {}
        self._failed = 0
        self._expected = expected
        self._stream = sys.stderr
        self._bar = tqdm(
            total=self._total, unit="exp", disable=None, mininterval=1.0, dynamic_ncols=True, file=self._stream,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # tqdm's time left counts
        )  # fmt: skip
        self._until_closed = ExitStack()
        if not self._bar.disable:
            out: Any = DummyTqdmFile(sys.stdout)
            err: Any = DummyTqdmFile(self._stream)
            self._until_closed.enter_context(redirect_stdout(out))
            self._until_closed.enter_context(redirect_stderr(err))
            self._tick()

    def _tick(self) -> None:
        """Let a thread draw the bar anew every second until the end."""
        ended = threading.Event()

        def draw() -> None:
            while not ended.wait(_TICK):
                self._bar.refresh()

        thread = threading.Thread(target=draw, daemon=True)
        self._until_closed.callback(thread.join)
        self._until_closed.callback(ended.set)
        thread.start()

    def begin(self, experiments: Sequence[Experiment], words: str, share: float = 1.0) -> None:
        """Add the experiments of a round, of which the words say what it is, and what share of their items it is."""
        self._share = share
        self.say(words)
        self._varied = find_varied(experiments)
        self._total += len(experiments)
        self._left.update(map(self.estimator.classify, experiments))
        self._bar.total = self._total
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=self._stream)

    def show(self, state: str) -> None:
        """Show what goes on before the first experiment ends: in the bar, or as a line of a log file."""
        if self._bar.disable:
            self.say(state)
        else:
            self._bar.set_postfix_str(", ".join(filter(None, (self._expected, state))))

    def take(self, outcome: Outcome) -> None:
        """Show that an experiment ended, what the other workers do, and how long the rest will take.

        Raises:
            OSError: the store no longer takes results, so that going on would waste work.
        """
        if not outcome.stored:
            raise OSError(outcome.error)
        done = self._total - self._left.total() + 1
        self._left[self.estimator.classify(outcome.experiment)] -= 1
        if outcome.seconds and not outcome.error:
            self.estimator.learn(outcome.experiment, outcome.seconds / self._share, outcome.tokens)
        time_left = self._predict_time(outcome)
        label = self._name(outcome.experiment)
        self._failed += bool(outcome.error)
        if outcome.error or self._bar.disable:
            how = outcome.error or ("done, " + time_left).removesuffix(", ")
            self.say(f"[{done}/{self._total}] {label}: {how}")
        speed = 60 * done / (time.monotonic() - self._start)
        doing = f"now: {' | '.join(map(self._name, outcome.working))}" if outcome.working else f"last: {label}"
        self._bar.set_postfix_str(f"{time_left}{self._failed} failed, {speed:.1f}/min, {doing}", refresh=False)
        self._bar.update()
        if self._store is not None and done % MANY_FILES == 0:
            compact_quietly(self._store)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._until_closed.close()
        self._bar.close()

    def _predict_time(self, outcome: Outcome) -> str:
        """Return the time left, such as "about 12 min left, ".

        An experiment that is seen for the first time began when the last outcome came.
        """
        now = time.monotonic()
        began = now - outcome.seconds if self._shown is None else self._shown  # workers start before the first one
        self._began = {experiment: self._began.get(experiment, began) for experiment in outcome.working}
        self._shown = now
        running = [(self.estimator.classify(experiment), now - start) for experiment, start in self._began.items()]
        time_left = self.estimator.predict_time(self._left, len(outcome.working) + 1, running, share=self._share)
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
