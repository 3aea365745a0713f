"""Settings of a quantizer beyond its data type, bits and block size: their columns, their defaults and their label.

A result's settings stay in the columns that kbit.read_results gives them. Figures compare these columns. The label
("nf row gptq") names the settings that are not the paper's. It is for display, and no code reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from kbit.layers.int8_schemes import SCHEMES
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS, data_type_label

# Settings that make a variant of a data type: column, default, how the label says it.
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
    ("rules", None, "rules ({})"),
    ("activations", None, "activations {}"),
    ("activation_bits", None, "at {:.0f} bits"),
    ("kv_cache", None, "cache {}"),
    ("cache_bits", None, "at {:.0f} bits"),
    ("rotation", None, "{}"),
    ("allocation", None, "{}"),
    ("training", None, "{}"),
)

# what captions say of the label "float", which is one for all precisions
FLOATS: Final = "float: with the paper's exponent bits, 1 at 2 bits, 2 at 3 bits and 3 at more."
SETTING_COLUMNS: Final = ["exponent_bits", *(column for column, _, _ in SETTINGS)]
DECIDED: Final = ("layout", "scale_format")  # by a method that multiplies in int8, so that its label leaves them out
# Of settings with equally many points the first of these is shown: the paper's own before later ones. Others follow.
DATA_TYPE_ORDER: Final = ("float", "int", "quantile", "dynamic", "nf", "af", "learned", "table")
WHOLE: Final = 2**62  # the place of "whole tensor" among block sizes: the largest block
USUAL_BLOCK: Final = 64


def is_missing(value: object) -> bool:
    """Whether a cell is None, NaN or NA, which depends on the column's type in pandas."""
    return bool(pd.isna(value))  # type: ignore[call-overload]


def complete_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Return quantized rows with every column of SETTINGS, where a setting that is not stored has its default."""
    filled = {}
    for column, default, _ in SETTINGS:
        if column not in rows:
            filled[column] = pd.Series([default] * len(rows), rows.index, dtype=object)
        elif default is not None and rows[column].isna().any():
            filled[column] = rows[column].astype(object).where(rows[column].notna(), default)
    return rows.assign(**filled)


def make_labels(rows: pd.DataFrame) -> pd.Series[str]:
    """Return make_label of every row, worked out once for each distinct setting."""
    columns = ["bits", "data_type", "exponent_bits", *(name for name, _, _ in SETTINGS if name in rows)]
    group = rows.groupby(columns, dropna=False, sort=False, observed=True).ngroup()
    first = rows[~group.duplicated()].to_dict("records")
    labels = dict(zip(group.unique(), map(make_label, first), strict=True))
    return pd.Series([labels[number] for number in group], rows.index, dtype=object)


def make_label(row: Mapping[Any, Any]) -> str | None:
    """Return the data type followed by every setting that is not the default, or None for the unquantized baseline.

    The defaults are the paper's: its exponent bits, "ieee", flat absmax blocks, float16 scales, round to nearest.
    """
    if is_missing(row["data_type"]):
        return None
    parts = [str(row["data_type"])]
    exponent_bits = row["exponent_bits"]
    is_float = row["data_type"] == "float" and not is_missing(exponent_bits)
    if is_float and exponent_bits != PAPER_EXPONENT_BITS[row["bits"]]:
        parts.append(f"E{exponent_bits}")
    return " ".join([*parts, *list_settings(row)])


def list_settings(row: Mapping[Any, Any]) -> list[str]:
    """Return the words for every setting that is not the default, but for a float's exponent bits."""
    parts = []
    decided = DECIDED if row.get("method") in SCHEMES else ()
    for column, default, words in SETTINGS:
        value = default if column in decided else row.get(column, default)
        if not is_missing(value) and value != default:
            parts.append(words.format(value))
    return parts


def name_quantizers(rows: pd.DataFrame) -> list[str]:
    """Return the name of each quantized row at its bits, such as "nf4", "float4-e2m1", "int3 gptq".

    Unlike a label, which is one for all precisions of a variant, it tells a float's exponent bits.
    """
    return [name_quantizer(row) for row in rows.to_dict("records")]


def name_quantizer(row: Mapping[Any, Any], *, but: Mapping[str, object] | None = None) -> str:
    """Return the name of a quantizer at its bits, where `but` replaces some settings."""
    row = dict(row) | dict(but or {})
    exponent_bits = None if is_missing(row.get("exponent_bits")) else int(row["exponent_bits"])
    name = data_type_label(str(row["data_type"]), int(row["bits"]), exponent_bits)
    return " ".join([name, *list_settings(row)])


def name_variant(label: object, block_size: object, allocation: object = None) -> str:
    """Return for example "nf block 64", "int whole tensor". BASELINE_ONLY stands where nothing was quantized.

    The choices of an allocation, which the label names, may differ in their blocks: it then has no block size.
    """
    if is_missing(label):
        return BASELINE_ONLY
    if is_missing(block_size) and not is_missing(allocation):
        return str(label)
    return f"{label} {name_block(block_size)}"


def name_block(block_size: object) -> str:
    """Return "block 64" or "whole tensor"."""
    return "whole tensor" if is_missing(block_size) else f"block {block_size}"


BASELINE_ONLY: Final = "16-bit only"  # the variant of a family that was never quantized


def rank_data_type(data_type: object) -> tuple[int, str]:
    """Return the place of a data type among others: those of DATA_TYPE_ORDER, then any other by name."""
    known = data_type in DATA_TYPE_ORDER
    return DATA_TYPE_ORDER.index(str(data_type)) if known else len(DATA_TYPE_ORDER), str(data_type)


def rank_label(label: object) -> tuple[int, str]:
    """Return the place of a label among those of one data type: the shorter first, as it has fewer settings."""
    return str(label).count(" "), str(label)


def rank_block(block_size: Any) -> tuple[bool, int]:
    """Return the place of a block size among others: the usual one, then from small to large."""
    block = WHOLE if is_missing(block_size) else int(block_size)
    return block != USUAL_BLOCK, block
