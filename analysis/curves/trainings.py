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

from kbit.evaluation.measurement import quantile_95
from kbit.training.config import ROLES

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
    if method == "gptq":
        return None
    if "lora" in fields and not roles:
        return QLORA
    if "lora" in fields or "fast" in fields or roles - {"weights"} or fields.get("start") == "random":
        return None
    return QAT if roles else CONTROL


def describe_seeds(values: pd.Series[float]) -> tuple[float, float, float]:
    """Return the mean over seeds with Student's 95% interval. One seed has no interval: NaN."""
    count, mean = len(values), float(values.mean())
    half = quantile_95(count) * float(values.std(ddof=1)) / np.sqrt(count) if count > 1 else np.nan
    return mean, mean - half, mean + half
