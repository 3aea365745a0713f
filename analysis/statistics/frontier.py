"""Uncertainty of curves: which one is best at a budget of bits, and with what probability.

Two variants of a model are scored on the same items, so most of the chance in their accuracies is shared and cancels
in their difference. The bootstrap keeps it: one draw resamples the items of each task once, for all points of a panel
(Koehn 2004, paired bootstrap). Interpolation is linear in the values, so a curve at all budgets is one matrix product.

Where a store has no scores of single items, points are drawn independently from their own 95% intervals. Differences
then look less certain than they are, and `Draws.paired` is False.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import TIE, VARIANT, ZERO_SHOT, Floats, Measure, shared_budgets, sort_curves
from kbit.evaluation.measurement import Z_95
from kbit.numerics.spec import BASELINE_BITS
from kbit.store.items import read_items_by_task
from kbit.store.stopped.complete import read_completed

CHOICE: Final = ["total_bits", "label", "block_size", "bits", "value", "low", "high", "chance"]
SAME_MEAN: Final = 1e-6  # items are float32, exact to 1e-7, and one of the paper's 18,300 moves the mean by 2e-5
DRAWS: Final = 1000  # a probability near 1/2 is known to 0.03, an end of a 95% interval to 1% of its rank


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of the points of one panel.

    Attributes:
        values: [draws, points], the points in the order of the curves they were drawn for.
        paired: whether items were resampled together for all points. Otherwise points were drawn independently from
            their intervals.
    """

    values: Floats
    paired: bool

    @property
    def source(self) -> str:
        """Say how the draws were made, for captions."""
        return "paired bootstrap over items" if self.paired else "unpaired: no items of these values in this store"


def find_pareto_frontier(points: pd.DataFrame, higher_is_better: bool) -> pd.DataFrame:
    """Return the points that no other point of the table beats: fewer bits and a value at least as good.

    Args:
        points: a table with the columns total_bits and value, of any families and variants together.

    Returns:
        The rows of the frontier in order of total_bits. Among equal points the first stays.
    """
    sign = 1.0 if higher_is_better else -1.0
    ordered = points.assign(_rank=-sign * points["value"]).sort_values(["total_bits", "_rank"], kind="stable")
    best = (sign * ordered["value"]).cummax().shift(fill_value=-np.inf)
    return ordered[sign * ordered["value"] > best].drop(columns="_rank")


def draw_values(
    curves: pd.DataFrame, measure: Measure, results: pd.DataFrame | None = None, count: int = DRAWS, seed: int = 0
) -> Draws:
    """Return bootstrap draws of every point of a panel, paired if the store of the results has the items.

    Args:
        curves: from precision_curves (or rows of it).
        measure: the measure that the curves show.
        results: the table that the curves come from, which says where its store is (results.attrs["store"]).
        count: the number of draws.
        seed: the seed of the draws.
    """
    rng = np.random.default_rng(seed)
    items = None if results is None else read_panel_items(curves, measure, results)
    if items is not None:
        return Draws(np.mean([resample_means(task, count, rng) for task in items], axis=0), paired=True)
    value = curves["value"].to_numpy(dtype=np.float64)
    error = ((curves["high"] - curves["low"]) / (2 * Z_95)).to_numpy(dtype=np.float64)
    return Draws(value + error * rng.standard_normal((count, value.size)), paired=False)


def read_panel_items(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Floats] | None:
    """Return the scores behind a panel's points, an array [points, items] for each task.

    The tasks of a mean are those that the store has for its experiments, whatever rows of the table are left. Points of
    several seeds are the mean over their experiments. None if scores are missing, or a value is not their mean.
    """
    store = results.attrs.get("store")
    if store is None:
        return None
    keys = [str(key).split() for key in curves["key"]]
    wanted = sorted({key for group in keys for key in group})
    early = set(results.loc[results["measured"] < 1, "key"]) & set(wanted) if "measured" in results else set()
    scores = read_scores(store, measure.metric, wanted, early)
    tasks = sorted(scores) if measure.task == ZERO_SHOT.task else [measure.task]
    if not tasks or not all(is_complete(scores.get(task, {}), wanted) for task in tasks):
        return None
    arrays = [np.stack([np.mean([scores[task][key] for key in group], axis=0) for group in keys]) for task in tasks]
    means = np.mean([array.mean(axis=1) for array in arrays], axis=0)
    value = curves["value"].to_numpy(dtype=np.float64)
    return arrays if np.allclose(means, value, rtol=SAME_MEAN, atol=SAME_MEAN) else None


def read_scores(store: str, metric: str, keys: Sequence[str], early: Collection[str]) -> dict[str, dict[str, Floats]]:
    """Return the scores of the items by task and experiment.

    Args:
        store: the store.
        metric: the metric.
        keys: the keys of the experiments.
        early: those of them that have stopped early, whose scores change with each round of the store.
    """
    whole = read_whole_scores(store, metric, tuple(key for key in keys if key not in early))
    completed = read_completed(store, metric, early) if early else {}
    return {task: whole.get(task, {}) | completed.get(task, {}) for task in whole.keys() | completed.keys()}


@lru_cache(maxsize=16)
def read_whole_scores(store: str, metric: str, keys: tuple[str, ...]) -> dict[str, dict[str, Floats]]:
    """Return the scores of finished experiments, see read_scores. There are none if the first experiment has none.

    They are cached because several figures ask for the same points, and what a key stands for does not change.
    """
    if not read_items_by_task(store, metric, keys[:1]):  # a store without items need not be read whole
        return {}
    return read_items_by_task(store, metric, keys)


def is_complete(scores: dict[str, Floats], keys: Sequence[str]) -> bool:
    """Whether all experiments have scores of as many items."""
    return len(scores) == len(keys) and len({array.size for array in scores.values()}) == 1


def resample_means(scores: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Return means over resampled items, [count, points]. Every draw takes the same items for all points.

    Args:
        scores: the score of each item, [points, items].
        count: the number of draws.
        rng: the source of the draws.
    """
    n = scores.shape[1]
    weights = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(count)])
    return np.asarray(weights @ scores.T / n, dtype=np.float64)


def weigh_points(curves: pd.DataFrame, budgets: Floats, by: str = "bits") -> dict[object, Floats]:
    """Return the interpolation of each curve as a matrix [budgets, points]: value at a budget = row @ values.

    The columns are the rows of `curves`, in its order. Curves of one size are left out. Outside a curve is NaN.
    """
    sizes = curves["total_bits"].to_numpy(dtype=np.float64)
    matrices: dict[object, Floats] = {}
    for name, own in sort_curves(curves, by).items():
        matrices[name] = np.zeros((budgets.size, len(curves)))
        matrices[name][:, own] = weigh_curve(sizes[own], budgets)
    return matrices


def weigh_curve(sizes: Floats, budgets: Floats, *, extend: bool = False) -> Floats:
    """Return the interpolation of one curve as a matrix [budgets, points]. Outside the curve it is NaN.

    Args:
        sizes: the points' sizes, bits, ascending.
        budgets: bits of the whole model.
        extend: whether to give the largest model's value beyond its size, as a budget need not be spent.
    """
    x, at = np.log(sizes), np.log(budgets)
    matrix = np.zeros((at.size, x.size))
    below = np.clip(np.searchsorted(x, at, side="right") - 1, 0, x.size - 2)  # the point before each budget
    inside = (at >= x[0]) & (at < x[-1])
    rows, below = np.flatnonzero(inside), below[inside]
    per_step, beyond = 1 / (x[below + 1] - x[below]), at[inside] - x[below]
    matrix[rows, below] = 1 - per_step * beyond
    matrix[rows, below + 1] = per_step * beyond
    matrix[at >= x[-1], -1] = 1.0
    matrix[(at < x[0]) | ((at > x[-1]) & (not extend))] = np.nan
    return matrix


def best_chances(curves: pd.DataFrame, draws: Draws, higher_is_better: bool, by: str = "bits") -> pd.DataFrame:
    """Return the probability of each curve of one panel to be the best at each shared budget.

    P(best) = share of the draws in which the curve is best of those defined at the budget. Equal ones share a draw.

    Returns:
        Index total_bits (the budgets), a column for each curve. Rows sum to 1. Empty if the curves never meet.
    """
    budgets = shared_budgets(curves, by=by)
    matrices = weigh_points(curves, budgets, by)
    if not budgets.size:
        return pd.DataFrame(columns=list(matrices), index=pd.Index(budgets, name="total_bits"))
    sign = 1.0 if higher_is_better else -1.0
    counts = np.zeros((budgets.size, len(matrices)))
    own = [np.flatnonzero((matrix != 0).any(axis=0)) for matrix in matrices.values()]  # the points of each curve
    rows = [sign * matrix[:, places].T for matrix, places in zip(matrices.values(), own, strict=True)]
    for chunk in np.array_split(draws.values, max(1, len(draws.values) // 100)):  # all draws at once would be large
        values = np.stack([chunk[:, places] @ row for places, row in zip(own, rows, strict=True)])
        counts += share_wins(values).sum(axis=1).T  # NaN: not defined there
    return pd.DataFrame(counts / len(draws.values), pd.Index(budgets, name="total_bits"), columns=list(matrices))


def share_wins(values: Floats) -> Floats:
    """Return 1 for the largest value along the first axis and 0 for others. Equal ones share the 1.

    A missing value is never the largest.
    """
    best = values >= np.fmax.reduce(values, axis=0) - TIE
    count = best.sum(axis=0)
    return np.asarray(best if count.max() == 1 else best / np.maximum(count, 1), dtype=np.float64)


def choose_precision(
    curves: pd.DataFrame, measure: Measure, budgets: Sequence[float], results: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return, for each budget of bits, every curve that exists there, with its chance to be the best.

    This is the table to read for "which model fits into B bits". All precisions, data types and block sizes compete,
    each with the largest model that fits (between two sizes: interpolated).

    Args:
        curves: the curves of one family, from precision_curves.
        measure: the measure that the curves show.
        budgets: bits of the whole model.
        results: the table behind the curves, see draw_values.

    Returns:
        Columns total_bits (the budget), label, block_size, bits, value, low, high (95%, from the draws), chance. At
        each budget the curve with the best value comes first, then the others by their chance. The second row is the
        likeliest rival, which need not have the second best value.
    """
    is_twin = (curves["bits"] == BASELINE_BITS) & curves.duplicated(["bits", "model"])  # it belongs to every variant
    points = curves[~is_twin].reset_index(drop=True)
    points["curve"] = points.groupby([*VARIANT, "bits"], dropna=False).ngroup()
    about = points.drop_duplicates("curve").set_index("curve")[CHOICE[1:4]]
    known: list[list[tuple[object, float, Floats]]] = [[] for _ in budgets]
    for curve, values, drawn in interpolate_draws(points, np.asarray(budgets, dtype=np.float64), measure, results):
        for place in np.flatnonzero(~np.isnan(values)):
            known[place].append((curve, float(values[place]), drawn[place]))
    parts = [
        rank_choices(about, found, measure).assign(total_bits=budget)
        for budget, found in zip(budgets, known, strict=True)
        if found
    ]
    return pd.concat(parts, ignore_index=True)[CHOICE] if parts else pd.DataFrame(columns=CHOICE)


def interpolate_draws(
    points: pd.DataFrame, budgets: Floats, measure: Measure, results: pd.DataFrame | None
) -> Iterator[tuple[object, Floats, Floats]]:
    """Yield each curve (column curve) with its values at the budgets and their draws, [budgets, draws].

    A budget needs two points of a curve, and only points that some budget needs are drawn. A value below the curve's
    smallest model is NaN. A draw is NaN where a point that it needs has no interval.
    """
    sizes, value = (points[column].to_numpy(dtype=np.float64) for column in ("total_bits", "value"))
    places = sort_curves(points, "curve")
    weights = {curve: weigh_curve(sizes[own], budgets, extend=True) for curve, own in places.items()}
    filled = {curve: np.where(np.isnan(matrix), 0.0, matrix) for curve, matrix in weights.items()}
    is_used = np.zeros(len(points), dtype=bool)
    for curve, own in places.items():
        is_used[own] = (filled[curve] != 0).any(axis=0)
    used = draw_values(points[is_used].reset_index(drop=True), measure, results).values.T
    draws = np.zeros((len(points), used.shape[1]))
    draws[is_used] = np.nan_to_num(used)
    unknown = np.zeros(len(points))
    unknown[is_used] = np.isnan(used).any(axis=1)
    for curve, own in places.items():
        drawn = weights[curve] @ draws[own]
        if unknown[own].any():
            drawn[filled[curve] @ unknown[own] > 0] = np.nan
        yield curve, weights[curve] @ value[own], drawn


def rank_choices(about: pd.DataFrame, found: list[tuple[object, float, Floats]], measure: Measure) -> pd.DataFrame:
    """Return the rows of choose_precision for one budget.

    Args:
        about: label, block_size and bits of each curve.
        found: each curve that exists at the budget, its value there, and the value's draws.
        measure: the measure that the curves show.
    """
    draws = np.stack([drawn for _, _, drawn in found], axis=1)
    sign = 1.0 if measure.higher_is_better else -1.0
    table = about.loc[[curve for curve, _, _ in found]].reset_index(drop=True)
    table["value"] = [value for _, value, _ in found]
    table["low"], table["high"] = np.quantile(draws, [0.025, 0.975], axis=0)
    wins = share_wins(sign * draws.T).mean(axis=1)
    table["chance"] = np.nan if np.isnan(draws).any() else wins  # one that is not known leaves all unknown
    by_value = table.sort_values("value", ascending=not measure.higher_is_better, ignore_index=True)
    rivals = by_value[1:].sort_values("chance", ascending=False, kind="stable")  # equal chances: by value
    return pd.concat([by_value[:1], rivals], ignore_index=True)


@dataclass(frozen=True)
class Lead:
    """The lead over the one of several rivals that decides whether the first is best.

    Attributes:
        place: the rival's place among the rivals.
        gap, low, high: the lead over it, and its interval. See find_strongest_rival.
    """

    place: int
    gap: float
    low: float
    high: float


def find_strongest_rival(draws: Draws, rows: Floats, gaps: Floats) -> Lead:
    """Return the lead that decides whether all leads are above zero, with an interval that gives the verdict.

        low_j = 2.5% quantile of d_j         high_j = l_j + c s_j,  c = 97.5% quantile of max_j (d_j - l_j) / s_j

    for leads l_j over rivals j with draws d_j of standard deviation s_j. "Best" holds if every lead is above zero, that
    is if the smallest low_j is, which errs as seldom as one low_j does. It does not hold if some lead is below zero.
    The smallest of several high_j is more often too small than each is, so they are widened for all to be right
    together. (To keep the rival that is best by value, or to take the best in each draw, would find a lead below zero
    too often: the best of several equal rivals is the one with the luckiest items.) With one rival both ends are
    quantiles.

    Args:
        draws: bootstrap draws of the points.
        rows: weights of the points in each lead, [rivals, points].
        gaps: the leads themselves, [rivals].

    Returns:
        The lead with the smallest high_j if that is below zero, else the one with the smallest low_j. Its interval is
        NaN if a point has none.
    """
    drawn = draws.values @ rows.T
    spread = np.maximum(drawn.std(axis=0), np.finfo(np.float64).tiny)  # without chance all are level: no division by 0
    reach = np.quantile(((drawn - gaps) / spread).max(axis=1), 0.975)
    low, high = np.quantile(drawn, 0.025, axis=0), gaps + reach * spread
    if np.isnan(reach):
        place = int(np.argmin(gaps))
        return Lead(place, float(gaps[place]), np.nan, np.nan)
    place = int(np.argmin(high if high.min() < 0 else low))
    return Lead(place, float(gaps[place]), float(low[place]), float(high[place]))


def mean_interval(draws: Draws, weights: Sequence[float] | Floats) -> tuple[float, float]:
    """Return the 95% interval of a linear combination of a panel's points, or NaN if a point has no interval."""
    low, high = np.quantile(draws.values @ np.asarray(weights, dtype=np.float64), [0.025, 0.975])
    return float(low), float(high)
