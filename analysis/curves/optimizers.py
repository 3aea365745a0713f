"""Trainings whose optimizers keep states of few bits, as rows: what each state was, and how the training ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import find_cross_entropy, refuse_mixed_evaluations, take_rows
from kbit.analysis.curves.trainings import find_trained, read_fields
from kbit.numerics.spec import BASELINE_BITS, QuantSpec
from kbit.training.config import ROLES, STATES

EXACT: Final = "32-bit"
_KEPT: Final = {*STATES, "seed", "stable_embedding", "min_size", "embedding_states"}  # what studies of states change


def read_state(fields: Mapping[str, Any], role: str) -> QuantSpec | None:
    """Return the quantizer of a state from the fields of a training, or None if it has 32 bits."""
    return QuantSpec.from_json({"data_type": "float"} | dict(fields[role])) if role in fields else None


def tabulate_trainings(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each training of whole models in which nothing but the optimizer's states was quantized.

    Returns:
        Columns model, family, parameters, evaluation (how it was measured), settings (JSON of what else decides the
        training), stable, momentum and variance (a QuantSpec or None), seed, diverged, value (the cross entropy, NaN if
        it diverged) and key.
    """
    measure, trained = find_cross_entropy(results), find_trained(results)
    if measure is None or trained.empty:
        return pd.DataFrame()
    measured = take_rows(trained, measure.metric, measure.task).set_index("key")
    ways = measured["evaluation"].to_dict() if "evaluation" in measured else {}
    ends = trained[(trained["task"] == "training") & (trained["metric"] == "diverged")].drop_duplicates("key")
    rows = []
    for row in ends.to_dict("records"):
        fields = read_fields(row["train_fields"])
        others = {"lora", "fast", *ROLES} - set(STATES)
        if others & set(fields) or row["bits"] != BASELINE_BITS:
            continue
        about = {name: row[name] for name in ("model", "family", "parameters", "key")}
        about |= {"evaluation": ways.get(row["key"])}
        about |= {"settings": json.dumps({k: v for k, v in fields.items() if k not in _KEPT}, sort_keys=True)}
        about |= {"seed": fields.get("seed", 0), "stable": bool(fields.get("stable_embedding", False))}
        about |= {"diverged": row["value"] > 0, "value": float(measured["value"].get(row["key"], np.nan))}
        rows.append(about | {role: read_state(fields, role) for role in STATES})
    return pd.DataFrame(rows)


def keep_usual(trainings: pd.DataFrame) -> pd.DataFrame:
    """Return the trainings with each model's most frequent settings.

    Raises:
        AmbiguousResults: these trainings were measured in several ways.
    """
    by_model = trainings.groupby("model")["settings"]
    usual = {str(model): own.value_counts().sort_index().idxmax() for model, own in by_model}
    kept = trainings[trainings["settings"] == trainings["model"].map(usual)]
    refuse_mixed_evaluations(kept[kept["value"].notna()])
    return kept


def name_states(momentum: QuantSpec | None, variance: QuantSpec | None) -> str | None:
    """Return a name for states of one data type, such as 'dynamic, 0 in the variance', or None of mixed ones."""
    specs = [spec for spec in (momentum, variance) if spec is not None]
    if not specs:
        return EXACT
    if len({(spec.data_type, spec.block_size, spec.bits) for spec in specs}) > 1:
        return None
    kind = "linear" if specs[0].data_type == "int" else specs[0].data_type
    return f"{kind}, 0 in the variance" if variance is not None and variance.zero else kind
