"""The order of a sweep in time: all experiments at once, or in rounds, of which each decides who goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kbit.evaluation.config import EvalConfig
from kbit.evaluation.rounds.order import LAST, SHARES, WORDS
from kbit.experiments.config import Experiment, RunConfig
from kbit.experiments.rounds import list_parts
from kbit.store.filesystem import open_files
from kbit.store.stopped.records import list_stopped, read_rounds
from kbit.store.store import Store

if TYPE_CHECKING:
    from kbit.engine.plan import Plan

Goals = Mapping[str, int]  # the rounds that each part of an evaluation is to have been measured in


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


class DecidedRounds(Rounds):
    """Rounds of which each measures more items of the experiments that still matter (kbit.evaluation.rounds.order).

    What a store holds of earlier rounds, or in full, is not measured again. A study that was stopped looks at its
    rounds anew, with the same answers, and goes on where it was.

    Args:
        plan: the plan.
        store: its store.
        judge: returns how far experiments are to be measured, by key, once so many rounds have ended.
        begin: tells the user that a round begins, with its experiments.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        judge: Callable[[int], Mapping[str, Goals]],
        begin: Callable[[Sequence[Experiment], str], None],
    ) -> None:
        super().__init__(plan)
        self._store = store
        self._judge = judge
        self._begin = begin
        self._goals: Mapping[str, Goals] = {}
        self._ended = 0

    def start_next(self) -> Sequence[Experiment]:
        """See Rounds."""
        while self._ended < LAST:
            first = {key: dict.fromkeys(list_parts(e), 1) for e, key in self._plan.keys.items()}
            self._goals = self._judge(self._ended) if self._ended else first
            self._ended += 1
            waiting = [experiment for experiment in self._plan.to_run if self._is_left(experiment)]
            if waiting:
                going = sum(1 for experiment in self._plan.to_run if self._plan.keys[experiment] in self._goals)
                words = f"round {self._ended} of {LAST}, {WORDS[self._ended]} of the items"
                self._begin(waiting, f"{words}: {going} of {len(self._plan.to_run)} experiments")
                return waiting
        return ()

    def find_goals(self, experiment: Experiment) -> Goals | None:
        """See Rounds."""
        return self._goals[self._plan.keys[experiment]]

    def _is_left(self, experiment: Experiment) -> bool:
        """Whether an experiment is to be measured further than it was."""
        key = self._plan.keys[experiment]
        goals, done = self._goals.get(key, {}), self._store.find_rounds(key)
        if done is None:  # nothing was measured of it, or all
            return bool(goals) and not self._store.has(key)
        return any(goals.get(part, 0) > rounds for part, rounds in zip(list_parts(experiment), done, strict=True))


def check_decidable(configs: Sequence[RunConfig]) -> None:
    """Raise ValueError if a study cannot stop when it knows: some of what it measures is no mean over items."""
    experiments = [config.experiment for config in configs]
    for experiment in experiments:
        if experiment.train.steps:
            raise ValueError(
                "study.until.decided=true measures a part of the items, and a training takes its time whatever is "
                f"measured ({experiment.label()}): study.until.decided=false"
            )
        if why := _find_indivisible(experiment.eval):
            raise ValueError(f"study.until.decided=true measures a part of the items, and {why}")
    quants, models = {e.quant for e in experiments}, {e.model for e in experiments}
    if len(quants) < 2 or len(models) < 2:
        raise ValueError(
            f"study.until.decided=true needs something to decide: two quantizers and two sizes of a model, not "
            f"{len(quants)} and {len(models)}"
        )


def _find_indivisible(evaluation: EvalConfig) -> str:
    """Return which measure of an evaluation needs all items, and what to do, or nothing."""
    keys = {
        "eval.features.measure": evaluation.features.measure,
        "eval.speed.measure": evaluation.speed.measure,
        "eval.measures": bool(evaluation.measures),
    }
    found = [name for name, is_asked in keys.items() if is_asked]
    if found:
        return f"{found[0]} is no mean over them: leave it out, or study.until.decided=false"
    if evaluation.perplexity is not None and evaluation.perplexity_kind == "rolling":
        return "eval.perplexity_kind=rolling is not divided into windows: eval.perplexity_kind=windows"
    return ""


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
