"""Scaling curves: quality against total model bits, one curve per precision.

The question of the k-bit paper is asked at a *fixed budget of total bits*: a small model in 16 bit and a four
times larger one in 4 bit cost the same memory; which is better? So each precision k is a curve
value_k(total_bits) through the models of one family, and the curves are compared at common budgets. Between
two models a curve is linear in log(total_bits), as in the paper, which found that power laws in (parameters,
bits) fit poorly.

Dettmers & Zettlemoyer, "The case for 4-bit precision: k-bit inference scaling laws", ICML 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from kbit.methods.config import is_int8
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS
from kbit.numerics.spec import BASELINE_BITS

VARIANT: Final = ["family", "data_type", "block_size"]  # what is held fixed while precisions are compared


POINT: Final = [*VARIANT, "bits", "model"]  # one marker of a figure


READING: Final = ["total_bits", "value", "low", "high"]


CURVE_COLUMNS: Final = ["family", "bits", "data_type", "block_size", "model", *READING, "key"]


REPEAT_COLUMNS: Final = ["exponent_bits", "method", "task", "metric"]


# Settings that make a variant of a data type: column, default, how its name says so.
SETTINGS: Final = (
    ("float_bias", "ieee", "{}"),
    ("table", None, "{}"),
    ("layout", "flat", "{}"),
    ("normalization", "absmax", "{}"),
    ("centering", False, "centred"),
    ("scale_format", "fp16", "{} scales"),
    ("rounding", "nearest", "{}"),
    ("method", "rtn", "{}"),
    ("method_options", "", "{}"),
    ("activation_threshold", 6.0, "threshold {:g}"),
    ("outlier_zscore", None, "outliers z > {:g}"),
    ("outlier_selection", "proxy", "{}"),
    ("outlier_fraction", 0.0, "outliers {:.3g}"),
    ("include", None, "with {}"),
    ("exclude", None, "without {}"),
)


BASELINE_ONLY: Final = "16-bit only"  # the variant of a family that was never quantized


BUDGETS: Final = 200  # grid points over the budgets compared: shares come out to half a percent


# Rounding of the interpolation is near 1e-16 and accuracies of 10^6 items differ by 1e-6: between the two is
# a tie.
TIE: Final = 1e-9


Floats = npt.NDArray[np.float64]


class AmbiguousResults(ValueError):
    """Several experiments claim the same point of a curve, and the results do not say which one is meant."""


@dataclass(frozen=True)
class Measure:
    """A column of the study: what is plotted on the y axis.

    Attributes:
        name: as printed.
        metric, task: which rows of the results hold it.
        higher_is_better: True for accuracies, False for losses.
    """

    name: str
    metric: str
    task: str
    higher_is_better: bool


ZERO_SHOT: Final = Measure("mean zero-shot accuracy", "acc", "mean_zero_shot", higher_is_better=True)


def find_cross_entropy(results: pd.DataFrame) -> Measure | None:
    """Return the cross entropy of the text with the most results (ties: first by name); None without any."""
    texts = results.loc[results["metric"] == "cross_entropy", "task"].value_counts().sort_index()
    return None if texts.empty else Measure("cross entropy", "cross_entropy", str(texts.idxmax()), False)


def precision_curves(results: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """Return the points of all precision curves of one measurement.

    A variant is a (family, data type, block size). The family's 16-bit baseline belongs to each of its
    variants. Settings other than the paper's become part of the data type's name ("float E2", "nf row", "nf gptq").
    Seeds are averaged, the interval's ends too: the items are the same under each seed, so more seeds do not
    narrow the interval. A value that is missing is no point.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results); a column seed is optional.
        metric: for example "acc" or "cross_entropy".
        task: for example "mean_zero_shot", or the name of a text.

    Returns:
        Columns family, bits, data_type, block_size (NA: whole tensor), model, total_bits, value, low, high, key (of
        the experiment; several seeds: their keys, separated by blanks); sorted. Empty if nothing was measured. A family
        with only a baseline has one variant, data_type None.

    Raises:
        ValueError: a column is missing.
        AmbiguousResults: experiments of the same seed share a point, or a family was measured in several ways.
    """
    missing = [column for column in [*CURVE_COLUMNS, *REPEAT_COLUMNS] if column not in results]
    if missing:
        raise ValueError(f"results lack the columns {missing}; pass what kbit.read_results returns")
    rows = results[(results["metric"] == metric) & (results["task"] == task) & results["value"].notna()]
    refuse_mixed_evaluations(rows)
    rows = rows.assign(data_type=name_data_types(rows), block_size=rows["block_size"].astype("Int64"))
    is_baseline = rows["bits"] == BASELINE_BITS
    variants = rows.loc[~is_baseline, VARIANT].drop_duplicates()
    baseline = rows[is_baseline].drop(columns=["data_type", "block_size"])
    baseline = baseline.merge(variants, on="family", how="left")
    points = merge_repeats(pd.concat([rows[~is_baseline], baseline], ignore_index=True))
    return points.sort_values([*VARIANT, "bits", "total_bits", "model"], ignore_index=True)[CURVE_COLUMNS]


def name_data_types(rows: pd.DataFrame) -> pd.Series[str]:
    """Return name_data_type of every row, worked out once for each distinct setting."""
    columns = ["bits", "data_type", "exponent_bits", *(name for name, _, _ in SETTINGS if name in rows)]
    group = rows.groupby(columns, dropna=False, sort=False, observed=True).ngroup()
    first = rows[~group.duplicated()].to_dict("records")
    names = dict(zip(group.unique(), map(name_data_type, first), strict=True))
    return pd.Series([names[number] for number in group], rows.index, dtype=object)


def name_data_type(row: Mapping[Any, Any]) -> str | None:
    """Return the data type followed by every setting that is not the default; None for the unquantized baseline.

    The defaults are the paper's: its exponent bits, "ieee", flat absmax blocks, float16 scales, round to nearest.
    """
    if row["bits"] == BASELINE_BITS:
        return None
    parts = [str(row["data_type"])]
    exponent_bits = row["exponent_bits"]
    is_float = row["data_type"] == "float" and not is_missing(exponent_bits)
    if is_float and exponent_bits != PAPER_EXPONENT_BITS[row["bits"]]:
        parts.append(f"E{exponent_bits}")
    decided = ("layout", "scale_format") if is_int8(row.get("method")) else ()  # by the method
    for column, default, words in SETTINGS:
        value = default if column in decided else row.get(column, default)
        if not is_missing(value) and value != default:
            parts.append(words.format(value))
    return " ".join(parts)


def is_missing(value: object) -> bool:
    """Whether a cell is None, NaN or NA; which of them depends on the column's type in pandas."""
    return bool(pd.isna(value))  # type: ignore[call-overload]


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
                f'Keep one, for example that with the most results: --where "{others}"'
            )


def prefer_baseline(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each model's experiments with the most bits, one row of each task and metric.

    Of what is said of a model, not of a way to quantize it: where it was measured at 16 bits, that counts alone.

    Raises:
        AmbiguousResults: a family was measured in several ways at those bits.
    """
    widest = rows[rows["bits"] == rows.groupby("model")["bits"].transform("max")]
    refuse_mixed_evaluations(widest)
    return widest.sort_values("key", kind="stable").drop_duplicates(["model", "task", "metric"])


def is_contest(curves: pd.DataFrame) -> bool:
    """Whether a variant has two quantized precisions of two sizes each; one against 16 bits alone wins by default."""
    return len([bits for bits in sort_curves(curves) if bits < BASELINE_BITS]) >= 2


def merge_repeats(points: pd.DataFrame) -> pd.DataFrame:
    """Return one row per point, averaged over seeds; the same value twice (measured beside other tasks) is one."""
    points = points.drop_duplicates([*POINT, *points.columns.intersection(["seed"]), *READING])
    if not points.duplicated(POINT).any():  # one seed, as nearly always: joining 35,000 groups takes seconds
        return points[[*POINT, *READING, "key"]]
    refuse_ambiguous(points)
    merged = points.groupby(POINT, dropna=False).agg(
        {"total_bits": "first", "value": "mean", "low": "mean", "high": "mean", "key": " ".join}
    )
    return merged.reset_index()


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
    variant = name_variant(first["data_type"], first["block_size"])
    raise AmbiguousResults(
        f"{first['model']} at {first['bits']} bit ({variant}) has {len(same)} results that differ in "
        f"{', '.join(differing) or 'a setting that is not a column'}; keep one of them"
    )


def name_variant(data_type: object, block_size: object) -> str:
    """Return for example "nf block 64", "int whole tensor"; BASELINE_ONLY where nothing was quantized."""
    if is_missing(data_type):
        return BASELINE_ONLY
    return f"{data_type} whole tensor" if is_missing(block_size) else f"{data_type} block {block_size}"


def split_variants(curves: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield each variant as ({family, data_type, block_size}, its curves), sorted."""
    for values, group in curves.groupby(VARIANT, dropna=False):
        yield dict(zip(VARIANT, values, strict=True)), group


def interpolate(sizes: Floats, values: Floats, total_bits: npt.ArrayLike) -> Floats:
    """Return a curve's value at each budget, linear in log(total_bits) between its points.

        y(b) = y_i + (y_(i+1) - y_i) * log(b / b_i) / log(b_(i+1) / b_i)   for b_i <= b <= b_(i+1)

    Args:
        sizes: b_i, bits of the whole model, ascending.
        values: y_i.
        total_bits: budgets, in bits.

    Returns:
        Same shape as total_bits; NaN outside the curve's range: a curve is never extrapolated.
    """
    budgets = np.log(np.asarray(total_bits, dtype=np.float64))
    return np.asarray(np.interp(budgets, np.log(sizes), values, left=np.nan, right=np.nan), dtype=np.float64)


def shared_budgets(curves: pd.DataFrame, count: int = BUDGETS, by: str = "bits") -> Floats:
    """Return log-spaced budgets at which every quantized curve of one panel is defined, perhaps none.

    Outside them a curve would win only because the others have no model that small or that large, which says
    nothing about precisions. With a single quantized curve the 16-bit baseline takes its place beside it. A curve
    of one size only is a point and does not take part.

    Args:
        curves: points of one panel; `by` tells its curves apart.
        count: budgets.
    """
    bounds = bound_budgets(curves, by)
    if bounds is None:
        return np.empty(0)
    (low, _), (high, _) = bounds
    return np.asarray(np.geomspace(low, high, count), dtype=np.float64)


def sort_curves(curves: pd.DataFrame, by: str = "bits") -> dict[Any, npt.NDArray[np.intp]]:
    """Return the curves of two sizes or more: the places of each one's points, in order of total_bits."""
    sizes = curves["total_bits"].to_numpy(dtype=np.float64)
    names, codes, counts = np.unique(curves[by].to_numpy(), return_inverse=True, return_counts=True)
    order, ends = np.lexsort((sizes, codes)), np.cumsum(counts)
    places = [order[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return {name: own for name, own in zip(names.tolist(), places, strict=True) if sizes[own[-1]] > sizes[own[0]]}


def bound_budgets(curves: pd.DataFrame, by: str = "bits") -> tuple[tuple[float, Any], tuple[float, Any]] | None:
    """Return the ends of shared_budgets, each with the curve that sets it; None if the curves never meet."""
    sizes, bits = curves["total_bits"].to_numpy(dtype=np.float64), curves["bits"].to_numpy(dtype=np.float64)
    ends = [(sizes[own[0]], sizes[own[-1]], bits[own].min(), name) for name, own in sort_curves(curves, by).items()]
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
        Columns family, data_type, block_size, total_bits (the budget), bits (the best; NA is a tie), value
        (of the best), margin (>= 0: to the second best, in the measure's unit). No rows for a variant whose
        curves never meet.
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
        best: from best_precision; its budgets are evenly spaced in log(total_bits), so counting them measures
        the range.

    Returns:
        Columns family, data_type, block_size, bits (NA: tied), share; the shares of a variant sum to 1,
        largest first.
    """
    counts = best.groupby([*VARIANT, "bits"], dropna=False).size().rename("share").reset_index()
    totals = counts.groupby(VARIANT, dropna=False)["share"].transform("sum")
    counts["share"] = counts["share"] / totals
    counts["bits"] = counts["bits"].astype("Int64")
    order = [*VARIANT, "share"]
    return counts.sort_values(order, ascending=[True, True, True, False], ignore_index=True, kind="stable")
