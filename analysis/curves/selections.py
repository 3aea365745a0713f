"""Which points a figure shows: each function takes the points of all curves and says in which panel and curve they lie.

The paper varies one thing a figure: the precision (2, 7, 13), the block size (8, 11, 15), the data type (9, 10, 14), a
float's exponent bits (12), outliers kept in 16 bit (4), a method with data (5). What else a store holds is left out;
where the choice is open, the setting with the most points is shown, and its name stands in the panel's title. A family
or setting that cannot be drawn (two curves of two sizes each) is never chosen before one that can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import VARIANT, is_missing, name_variant
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS
from kbit.numerics.spec import BASELINE_BITS

WHOLE: Final = 2**62  # the place of "whole tensor" among block sizes: the largest block


# Of settings with equally many points the first of these is shown: the paper's own before later ones.
DATA_TYPE_ORDER: Final = ("float", "int", "quantile", "dynamic", "nf", "af", "learned", "table")


USUAL_BLOCK: Final = 64


OUTLIERS: Final = re.compile(r"( column| random)? outliers ([\d.]+)$")  # as curves.name_data_type writes it


CONTROLS: Final = ("", " column", " random")  # how outliers were selected: "" is the paper's proxy


METHOD: Final = re.compile(r" (mse|hqq|awq|gptq)( \S+=\S+)*")  # with its options, as curves.name_data_type has it


RIVAL_BITS: Final = 4


NANO_TWINS: Final = {"pythia": "nano-neox", "gpt2": "nano-gpt2", "opt": "nano-opt", "bloom": "nano-bloom"}


Row = Mapping[Any, Any]


def prefer_family(shown: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the panels of one family that can be drawn, perhaps none.

    The family asked for; else its architecture's nano family; else that with the most models.

    Args:
        shown: points of all families, with panel and series.
        family: the paper's.
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
    """Whether the panel of each point has two curves of two sizes each; columns tell panels and their curves apart."""
    sizes = points.groupby([*panel, *series], dropna=False)["model"].nunique().rename("sizes").reset_index()
    lines = sizes[sizes["sizes"] >= 2].groupby(panel, dropna=False).size().rename("lines").reset_index()
    counts = points[panel].merge(lines, on=panel, how="left")["lines"]
    return pd.Series((counts >= 2).to_numpy(dtype=bool), points.index)


def most_points(points: pd.DataFrame, columns: list[str], drawable: pd.Series[bool] | None = None) -> pd.DataFrame:
    """Return, for each family, the points of the setting of `columns` that has the most points.

    Args:
        points: those that count.
        columns: what a setting is.
        drawable: of all points, see has_curves; a setting without any such point comes after those with one; None: all.
    """
    if points.empty:
        return points
    counted = points.assign(_drawable=True if drawable is None else drawable.loc[points.index])
    groups = counted.groupby(["family", *columns], dropna=False)["_drawable"]
    counts = groups.agg(count="size", drawable="any").reset_index()
    ranks = [tuple(map(rank_setting, row)) for row in counts[columns].itertuples(index=False)]
    counts["rank"] = pd.Series(ranks, counts.index, dtype=object)
    order = ["drawable", "count", "rank"]
    best = counts.sort_values(order, ascending=[False, False, True]).drop_duplicates("family")
    return points.merge(best[["family", *columns]], on=["family", *columns])


def rank_setting(value: Any) -> tuple[int, int, str]:
    """Return the place of a data type, block size or family among its like."""
    if isinstance(value, str):
        name = value.split()[0]
        place = DATA_TYPE_ORDER.index(name) if name in DATA_TYPE_ORDER else len(DATA_TYPE_ORDER)
        return (place, value.count(" "), value)
    block = WHOLE if is_missing(value) else int(value)
    return (0 if block == USUAL_BLOCK else 1, block, "")


def mark(
    points: pd.DataFrame, panel: Callable[[Row], str], series: Callable[[Row], str], order: Sequence[str]
) -> pd.DataFrame:
    """Return the points with the panel and series of each row, sorted by panel, `order`, total_bits."""
    rows = points.to_dict("records")
    marked = points.assign(panel=[panel(row) for row in rows], series=[series(row) for row in rows])
    return marked.sort_values(["panel", *order, "total_bits"], kind="stable", ignore_index=True)


def select_precisions(points: pd.DataFrame, bits: Sequence[int] = ()) -> pd.DataFrame:
    """Return a panel per family and a curve per precision: the variant that was measured most.

    Args:
        points: from curves.precision_curves.
        bits: precisions to show; empty is all.
    """
    points = points[points["bits"].isin(bits)] if bits else points
    drawable = has_curves(points, VARIANT, ["bits"])
    chosen = most_points(points[points["bits"] < BASELINE_BITS], ["data_type", "block_size"], drawable)
    shown = points.merge(chosen[VARIANT].drop_duplicates(), on=VARIANT)
    return mark(
        shown,
        lambda row: f"{row['family']}, {name_variant(row['data_type'], row['block_size'])}",
        lambda row: f"{row['bits']}-bit",
        ["bits"],
    )


def select_block_sizes(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel per family and a curve per block size, at one precision, for the data type measured most."""
    points = points[(points["bits"] == bits) & ~has_settings(points["data_type"])]
    shown = most_points(points, ["data_type"], has_curves(points, ["family", "data_type"], ["block_size"]))
    shown = shown.assign(_place=shown["block_size"].fillna(WHOLE))
    marked = mark(shown, lambda row: f"{row['family']}, {bits}-bit {row['data_type']}", name_block, ["_place"])
    return marked.drop(columns="_place")


def select_data_types(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel per family and a curve per data type, at one precision, for the block size measured most."""
    points = points[(points["bits"] == bits) & ~has_settings(points["data_type"])]
    shown = most_points(points, ["block_size"], has_curves(points, ["family", "block_size"], ["data_type"]))
    return mark(
        shown,
        lambda row: f"{row['family']}, {bits}-bit {name_block(row)}",
        lambda row: str(row["data_type"]),
        ["data_type"],
    )


def has_settings(names: pd.Series[str]) -> pd.Series[bool]:
    """Whether a data type's name has settings of its own, as "nf row" has; true of a missing name."""
    return pd.Series([is_missing(name) or " " in name for name in names], names.index, dtype=bool)


def name_block(row: Row) -> str:
    """Return "block 64" or "whole tensor"."""
    return "whole tensor" if is_missing(row["block_size"]) else f"block {row['block_size']}"


def select_exponents(points: pd.DataFrame) -> pd.DataFrame:
    """Return a panel per precision and a curve per number of exponent bits of the data type float."""
    is_float = [re.fullmatch(r"float( E\d)?", str(name)) is not None for name in points["data_type"]]
    points = points[np.array(is_float, dtype=bool) & (points["bits"] < BASELINE_BITS)]
    drawable = has_curves(points, ["family", "bits", "block_size"], ["data_type"])
    shown = most_points(points, ["block_size"], drawable)
    return mark(
        shown,
        lambda row: f"{row['family']}, {row['bits']}-bit float {name_block(row)}",
        lambda row: f"E{find_exponent(row)}",
        ["series"],
    )


def find_exponent(row: Row) -> int:
    """Return the exponent bits of a float: those in its name, or the paper's."""
    name = str(row["data_type"])
    return int(name[-1]) if " " in name else PAPER_EXPONENT_BITS[row["bits"]]


def select_outliers(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel with one precision with and without 16-bit outliers; at 3 bits also 4 bits without.

    The paper asks whether 3-bit with outliers catches up with 4-bit (section 5.2). Dimensions that were selected in
    another way than the paper's have a curve of their own.
    """
    names = points["data_type"].astype(str)
    points = points.assign(_base=[OUTLIERS.sub("", name) for name in names], _kept=list(map(rank_selection, names)))
    is_rival = (points["bits"] == RIVAL_BITS) & (points["_kept"] == 0) & (bits < RIVAL_BITS)
    points = points[(points["bits"] == bits) | is_rival]
    panel = ["family", "_base", "block_size"]
    drawable = has_curves(points, panel, ["bits", "data_type"])
    chosen = most_points(points[(points["_kept"] > 0) & (points["bits"] == bits)], panel[1:], drawable)
    marked = mark(
        points.merge(chosen[panel].drop_duplicates(), on=panel),
        lambda row: f"{row['family']}, {bits}-bit {row['_base']} {name_block(row)}",
        name_outliers,
        ["bits", "_kept"],
    )
    return marked.drop(columns=["_base", "_kept"])


def rank_selection(name: str) -> int:
    """Return 0 for a data type without 16-bit outliers, else 1, 2, ... by how they were selected (CONTROLS)."""
    found = OUTLIERS.search(name)
    return 1 + CONTROLS.index(found[1] or "") if found else 0


def name_outliers(row: Row) -> str:
    """Return "3-bit", "3-bit with 2% outliers", "3-bit with 2% column" or "3-bit with 2% random"."""
    found = OUTLIERS.search(str(row["data_type"]))
    share = f" with {100 * float(found[2]):.3g}%{found[1] or ' outliers'}" if found else ""
    return f"{row['bits']}-bit{share}"


def select_gptq(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel with GPTQ, per block size, beside zero-shot float with blocks of 64, at one precision."""
    points = points[points["bits"] == bits]
    is_gptq = np.array(["gptq" in str(name).split() for name in points["data_type"]], dtype=bool)
    is_float = ((points["data_type"] == "float") & (points["block_size"] == USUAL_BLOCK)).to_numpy(dtype=bool)
    has_gptq = points["family"].isin(points.loc[is_gptq, "family"])
    return mark(
        points[(is_gptq | is_float) & has_gptq],
        lambda row: f"{row['family']}, {bits}-bit",
        lambda row: name_variant(row["data_type"], row["block_size"]),
        ["series"],
    )


def select_methods(points: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return a panel per family and a curve per method, at one precision, for the quantizer with the most points."""
    names = [str(name) for name in points["data_type"]]
    found = [METHOD.search(name) for name in names]
    points = points.assign(
        _base=[METHOD.sub("", name) for name in names], _method=[match[0][1:] if match else "rtn" for match in found]
    )
    points = points[points["bits"] == bits]
    quantizer = ["family", "_base", "block_size"]
    drawable = has_curves(points, quantizer, ["_method"])
    chosen = most_points(points[points["_method"] != "rtn"], quantizer[1:], drawable)
    marked = mark(
        points.merge(chosen[quantizer].drop_duplicates(), on=quantizer),
        lambda row: f"{row['family']}, {bits}-bit {row['_base']} {name_block(row)}",
        lambda row: str(row["_method"]),
        ["_method"],
    )
    return marked.drop(columns=["_base", "_method"])
