"""The statement "k-bit is optimal" for every family, variant and measure, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import (
    TIE,
    VARIANT,
    AmbiguousResults,
    Measure,
    bound_budgets,
    find_measures,
    is_contest,
    precision_curves,
    split_variants,
)
from kbit.analysis.curves.settings import rank_block, rank_data_type, rank_label
from kbit.analysis.curves.units import format_bits
from kbit.analysis.statistics.claims import CLAIMED_BITS, Race, Trial, line_up, try_precision

MOST_VARIANTS: Final = 4  # of a family and measure in a table that is read, while the CSV has all


MOST_TRIALS: Final = 80  # variants that are tried, over all families and measures: 0.03 s each


NOT_TRIED: Final = "not tried: too many variants; --where chooses"


NO_CONTEST: Final = "no contest: one quantized precision"


def tabulate_verdicts(results: pd.DataFrame) -> pd.DataFrame:
    """Return the statement "k-bit is optimal" for every family and measure, with its margin.

    A variant is a data type with its method, outliers and other settings, and a block size. The variants with the most
    points come first. A variant with one quantized precision is listed as NO_CONTEST, without a verdict. Of a large
    study's variants the first of each family and measure are tried, MOST_TRIALS in all, and the others are listed as
    NOT_TRIED. Variants whose curves never meet are left out. A family measured in several ways has one row, with the
    reason as its grade.

    Returns:
        Columns family, data_type (the variant's label), block_size, measure, precisions (that were compared), bits (the
        one that is best over most budgets), share, gap, low, high, rival, chance, grade (of "this precision is
        optimal"), four_bit (the grade of the paper's claim), source, lowest, highest (the budgets compared, bits), keys
        (the experiments' keys, separated by blanks).
    """
    most = max(MOST_VARIANTS, MOST_TRIALS // max(1, 2 * results["family"].nunique()))  # by accuracy and cross entropy
    rows: list[dict[str, Any]] = []
    for family, of_family in results.groupby("family"):
        for measure in find_measures(of_family):
            try:
                curves = precision_curves(of_family, measure.metric, measure.task)
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
    for variant, group in sorted(split_variants(curves), key=rank_variant):
        bounds = bound_budgets(group)
        if bounds is None:
            continue
        about = variant | {"measure": measure.name, "lowest": bounds[0][0], "highest": bounds[1][0]}
        about |= {"keys": " ".join(group["key"]), "precisions": list_bits(group["bits"])}
        contest = is_contest(group)
        if not contest or tries == most:
            rows.append(about | {"grade": NOT_TRIED if contest else NO_CONTEST})
            continue
        tries += 1
        race = line_up(group, measure, results)
        trials = {bits: try_precision(race, bits) for bits in list_candidates(race)}
        if tested := {bits: trial for bits, trial in trials.items() if not np.isnan(trial.share)}:
            rows.append(about | {"precisions": list_bits(race.values.columns)} | describe_best(tested))
    return rows


def list_candidates(race: Race) -> list[int]:
    """Return the precisions that describe_best can choose, and CLAIMED_BITS, as a trial of each takes time."""
    values = race.values.to_numpy()
    shares: dict[int, float] = {}
    for place, bits in enumerate(race.values):
        lead = values[:, place] - np.fmax.reduce(np.delete(values, place, axis=1), axis=1)
        met = lead[~np.isnan(lead)]
        shares[int(str(bits))] = float((met > TIE).mean()) if met.size else np.nan
    most = max(share for share in shares.values() if not np.isnan(share))
    return [bits for bits, share in shares.items() if share == most or bits == CLAIMED_BITS]


def list_bits(bits: Iterable[Any]) -> str:
    """Return for example "3, 4, 16"."""
    return ", ".join(map(str, sorted(set(bits))))


def name_range(low: float, high: float) -> str:
    """Return budgets as "20 Mbit to 300 Mbit", or "-" where none are compared."""
    return "-" if np.isnan(low) else f"{format_bits(low)} to {format_bits(high)}"


def rank_variant(part: tuple[dict[str, Any], pd.DataFrame]) -> tuple[Any, ...]:
    """Return the place of a variant: the most points first, and among equals the paper's settings."""
    variant, points = part
    data_type = rank_data_type(points["data_type"].iloc[0])
    return -len(points), data_type, rank_label(variant["label"]), rank_block(variant["block_size"])


def describe_best(tested: dict[int, Trial]) -> dict[str, Any]:
    """Return the row of the precision that is best over most budgets, and among equals has the largest gap."""
    best = max(tested.values(), key=lambda trial: (trial.share, trial.gap))
    fields = ("bits", "share", "gap", "low", "high", "rival", "chance", "grade", "source")
    claim = tested[CLAIMED_BITS].grade if CLAIMED_BITS in tested else "not tested"
    return {name: getattr(best, name) for name in fields} | {"four_bit": claim}
