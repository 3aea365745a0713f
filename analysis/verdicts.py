"""The statement "k-bit is optimal" for every family, variant and measure, as a table."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.claims import CLAIMED_BITS, Trial, find_measures, line_up, try_precision
from kbit.analysis.curves import VARIANT, AmbiguousResults, precision_curves, shared_budgets, split_variants
from kbit.analysis.selections import rank_setting

MOST_VARIANTS: Final = 4  # a table that is read; --where shows others


def tabulate_verdicts(results: pd.DataFrame) -> pd.DataFrame:
    """Return the statement "k-bit is optimal" for every family and measure, with its margin.

    Of a family's variants (data type and block size) those with the most points, MOST_VARIANTS at most.

    Returns:
        Columns family, data_type, block_size, measure, precisions (that were compared), bits (the one that is best over
        most budgets), share, gap, low, high, rival, chance, grade (of "this precision is optimal"), four_bit (the grade
        of the paper's claim), source.
        Variants whose curves never meet are left out; a family measured in several ways has one row, with the reason
        as its grade.
    """
    rows: list[dict[str, Any]] = []
    for family, of_family in results.groupby("family"):
        for measure in find_measures(of_family):
            try:
                curves = precision_curves(of_family, measure.metric, measure.task)
            except AmbiguousResults as error:
                rows.append({"family": family, "measure": measure.name, "grade": str(error)})
                continue
            for variant, group in sorted(split_variants(curves), key=rank_variant)[:MOST_VARIANTS]:
                if not shared_budgets(group).size:
                    continue
                race = line_up(group, measure, results)
                trials = {bits: try_precision(race, bits) for bits in (int(str(name)) for name in race.values)}
                tested = {bits: trial for bits, trial in trials.items() if not np.isnan(trial.share)}
                if tested:
                    compared = ", ".join(map(str, sorted(tested)))
                    rows.append(variant | {"measure": measure.name, "precisions": compared} | describe_best(tested))
    columns = ["bits", "share", "gap", "low", "high", "rival", "chance", "grade", "four_bit", "source"]
    return pd.DataFrame(rows, columns=[*VARIANT, "measure", "precisions", *columns]).astype(
        {"block_size": "Int64", "bits": "Int64", "rival": "Int64"}
    )


def rank_variant(part: tuple[dict[str, Any], pd.DataFrame]) -> tuple[Any, ...]:
    """Return the place of a variant: the most points first, of equals the paper's settings."""
    variant, points = part
    return -len(points), rank_setting(variant["data_type"]), rank_setting(variant["block_size"])


def describe_best(tested: dict[int, Trial]) -> dict[str, Any]:
    """Return the row of the precision that is best over most budgets (of equals: with the largest gap)."""
    best = max(tested.values(), key=lambda trial: (trial.share, trial.gap))
    fields = ("bits", "share", "gap", "low", "high", "rival", "chance", "grade", "source")
    claim = tested[CLAIMED_BITS].grade if CLAIMED_BITS in tested else "not tested"
    return {name: getattr(best, name) for name in fields} | {"four_bit": claim}
