"""Trained models as rows: what each training was, in columns.

A result's training is stored as JSON of the fields that are not at their default (column train_fields), so that figures
compare fields and read no label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.settings import USUAL_BLOCK, complete_settings, name_block, name_quantizers
from kbit.evaluation.measurement import quantile_95
from kbit.numerics.spec import BASELINE_BITS
from kbit.training.config import ROLES

TASK: Final = "training"  # of what is known of a training itself
UNTRAINED: Final = "untrained"
# Ways in which a model comes to its rounded weights, as figures name them.
PTQ, GPTQ, QLORA = "rounded (PTQ)", "GPTQ", "adapters beside it (QLoRA)"
QAT, CONTROL = "trained for it (QAT)", "trained, then rounded"


def read_fields(cell: object) -> dict[str, Any]:
    """Return the fields of a training from its cell of the column train_fields. An empty cell is no training."""
    fields: dict[str, Any] = json.loads(cell) if isinstance(cell, str) else {}
    return fields


def leave_out_trained(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of models that no experiment trained, which most figures are of."""
    if "training" not in results or results["training"].isna().all():
        return results
    plain = results[results["training"].isna()]
    plain.attrs = results.attrs
    return plain


def find_trained(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of trained models."""
    if "training" not in results:
        return results.iloc[:0]
    return results[results["training"].notna()]


def name_way(fields: Mapping[str, Any], method: object = "rtn") -> str | None:
    """Return the way of an experiment, or None of one that quantizes anything beside the weights.

    Args:
        fields: the fields of its training.
        method: its quantization method. A missing one is that of the 16-bit baseline.
    """
    roles = {role for role in ROLES if role in fields}
    if not fields:
        return GPTQ if method == "gptq" else PTQ if method == "rtn" or pd.isna(method) else None  # type: ignore[call-overload]
    if not (method == "rtn" or pd.isna(method)):  # type: ignore[call-overload]
        return None
    if "lora" in fields and not roles:
        return QLORA
    if "lora" in fields or "fast" in fields or roles - {"weights"} or fields.get("start") == "random":
        return None
    return QAT if roles else CONTROL


def add_diverged(rows: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Return rows of one measurement with a column diverged, and a row without a value for each diverged training."""
    ends = results[(results["task"] == TASK) & (results["metric"] == "diverged") & (results["value"] > 0)]
    ends = ends[~ends["key"].isin(rows["key"])].drop_duplicates("key")
    if ends.empty:
        return rows.assign(diverged=False).reset_index(drop=True)
    return pd.concat([rows.assign(diverged=False), ends.assign(value=np.nan, diverged=True)], ignore_index=True)


def read_blocks(rows: pd.DataFrame) -> list[int | None]:
    """Return the block size of each row, or None of a whole tensor."""
    return [None if pd.isna(block) else int(block) for block in rows["block_size"]]


def name_bases(rows: pd.DataFrame) -> pd.Series[str]:
    """Return the name of each row's quantizer at its bits, with the settings and the block that are not usual."""
    quantized = complete_settings(rows[rows["bits"] != BASELINE_BITS].assign(training=None))
    blocks = ["" if block == USUAL_BLOCK else f" {name_block(block)}" for block in read_blocks(quantized)]
    names = [name + block for name, block in zip(name_quantizers(quantized), blocks, strict=True)]
    return pd.Series(names, quantized.index, dtype=object).reindex(rows.index, fill_value="16-bit")


def describe_seeds(values: pd.Series[float]) -> tuple[float, float, float]:
    """Return the mean over seeds with Student's 95% interval. One seed has no interval: NaN."""
    count, mean = len(values), float(values.mean())
    half = quantile_95(count) * float(values.std(ddof=1)) / np.sqrt(count) if count > 1 else np.nan
    return mean, mean - half, mean + half
