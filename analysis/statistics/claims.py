"""The paper's claims of the form "this is better than that", tested on the curves at hand, each with a 95% interval.

A Contrast sets one group of curves against another at equal total bits. A lead is positive where the first named is
better: higher accuracy, or lower loss. A verdict follows from the interval alone. A claim holds where all of the
interval speaks for it, does not hold where all of it speaks against it, and is undecided where the interval contains
both. The best is better than each other, so its lead over the strongest rival decides (frontier.find_strongest_rival).

Only budgets that every quantized curve reaches count (curves.shared_budgets). Above the family's largest model in 3 bit
a wider precision would win by default, because there is no larger model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import (
    Floats,
    Measure,
    bound_budgets,
    shared_budgets,
    sort_curves,
)
from kbit.analysis.curves.units import format_bits
from kbit.analysis.statistics.frontier import (
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
    describe_sources,
    grade_interval,
    grade_level,
    join_parts,
)

Expectation = Literal["better", "best", "worse", "no better", "level"]
Groups = tuple[Sequence[str], Sequence[str]]  # the series of a first and of a second group of curves
Split = Callable[[pd.DataFrame], Groups]  # of one panel's points


@dataclass(frozen=True)
class Comparison:
    """Two kinds of curves that are compared.

    Attributes:
        split: the points of one panel -> the names of the series of the first and of the second kind.
        first, second: the two kinds in words.
    """

    split: Split
    first: str
    second: str


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
    curves: pd.DataFrame,
    comparison: Comparison,
    expected: Expectation,
    measure: Measure,
    results: pd.DataFrame | None = None,
) -> str:
    """Return whether one group of curves is better (worse, no better, level) than another, panel by panel.

    "best" means better than each curve of the other group. The other expectations are about the group's mean.

    Args:
        curves: points with columns panel and series.
        comparison: the two groups of curves.
        expected: what the paper says of the first group.
        measure: the measure that the curves show.
        results: the table behind the curves, see frontier.draw_values.
    """
    contrast = contrast_best if expected == "best" else contrast_curves
    tests: list[tuple[str, Contrast]] = []
    budgets: list[str] = []
    for panel, group in curves.groupby("panel", sort=False):
        test = contrast(group, comparison.split(group), measure, results)
        tests.append((str(panel), test))
        bounds = bound_budgets(group[group["series"].isin([*test.first, *test.second])], "series")
        budgets.append(" to ".join(format_bits(end) for end, _ in bounds or ()))
    negligible = NEGLIGIBLE[measure.higher_is_better]
    tested = [(*test, ends) for test, ends in zip(tests, budgets, strict=True) if not np.isnan(test[1].gap)]
    if not tested:
        return explain_untested(curves, comparison)
    grades = count_grades(test.grade(expected, negligible) for _, test in tests)
    limits = {"no better": f" (better by less than {negligible:g} counts as no better)"}
    limits["level"] = f" (a difference below {negligible:g} counts as level)"
    parts = [f"{panel}, {describe_contrast(test, measure)}, {ends}" for panel, test, ends in tested[:NAMED]]
    whom = " over the strongest rival" if expected == "best" else ""
    head = grades.capitalize() if len(tests) == 1 else f"Of {len(tests)} panels: {grades}"
    leads = join_parts(parts, len(tested))
    sources = describe_sources(test.source for _, test, _ in tested[:NAMED])
    return f"{head}{limits.get(expected, '')}. Mean lead{whom}: {leads} ({sources})."


def explain_untested(curves: pd.DataFrame, comparison: Comparison) -> str:
    """Say why no panel allows a comparison: a kind of curves is not there, or the two kinds do not meet."""
    panels = [group for _, group in curves.groupby("panel", sort=False)]
    there = [[set(sort_curves(group, "series")) & set(kind) for kind in comparison.split(group)] for group in panels]
    kinds = zip((comparison.first, comparison.second), zip(*there, strict=True), strict=True)
    if absent := [name for name, found in kinds if not any(found)]:
        return f"Not tested: there is no curve of {' and none of '.join(absent)}."
    both = f"{comparison.first} and {comparison.second}"
    if not any(first and second for first, second in there):
        return f"Not tested: no panel has curves of {both}."
    return f"Not tested: in no panel do curves of {both} meet at equal total bits."


def describe_contrast(test: Contrast, measure: Measure) -> str:
    """Return for example "block 64 over block 1024: +0.0100 (...)", where several curves are joined by "and"."""
    first, second = (" and ".join(dict.fromkeys(group)) for group in (test.first, test.second))
    return f"{first} over {second}: {describe_lead(test.gap, test.low, test.high, measure)}"
