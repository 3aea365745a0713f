"""Which points a figure shows: each function takes the points of all curves and says in which panel and curve they lie.

The paper varies one thing a figure: the precision (2, 7, 13), the block size (8, 11, 15), the data type (9, 10, 14), a
float's exponent bits (12), outliers kept in 16 bit (4), a method with data (5). Whatever else a store holds is left
out. Where the choice is open, the setting with the most points is shown, and its name stands in the panel's title. Data
types with equally many points are all shown, in a panel each. A family or setting that cannot be drawn (two curves of
two sizes each) is never chosen before one that can.

Selections compare columns of curves.precision_curves, so that a data type or method of any name is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pandas as pd

from kbit.analysis.curves.curves import VARIANT
from kbit.analysis.curves.settings import (
    USUAL_BLOCK,
    WHOLE,
    is_missing,
    make_labels,
    name_block,
    name_quantizer,
    name_variant,
    rank_block,
    rank_data_type,
    rank_label,
)
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS
from kbit.numerics.spec import BASELINE_BITS

PROXY: Final = "proxy"  # how the paper selects outliers
CONTROLS: Final = ("column", "random")  # how else they are selected, to compare with the proxy
RIVAL_BITS: Final = 4
NANO_TWINS: Final = {"pythia": "nano-neox", "gpt2": "nano-gpt2", "opt": "nano-opt", "bloom": "nano-bloom"}

RANKS: Final[dict[str, Callable[[Any], tuple[Any, ...]]]] = {
    "data_type": rank_data_type,
    "label": rank_label,
    "_base": rank_label,
    "block_size": rank_block,
}

ROUNDED: Final = {"method": "rtn", "method_options": ""}  # what a panel of methods leaves out of its name
Row = Mapping[Any, Any]


def prefer_family(shown: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the panels of one family that can be drawn, perhaps none.

    The family asked for is preferred, then its architecture's nano family, then the family with the most models.

    Args:
        shown: points of all families, with panel and series.
        family: the family that the paper shows.
    """
    points = keep_comparable(shown)
    for name in (family, NANO_TWINS.get(family)):
        if name in set(points["family"]):
            return points[points["family"] == name]
    models = points.groupby("family")["model"].nunique()
    return points[points["family"] == (models.idxmax() if len(models) else family)]


def keep_comparable(shown: pd.DataFrame) -> pd.DataFrame:
    """Return the panels that can be drawn: two curves of two sizes each. Less is points, not curves to compare."""
    if shown.empty:
        return shown
    return shown[has_curves(shown, ["panel"], ["series"])].reset_index(drop=True)


def has_curves(points: pd.DataFrame, panel: list[str], series: list[str]) -> pd.Series[bool]:
    """Whether the panel of each point has two curves of two sizes each. Columns tell panels and their curves apart."""
    sizes = points.groupby([*panel, *series], dropna=False)["model"].nunique().rename("sizes").reset_index()
    lines = sizes[sizes["sizes"] >= 2].groupby(panel, dropna=False).size().rename("lines").reset_index()
    counts = points[panel].merge(lines, on=panel, how="left")["lines"]
    return pd.Series((counts >= 2).to_numpy(dtype=bool), points.index)


def has_settings(points: pd.DataFrame, *, but_exponents: bool = False) -> pd.Series[bool]:
    """Whether a point has a setting that is not the paper's: its label then says more than its data type.

    With `but_exponents` a float's exponent bits do not count.
    """
    if but_exponents:
        usual = points["bits"].map(PAPER_EXPONENT_BITS).astype("Int64")
        points = points.assign(label=make_labels(points.assign(exponent_bits=usual)))
    return points["label"].isna() | (points["label"].astype(object) != points["data_type"].astype(object))


def most_points(
    points: pd.DataFrame, columns: list[str], drawable: pd.Series[bool] | None = None, *, tied: bool = False
) -> pd.DataFrame:
    """Return, for each family, the points of the setting of `columns` that has the most points.

    Args:
        points: the points that count.
        columns: the columns that make a setting.
        drawable: whether each point can be drawn, see has_curves. A setting without any such point comes after those
            with one. None: all points can be drawn.
        tied: whether all data types are returned that have as many points as the first, each in its first setting of
            the same block size. No data type then stands for others because it comes first.
    """
    if points.empty:
        return points
    counted = points.assign(_drawable=True if drawable is None else drawable.loc[points.index])
    groups = counted.groupby(["family", *columns], dropna=False)["_drawable"]
    counts = groups.agg(count="size", drawable="any").reset_index()
    ranks = [rank_setting(dict(zip(columns, row, strict=True))) for row in counts[columns].itertuples(index=False)]
    counts["rank"] = pd.Series(ranks, counts.index, dtype=object)
    order = ["drawable", "count", "rank"]
    ranked = counts.sort_values(order, ascending=[False, False, True])
    best = ranked.drop_duplicates("family")
    if tied:
        alike = ["family", "drawable", "count", *(name for name in columns if name == "block_size")]
        best = ranked.merge(best[alike], on=alike).drop_duplicates(["family", "data_type"])
    return points.merge(best[["family", *columns]], on=["family", *columns])


def rank_setting(setting: Row) -> tuple[Any, ...]:
    """Return the place of a setting among others with as many points: the paper's first. See RANKS."""
    return tuple(RANKS[name](value) if name in RANKS else value for name, value in setting.items())


def mark(
    points: pd.DataFrame,
    panel: Callable[[Row], str],
    series: Callable[[Row], str],
    order: Sequence[str],
    varied: str,
) -> pd.DataFrame:
    """Return the points with the panel and series of each row, sorted by panel, `order`, total_bits.

    Args:
        points: the points to show.
        panel, series: the name of a row's panel, and of its curve.
        order: columns by which the curves of a panel are ordered.
        varied: the column in which the curves of a panel differ, which becomes the column varied.
    """
    rows = points.to_dict("records")
    marked = points.assign(panel=[panel(row) for row in rows], series=[series(row) for row in rows], varied=varied)
    return marked.sort_values(["panel", *order, "total_bits"], kind="stable", ignore_index=True)


def select_precisions(points: pd.DataFrame, bits: Sequence[int] = (), *, tied: bool = True) -> pd.DataFrame:
    """Return a panel per family and a curve per precision, for the variant that was measured most.

    Args:
        points: from curves.precision_curves.
        bits: precisions to show. Empty: all.
        tied: whether each data type that was measured as often has its panel, see most_points.
    """
    points = points[points["bits"].isin(bits)] if bits else points
    drawable = has_curves(points, VARIANT, ["bits"])
    chosen = most_points(
        points[points["bits"] < BASELINE_BITS], ["data_type", "label", "block_size"], drawable, tied=tied
    )
    return mark(
        points.merge(chosen[VARIANT].drop_duplicates(), on=VARIANT),
        lambda row: f"{row['family']}, {name_variant(row['label'], row['block_size'], row.get('allocation'))}",
        lambda row: f"{row['bits']}-bit",
        ["bits"],
        "bits",
    )


def select_block_sizes(points: pd.DataFrame, bits: int, *, tied: bool = True) -> pd.DataFrame:
    """Return a panel per family and a curve per block size, at one precision, for the data type measured most.

    With `tied` each data type that was measured as often has its panel, see most_points.
    """
    points = points[(points["bits"] == bits) & ~has_settings(points)]
    shown = most_points(points, ["data_type"], has_curves(points, ["family", "data_type"], ["block_size"]), tied=tied)
    marked = mark(
        shown.assign(_place=shown["block_size"].fillna(WHOLE)),
        lambda row: f"{row['family']}, {name_quantizer(row)}",
        lambda row: name_block(row["block_size"]),
        ["_place"],
        "block_size",
    )
    return marked.drop(columns="_place")


def select_data_types(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel per family and a curve per data type, at one precision, for the block size measured most.

    A float with other exponent bits is another data type: float4-e2m1 stands beside float4-e3m0.
    """
    points = points[(points["bits"] == bits) & ~has_settings(points, but_exponents=True)]
    points = points.assign(_name=[name_quantizer(row) for row in points.to_dict("records")])
    shown = most_points(points, ["block_size"], has_curves(points, ["family", "block_size"], ["_name"]))
    marked = mark(
        shown,
        lambda row: f"{row['family']}, {bits}-bit {name_block(row['block_size'])}",
        lambda row: str(row["_name"]),
        ["data_type", "_name"],
        "data_type",
    )
    return marked.drop(columns="_name")


def select_exponents(points: pd.DataFrame) -> pd.DataFrame:
    """Return a panel per precision and a curve per number of exponent bits of the data type float.

    Exponent bits that are not stored are the paper's.
    """
    points = points[(points["data_type"] == "float") & (points["bits"] < BASELINE_BITS)]
    usual = points["bits"].map(PAPER_EXPONENT_BITS).astype("Int64")
    exponent_bits = points["exponent_bits"].astype("Int64").fillna(usual)
    points = points.assign(exponent_bits=exponent_bits)[~has_settings(points, but_exponents=True)]
    drawable = has_curves(points, ["family", "bits", "block_size"], ["exponent_bits"])
    return mark(
        most_points(points, ["block_size"], drawable),
        lambda row: f"{row['family']}, {row['bits']}-bit float {name_block(row['block_size'])}",
        lambda row: f"E{row['exponent_bits']}",
        ["series"],
        "exponent_bits",
    )


def select_outliers(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel with one precision with and without 16-bit outliers. At 3 bits also 4 bits without are shown.

    The paper asks whether 3-bit with outliers catches up with 4-bit (section 5.2). Dimensions that were selected in
    another way than the paper's have a curve of their own.
    """
    kept = points["outlier_fraction"] > 0
    without = points.assign(
        outlier_fraction=points["outlier_fraction"].mask(kept, 0.0),
        outlier_selection=points["outlier_selection"].mask(kept, PROXY),
    )
    points = points.assign(_base=make_labels(without), _kept=rank_selections(points))
    is_rival = (points["bits"] == RIVAL_BITS) & ~kept & (bits < RIVAL_BITS)
    points = points[(points["bits"] == bits) | is_rival]
    panel = ["family", "data_type", "_base", "block_size"]
    drawable = has_curves(points, panel, ["bits", "label"])
    chosen = most_points(points[(points["_kept"] > 0) & (points["bits"] == bits)], panel[1:], drawable, tied=True)
    marked = mark(
        points.merge(chosen[panel].drop_duplicates(), on=panel),
        lambda row: f"{row['family']}, {name_without_outliers(row, bits)} {name_block(row['block_size'])}",
        name_outliers,
        ["bits", "_kept"],
        "outlier_fraction",
    )
    return marked.drop(columns=["_base", "_kept"])


def name_without_outliers(row: Row, bits: int) -> str:
    """Return the name of a row's quantizer at a panel's bits, where no outliers stay at 16 bits."""
    is_usual = row["exponent_bits"] == PAPER_EXPONENT_BITS.get(row["bits"])
    own = {"exponent_bits": None} if is_missing(row["exponent_bits"]) or is_usual else {}
    return name_quantizer(row, but={"bits": bits, "outlier_fraction": 0.0, "outlier_selection": PROXY} | own)


def rank_selections(points: pd.DataFrame) -> pd.Series[int]:
    """Return 0 for points without 16-bit outliers, else 1, 2, ... by how: PROXY, CONTROLS, others."""
    order = [PROXY, *CONTROLS, *sorted(set(points["outlier_selection"].dropna()) - {PROXY, *CONTROLS})]
    places = points["outlier_selection"].map({name: place for place, name in enumerate(order, start=1)})
    return places.where(points["outlier_fraction"] > 0, 0).astype(int)


def name_outliers(row: Row) -> str:
    """Return "3-bit", "3-bit with 2% outliers", "3-bit with 2% column" or "3-bit with 2% random"."""
    if not row["outlier_fraction"] > 0:
        return f"{row['bits']}-bit"
    what = "outliers" if row["outlier_selection"] == PROXY else row["outlier_selection"]
    return f"{row['bits']}-bit with {100 * row['outlier_fraction']:.3g}% {what}"


def select_gptq(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel with GPTQ, per block size, beside zero-shot float with blocks of 64, at one precision."""
    points = points.assign(_options=tell_options(points))[points["bits"] == bits]
    is_gptq = points["method"] == "gptq"
    is_float = (
        (points["data_type"] == "float") & ~has_settings(points) & points["block_size"].eq(USUAL_BLOCK).fillna(False)
    )
    has_gptq = points["family"].isin(points.loc[is_gptq, "family"])
    marked = mark(
        points[(is_gptq | is_float) & has_gptq],
        lambda row: f"{row['family']}, {bits}-bit",
        lambda row: f"{name_quantizer(row, but={'method_options': row['_options']})} {name_block(row['block_size'])}",
        ["series"],
        "method",
    )
    return marked.drop(columns="_options")


def select_methods(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel per family and a curve per method, at one precision, for the quantizer with the most points.

    A quantizer is everything but the method and its options.
    """
    names = points["method"].astype(str) + " " + tell_options(points)
    base = make_labels(points.assign(method="rtn", method_options=""))
    points = points.assign(_base=base, _method=names.str.strip())
    points = points[points["bits"] == bits]
    quantizer = ["family", "data_type", "_base", "block_size"]
    drawable = has_curves(points, quantizer, ["_method"])
    chosen = most_points(points[points["method"] != "rtn"], quantizer[1:], drawable, tied=True)
    marked = mark(
        points.merge(chosen[quantizer].drop_duplicates(), on=quantizer),
        lambda row: f"{row['family']}, {name_quantizer(row, but=ROUNDED)} {name_block(row['block_size'])}",
        lambda row: str(row["_method"]),
        ["_method"],
        "method",
    )
    return marked.drop(columns=["_base", "_method"])


def tell_options(points: pd.DataFrame) -> pd.Series[str]:
    """Return the options that a curve's name needs: none where all points of a method have the same ones."""
    options = points["method_options"].astype(str)
    return options.where(options.groupby(points["method"].astype(str)).transform("nunique") > 1, "")
