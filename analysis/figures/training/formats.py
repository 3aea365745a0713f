"""Trainings that differ in what they quantize alone: their names, their losses, and what each loses to float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import find_cross_entropy, refuse_mixed_evaluations, take_rows
from kbit.analysis.curves.trainings import describe_seeds, find_trained, read_fields
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker
from kbit.analysis.figures.drawing import count_things
from kbit.numerics.spec import QuantSpec
from kbit.training.config import PRODUCTS, SENT, STATES

PLAIN: Final = "float32"
TASK: Final = "training"
FAST: Final = "FAST"
USUAL_BLOCKS: Final = {"BFP": 16, "MX": 32}  # which their names do not say
COLUMNS: Final = ["model", "format", "seed", "steps", "cost", "value", "added", "key"]


def tabulate_formats(
    results: pd.DataFrame, metric: str, name: Callable[[Mapping[str, Any]], str | None], ignored: frozenset[str]
) -> pd.DataFrame:
    """Return COLUMNS, a row for each training, float32 first, of one model and of one recipe beside its formats.

    The model and the recipe with the most formats are taken, and before all others one with FAST. Of quantizers that
    share a name (as nearest and stochastic rounding do) the most frequent one is taken. describe_left_out counts the
    rest. `added` is the loss less that of float32 with the same seed, and missing where there is none.

    Args:
        results: long form.
        metric: the metric of the training that is the cost. Its value is missing where nothing was quantized.
        name: function that names the format of a training's fields, or returns None of one that is not to be shown.
        ignored: names of fields that differ between formats.

    Raises:
        AmbiguousResults: these trainings were measured in several ways.
    """
    measure, trained = find_cross_entropy(results), find_trained(results)
    if measure is None or trained.empty:
        return pd.DataFrame(columns=COLUMNS)
    costs = trained[(trained["task"] == TASK) & (trained["metric"] == metric)].set_index("key")["value"]
    rows = take_rows(trained, measure.metric, measure.task)
    fields = [read_fields(cell) for cell in rows["train_fields"]]
    recipes = [str(sorted((k, str(v)) for k, v in own.items() if k not in {*ignored, "seed"})) for own in fields]
    names: list[Any] = [name(own) for own in fields]
    rows = rows.assign(format=names, seed=[own.get("seed", 0) for own in fields])
    rows = rows.assign(steps=[own["steps"] for own in fields])
    rows = rows.assign(recipe=recipes, cost=rows["key"].map(costs.groupby(level=0).first()))
    rows = rows.assign(spec=[json.dumps({k: own[k] for k in sorted(ignored & own.keys())}) for own in fields])
    rows = rows[rows["format"].notna()]
    groups = [own for _, own in rows.groupby(["model", "recipe", "bits"], sort=True) if own["cost"].notna().any()]
    if not groups:
        return pd.DataFrame(columns=COLUMNS)
    table = max(groups, key=count_formats)
    refuse_mixed_evaluations(table)
    usual = {name: own.value_counts().sort_index().idxmax() for name, own in table.groupby("format")["spec"]}
    table = table[table["spec"] == table["format"].map(usual)]  # a name does not tell all of a quantizer
    table = table.drop_duplicates(["format", "seed"])
    order = table["format"].map(table.groupby("format")["cost"].mean().to_dict()).fillna(np.inf)
    table = table.assign(order=np.where(table["format"] == PLAIN, -np.inf, -order))
    plain = table[table["format"] == PLAIN].set_index("seed")["value"]
    table = table.assign(added=table["value"] - table["seed"].map(plain).astype(np.float64))
    return table.sort_values(["order", "format", "seed"], ignore_index=True)[COLUMNS]


def count_formats(group: pd.DataFrame) -> tuple[bool, int]:
    """Return whether FAST is among the formats of some trainings, and how many they have."""
    return bool(group["format"].str.startswith(FAST).any()), int(group["format"].nunique())


def describe_left_out(
    results: pd.DataFrame, data: pd.DataFrame, name: Callable[[Mapping[str, Any]], str | None]
) -> str:
    """Say how many trainings that `name` names are not in the data, or nothing."""
    trained = find_trained(results)
    named = trained["train_fields"].map({cell: name(read_fields(cell)) for cell in trained["train_fields"].unique()})
    left = trained.loc[named.notna(), "key"].nunique() - len(data)
    return (
        f"Not shown: {count_things(left, 'training')} that diverged or are of other models, recipes or quantizers."
        if left > 0
        else ""
    )


def name_products(fields: Mapping[str, Any]) -> str | None:
    """Return the name of what a training's products have: FAST with alpha and beta, one format, or one each."""
    if any(name in fields for name in (*STATES, *SENT, "lora", "replicas")):
        return None
    if "fast" in fields:
        fast = {"alpha": 0.6, "beta": 0.3, "low": 2, "high": 4} | fields["fast"]
        more = "" if (fast["low"], fast["high"]) == (2, 4) else f" m={fast['low']}/{fast['high']}"
        return f"{FAST} {fast['alpha']:g}/{fast['beta']:g}{more}"
    names = {role: name_format(fields.get(role)) for role in PRODUCTS}
    if len(set(names.values())) == 1:
        return names["weights"]
    return ", ".join(f"{role[0].upper()} {name}" for role, name in names.items())


def name_format(role: Mapping[str, Any] | None) -> str:
    """Return the short name of a role's quantizer: BFP m=2, MX float4-e2m1 block 64, int8 rows, nf4 block 64."""
    if role is None:
        return PLAIN
    spec = QuantSpec.from_json({"data_type": "float", **role})  # the values that keys leave out
    if spec.scale_format == "e8m0":
        kind, about = ("BFP", f"m={spec.bits - 1}") if spec.data_type == "int" else ("MX", spec.label())
        block = "" if spec.block_size == USUAL_BLOCKS[kind] else f" block {spec.block_size or 'whole'}"
        return f"{kind} {about}{block}"
    if spec.block_size is None:
        return f"{spec.label()} {'rows' if spec.layout == 'row' else 'one scale'}"
    return f"{spec.label()} block {spec.block_size}"


def find_differences(data: pd.DataFrame) -> pd.DataFrame:
    """Return for each format its mean cost, and its loss less that of float32, paired by seed, with an interval.

    The interval is Student's over seeds. The columns are cost, mean, low, high and seeds, by format.
    """
    rows = {}
    for name, group in data[data["format"] != PLAIN].groupby("format", sort=False):
        lost = group["added"].dropna()
        if len(lost):
            rows[str(name)] = (group["cost"].mean(), *describe_seeds(lost), len(lost))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["cost", "mean", "low", "high", "seeds"])


def describe_difference(name: str, row: pd.Series[float], unit: str) -> str:
    """Say what a format costs and loses, such as: BFP m=2 +0.030 (+0.010 to +0.050) at 1.00 passes."""
    interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if np.isfinite(row["low"]) else "one seed"
    return f"{name} {row['mean']:+.4f} ({interval}) at {row['cost']:.2f} {unit}"


def draw_formats(axes: Axes, data: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    """Draw what each format adds to the loss of float32: a mark with a bar over seeds, and a dot for each seed.

    Seeds differ by more than formats do, so that the losses themselves are drawn only where there is no float32.
    """
    has_plain = bool(data["added"].notna().any())
    axes.set_ylabel(f"nats per token above {PLAIN}" if has_plain else "cross entropy (nats per token)")
    if has_plain:
        axes.axhline(0, color=styles[PLAIN].color, linestyle=(0, (1, 2)), linewidth=1)
    for name, group in data.assign(drawn=data["added" if has_plain else "value"]).groupby("format", sort=False):
        style = styles[str(name)]
        if group["cost"].isna().all() or group["drawn"].isna().all():
            continue
        mean, low, high = describe_seeds(group["drawn"].dropna())
        error = np.nan_to_num([[mean - low], [high - mean]])
        cost = float(group["cost"].mean())
        axes.plot(group["cost"], group["drawn"], ".", color=style.color, markersize=3, alpha=0.6)
        axes.errorbar(
            [cost], [mean], yerr=error, color=style.color, marker=style.marker, capsize=2,
            markersize=scale_marker(style),
        )  # fmt: skip
