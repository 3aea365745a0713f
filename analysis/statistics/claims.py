"""The paper's claims, tested on the curves at hand, each with its lead and a 95% interval.

A lead is positive where the first named is better: higher accuracy, or lower loss. A verdict follows from the interval
alone: a claim holds where all of it speaks for the claim, does not hold where all of it speaks against it, and is
undecided where it contains both.

Two forms cover all claims. "k-bit is optimal": at equal total bits, is precision k the best (Trial)? And "this is
better than that": one group of curves against another at equal total bits (Contrast). The best is better than each
other: its lead over the strongest rival decides (frontier.find_strongest_rival).

Only budgets that every quantized curve reaches count (curves.shared_budgets): above the family's largest model in 3 bit
a wider precision would win by default, because there is no larger model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import (
    TIE,
    ZERO_SHOT,
    Floats,
    Measure,
    bound_budgets,
    find_cross_entropy,
    name_variant,
    shared_budgets,
    split_variants,
    tabulate_curves,
)
from kbit.analysis.figures.panels import format_bits
from kbit.analysis.statistics.frontier import (
    Draws,
    best_chances,
    draw_values,
    find_strongest_rival,
    mean_interval,
    weigh_points,
)

CLAIMED_BITS: Final = 4


SURE: Final = 0.975  # a one-sided chance that corresponds to a two-sided 95% interval


NEGLIGIBLE: Final = {True: 0.005, False: 0.01}  # "no gain", "level": half a point of accuracy, a hundredth of a nat


NAMED: Final = 6  # panels that a sentence names, each with its lead


GRADES: Final = ("holds", "does not hold", "undecided", "not tested")


SIGN: Final = "A lead above 0 is better: higher accuracy, lower cross entropy."


Expectation = Literal["better", "best", "worse", "no better", "level"]


Split = Callable[[str, Sequence[str]], tuple[Sequence[str], Sequence[str]]]


def grade_interval(low: float, high: float) -> str:
    """Return the verdict on "x > 0" of a 95% interval of x; without an interval (NaN) nothing is decided."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def grade_level(low: float, high: float, negligible: float) -> str:
    """Return the verdict on "-negligible < x < negligible" of a 95% interval of x."""
    return grade_interval(min(low + negligible, negligible - high), min(high + negligible, negligible - low))


@dataclass(frozen=True)
class Trial:
    """One precision against each other one, over the shared budgets of one variant.

    Attributes:
        bits: the precision on trial.
        share: of the budgets, where it is best; NaN if it meets no other precision.
        gap, low, high: mean lead over the strongest rival (< 0: it trails), with 95% interval, in the measure's unit;
            see frontier.find_strongest_rival. The mean is over the budgets where both are defined.
        rival: that precision.
        chance: the probability that it is best, averaged over the budgets; NaN without intervals.
        ahead: share of the budgets where that probability is 97.5% or more; behind: where it is 2.5% or less.
        rivals: the best other precision at each budget where it is not best, most frequent first.
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
        """One of GRADES, of the statement: on average over the budgets this precision leads every other one."""
        return "not tested" if np.isnan(self.share) else grade_interval(self.low, self.high)


@dataclass(frozen=True)
class Contrast:
    """One group of curves against another, at equal total bits, averaged over the shared budgets of a panel.

    Attributes:
        gap, low, high: mean lead of the first group (> 0: better), with the 95% interval; NaN if untested.
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
        """Return one of GRADES: is the first group better, worse, better by less than `negligible`, or that close?"""
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
        values: index total_bits, a column per precision, better is larger (losses are negated).
        weights: by precision, see frontier.weigh_points; draws: of the points that they weigh.
        sign: -1 for losses.
        chances: frontier.best_chances; None without intervals.
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
        measure: what the curves show.
        results: see frontier.draw_values.
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
        curves: from precision_curves; any number of families and variants.
        measure: what the curves show.
        results: see frontier.draw_values.
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
    return f"{variant['family']}, {name_variant(variant['data_type'], variant['block_size'])}"


def describe_budgets(curves: pd.DataFrame) -> str:
    """Return the budgets of a variant and the precisions that bound them: "20 Mbit (8-bit) to 300 Mbit (2-bit)"."""
    return " to ".join(f"{format_bits(end)} ({bits}-bit)" for end, bits in bound_budgets(curves) or ())


def join_parts(parts: Sequence[str], count: int) -> str:
    """Return the parts as one list; it ends with how many of `count` there are beyond them."""
    return "; ".join(parts) + (f"; and {count - len(parts)} more" if count > len(parts) else "")


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


def describe_lead(gap: float, low: float, high: float, measure: Measure) -> str:
    """Return for example "+0.0123 nats (95% interval +0.0100 to +0.0140)": above 0 is better, see SIGN."""
    unit = "" if measure.higher_is_better else " nats"
    interval = "no interval" if np.isnan(low) else f"95% interval {low:+.4f} to {high:+.4f}"
    return f"{round(gap, 4) + 0.0:+.4f}{unit} ({interval})"  # + 0.0: never "-0.0000"


def weigh_contrast(curves: pd.DataFrame, groups: tuple[Sequence[str], Sequence[str]]) -> Floats | None:
    """Return the weights [points] of the mean difference of two groups of curves; None if they do not meet.

        row @ y = mean over budgets b of  mean_(i in first) y_i(b) - mean_(j in second) y_j(b)

    Args:
        curves: points of one panel; column series tells its curves apart.
        groups: names of series.
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
    groups: tuple[Sequence[str], Sequence[str]],
    measure: Measure,
    results: pd.DataFrame | None = None,
) -> Contrast:
    """Return the mean lead of the first group of curves over the second, at equal total bits; see weigh_contrast.

    Args:
        curves: points of one panel; column series tells its curves apart.
        groups: names of series.
        measure: what the curves show.
        results: see frontier.draw_values.
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
    groups: tuple[Sequence[str], Sequence[str]],
    measure: Measure,
    results: pd.DataFrame | None = None,
) -> Contrast:
    """Return the contrast of the first group with that curve of the second which decides whether it leads them all.

    Arguments as of contrast_curves; see frontier.find_strongest_rival.
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

    "best" is better than each curve of the other group; the other expectations are about the group's mean.

    Args:
        curves: points with columns panel and series.
        split: (panel, its series in order) -> names of the first and of the second group.
        expected: what the paper says of the first group.
        measure: what the curves show.
        results: see frontier.draw_values.
    """
    contrast = contrast_best if expected == "best" else contrast_curves
    tests: list[tuple[str, Contrast]] = []
    budgets: list[str] = []
    for panel, group in curves.groupby("panel", sort=False):
        names = list(dict.fromkeys(group["series"]))
        test = contrast(group, split(str(panel), names), measure, results)
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
    """Return for example "block 64 over block 1024: +0.0100 (...)"; of several curves the mean."""
    first, second = (" and ".join(group) for group in (test.first, test.second))
    return f"{first} over {second}: {describe_lead(test.gap, test.low, test.high, measure)}"


def count_grades(grades: Iterable[str]) -> str:
    """Return for example "holds in 2, undecided in 1"; a single grade alone."""
    counts = Counter(grades)
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{grade} in {counts[grade]}" for grade in GRADES if counts[grade])


def find_measures(results: pd.DataFrame) -> list[Measure]:
    """Return the measures of the study that the results hold: mean zero-shot accuracy, cross entropy."""
    has_accuracy = ((results["metric"] == ZERO_SHOT.metric) & (results["task"] == ZERO_SHOT.task)).any()
    loss = find_cross_entropy(results)
    return [*([ZERO_SHOT] if has_accuracy else []), *([loss] if loss else [])]
