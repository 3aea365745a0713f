"""The order of a sweep in time: all experiments at once, or in rounds, of which each decides who goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kbit.evaluation.rounds.order import LAST, SHARES, WORDS
from kbit.experiments.config import Experiment
from kbit.experiments.rounds import Goals, is_reached, list_parts
from kbit.store.filesystem import open_files
from kbit.store.stopped.records import list_stopped, read_rounds

if TYPE_CHECKING:
    from kbit.engine.plan import Plan
    from kbit.store.store import Store


class Rounds:
    """A sweep of one round, in which every experiment is measured in full.

    Args:
        plan: the plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._begun = False

    def start_next(self) -> Sequence[Experiment]:
        """Return the experiments of the next round, once all of the round before have ended. None: there is no more."""
        begun, self._begun = self._begun, True
        return () if begun else self._plan.to_run

    def find_goals(self, experiment: Experiment) -> Goals | None:
        """Return how far an experiment is to be measured in this round. None: in full."""
        return None

    def list_open(self) -> set[str]:
        """Return the keys of experiments that are to be measured further than they were, by what is known now."""
        return set()


class DecidedRounds(Rounds):
    """Rounds of which each measures more items of the experiments that still matter (kbit.evaluation.rounds.order).

    What a store holds of earlier rounds, or in full, is not measured again. A study that was stopped looks at its
    rounds anew, with the same answers, and goes on where it was.

    Args:
        plan: the plan.
        store: its store.
        judge: returns how far experiments are to be measured, by key, once so many rounds have ended.
        begin: tells the user that a round begins, with its experiments, and the share of their items that it measures.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        judge: Callable[[int], Mapping[str, Goals]],
        begin: Callable[[Sequence[Experiment], str, float], None],
    ) -> None:
        super().__init__(plan)
        self._store = store
        self._judge = judge
        self._begin = begin
        self._goals: Mapping[str, Goals] = {}
        self._ended = 0
        self._is_over = False

    def start_next(self) -> Sequence[Experiment]:
        """See Rounds."""
        while self._ended < LAST:
            first = {key: dict.fromkeys(list_parts(e), 1) for e, key in self._plan.keys.items()}
            self._goals = self._judge(self._ended) if self._ended else first
            self._ended += 1
            left = self._list_left()
            waiting = [experiment for experiment in self._plan.to_run if self._plan.keys[experiment] in left]
            if waiting:
                going = sum(1 for experiment in self._plan.to_run if self._plan.keys[experiment] in self._goals)
                words = f"round {self._ended} of {LAST}, {WORDS[self._ended]} of the items"
                share = SHARES[self._ended - 1] - (SHARES[self._ended - 2] if self._ended > 1 else 0.0)
                self._begin(waiting, f"{words}: {going} of {len(self._plan.to_run)} experiments", share)
                return waiting
        self._is_over = True
        return ()

    def find_goals(self, experiment: Experiment) -> Goals | None:
        """See Rounds."""
        return self._goals[self._plan.keys[experiment]]

    def list_open(self) -> set[str]:
        """See Rounds. In a round that was broken off nobody knows which of its experiments would have gone on."""
        return self._list_left() if self._is_over else set(self._goals) - self._store.finished_keys()

    def _list_left(self) -> set[str]:
        """Return the keys of the experiments that have not been measured as far as this round is to go."""
        finished, done = self._store.finished_keys(), self._store.list_rounds(self._plan.keys.values())
        return {
            key
            for experiment, key in self._plan.keys.items()
            if key not in finished and not is_reached(experiment, self._goals.get(key, {}), done.get(key))
        }


def bound_tokens(counts: Mapping[str, int], store_path: str) -> tuple[int, int]:
    """Return the least and the most tokens that a study may still take until it is decided.

    Args:
        counts: the tokens of each experiment in full, by key.
        store_path: its store, which may have some rounds of them, and need not exist.
    """
    names = list_stopped(open_files(store_path))
    rounds = {key: min(read_rounds(name)) for key, name in names.items()}  # a part that went further counts as less
    done = {key: SHARES[rounds[key] - 1] if rounds.get(key) else 0.0 for key in counts}
    least = sum(count * (0 if done[key] else SHARES[0]) for key, count in counts.items())
    return round(least), round(sum(count * (1 - done[key]) for key, count in counts.items()))
