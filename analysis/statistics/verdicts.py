"""The statement "k-bit is optimal": is precision k the best at equal total bits, by how much, and how surely?

A Trial tests it for one precision of one variant, by its lead over the strongest rival (frontier.find_strongest_rival).
A table has the statement for every family, variant and measure. A verdict follows from the lead's 95% interval alone,
as in claims, and only budgets that every quantized curve reaches count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from kbit.analysis.curves.curves import (
    TIE,
    VARIANT,
    AmbiguousResults,
    Floats,
    Measure,
    bound_budgets,
    bound_points,
    find_measures,
    is_contest,
    list_variants,
    sort_curves,
    sort_points,
    split_families,
    split_variants,
    tabulate_curves,
)
from kbit.analysis.curves.families import take_family
from kbit.analysis.curves.settings import name_variant, rank_block, rank_data_type, rank_label
from kbit.analysis.curves.units import format_bits
from kbit.analysis.statistics.frontier import Draws, best_chances, draw_values, find_strongest_rival, weigh_points
from kbit.analysis.statistics.grades import (
    NAMED,
    count_grades,
    describe_lead,
    describe_share,
    describe_sources,
    grade_interval,
    join_parts,
)

CLAIMED_BITS: Final = 4
SURE: Final = 0.975  # a one-sided chance that corresponds to a two-sided 95% interval
MOST_VARIANTS: Final = 4  # of a family and measure in a table that is read, while the CSV has all
MOST_TRIALS: Final = 80  # variants that are tried, over all families and measures: 0.03 s each
NOT_TRIED: Final = "not tried: too many variants; --where chooses"
NO_CONTEST: Final = "no contest: one quantized precision"
TIED: Final = "tied: at no budget is one precision better than all others"


@dataclass(frozen=True)
class Trial:
    """One precision against each other one, over the shared budgets of one variant.

    Attributes:
        bits: the precision on trial.
        share: the share of the budgets where it is better than each other one. NaN if it meets no other precision.
        gap, low, high: the mean lead over the strongest rival (< 0: it trails) with its 95% interval, in the measure's
            unit. See frontier.find_strongest_rival. The mean is over the budgets where both are defined.
        rival: the strongest rival's bits.
        chance: the probability that it is best, averaged over the budgets. NaN without intervals.
        ahead: the share of the budgets where that probability is 97.5% or more.
        behind: the share of the budgets where that probability is 2.5% or less.
        rivals: the best other precision at each budget where that is better than this one, most frequent first.
        source: how the uncertainty was found.
        level: the share of the budgets where it is as good as the best other one.
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
    level: float = 0.0

    @property
    def grade(self) -> str:
        """The grade (grades.GRADES) of the statement that on average over the budgets it leads every other one."""
        return "not tested" if np.isnan(self.share) else grade_interval(self.low, self.high)


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
    chance = None if race.chances is None else race.chances[bits].to_numpy()
    return Trial(
        bits,
        share=float((closest > TIE).sum() / len(reached)),
        level=float((np.abs(closest) <= TIE).sum() / len(reached)),
        gap=decisive.gap,
        low=decisive.low,
        high=decisive.high,
        rival=int(str(rivals[decisive.place])),
        chance=np.nan if chance is None else float(chance.mean()),
        ahead=np.nan if chance is None else float((chance >= SURE).mean()),
        behind=np.nan if chance is None else float((chance <= 1 - SURE).mean()),
        rivals=tuple(int(str(rivals[place])) for place, _ in Counter(nearest[closest < -TIE].tolist()).most_common()),
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
    if len(trials) == 1 and not np.isnan(trials[0][1].share):
        return describe_trial(trials[0][1], measure) + (f" Budgets: {ranges[0]}." if ranges[0] else "")
    tested = [
        (panel, trial, budgets)
        for (panel, trial), budgets in zip(trials, ranges, strict=True)
        if not np.isnan(trial.share)
    ]
    if not tested:
        return explain_untested(curves)
    parts = [
        f"{panel}: {trial.grade}, {describe_lead(trial.gap, trial.low, trial.high, measure)} over {trial.rival}-bit, "
        f"best over {describe_share(trial.share)} of the budgets, {budgets}"
        for panel, trial, budgets in tested[:NAMED]
    ]
    sources = describe_sources(trial.source for _, trial, _ in tested[:NAMED])
    return (
        f"Of {len(trials)} panels: {count_grades(trial.grade for _, trial in trials)}. Mean lead of 4-bit over its "
        f"strongest rival: {join_parts(parts, len(tested))} ({sources})."
    )


def explain_untested(curves: pd.DataFrame) -> str:
    """Say why the claim for 4 bits is tested in no panel: there is no such curve, or it meets no other."""
    panels = [group for _, group in split_variants(curves)]
    where = "" if len(panels) == 1 else f" in any of {len(panels)} panels"
    if not any(CLAIMED_BITS in sort_curves(group) for group in panels):
        return f"Not tested: no {CLAIMED_BITS}-bit model was measured at two sizes{where}."
    return f"Not tested: no {CLAIMED_BITS}-bit curve meets another precision at equal total bits{where}."


def name_panel(variant: dict[str, Any]) -> str:
    """Return for example "opt, nf block 64"."""
    return f"{variant['family']}, {name_variant(variant['label'], variant['block_size'])}"


def describe_budgets(curves: pd.DataFrame) -> str:
    """Return the budgets of a variant and the precisions that bound them: "20 Mbit (8-bit) to 300 Mbit (2-bit)"."""
    return " to ".join(f"{format_bits(end)} ({bits}-bit)" for end, bits in bound_budgets(curves) or ())


def describe_trial(trial: Trial, measure: Measure) -> str:
    """Return the sentences for a single variant that was tested."""
    others = [f"else {' or '.join(f'{bits}-bit' for bits in trial.rivals)}"] if trial.rivals else []
    others += [f"level with the best over {describe_share(trial.level)}"] if trial.level else []
    rivals = f" ({', '.join(others)})" if others else ""
    chance = ""
    if not np.isnan(trial.chance):
        chance = (
            f" Its chance to be best is {describe_share(trial.chance)} on average; it is best with {SURE:.1%} or more "
            f"over {describe_share(trial.ahead)} of the budgets, with {1 - SURE:.1%} or less over "
            f"{describe_share(trial.behind)} ({trial.source})."
        )
    return (
        f"{trial.grade.capitalize()}: the mean lead of {trial.bits}-bit over its strongest rival, {trial.rival}-bit, "
        f"is {describe_lead(trial.gap, trial.low, trial.high, measure)}. It is best over "
        f"{describe_share(trial.share)} of the shared budgets{rivals}.{chance}"
    )


def tabulate_verdicts(results: pd.DataFrame) -> pd.DataFrame:
    """Return the statement "k-bit is optimal" for every family and measure, with its margin.

    A variant is a data type with its method, outliers and other settings, and a block size. The variants with the most
    points come first. A variant with one quantized precision is listed as NO_CONTEST, without a verdict. Of a large
    study's variants the first of each family and measure are tried, MOST_TRIALS in all, and the others are listed as
    NOT_TRIED. Where no precision is ever better than all others the grade is TIED, and bits are missing. Variants whose
    curves never meet are left out. A family measured in several ways has one row, with the
    reason as its grade.

    Returns:
        Columns family, data_type (the variant's label), block_size, measure, precisions (that were compared), bits (the
        one that is best over the largest share of the budgets), share, gap, low, high, rival, chance, grade (of "this
        precision is optimal"), four_bit (the grade of the paper's claim), source, lowest, highest (the budgets
        compared, bits), keys (the experiments' keys, separated by blanks).
    """
    results = split_families(results)
    most = max(MOST_VARIANTS, MOST_TRIALS // max(1, 2 * results["family"].nunique()))  # by accuracy and cross entropy
    rows: list[dict[str, Any]] = []
    known: dict[Measure, pd.DataFrame | None] = {}
    for family, of_family in results[["family", "metric", "task"]].groupby("family"):  # a group copies its columns
        for measure in find_measures(of_family):
            try:
                curves = take_family(results, family, measure, known)
            except AmbiguousResults as error:
                rows.append({"family": family, "measure": measure.name, "grade": str(error)})
                continue
            rows += judge_variants(curves, measure, results, most)
    columns = ["bits", "share", "gap", "low", "high", "rival", "chance", "grade", "four_bit", "source"]
    columns += ["lowest", "highest", "keys"]
    table = pd.DataFrame(rows, columns=[*VARIANT, "measure", "precisions", *columns])
    table = table.rename(columns={"label": "data_type"})
    return table.astype({"block_size": "Int64", "bits": "Int64", "rival": "Int64"})


def judge_variants(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame, most: int) -> list[dict[str, Any]]:
    """Return the rows of tabulate_verdicts for one family and measure, with at most so many variants tried."""
    rows: list[dict[str, Any]] = []
    tries = 0
    sizes, bits = curves["total_bits"].to_numpy(dtype=np.float64), curves["bits"].to_numpy()
    keys, data_types = curves["key"].to_numpy(dtype=object), curves["data_type"].tolist()
    for variant, own in sorted(list_variants(curves), key=lambda part: rank_variant(part[0], part[1], data_types)):
        places = sort_points(sizes[own], bits[own])
        bounds = bound_points(sizes[own], bits[own].astype(np.float64), places)
        if bounds is None:
            continue
        about = variant | {"measure": measure.name, "lowest": bounds[0][0], "highest": bounds[1][0]}
        about |= {"keys": " ".join(keys[own]), "precisions": list_bits(bits[own])}
        contest = is_contest(places)
        if not contest or tries == most:
            rows.append(about | {"grade": NOT_TRIED if contest else NO_CONTEST})
            continue
        tries += 1
        race = line_up(curves.iloc[own], measure, results)
        trials = {bits: try_precision(race, bits) for bits in list_candidates(race)}
        if tested := {bits: trial for bits, trial in trials.items() if not np.isnan(trial.share)}:
            best = describe_best(tested)
            best |= {} if best["share"] else {"bits": None, "rival": None, "grade": TIED}
            rows.append(about | {"precisions": list_bits(race.values.columns)} | best)
    return rows


def list_candidates(race: Race) -> list[int]:
    """Return the precisions that describe_best can choose, and CLAIMED_BITS, as a trial of each takes time."""
    values = race.values.to_numpy()
    shares: dict[int, float] = {}
    for place, bits in enumerate(race.values):
        lead = values[:, place] - np.fmax.reduce(np.delete(values, place, axis=1), axis=1)
        met = lead[~np.isnan(lead)]
        shares[int(str(bits))] = float((met > TIE).sum() / len(lead)) if met.size else np.nan
    most = max(share for share in shares.values() if not np.isnan(share))
    return [bits for bits, share in shares.items() if share == most or bits == CLAIMED_BITS]


def list_bits(bits: Iterable[Any]) -> str:
    """Return for example "3, 4, 16"."""
    return ", ".join(map(str, sorted(set(bits))))


def name_range(low: float, high: float) -> str:
    """Return budgets as "20 Mbit to 300 Mbit", or "-" where none are compared."""
    return "-" if np.isnan(low) else f"{format_bits(low)} to {format_bits(high)}"


def rank_variant(
    variant: Mapping[str, Any], own: npt.NDArray[np.intp], data_types: Sequence[object]
) -> tuple[Any, ...]:
    """Return the place of a variant: the most points first, and among equals the paper's settings.

    Args:
        variant: its label and block size.
        own: the places of its points.
        data_types: the data type of each row.
    """
    data_type = rank_data_type(data_types[own[0]])
    return -len(own), data_type, rank_label(variant["label"]), rank_block(variant["block_size"])


def describe_best(tested: dict[int, Trial]) -> dict[str, Any]:
    """Return the row of the precision that is best over the most budgets, and among equals has the largest gap."""
    best = max(tested.values(), key=lambda trial: (trial.share, trial.gap))
    fields = ("bits", "share", "gap", "low", "high", "rival", "chance", "grade", "source")
    claim = tested[CLAIMED_BITS].grade if CLAIMED_BITS in tested else "not tested"
    return {name: getattr(best, name) for name in fields} | {"four_bit": claim}
