"""Scaling curves: quality against total model bits, one curve per precision.

The k-bit paper asks its question at a *fixed budget of total bits*. A small model in 16 bit and a four times larger
one in 4 bit cost the same memory: which is better? So each precision k is a curve value_k(total_bits) through the
models of one family, and the curves are compared at common budgets. Between two models a curve is linear in
log(total_bits), as in the paper, which found that power laws in (parameters, bits) fit poorly.

Dettmers & Zettlemoyer, "The case for 4-bit precision: k-bit inference scaling laws", ICML 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from kbit.analysis.curves.settings import SETTING_COLUMNS, complete_settings, make_labels, name_variant
from kbit.numerics.spec import BASELINE_BITS

VARIANT: Final = ["family", "label", "block_size"]  # what is held fixed while precisions are compared
POINT: Final = [*VARIANT, "bits", "model"]  # one marker of a figure
READING: Final = ["total_bits", "value", "low", "high"]

NEEDED: Final = [
    "family", "bits", "data_type", "block_size", "model", *READING, "key", "exponent_bits", "method", "task", "metric",
]  # fmt: skip

CURVE_COLUMNS: Final = [
    "family", "bits", "data_type", "block_size", "label", "model", *READING, "key", *SETTING_COLUMNS,
]  # fmt: skip

BUDGETS: Final = 200  # grid points over the budgets compared: shares come out to half a percent
# Rounding of the interpolation is near 1e-16, and accuracies of 10^6 items differ by 1e-6. A tie is between the two.
TIE: Final = 1e-9
Floats = npt.NDArray[np.float64]
Bounds = tuple[tuple[float, Any], tuple[float, Any]]  # the least and the largest budget, each with what sets it


class AmbiguousResults(ValueError):
    """Several experiments claim the same point of a curve, and the results do not say which one is meant.

    Attributes:
        family: the family whose results are ambiguous, or None if it is not one family alone.
    """

    def __init__(self, message: str, family: str | None = None) -> None:
        super().__init__(message)
        self.family = family


@dataclass(frozen=True)
class Measure:
    """A column of the study: what is plotted on the y axis.

    Attributes:
        name: the words that figures print.
        metric, task: the cells that tell its rows of the results.
        higher_is_better: True for accuracies, False for losses.
    """

    name: str
    metric: str
    task: str
    higher_is_better: bool


ZERO_SHOT: Final = Measure("mean zero-shot accuracy", "acc", "mean_zero_shot", higher_is_better=True)
# kbit's own metrics that are better if they are lower
LOSSES: Final = (
    "cross_entropy", "perplexity", "kl_divergence", "bits_per_byte", "word_cross_entropy", "word_perplexity",
    "byte_perplexity",
)  # fmt: skip


def find_cross_entropy(results: pd.DataFrame) -> Measure | None:
    """Return the cross entropy of the text with the most results (ties: first by name), or None without any."""
    if results.empty:
        return None
    measured = results.loc[results["metric"] == "cross_entropy", "task"]
    texts = measured[~measured.str.startswith("training/")].value_counts().sort_index()
    return None if texts.empty else Measure("cross entropy", "cross_entropy", str(texts.idxmax()), False)


def find_measures(results: pd.DataFrame) -> list[Measure]:
    """Return the measures of the study that the results hold: mean zero-shot accuracy, cross entropy."""
    has_accuracy = ((results["metric"] == ZERO_SHOT.metric) & (results["task"] == ZERO_SHOT.task)).any()
    loss = find_cross_entropy(results)
    return [*([ZERO_SHOT] if has_accuracy else []), *([loss] if loss else [])]


def pick_rows(results: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """Return the rows of one measurement, one for each experiment that has a value.

    Raises:
        AmbiguousResults: a family was measured in several ways, see refuse_mixed_evaluations.
    """
    rows = take_rows(results, metric, task)
    refuse_mixed_evaluations(rows)
    return rows


def take_rows(results: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """Return what pick_rows does, in however many ways a family was measured.

    What is drawn of such rows still has to go through refuse_mixed_evaluations.
    """
    rows = results[(results["metric"] == metric) & (results["task"] == task) & results["value"].notna()]
    return rows.drop_duplicates("key")


def precision_curves(results: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """Return the points of all precision curves of one measurement.

    A variant is a data type with its settings, and a block size, of one family. Its label is the data type followed by
    every setting that is not the paper's ("float E2", "nf row", "nf gptq"). The family's 16-bit baseline belongs to
    each of its variants. Seeds are averaged, and so are the ends of their intervals: the items are the same under each
    seed, so more seeds do not narrow the interval. A missing value is no point.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results). A column seed is optional.
        metric: a metric, for example "acc" or "cross_entropy".
        task: a task, for example "mean_zero_shot", or the name of a text.

    Returns:
        Columns family, bits, data_type, block_size (NA: whole tensor), label, model, total_bits, value, low, high, key
        (the experiment's, or several seeds' keys separated by blanks), and those of settings.SETTING_COLUMNS, in which
        a setting that is not stored has its default. The rows are sorted, and there are none if nothing was measured.
        A family with only a baseline has one variant, whose label is None.

    Raises:
        ValueError: a column is missing.
        AmbiguousResults: experiments of the same seed share a point, or a family was measured in several ways.
    """
    missing = [column for column in NEEDED if column not in results]
    if missing:
        raise ValueError(f"results lack the columns {missing}; pass what kbit.read_results returns")
    results = split_families(results)
    rows = results[(results["metric"] == metric) & (results["task"] == task) & results["value"].notna()]
    refuse_mixed_evaluations(rows)
    rows = rows.assign(block_size=rows["block_size"].astype("Int64"))
    is_baseline = rows["bits"] == BASELINE_BITS
    quantized = complete_settings(rows[~is_baseline])
    quantized = quantized.assign(label=make_labels(quantized))
    points = merge_repeats(pd.concat([quantized, spread_baseline(rows[is_baseline], quantized)], ignore_index=True))
    return points.sort_values([*VARIANT, "bits", "total_bits", "model"], ignore_index=True)[CURVE_COLUMNS]


def split_families(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results in which a family of several architectures is several families, "runs (GPT2LMHeadModel)".

    Models of two architectures are two curves, however their folders are named.
    """
    if results.empty or "architecture" not in results:
        return results
    pairs = results[["family", "architecture"]].drop_duplicates().dropna()
    several = pairs.loc[pairs["family"].duplicated(), "family"]
    is_mixed = results["family"].isin(several) & results["architecture"].notna()
    if not is_mixed.any():
        return results
    names = results["family"].astype(str) + " (" + results["architecture"].astype(str) + ")"
    return results.assign(family=results["family"].mask(is_mixed, names))


def spread_baseline(baseline: pd.DataFrame, quantized: pd.DataFrame) -> pd.DataFrame:
    """Return the 16-bit rows once for each variant of their family, with its settings but for the exponent bits.

    The exponent bits of one variant depend on the precision: they are the paper's.
    """
    own = ["data_type", *SETTING_COLUMNS]
    variants = quantized.drop_duplicates(VARIANT)[[*VARIANT, *own]]
    variants = variants.assign(exponent_bits=pd.Series(pd.NA, variants.index, dtype="Int64"))
    return baseline.drop(columns=["block_size", *own], errors="ignore").merge(variants, on="family", how="left")


def refuse_mixed_evaluations(rows: pd.DataFrame) -> None:
    """Raise AmbiguousResults if one family was measured in several ways: other tasks, items, windows or dtype."""
    if "evaluation" not in rows:
        return
    for family, group in rows.groupby("family"):
        counts = group["evaluation"].value_counts().sort_index()
        ways = [str(way) for way in counts.index]
        if len(ways) > 1:
            # rows of other tasks and texts are described in other words, and "==" would drop them all
            others = " and ".join(f"evaluation != '{way}'" for way in ways if way != counts.idxmax())
            raise AmbiguousResults(
                f"{family} was measured in {len(ways)} ways that do not compare: {'; '.join(ways)}. "
                f'Keep one, for example that with the most results: --where "{others}"',
                str(family),
            )


def prefer_baseline(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each model's experiments with the most bits, one row of each task and metric.

    This is for statements about a model, not about a way to quantize it. Where a model was measured at 16 bits, that
    experiment counts alone.

    Raises:
        AmbiguousResults: a family was measured in several ways at those bits.
    """
    widest = rows[rows["bits"] == rows.groupby("model")["bits"].transform("max")]
    refuse_mixed_evaluations(widest)
    return widest.sort_values("key", kind="stable").drop_duplicates(["model", "task", "metric"])


def is_contest(precisions: Iterable[int]) -> bool:
    """Whether a variant has two quantized precisions of two sizes each. One against 16 bits alone wins by default.

    Args:
        precisions: those of two sizes or more, such as sort_curves returns.
    """
    return len([bits for bits in precisions if bits < BASELINE_BITS]) >= 2


def merge_repeats(points: pd.DataFrame) -> pd.DataFrame:
    """Return one row per point, averaged over seeds. An equal value, measured again beside other tasks, counts once."""
    points = points.drop_duplicates([*POINT, *points.columns.intersection(["seed"]), *READING])
    if not points.duplicated(POINT).any():  # one seed, as nearly always: joining 35,000 groups takes seconds
        return points
    refuse_ambiguous(points)
    groups = points.groupby(POINT, dropna=False)
    means = groups.agg({"value": "mean", "low": "mean", "high": "mean", "key": " ".join})
    return points.drop_duplicates(POINT).drop(columns=means.columns).merge(means.reset_index(), on=POINT)


def refuse_ambiguous(points: pd.DataFrame) -> None:
    """Raise AmbiguousResults if two rows share a point and a seed, or a point has two sizes in bits."""
    sizes = points.groupby(POINT, dropna=False)["total_bits"].transform("nunique")
    clash = points[points.duplicated([*POINT, *points.columns.intersection(["seed"])], keep=False) | (sizes > 1)]
    if clash.empty:
        return
    first = clash.iloc[0]
    same = clash[(clash[POINT].astype(str) == first[POINT].astype(str)).all(axis=1)]
    differing = [
        str(column) for column in same if column not in ("key", *READING) and same[column].nunique(dropna=False) > 1
    ]
    variant = name_variant(first["label"], first["block_size"])
    raise AmbiguousResults(
        f"{first['model']} at {first['bits']} bit ({variant}) has {len(same)} results that differ in "
        f"{', '.join(differing) or 'a setting that is not a column'}; keep one of them",
        str(first["family"]),
    )


def split_variants(curves: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield each variant as ({family, label, block_size}, its curves), sorted."""
    for values, group in curves.groupby(VARIANT, dropna=False):
        yield dict(zip(VARIANT, values, strict=True)), group


def list_variants(curves: pd.DataFrame) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.intp]]]:
    """Yield each variant as split_variants does, but with the places of its rows instead of a table of them."""
    codes = curves.groupby(VARIANT, dropna=False).ngroup().to_numpy()
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(codes) else []
    names = curves[VARIANT].iloc[[part[0] for part in parts]].to_dict("records")
    for name, part in zip(names, parts, strict=True):
        yield {str(column): value for column, value in name.items()}, part


def interpolate(sizes: Floats, values: Floats, total_bits: npt.ArrayLike) -> Floats:
    """Return a curve's value at each budget, linear in log(total_bits) between its points.

        y(b) = y_i + (y_(i+1) - y_i) * log(b / b_i) / log(b_(i+1) / b_i)   for b_i <= b <= b_(i+1)

    Args:
        sizes: b_i, bits of the whole model, ascending.
        values: y_i.
        total_bits: budgets, in bits.

    Returns:
        An array of total_bits' shape. It is NaN outside the curve's range, as a curve is never extrapolated.
    """
    budgets = np.log(np.asarray(total_bits, dtype=np.float64))
    return np.asarray(np.interp(budgets, np.log(sizes), values, left=np.nan, right=np.nan), dtype=np.float64)


def shared_budgets(curves: pd.DataFrame, count: int = BUDGETS, by: str = "bits") -> Floats:
    """Return log-spaced budgets at which every quantized curve of one panel is defined, perhaps none.

    Outside them a curve would win only because the others have no model that small or that large, which says nothing
    about precisions. With a single quantized curve the 16-bit baseline takes its place beside it. A curve of one size
    only is a point and does not take part.

    Args:
        curves: points of one panel.
        count: the number of budgets.
        by: the column that tells the curves apart.
    """
    bounds = bound_budgets(curves, by)
    if bounds is None:
        return np.empty(0)
    (low, _), (high, _) = bounds
    return np.asarray(np.geomspace(low, high, count), dtype=np.float64)


def sort_curves(curves: pd.DataFrame, by: str = "bits") -> dict[Any, npt.NDArray[np.intp]]:
    """Return the curves of two sizes or more: the places of each one's points, in order of total_bits."""
    return sort_points(curves["total_bits"].to_numpy(dtype=np.float64), curves[by].to_numpy())


def sort_points(sizes: Floats, names: npt.NDArray[Any]) -> dict[Any, npt.NDArray[np.intp]]:
    """Return what sort_curves does, of the points' sizes and of the curve that each belongs to."""
    names, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
    order, ends = np.lexsort((sizes, codes)), np.cumsum(counts)
    places = [order[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return {name: own for name, own in zip(names.tolist(), places, strict=True) if sizes[own[-1]] > sizes[own[0]]}


def bound_budgets(curves: pd.DataFrame, by: str = "bits") -> Bounds | None:
    """Return the ends of shared_budgets, each with the curve that sets it, or None if the curves never meet."""
    sizes, bits = curves["total_bits"].to_numpy(dtype=np.float64), curves["bits"].to_numpy(dtype=np.float64)
    return bound_points(sizes, bits, sort_curves(curves, by))


def bound_points(sizes: Floats, bits: Floats, places: Mapping[Any, npt.NDArray[np.intp]]) -> Bounds | None:
    """Return what bound_budgets does, of the points' sizes and bits, and of what sort_points found."""
    ends = [(sizes[own[0]], sizes[own[-1]], bits[own].min(), name) for name, own in places.items()]
    quantized = [end for end in ends if end[2] < BASELINE_BITS]
    compared = quantized if len(quantized) >= 2 else ends
    if len(compared) < 2:
        return None
    first, last = max(compared, key=lambda end: end[0]), min(compared, key=lambda end: end[1])
    return ((first[0], first[3]), (last[1], last[3])) if first[0] < last[1] else None


def tabulate_curves(curves: pd.DataFrame, by: str = "bits") -> pd.DataFrame:
    """Return one panel at its shared budgets: index total_bits, a column per curve, NaN where undefined."""
    budgets = shared_budgets(curves, by=by)
    sizes, values = (curves[column].to_numpy(dtype=np.float64) for column in ("total_bits", "value"))
    columns = {name: interpolate(sizes[own], values[own], budgets) for name, own in sort_curves(curves, by).items()}
    return pd.DataFrame(columns, index=pd.Index(budgets, name="total_bits"))


def best_precision(curves: pd.DataFrame, higher_is_better: bool) -> pd.DataFrame:
    """Return the best precision at each shared budget of each variant.

    Args:
        curves: from precision_curves.
        higher_is_better: True for accuracies, False for losses.

    Returns:
        Columns family, label, block_size, total_bits (the budget), bits (the best one, NA for a tie), value (the best
        curve's), margin (>= 0: the distance to the second best, in the measure's unit). A variant whose curves never
        meet has no rows.
    """
    sign = 1.0 if higher_is_better else -1.0
    parts = [pd.DataFrame(columns=[*VARIANT, "total_bits", "bits", "value", "margin"])]
    for variant, group in split_variants(curves):
        table = tabulate_curves(group)
        if table.empty:
            continue
        # NaN sorts last, so the first two columns hold the best and the second best.
        ranked = -np.sort(-sign * table.to_numpy(), axis=1)
        margin = ranked[:, 0] - ranked[:, 1]
        bits = (sign * table).idxmax(axis=1).astype("Int64").mask(margin <= TIE)
        part = pd.DataFrame({"bits": bits, "value": sign * ranked[:, 0], "margin": margin}).reset_index()
        parts.append(part.assign(**variant))
    best = pd.concat(parts[1:] or parts, ignore_index=True)
    return best[parts[0].columns]


def optimal_share(best: pd.DataFrame) -> pd.DataFrame:
    """Return the share of the log-budget range that each precision wins.

    Args:
        best: from best_precision. Its budgets are evenly spaced in log(total_bits), so counting them measures the
            range.

    Returns:
        Columns family, label, block_size, bits (NA: tied), share. The shares of a variant sum to 1, and the largest
        comes first.
    """
    counts = best.groupby([*VARIANT, "bits"], dropna=False).size().rename("share").reset_index()
    totals = counts.groupby(VARIANT, dropna=False)["share"].transform("sum")
    counts["share"] = counts["share"] / totals
    counts["bits"] = counts["bits"].astype("Int64")
    order = [*VARIANT, "share"]
    return counts.sort_values(order, ascending=[True, True, True, False], ignore_index=True, kind="stable")
