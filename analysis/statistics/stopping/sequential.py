"""Verdicts of a study that is not measured in full: which of its contests are known already?

A contest is between options (precisions, data types) of which each lead is a combination of points, and each point a
mean over items. Looks are taken at an eighth, a quarter and a half of the items. A part of the items is a random sample
*without replacement* from all that the study has, so that the claim of a look is about the study itself: what its own
verdict will be when all items are measured. With a lead d after n of N items, whose items have the variance s^2,

    D | d ~ d +- c sqrt(s^2 / n - s^2 / N)                 the lead on all N items (Cochran 1977, section 2.6)
    D / sqrt(s^2 / N) > 1.96                               what the study's verdict asks of it

so that the verdict is known to be "better" where d - c sqrt(s^2 / n - s^2 / N) > 1.96 sqrt(s^2 / N), and "worse" where
the same holds of -d. To predict the test of all items from some of them is stochastic curtailment (Lan, Simon &
Halperin 1982). Several tasks of one weight are means of independent samples, so that their variances add.

The intervals hold at all looks, pairs and contests of a study together: c is Student's quantile at 1 - ALPHA / (2 x
looks x pairs), a union bound (Bonferroni). So with 95% no decision of a study differs from what all of its items say.

A look also gives up where the study will not tell, either: where no option has a chance of GIVE_UP or more that all
items show it better than each other one. The chance is that of the same prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtr, stdtrit

from kbit.analysis.curves.curves import Floats
from kbit.evaluation.measurement import FEW, Z_95

ALPHA: Final = 0.05  # the chance of any wrong decision in a study, early looks and all pairs together
LOOKS: Final = 3  # at which something can be decided before all items are measured
GIVE_UP: Final = 0.05  # the least chance of a verdict for which measuring goes on
UNDECIDED: Final = "undecided"


@dataclass(frozen=True)
class Contest:
    """Options that compete to be the best.

    Attributes:
        name: what competes, in words.
        options: the options' names.
        leads: [options, options, points]. leads[i, j] @ values is the lead of i over j, NaN where they never meet.
        curves: the points of each option.
    """

    name: str
    options: tuple[str, ...]
    leads: Floats
    curves: tuple[tuple[int, ...], ...]

    @property
    def pairs(self) -> int:
        """The number of pairs that meet."""
        return int((~np.isnan(self.leads).any(axis=2)).sum() - len(self.options)) // 2

    def find_points(self, options: Sequence[int]) -> list[int]:
        """Return the points that the leads among these options depend on."""
        chosen = np.nan_to_num(self.leads[np.ix_(options, options)])
        return [int(point) for point in np.flatnonzero((chosen != 0).any(axis=(0, 1)))]


@dataclass(frozen=True)
class Standing:
    """What is known of a contest.

    Attributes:
        left: the options that can still be the best.
        given_up: whether all items would not tell which one is.
    """

    left: tuple[int, ...]
    given_up: bool = False

    @property
    def is_known(self) -> bool:
        """Whether nothing more needs to be measured."""
        return self.given_up or len(self.left) < 2


def find_reach(pairs: int, degrees: int) -> float:
    """Return how many standard errors an interval reaches that holds at all looks and pairs (ALPHA).

    Args:
        pairs: the number of pairs in all contests of a study.
        degrees: the degrees of freedom of a variance.
    """
    return float(stdtrit(degrees, 1 - ALPHA / (2 * LOOKS * max(pairs, 1))))


def measure_leads(leads: Floats, scores: Sequence[Floats], totals: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Return the leads, their standard errors now, and those that they will have with all items.

    Args:
        leads: weights of the points, [..., points].
        scores: the scores of each task's measured items, larger is better: [points, items].
        totals: the number of all items of each task.
    """
    gaps = np.mean([leads @ task.mean(axis=1) for task in scores], axis=0)
    spreads = [(leads @ task).var(axis=-1, ddof=1) for task in scores]
    now = np.sqrt(sum(s / task.shape[1] for s, task in zip(spreads, scores, strict=True))) / len(scores)
    whole = np.sqrt(sum(s / total for s, total in zip(spreads, totals, strict=True))) / len(scores)
    return np.asarray(gaps), np.asarray(now), np.asarray(whole)


def look(contest: Contest, before: Standing, scores: Sequence[Floats], totals: Sequence[int], pairs: int) -> Standing:
    """Return what is known of a contest after a look at the items that have been measured.

    Nothing is decided from fewer than FEW items of a task, or where two options agree in every item.

    Args:
        contest: the contest.
        before: what was known before.
        scores: see measure_leads. Points that no remaining option depends on may be NaN.
        totals: the number of all items of each task.
        pairs: the number of pairs in all contests of the study.
    """
    if before.is_known or min(task.shape[1] for task in scores) < FEW:
        return before
    left = np.asarray(before.left)
    points = np.asarray(contest.find_points(before.left), dtype=np.intp)
    leads = contest.leads[np.ix_(left, left, points)]
    gaps, now, whole = measure_leads(leads, [task[points] for task in scores], totals)
    reach = find_reach(pairs, sum(task.shape[1] - 1 for task in scores))
    ahead = np.sqrt(np.maximum(now**2 - whole**2, 0))
    with np.errstate(invalid="ignore", divide="ignore"):  # a pair that never meets, and one that agrees in every item
        is_better = gaps - reach * ahead > Z_95 * whole
        chances = np.where(ahead > 0, ndtr((gaps - Z_95 * whole) / ahead), 1.0)
    beaten = (is_better & (whole > 0)).any(axis=0)
    np.fill_diagonal(chances, 1.0)
    remaining = left[~beaten] if not beaten.all() else left
    chance = chances[~beaten][:, ~beaten].min(axis=1, initial=1.0) if not beaten.all() else np.ones(1)
    return Standing(tuple(int(option) for option in remaining), bool(len(remaining) > 1 and chance.max() < GIVE_UP))


def name_best(contest: Contest, standing: Standing) -> str:
    """Return the option that is known to be the best, or UNDECIDED."""
    is_decided = len(standing.left) == 1 and not standing.given_up
    return contest.options[standing.left[0]] if is_decided else UNDECIDED


def judge_whole(contest: Contest, scores: Sequence[Floats]) -> str:
    """Return the verdict of all items: the option whose lead over each other one is above 0 with 95%, or UNDECIDED."""
    totals = [task.shape[1] for task in scores]
    gaps, _, whole = measure_leads(contest.leads, scores, totals)
    never = np.isnan(gaps)
    np.fill_diagonal(never, True)
    wins = ((gaps > Z_95 * whole) | never).all(axis=1) & ~never.all(axis=1)
    return contest.options[int(np.argmax(wins))] if wins.any() else UNDECIDED
