"""Which experiments of a study go on after a round, and what is known of its contests, by what its store holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import ZERO_SHOT, Floats
from kbit.analysis.statistics.stopping.contests import Question, list_questions
from kbit.analysis.statistics.stopping.sequential import UNDECIDED, Standing, judge_whole, look, name_best
from kbit.evaluation.rounds.order import LAST, TASKS, TEXT, WORDS, list_places
from kbit.experiments.config import UntilConfig
from kbit.experiments.decidable import NO_CONTEST
from kbit.store.readers import read_results
from kbit.store.stopped.complete import read_measured

Scores = Mapping[str, Mapping[str, Floats]]  # by task and key: the value of each item, NaN where it was not measured


@dataclass(frozen=True)
class Decision:
    """A contest of a study after some rounds.

    Attributes:
        question: the contest.
        standing: what is known of it.
        rounds: the rounds after which it was known, or after which it is not known yet.
        whole: the verdict of all items, between the options that were left after the last round.
    """

    question: Question
    standing: Standing
    rounds: int
    whole: str = UNDECIDED

    def describe(self) -> str:
        """Return for example "nano-neox, nf block 64, cross entropy: 4-bit is best, known from a half of the items"."""
        contest = self.question.contest
        about = f"{contest.name}, {self.question.measure.name}"
        items = f"{WORDS[self.rounds]} of the items"
        left = " or ".join(contest.options[option] for option in self.standing.left)
        if self.standing.lost:
            lost = " and ".join(contest.options[option] for option in self.standing.lost)
            return f"{about}: {left}, not known: {lost} without {items}, as an experiment failed or did not run"
        if self.standing.given_up:
            return f"{about}: {left}, and all items would hardly tell (given up after {items})"
        if self.standing.is_known:
            return f"{about}: {name_best(contest, self.standing)} is best, known from {items}"
        if self.rounds == LAST:
            verdict = f"{left}, undecided" if self.whole == UNDECIDED else f"{self.whole} is best"
            return f"{about}: {verdict} from {items}"
        return f"{about}: {left}, not known from {items}"


def look_at_store(path: str, keys: Collection[str], until: UntilConfig, rounds: int) -> list[Decision]:
    """Return what is known of a study after so many rounds.

    Args:
        path: the store.
        keys: the keys of the study's experiments.
        until: which verdicts are to be known.
        rounds: see decide.

    Raises:
        ValueError: the study has no contest, or see precision_curves.
    """
    results = read_results(path, stopped=True)
    results = results[results["key"].isin(keys)]
    asked = list_asked(results, until)
    if not asked:
        raise ValueError(
            f"study.until.decided=true: study.until.claims=[{','.join(until.claims)}]: {NO_CONTEST}, "
            "that share a range of total bits"
        )
    return decide(asked, read_measured(path, keys), rounds)


def list_asked(results: pd.DataFrame, until: UntilConfig) -> list[Question]:
    """Return the contests of a table of results whose verdicts are waited for."""
    questions = list_questions(results, until.claims)
    return [question for question in questions if not until.metrics or question.measure.metric in until.metrics]


def decide(questions: list[Question], scores: Mapping[str, Scores], rounds: int) -> list[Decision]:
    """Return what is known after a round. Each earlier round is looked at in turn, as when it had just ended.

    Args:
        questions: the contests of the study.
        scores: the scores by metric, see Scores.
        rounds: the number of rounds that have ended. After the last one the verdicts are those of all items.
    """
    pairs = sum(question.contest.pairs for question in questions)
    return [decide_one(question, scores.get(question.measure.metric, {}), rounds, pairs) for question in questions]


def decide_one(question: Question, scores: Scores, rounds: int, pairs: int) -> Decision:
    """Return what is known of one contest, see decide."""
    standing = Standing(tuple(range(len(question.contest.options))))
    for ended in range(1, min(rounds, LAST - 1) + 1):
        sample, totals = take_scores(question, scores, standing, ended)
        if lost := find_lost(question, standing, sample):
            return Decision(question, replace(standing, lost=lost), ended)
        if sample:
            standing = look(question.contest, standing, sample, totals, pairs)
        if standing.is_known:
            return Decision(question, standing, ended)
    if rounds < LAST:
        return Decision(question, standing, rounds)
    sample, _ = take_scores(question, scores, standing, LAST)
    if lost := find_lost(question, standing, sample):
        return Decision(question, replace(standing, lost=lost), LAST)
    whole = judge_whole(question.contest, sample, standing.left) if sample else UNDECIDED
    return Decision(question, standing, LAST, whole)


def take_scores(question: Question, scores: Scores, standing: Standing, rounds: int) -> tuple[list[Floats], list[int]]:
    """Return the scores of the items of these rounds, [points, items] for each task, and each task's number of items.

    They are NaN for a point that was not measured on all of them.
    """
    sign = 1.0 if question.measure.higher_is_better else -1.0
    is_mean = question.measure.task == ZERO_SHOT.task
    tasks = sorted(scores) if is_mean else [task for task in scores if task == question.measure.task]
    needed = {key for point in question.contest.find_points(standing.left) for key in question.keys[point]}
    tasks = [task for task in tasks if needed & scores[task].keys()]
    sample: list[Floats] = []
    totals: list[int] = []
    for task in tasks:
        total = max(scores[task][key].size for key in needed & scores[task].keys())
        places = list_places(total, rounds)
        missing = np.full(places.size, np.nan)
        rows = [[scores[task][key][places] if key in scores[task] else missing for key in own] for own in question.keys]
        sample.append(sign * np.stack([np.mean(row, axis=0) for row in rows]))
        totals.append(total)
    return sample, totals


def find_lost(question: Question, standing: Standing, sample: list[Floats]) -> tuple[int, ...]:
    """Return the options left of which a point has no values: its experiment failed, or its round did not come.

    Nothing is known of them, so that no other option has beaten them.
    """
    contest = question.contest
    unknown = np.any([np.isnan(task).any(axis=1) for task in sample], axis=0) if sample else np.ones(len(question.keys))
    lacking = {point for point in contest.find_points(standing.left) if unknown[point]}
    return tuple(option for option in standing.left if lacking & set(contest.curves[option]))


def find_goals(decisions: list[Decision], rounds: int) -> dict[str, dict[str, int]]:
    """Return the rounds that each experiment is to have measured next, by key and part (order.PARTS).

    What no open contest depends on stays as it is, and is not in the answer.
    """
    goals: dict[str, dict[str, int]] = defaultdict(dict)
    for decision in decisions:
        if decision.standing.is_open:
            part = TASKS if decision.question.measure.task == ZERO_SHOT.task else TEXT
            points = decision.question.contest.find_points(decision.standing.left)
            for key in {key for point in points for key in decision.question.keys[point]}:
                goals[key][part] = rounds + 1
    return dict(goals)
