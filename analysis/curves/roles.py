"""Trainings as rows with the bits of each role, for laws of loss against bits.

The loss is that of the training itself, in its own arithmetic: the mean of the last twentieth of the steps. Seeds draw
the same batches, so that trainings of one seed are paired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.trainings import TASK, find_trained, read_fields
from kbit.training.config import PRODUCTS, SENT, STATES

LAW_ROLES: Final = (*PRODUCTS, *STATES)
ABOUT: Final = ["model", "parameters", "seed", "value", "diverged", "key"]
_OTHER_QUANTIZERS: Final = frozenset({*SENT, "fast", "lora", "replicas"})
_APART: Final = frozenset({*LAW_ROLES, "seed", "lr"})  # what one study changes
_KINDS: Final = dict.fromkeys(PRODUCTS, ("include",)) | dict.fromkeys(STATES, ("min_size", "embedding_states"))
_SHARED: Final = frozenset(name for names in _KINDS.values() for name in names)  # they say what a role quantizes


def tabulate_roles(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each training of one recipe, with the columns ABOUT and the bits of each of LAW_ROLES.

    A role that is not quantized has infinite bits. Each role has one kind of quantizer, which differs in its bits
    alone: the most frequent one. Of several recipes the one with the most models is taken, and then the one with the
    most trainings. Models may have learning rates of their own, each its most frequent one.
    """
    trained = find_trained(results)
    ends = trained[trained["task"] == TASK] if "task" in trained else trained
    if ends.empty:
        return pd.DataFrame(columns=[*ABOUT, *LAW_ROLES])
    ends = ends[ends["metric"].isin(["loss", "diverged"])]
    table = ends.pivot_table("value", ["key", "model", "parameters", "train_fields"], "metric").reset_index()
    fields = [read_fields(cell) for cell in table["train_fields"]]
    kinds = pd.DataFrame([{role: name_kind(own, role) for role in LAW_ROLES} for own in fields], table.index)
    table = table.rename(columns={"loss": "value"}).reindex(columns=["key", "model", "parameters", "value", "diverged"])
    table = table.assign(
        seed=[own.get("seed", 0) for own in fields],
        recipe=pd.Series([name_recipe(own) for own in fields], table.index, dtype=object),
        lr=[own.get("lr", np.nan) for own in fields],
        diverged=table["diverged"] > 0,
        **{role: [own[role]["bits"] if role in own else np.inf for own in fields] for role in LAW_ROLES},
    )
    table = table[table["recipe"].notna()]
    if table.empty:
        return pd.DataFrame(columns=[*ABOUT, *LAW_ROLES])
    table = keep_recipe(table)
    for role in LAW_ROLES:
        own = kinds.loc[table.index, role]
        if own.notna().any():
            usual = own.value_counts().sort_index().idxmax()
            table = table[own.isna() | (own == usual)]
    table = table.drop_duplicates(["model", "seed", *LAW_ROLES])
    return table.sort_values(["parameters", "seed", *LAW_ROLES], ignore_index=True)[[*ABOUT, *LAW_ROLES]]


def keep_recipe(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one recipe, and of each model's most frequent learning rate in it. See tabulate_roles."""
    sizes = table.groupby("recipe").agg(models=("model", "nunique"), trainings=("key", "nunique"))
    recipe = sizes.sort_values(["models", "trainings"], kind="stable").index[-1]
    table = table[table["recipe"] == recipe]
    rates = table["lr"].fillna(0)
    usual = {model: own.value_counts().sort_index().idxmax() for model, own in rates.groupby(table["model"])}
    return table[rates == table["model"].map(usual)]


def name_kind(fields: Mapping[str, Any], role: str) -> str | None:
    """Return the quantizer of a role without its bits, and what it is applied to. None: it is not quantized."""
    if role not in fields:
        return None
    quantizer = {name: value for name, value in fields[role].items() if name != "bits"}
    applied = {name: fields[name] for name in _KINDS[role] if name in fields}
    return json.dumps([quantizer, applied], sort_keys=True)


def name_recipe(fields: Mapping[str, Any]) -> str | None:
    """Return what decides a training beside its roles, or None of one that is quantized in other ways as well."""
    if _OTHER_QUANTIZERS & set(fields):
        return None
    left = {name: value for name, value in fields.items() if name not in _APART | _SHARED}
    return json.dumps(left, sort_keys=True)
