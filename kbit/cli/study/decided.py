"""What `kbit run` says of a study that stops when it knows, and whom it asks after each round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from kbit.engine.estimate import format_count
from kbit.engine.rounds import DecidedRounds, Rounds, bound_tokens
from kbit.evaluation.rounds.order import LAST, WORDS

if TYPE_CHECKING:
    from kbit.analysis.statistics.stopping.looks import Decision
    from kbit.engine.estimate import Estimator
    from kbit.engine.plan import Plan
    from kbit.engine.progress import Progress
    from kbit.experiments.config import RunConfig, UntilConfig
    from kbit.store.store import Store

_SHOWN: Final = 12  # verdicts that are printed, while `kbit figures verdicts` has all


def make_rounds(plan: Plan, settings: RunConfig, store: Store, progress: Progress) -> Rounds:
    """Return the rounds of a plan: one, or those of study.until.decided."""
    until = settings.study.until
    if not until.decided:
        return Rounds(plan)
    return DecidedRounds(plan, store, lambda ended: _judge(plan, store, until, ended), progress.begin)


def _judge(plan: Plan, store: Store, until: UntilConfig, ended: int) -> Mapping[str, Mapping[str, int]]:
    """Return how far experiments are to be measured next, by key, after so many rounds."""
    from kbit.analysis.statistics.stopping.looks import find_goals

    return find_goals(_look(plan, store, until, ended), ended)


def _look(plan: Plan, store: Store, until: UntilConfig, rounds: int) -> list[Decision]:
    """Return what is known after so many rounds: nothing if experiments failed and nothing competes without them.

    Raises:
        ValueError: see look_at_store, of a study without failures.
    """
    from kbit.analysis.statistics.stopping.looks import look_at_store
    from kbit.store.readers import list_keys

    keys = set(plan.keys.values())
    try:
        return look_at_store(store.root, keys, until, rounds)
    except ValueError:
        if keys & list_keys(store.root)[1]:  # whose table says more
            return []
        raise


def describe_bounds(plan: Plan, estimator: Estimator, store_path: str) -> str:
    """Return the least and the most that a plan may take until it is decided."""
    counts = {plan.keys[e]: estimator.count_tokens(estimator.classify(e)) for e in plan.to_run}
    known = {key: count for key, count in counts.items() if count is not None}
    if len(known) < len(counts):
        return f"until decided: {WORDS[1]} of each experiment's items at least, and all at most, in up to {LAST} rounds"
    least, most = bound_tokens(known, store_path)
    return f"until decided: {format_count(least)} tokens at least, {format_count(most)} at most, in up to {LAST} rounds"


def describe_study(plan: Plan, settings: RunConfig, store: Store, estimator: Estimator) -> Iterator[str]:
    """Yield lines: what is known, from how many items, and how much was measured."""
    from kbit.experiments.result import Result
    from kbit.store.filesystem import open_files
    from kbit.store.results import load_results
    from kbit.store.stopped.records import list_stopped, load_stopped

    keys = set(plan.keys.values())
    if not (decisions := _look(plan, store, settings.study.until, LAST)):
        yield "nothing is known: without the experiments that failed nothing competes"
    yield from (decision.describe() for decision in decisions[:_SHOWN])
    if len(decisions) > _SHOWN:
        yield f"and {len(decisions) - _SHOWN} more verdicts: {_count(decisions)}"
    early = load_stopped(files := open_files(store.root), list_stopped(files).keys() & keys, Result)
    spent = sum(result.tokens for result in [*early.values(), *load_results(store.root, keys - early.keys())])
    counts = [estimator.count_tokens(estimator.classify(experiment)) for experiment in plan.keys]
    whole = sum(count or 0 for count in counts)
    share = "" if None in counts or not whole else f" of about {format_count(whole)} ({spent / whole:.0%})"
    yield f"{len(early)} of {len(keys)} experiments measured a part; {format_count(spent)} tokens were scored{share}"
    if early:
        yield "the same command with study.until.decided=false goes on to all items"


def _count(decisions: list[Decision]) -> str:
    known = sum(decision.standing.is_known and not decision.standing.given_up for decision in decisions)
    given_up = sum(decision.standing.given_up for decision in decisions)
    lost = sum(bool(decision.standing.lost) for decision in decisions)
    failed = f", {lost} not known, as experiments failed" if lost else ""
    return f"{known} of {len(decisions)} are known early, {given_up} given up{failed}, the others from all items"
