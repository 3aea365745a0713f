"""The paper's claims, tested on the curves at hand, each with its lead and a 95% interval.

A lead is positive where the first named is better: higher accuracy, or lower loss. A verdict follows from the interval
alone. A claim holds where all of the interval speaks for it, does not hold where all of it speaks against it, and is
undecided where the interval contains both.

Two forms cover all claims. "k-bit is optimal" asks whether precision k is the best at equal total bits (Trial). "This
is better than that" sets one group of curves against another at equal total bits (Contrast). The best is better than
each other, so its lead over the strongest rival decides (frontier.find_strongest_rival).

Only budgets that every quantized curve reaches count (curves.shared_budgets). Above the family's largest model in 3 bit
a wider precision would win by default, because there is no larger model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import (
    TIE,
    Floats,
    Measure,
    bound_budgets,
    shared_budgets,
    split_variants,
    tabulate_curves,
)
from kbit.analysis.curves.settings import name_variant
from kbit.analysis.curves.units import format_bits
from kbit.analysis.statistics.frontier import (
    Draws,
    best_chances,
    draw_values,
    find_strongest_rival,
    mean_interval,
    weigh_points,
)
from kbit.analysis.statistics.grades import (
    NAMED,
    NEGLIGIBLE,
    count_grades,
    describe_lead,
    grade_interval,
    grade_level,
    join_parts,
)

CLAIMED_BITS: Final = 4


SURE: Final = 0.975  # a one-sided chance that corresponds to a two-sided 95% interval


Expectation = Literal["better", "best", "worse", "no better", "level"]


Groups = tuple[Sequence[str], Sequence[str]]  # the series of a first and of a second group of curves


Split = Callable[[pd.DataFrame], Groups]  # of one panel's points


@dataclass(frozen=True)
class Trial:
    """One precision against each other one, over the shared budgets of one variant.

    Attributes:
        bits: the precision on trial.
        share: the share of the budgets where it is best. NaN if it meets no other precision.
        gap, low, high: the mean lead over the strongest rival (< 0: it trails) with its 95% interval, in the measure's
            unit. See frontier.find_strongest_rival. The mean is over the budgets where both are defined.
        rival: the strongest rival's bits.
        chance: the probability that it is best, averaged over the budgets. NaN without intervals.
        ahead: the share of the budgets where that probability is 97.5% or more.
        behind: the share of the budgets where that probability is 2.5% or less.
        rivals: the best other precision at each budget where this one is not best, most frequent first.
        source: how the uncertainty was found.
    """

    bits: int
    share: float
    gap: float = np.nan
    low: float = np.nan
    high: float = np.nan
    rival: int | None = None
    chance: float = np.nan
    ahead: float = np.nan
    behind: float = np.nan
    rivals: tuple[int, ...] = ()
    source: str = ""

    @property
    def grade(self) -> str:
        """The grade (grades.GRADES) of the statement that on average over the budgets it leads every other one."""
        return "not tested" if np.isnan(self.share) else grade_interval(self.low, self.high)


@dataclass(frozen=True)
class Contrast:
    """One group of curves against another, at equal total bits, averaged over the shared budgets of a panel.

    Attributes:
        gap, low, high: the mean lead of the first group (> 0: better) with its 95% interval. NaN if untested.
        first, second: the names of the two groups' curves.
        source: how the uncertainty was found.
    """

    gap: float
    low: float
    high: float
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    source: str = ""

    def grade(self, expected: Expectation, negligible: float) -> str:
        """Return the grade (grades.GRADES) of what is expected of the first group.

        Args:
            expected: that it is better ("best" likewise), worse, no better than by `negligible`, or level within it.
            negligible: a difference that does not matter, in the measure's unit.
        """
        if np.isnan(self.gap):
            return "not tested"
        if expected == "worse":
            return grade_interval(-self.high, -self.low)
        if expected == "no better":
            return grade_interval(negligible - self.high, negligible - self.low)
        if expected == "level":
            return grade_level(self.low, self.high, negligible)
        return grade_interval(self.low, self.high)


@dataclass(frozen=True)
class Race:
    """The precisions of one variant at its shared budgets, ready to be compared.

    Attributes:
        values: a table with index total_bits and a column per precision. Better is larger: losses are negated.
        weights: the weights of the points in each precision's values, see frontier.weigh_points.
        draws: bootstrap draws of these points.
        sign: 1 for accuracies, -1 for losses.
        chances: the table of frontier.best_chances, or None without intervals.
    """

    values: pd.DataFrame
    weights: dict[object, Floats]
    draws: Draws
    sign: float
    chances: pd.DataFrame | None


def line_up(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame | None = None) -> Race:
    """Return the race of one variant.

    Args:
        curves: one variant of precision_curves.
        measure: the measure that the curves show.
        results: the table behind the curves, see frontier.draw_values.
    """
    sign = 1.0 if measure.higher_is_better else -1.0
    values = sign * tabulate_curves(curves)
    draws = draw_values(curves, measure, results)
    weights = weigh_points(curves, values.index.to_numpy(dtype=np.float64))
    known = not values.empty and not np.isnan(draws.values).any()
    chances = best_chances(curves, draws, measure.higher_is_better) if known else None
    return Race(values, weights, draws, sign, chances)


def try_precision(race: Race, bits: int = CLAIMED_BITS) -> Trial:
    """Return how one precision does against every other precision of a race."""
    values = {name: race.values[name].to_numpy(dtype=np.float64) for name in race.values}
    own = values.pop(bits, np.full(len(race.values), np.nan))
    leads = {name: own - other for name, other in values.items() if not np.isnan(own - other).all()}
    if not leads:
        return Trial(bits, np.nan)
    rivals, table = list(leads), np.stack(list(leads.values()))  # [rivals, budgets]
    met = ~np.isnan(table)
    weights = [race.weights[bits][both] - race.weights[name][both] for name, both in zip(rivals, met, strict=True)]
    rows = race.sign * np.stack([row.mean(axis=0) for row in weights])
    decisive = find_strongest_rival(race.draws, rows, np.nanmean(table, axis=1))
    reached = met.any(axis=0)
    closest, nearest = np.nanmin(table[:, reached], axis=0), np.nanargmin(table[:, reached], axis=0)
    chance = None if race.chances is None else race.chances[bits].to_numpy()[reached]
    return Trial(
        bits,
        share=float((closest > TIE).mean()),
        gap=decisive.gap,
        low=decisive.low,
        high=decisive.high,
        rival=int(str(rivals[decisive.place])),
        chance=np.nan if chance is None else float(chance.mean()),
        ahead=np.nan if chance is None else float((chance >= SURE).mean()),
        behind=np.nan if chance is None else float((chance <= 1 - SURE).mean()),
        rivals=tuple(int(str(rivals[place])) for place, _ in Counter(nearest[closest <= TIE].tolist()).most_common()),
        source="" if chance is None else race.draws.source,
    )


def judge_four_bit(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame | None = None) -> str:
    """Return whether 4-bit is best at equal total bits on these curves, and by how much.

    Args:
        curves: from precision_curves, any number of families and variants.
        measure: the measure that the curves show.
        results: the table behind the curves, see frontier.draw_values.
    """
    trials = [
        (name_panel(variant), try_precision(line_up(group, measure, results)))
        for variant, group in split_variants(curves)
    ]
    ranges = [describe_budgets(group) for _, group in split_variants(curves)]
    if len(trials) == 1:
        return describe_trial(trials[0][1], measure) + (f" Budgets: {ranges[0]}." if ranges[0] else "")
    tested = [
        (panel, trial, budgets)
        for (panel, trial), budgets in zip(trials, ranges, strict=True)
        if not np.isnan(trial.share)
    ]
    if not tested:
        return f"Not tested: in none of {len(trials)} panels does a 4-bit curve meet another precision."
    parts = [
        f"{panel}: {trial.grade}, {describe_lead(trial.gap, trial.low, trial.high, measure)} over {trial.rival}-bit, "
        f"best over {trial.share:.0%} of the budgets, {budgets}"
        for panel, trial, budgets in tested[:NAMED]
    ]
    return (
        f"Of {len(trials)} panels: {count_grades(trial.grade for _, trial in trials)}. Mean lead of 4-bit over its "
        f"strongest rival: {join_parts(parts, len(tested))} ({tested[0][1].source or 'no intervals'})."
    )


def name_panel(variant: dict[str, Any]) -> str:
    """Return for example "opt, nf block 64"."""
    return f"{variant['family']}, {name_variant(variant['label'], variant['block_size'])}"


def describe_budgets(curves: pd.DataFrame) -> str:
    """Return the budgets of a variant and the precisions that bound them: "20 Mbit (8-bit) to 300 Mbit (2-bit)"."""
    return " to ".join(f"{format_bits(end)} ({bits}-bit)" for end, bits in bound_budgets(curves) or ())


def describe_trial(trial: Trial, measure: Measure) -> str:
    """Return the sentences for a single variant."""
    if np.isnan(trial.share):
        return f"Not tested: no {trial.bits}-bit curve meets another precision at equal total bits."
    rivals = f" (else {' or '.join(f'{bits}-bit' for bits in trial.rivals[:2])})" if trial.rivals else ""
    chance = ""
    if not np.isnan(trial.chance):
        chance = (
            f" Its chance to be best is {trial.chance:.0%} on average; it is best with {SURE:.1%} or more over "
            f"{trial.ahead:.0%} of the budgets, with {1 - SURE:.1%} or less over {trial.behind:.0%} ({trial.source})."
        )
    return (
        f"{trial.grade.capitalize()}: the mean lead of {trial.bits}-bit over its strongest rival, {trial.rival}-bit, "
        f"is {describe_lead(trial.gap, trial.low, trial.high, measure)}. It is best over {trial.share:.0%} of the "
        f"shared budgets{rivals}.{chance}"
    )


def weigh_contrast(curves: pd.DataFrame, groups: Groups) -> Floats | None:
    """Return the weights [points] of the mean difference of two groups of curves, or None if they do not meet.

        row @ y = mean over budgets b of  mean_(i in first) y_i(b) - mean_(j in second) y_j(b)

    Args:
        curves: points of one panel. The column series tells its curves apart.
        groups: the names of the series of both groups.
    """
    chosen = curves["series"].isin([*groups[0], *groups[1]]).to_numpy()
    kept = curves[chosen].reset_index(drop=True)
    first, second = ([name for name in group if name in set(kept["series"])] for group in groups)
    budgets = shared_budgets(kept, by="series") if first and second else np.empty(0)
    if not budgets.size:
        return None
    weights = weigh_points(kept, budgets, "series")
    means = [np.mean([weights[name] for name in group if name in weights], axis=0) for group in (first, second)]
    row = np.zeros(len(curves))
    row[chosen] = np.mean(means[0] - means[1], axis=0)
    return row


def contrast_curves(
    curves: pd.DataFrame,
    groups: Groups,
    measure: Measure,
    results: pd.DataFrame | None = None,
) -> Contrast:
    """Return the mean lead of the first group of curves over the second, at equal total bits. See weigh_contrast.

    Args:
        curves: points of one panel. The column series tells its curves apart.
        groups: the names of the series of both groups.
        measure: the measure that the curves show.
        results: the table behind the curves, see frontier.draw_values.
    """
    first, second = (tuple(name for name in group if name in set(curves["series"])) for group in groups)
    kept = curves[curves["series"].isin([*first, *second])].reset_index(drop=True)
    row = weigh_contrast(kept, groups)
    if row is None:
        return Contrast(np.nan, np.nan, np.nan)
    row = row if measure.higher_is_better else -row
    draws = draw_values(kept, measure, results)
    gap = float(kept["value"].to_numpy(dtype=np.float64) @ row)
    return Contrast(gap, *mean_interval(draws, row), first, second, draws.source)


def contrast_best(
    curves: pd.DataFrame,
    groups: Groups,
    measure: Measure,
    results: pd.DataFrame | None = None,
) -> Contrast:
    """Return the contrast of the first group with that curve of the second which decides whether it leads them all.

    The arguments are those of contrast_curves. See frontier.find_strongest_rival.
    """
    rows = {name: weigh_contrast(curves, (groups[0], [name])) for name in groups[1]}
    known: Mapping[str, Floats] = {name: row for name, row in rows.items() if row is not None}
    if not known:
        return Contrast(np.nan, np.nan, np.nan)
    chosen = curves["series"].isin([*groups[0], *known]).to_numpy()  # a point that is not compared may lack items
    kept = curves[chosen].reset_index(drop=True)
    stacked = (1.0 if measure.higher_is_better else -1.0) * np.stack([row[chosen] for row in known.values()])
    draws = draw_values(kept, measure, results)
    lead = find_strongest_rival(draws, stacked, stacked @ kept["value"].to_numpy(dtype=np.float64))
    first = tuple(name for name in groups[0] if name in set(kept["series"]))
    return Contrast(lead.gap, lead.low, lead.high, first, (list(known)[lead.place],), draws.source)


def judge_contrasts(
    curves: pd.DataFrame, split: Split, expected: Expectation, measure: Measure, results: pd.DataFrame | None = None
) -> str:
    """Return whether one group of curves is better (worse, no better, level) than another, panel by panel.

    "best" means better than each curve of the other group. The other expectations are about the group's mean.

    Args:
        curves: points with columns panel and series.
        split: the points of one panel -> the names of the series of the first and of the second group.
        expected: what the paper says of the first group.
        measure: the measure that the curves show.
        results: the table behind the curves, see frontier.draw_values.
    """
    contrast = contrast_best if expected == "best" else contrast_curves
    tests: list[tuple[str, Contrast]] = []
    budgets: list[str] = []
    for panel, group in curves.groupby("panel", sort=False):
        test = contrast(group, split(group), measure, results)
        tests.append((str(panel), test))
        bounds = bound_budgets(group[group["series"].isin([*test.first, *test.second])], "series")
        budgets.append(" to ".join(format_bits(end) for end, _ in bounds or ()))
    negligible = NEGLIGIBLE[measure.higher_is_better]
    tested = [(*test, ends) for test, ends in zip(tests, budgets, strict=True) if not np.isnan(test[1].gap)]
    if not tested:
        return "Not tested: in no panel do the two kinds of curves meet at equal total bits."
    grades = count_grades(test.grade(expected, negligible) for _, test in tests)
    limits = {"no better": f" (better by less than {negligible:g} counts as no better)"}
    limits["level"] = f" (a difference below {negligible:g} counts as level)"
    parts = [f"{panel}, {describe_contrast(test, measure)}, {ends}" for panel, test, ends in tested[:NAMED]]
    whom = " over the strongest rival" if expected == "best" else ""
    head = grades.capitalize() if len(tests) == 1 else f"Of {len(tests)} panels: {grades}"
    leads = join_parts(parts, len(tested))
    return f"{head}{limits.get(expected, '')}. Mean lead{whom}: {leads} ({tested[0][1].source or 'no intervals'})."


def describe_contrast(test: Contrast, measure: Measure) -> str:
    """Return for example "block 64 over block 1024: +0.0100 (...)", where several curves are joined by "and"."""
    first, second = (" and ".join(group) for group in (test.first, test.second))
    return f"{first} over {second}: {describe_lead(test.gap, test.low, test.high, measure)}"
