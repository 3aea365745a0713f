"""How far each curve is from the best one of its panel, paired: on the same items, at the same bits."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Floats, Measure, tabulate_curves
from kbit.analysis.statistics.frontier import draw_values, weigh_curve

DIFFERENCE: Final = ["panel", "series", "total_bits", "difference", "low", "high", "reference"]

# A curve is extended by so much in the logarithm of bits: codebooks of a model's own differ in size by less.
EDGE: Final = 0.02


def compare_with_best(
    curves: pd.DataFrame, measure: Measure, results: pd.DataFrame | None
) -> tuple[pd.DataFrame, list[str]]:
    """Return the difference of each point to its panel's best curve at the point's bits, with its paired interval.

        d = y - y_best(b)        b = the point's total bits, y_best linear in log(b) between two points

    The best curve is the one with the best mean over the shared budgets. One draw resamples the items once for all
    points, so what chance they share cancels in d.

    Args:
        curves: points with the columns panel and series.
        measure: the measure that they show.
        results: the table behind the points, see frontier.draw_values.

    Returns:
        Columns DIFFERENCE in the measure's own unit and direction (a loss above 0 is worse). reference is the best
        curve's series. Points beyond its ends by more than EDGE are left out, as are panels whose curves never meet.
        Besides, the panels without rows because the store lacks their items: unpaired intervals would be too wide.
    """
    parts: list[pd.DataFrame] = []
    unpaired: list[str] = []
    for panel, points in curves.groupby("panel", sort=False):
        points = points.reset_index(drop=True)
        values = tabulate_curves(points, by="series").dropna(axis=1)
        if values.empty or values.shape[1] < 2:
            continue
        draws = draw_values(points, measure, results)
        if not draws.paired:
            unpaired.append(str(panel))
            continue
        means = values.mean()
        best = str(means.idxmax() if measure.higher_is_better else means.idxmin())
        rows = subtract_curve(points, best)
        low, high = np.quantile(draws.values @ np.nan_to_num(rows).T, [0.025, 0.975], axis=0)
        value = np.nan_to_num(rows) @ points["value"].to_numpy(dtype=np.float64)
        rest = points[["panel", "series", "total_bits"]].assign(difference=value, low=low, high=high, reference=best)
        parts.append(rest[~np.isnan(rows).any(axis=1)].assign(panel=panel))
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=DIFFERENCE)
    return found, unpaired


def subtract_curve(points: pd.DataFrame, series: str) -> Floats:
    """Return the weights [points, points] of each point's difference to a curve at its bits.

    They are NaN where the curve, extended by EDGE, does not reach.
    """
    sizes = points["total_bits"].to_numpy(dtype=np.float64)
    own = np.flatnonzero((points["series"] == series).to_numpy())
    own = own[np.argsort(sizes[own])]
    weights = weigh_curve(sizes[own], sizes)
    for ends in (own[:2], own[-1:-3:-1]):  # the curve's first and last point, each with its neighbour
        start, step = np.log(sizes[ends[0]]), np.log(sizes[ends[1]] / sizes[ends[0]])
        beyond = (np.log(sizes) - start) / step
        near = np.isnan(weights).any(axis=1) & (np.abs(np.log(sizes) - start) <= EDGE)
        weights[near] = 0.0
        weights[np.ix_(near, np.searchsorted(sizes[own], sizes[ends]))] = np.stack([1 - beyond, beyond], axis=1)[near]
    rows = np.eye(len(points))
    rows[:, own] -= weights
    return rows
