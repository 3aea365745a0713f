"""Verdicts of a study that is not measured in full: which of its contests are known already?

A contest is between options (precisions, data types) of which each lead is a combination of points, and each point a
mean over items. Looks are taken at an eighth, a quarter and a half of the items. A part of the items is a random sample
*without replacement* from all that the study has, so that the claim of a look is about the study itself: what its own
verdict will be when all items are measured. With a lead d after n of N items, whose items have the variance s^2,

    D | d ~ d +- c sqrt(s^2 / n - s^2 / N)                 the lead on all N items (Cochran 1977, section 2.6)
    D / sqrt(s^2 / N) > 1.96                               what the study's verdict asks of it

so that the verdict is known to be "better" where d - c sqrt(s^2 / n - s^2 / N) > 1.96 sqrt(s^2 / N), and "worse" where
the same holds of -d. To predict the test of all items from some of them is stochastic curtailment (Lan, Simon &
Halperin 1982). Several tasks of one weight are means of independent samples, so that their variances add. The degrees
of freedom of such a sum are those of Welch and Satterthwaite: a small task may have most of the variance.

The intervals hold at all looks, pairs and contests of a study together: c is Student's quantile at 1 - ALPHA / (2 x
looks x pairs), a union bound (Bonferroni). So with 95% all items show each lead by which an option of the study dropped
out. An option is the best where each other one dropped out. All items need not show its own lead over each of them: one
that a second option beat, which it beat in turn, is never compared with it again.

A look also gives up where the study will not tell, either: where no option has a chance of GIVE_UP or more that all
items show it better than each other one. The chance is that of the same prediction. The union bound does not cover it:
each contest that was given up may have had a verdict, with a chance of up to GIVE_UP for each option.

Answers that are right or wrong have no normal mean where few of them differ. So two options are compared once they
differ in FEW items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtr, stdtrit

from kbit.analysis.curves.curves import Floats
from kbit.evaluation.measurement import FEW, Z_95

ALPHA: Final = 0.05  # the chance that some lead by which an option dropped out is not that of all items
LOOKS: Final = 3  # at which something can be decided before all items are measured
GIVE_UP: Final = 0.05  # the least chance of a verdict for which measuring goes on
SAME: Final = 1e-9  # leads below it are rounding: the two options agree in the item
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
        lost: those of them that lack values of a round, so that nothing more can be known.
    """

    left: tuple[int, ...]
    given_up: bool = False
    lost: tuple[int, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether nothing more needs to be measured."""
        return not self.lost and (self.given_up or len(self.left) < 2)

    @property
    def is_open(self) -> bool:
        """Whether measuring more may tell more."""
        return not self.is_known and not self.lost


def find_reach(pairs: int, degrees: Floats) -> Floats:
    """Return how many standard errors intervals reach that hold at all looks and pairs (ALPHA).

    Args:
        pairs: the number of pairs in all contests of a study.
        degrees: the degrees of freedom of each variance.
    """
    return np.asarray(stdtrit(degrees, 1 - ALPHA / (2 * LOOKS * max(pairs, 1))))


def count_degrees(leads: Floats, scores: Sequence[Floats]) -> Floats:
    """Return the degrees of freedom of each lead's variance, NaN where it is 0 (Satterthwaite 1946): [...].

    Args:
        leads, scores: see measure_leads.
    """
    counts = [task.shape[1] for task in scores]
    parts = [(leads @ task).var(axis=-1, ddof=1) / count for task, count in zip(scores, counts, strict=True)]
    with np.errstate(invalid="ignore"):
        return np.asarray(sum(parts) ** 2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True)))


def count_differences(leads: Floats, scores: Sequence[Floats]) -> Floats:
    """Return in how many items, of all tasks together, the options of each lead differ: [...]."""
    return np.asarray(sum((np.abs(leads @ task) > SAME).sum(axis=-1) for task in scores))


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

    Nothing is decided from fewer than FEW items of a task, or between two options that differ in fewer than FEW items.

    Args:
        contest: the contest.
        before: what was known before.
        scores: see measure_leads. Points that no remaining option depends on may be NaN.
        totals: the number of all items of each task.
        pairs: the number of pairs in all contests of the study.
    """
    if not before.is_open or min(task.shape[1] for task in scores) < FEW:
        return before
    left = np.asarray(before.left)
    points = np.asarray(contest.find_points(before.left), dtype=np.intp)
    leads = contest.leads[np.ix_(left, left, points)]
    sample = [task[points] for task in scores]
    gaps, now, whole = measure_leads(leads, sample, totals)
    reach = find_reach(pairs, count_degrees(leads, sample))
    is_thin = count_differences(leads, sample) < FEW
    ahead = np.sqrt(np.maximum(now**2 - whole**2, 0))
    with np.errstate(invalid="ignore", divide="ignore"):  # a pair that never meets, and one that agrees in every item
        is_better = gaps - reach * ahead > Z_95 * whole
        chances = np.where(is_thin | ~(ahead > 0), 1.0, ndtr((gaps - Z_95 * whole) / ahead))
    beaten = (is_better & ~is_thin).any(axis=0)
    np.fill_diagonal(chances, 1.0)
    remaining = left[~beaten] if not beaten.all() else left
    chance = chances[~beaten][:, ~beaten].min(axis=1, initial=1.0) if not beaten.all() else np.ones(1)
    return Standing(tuple(int(option) for option in remaining), bool(len(remaining) > 1 and chance.max() < GIVE_UP))


def name_best(contest: Contest, standing: Standing) -> str:
    """Return the option that is known to be the best, or UNDECIDED."""
    is_decided = len(standing.left) == 1 and not standing.given_up
    return contest.options[standing.left[0]] if is_decided else UNDECIDED


def judge_whole(contest: Contest, scores: Sequence[Floats], left: Sequence[int] | None = None) -> str:
    """Return the verdict of all items: the option whose lead over each other one is above 0 with 95%, or UNDECIDED.

    Args:
        contest: the contest.
        scores: see measure_leads.
        left: the options that it is between. None: all.
    """
    left = range(len(contest.options)) if left is None else left
    totals, points = [task.shape[1] for task in scores], contest.find_points(left)
    leads = contest.leads[np.ix_(left, left, points)]
    gaps, _, whole = measure_leads(leads, [task[points] for task in scores], totals)
    never = np.asarray(np.isnan(contest.leads[np.ix_(left, left)]).any(axis=2))
    np.fill_diagonal(never, True)
    wins = ((gaps > Z_95 * whole) | never).all(axis=1) & ~never.all(axis=1)
    return contest.options[left[int(np.argmax(wins))]] if wins.any() else UNDECIDED
