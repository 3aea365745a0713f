"""The contests of a study: what its results compare, as combinations of their points (see sequential).

precision   the precisions of one data type and its settings, over the budgets that they share: "k bits are best"
setting     the data types and settings of one precision, likewise: "nf is best at 4 bits"
frontier    everything of one family, at each measured size by itself: "what is best for B bits"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import (
    VARIANT,
    Floats,
    Measure,
    find_measures,
    is_contest,
    precision_curves,
    shared_budgets,
    sort_curves,
    split_families,
    split_variants,
)
from kbit.analysis.curves.settings import name_variant
from kbit.analysis.statistics.frontier import weigh_points
from kbit.analysis.statistics.stopping.sequential import Contest
from kbit.numerics.spec import BASELINE_BITS


@dataclass(frozen=True)
class Question:
    """A contest of a study, with what its points are.

    Attributes:
        contest: the contest.
        measure: what the points are values of.
        keys: the keys of the experiments behind each point, of which a point is the mean.
        claim: the kind of the contest, of kbit.experiments.config.CLAIMS.
    """

    contest: Contest
    measure: Measure
    keys: tuple[tuple[str, ...], ...]
    claim: str


def list_questions(results: pd.DataFrame, claims: tuple[str, ...]) -> list[Question]:
    """Return the contests of a table of results that have two options or more.

    Args:
        results: from kbit.read_results.
        claims: which kinds to return.

    Raises:
        AmbiguousResults: see precision_curves.
    """
    results = split_families(results)
    found: list[Question] = []
    for family, rows in results.groupby("family"):
        for measure in find_measures(rows):
            curves = precision_curves(rows, measure.metric, measure.task)
            for claim in claims:
                contests = _LISTS[claim](str(family), curves)
                found += [Question(contest, measure, keys, claim) for contest, keys in contests]
    return found


Found = Iterator[tuple[Contest, tuple[tuple[str, ...], ...]]]


def list_precisions(family: str, curves: pd.DataFrame) -> Found:
    """Yield the contest of the precisions of each variant that has several."""
    for variant, group in split_variants(curves):
        if is_contest(sort_curves(group, "bits")):
            name = f"{family}, {name_variant(variant['label'], variant['block_size'])}"
            yield from make_contest(name, group, "bits", "{}-bit")


def list_settings(family: str, curves: pd.DataFrame) -> Found:
    """Yield the contest of the variants of each quantized precision that has several."""
    for bits, group in curves[curves["bits"] < BASELINE_BITS].groupby("bits"):
        yield from make_contest(f"{family}, {bits}-bit", name_settings(group), "setting", "{}")


def list_budgets(family: str, curves: pd.DataFrame) -> Found:
    """Yield a contest of all curves of a family at each measured size within the budgets that they share."""
    twin = (curves["bits"] == BASELINE_BITS) & curves.duplicated(["bits", "model"])  # it belongs to every variant
    points = name_settings(curves[~twin])
    points["curve"] = np.where(
        points["bits"] == BASELINE_BITS, "16-bit", points["setting"] + ", " + points["bits"].astype(str) + "-bit"
    )
    shared = shared_budgets(points, by="curve")
    if not shared.size:
        return
    sizes = np.unique(points["total_bits"].to_numpy(dtype=np.float64))
    for size in sizes[(sizes >= shared[0]) & (sizes <= shared[-1])]:
        yield from make_contest(f"{family}, {size / 1e6:.3g} Mbit", points, "curve", "{}", np.array([size]))


_LISTS: Final = {"precision": list_precisions, "setting": list_settings, "frontier": list_budgets}


def name_settings(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points with the name of each one's variant in the column setting."""
    pairs: Any = zip(points[VARIANT[1]], points[VARIANT[2]], strict=True)
    return points.assign(setting=[name_variant(label, block) for label, block in pairs])


def make_contest(name: str, points: pd.DataFrame, by: str, words: str, budgets: Floats | None = None) -> Found:
    """Yield the contest of the curves of a panel, or nothing if fewer than two of them meet.

    The lead of one curve over another is the mean over the budgets where both are defined, as in verdicts.

    Args:
        name: what competes.
        points: the points.
        by: the column that tells the curves apart.
        words: how an option is called, with {} for the curve's name.
        budgets: bits of the whole model. None: those that the curves share.
    """
    points = points.reset_index(drop=True)
    budgets = shared_budgets(points, by=by) if budgets is None else budgets
    curves = sort_curves(points, by)
    if budgets.size and len(curves) > 1:
        weights = weigh_points(points, budgets, by)
        leads = np.full((len(curves), len(curves), len(points)), np.nan)
        for i, _ in enumerate(curves):
            leads[i, i] = 0.0
        for (i, first), (j, second) in combinations(enumerate(curves), 2):
            rows = weights[first] - weights[second]
            if (met := ~np.isnan(rows).any(axis=1)).any():
                leads[i, j] = rows[met].mean(axis=0)
                leads[j, i] = -leads[i, j]
        keys = tuple(tuple(str(key).split()) for key in points["key"])
        own = tuple(tuple(int(point) for point in places) for places in curves.values())
        yield Contest(name, tuple(words.format(curve) for curve in curves), leads, own), keys
