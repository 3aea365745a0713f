"""The data of the page's chart and table: experiments as columns, and the measurements of each measure.

A column with few distinct names has each name once, with a code and a look for it. Values have seven digits. 35,000
experiments with seven measures then take 11 MB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import pandas as pd

from kbit.analysis.curves.curves import LOSSES, ZERO_SHOT
from kbit.analysis.curves.settings import (
    SETTING_COLUMNS,
    is_missing,
    list_settings,
    name_quantizer,
    rank_data_type,
    rank_label,
)
from kbit.analysis.curves.stopped import is_stopped
from kbit.analysis.figures.canvas.styles import (
    LINE_STYLES,
    SERIES_STYLES,
    LineStyle,
    style_data_type,
    style_precision,
)
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS
from kbit.numerics.spec import BASELINE_BITS

UNQUANTIZED: Final = "unquantized"
OF_CHECKPOINT: Final = "as the checkpoint has it"  # block size and method of what another tool quantized
# The study's measures, in the order of the menu: metric, its words, its unit.
METRICS: Final = {
    "acc": ("accuracy", ""),
    "top1_agreement": ("top-1 agreement with 16 bits", ""),
    "cross_entropy": ("cross entropy", "nats per token"),
    "kl_divergence": ("KL divergence to 16 bits", "nats per token"),
    "perplexity": ("perplexity", ""),
}
GAINS: Final = ("acc", "acc_norm", "exact_match", "top1_agreement")  # metrics that are better if they are higher
DIGITS: Final = ".7g"


def collect_data(results: pd.DataFrame) -> dict[str, Any]:
    """Return what page.js reads: the experiments' columns, and a list of measures, the study's first.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results), with families of one
            architecture each (curves.split_families).
    """
    rows = results[results["value"].notna()]
    experiments = rows.drop_duplicates("key").reset_index(drop=True)
    places = pd.Series(experiments.index, index=experiments["key"])
    stopped = is_stopped(experiments, rows)
    return {"experiments": collect_experiments(experiments, stopped), "measures": collect_measures(rows, places)}


def collect_experiments(experiments: pd.DataFrame, stopped: pd.Series[bool]) -> dict[str, Any]:
    """Return the columns of experiments, one row each: the named ones with codes and looks, the others as lists.

    Args:
        experiments: a row each.
        stopped: which of them stopped early in anything that they measure.
    """
    is_found = find_checkpoints(experiments)
    bits = experiments["bits"].astype(int).mask(is_found, experiments["bits_per_param"].fillna(0).astype(int))
    types = experiments["data_type"].astype(object)
    named = name_settings(experiments, name_type)
    looks = style_types(experiments, named)
    quantizers = name_settings(experiments, name_quantized)
    sizes = pd.Series(
        [name_block_size(*pair) for pair in zip(experiments["block_size"], bits, strict=True)], dtype=object
    ).mask(is_found, OF_CHECKPOINT)
    methods = experiments["method"].astype(object).where(types.notna(), UNQUANTIZED).fillna("none").astype(str)
    methods = methods.mask(is_found, OF_CHECKPOINT)
    curves = pd.DataFrame({"family": experiments["family"].astype(str), "label": named, "size": sizes, "bits": bits})
    return {
        "family": encode(experiments["family"].astype(str), sort_names(experiments["family"])),
        "model": encode(experiments["model"].astype(str), sort_names(experiments["model"])),
        "bits": encode(bits.astype(str), sort_names(bits), {str(k): style_precision(k) for k in LINE_STYLES}),
        "data_type": encode(named, list(looks), looks),
        "quantizer": encode(quantizers, sort_names(quantizers)),
        "block_size": encode(sizes, sort_names(sizes)),
        "method": encode(methods, sort_names(methods)),
        "curve": curves.groupby(list(curves), sort=False).ngroup().tolist(),
        "key": experiments["key"].astype(str).tolist(),
        "stopped": stopped.astype(int).tolist(),
        "total_bits": experiments["total_bits"].astype(int).tolist(),
        "bits_per_param": shorten(experiments["bits_per_param"]),
    }


def find_checkpoints(experiments: pd.DataFrame) -> pd.Series[bool]:
    """Return which experiments are on checkpoints as another tool, or `kbit pack`, quantized them.

    Their precision is that of their bits per quantized parameter, rounded down: scales take the rest.
    """
    if "checkpoint" not in experiments:
        return pd.Series(False, experiments.index)
    return experiments["checkpoint"].notna() & experiments["data_type"].isna()


def encode(column: pd.Series[Any], names: Sequence[str], looks: dict[str, LineStyle] | None = None) -> dict[str, Any]:
    """Return a column as its names in order, a code for each row, and a look for each name."""
    known = looks or {}
    free = itertools.cycle(SERIES_STYLES)
    styles = [known[name] if name in known else BASELINE if name == UNQUANTIZED else next(free) for name in names]
    places = {name: place for place, name in enumerate(names)}
    return {
        "names": list(names),
        "codes": column.map(places).astype(int).tolist(),
        "looks": [{"color": style.color, "marker": style.marker} for style in styles],
    }


BASELINE: Final = LINE_STYLES[BASELINE_BITS]
CHECKPOINT: Final = replace(BASELINE, color="#666666")  # no curve of the study
MARKERS: Final = [style.marker for style in SERIES_STYLES]


def sort_names(column: pd.Series[Any]) -> list[str]:
    """Return the distinct names of a column: numbers by size, then texts, then what is not quantized."""
    names = {str(name) for name in column}
    return sorted(
        names, key=lambda name: (name == UNQUANTIZED, not name.isdigit(), int(name) if name.isdigit() else 0, name)
    )


def name_settings(experiments: pd.DataFrame, name: Callable[[dict[Any, Any]], str]) -> pd.Series[str]:
    """Return a name for each experiment's quantizer, worked out once for each distinct one."""
    columns = experiments.columns.intersection(["bits", "data_type", "checkpoint", *SETTING_COLUMNS]).tolist()
    group = experiments.groupby(columns, dropna=False, sort=False, observed=True).ngroup()
    firsts = experiments[~group.duplicated()].to_dict("records")
    return group.map(dict(zip(group.unique(), map(name, firsts), strict=True)))


def style_types(experiments: pd.DataFrame, names: pd.Series[str]) -> dict[str, LineStyle]:
    """Return the look of each name of name_type, sorted data type by data type.

    Names of one data type have its colour, as in the figures, and differ in their markers.
    """
    is_first = ~names.duplicated()
    rows = dict(zip(names[is_first], experiments[is_first].to_dict("records"), strict=True))
    ranks = {name: (rank_data_type(row["data_type"]), rank_label(name)) for name, row in rows.items()}
    looks: dict[str, LineStyle] = {}
    for name in sorted(rows, key=lambda name: (name == UNQUANTIZED, ranks[name])):
        row = rows[name]
        look = BASELINE
        if name != UNQUANTIZED and is_missing(row["data_type"]):
            look = CHECKPOINT
        elif name != UNQUANTIZED:
            look = style_data_type(str(row["data_type"]), int(row["bits"]), row["exponent_bits"])
        taken = {other.marker for other in looks.values() if other.color == look.color}
        free = [marker for marker in (look.marker, *MARKERS) if marker not in taken]
        looks[name] = replace(look, marker=free[0] if free else look.marker)
    return looks


def name_type(row: dict[Any, Any]) -> str:
    """Return the name of one experiment's data type with its settings. A float has its exponent bits in it."""
    if is_missing(row["data_type"]):
        weights = UNQUANTIZED if is_missing(row.get("checkpoint")) else str(row["checkpoint"])
        return " ".join([weights, *list_settings(row | {"method": None})])
    name = str(row["data_type"])
    if name == "float":
        exponent = PAPER_EXPONENT_BITS[row["bits"]] if is_missing(row["exponent_bits"]) else row["exponent_bits"]
        name = f"float e{exponent}"
    return " ".join([name, *list_settings(row)])


def name_quantized(row: dict[Any, Any]) -> str:
    """Return the name of one experiment's quantizer at its bits, such as "float4-e2m1" or "int3 gptq"."""
    return name_type(row) if is_missing(row["data_type"]) else name_quantizer(row)


def name_block_size(block_size: Any, bits: int) -> str:
    """Return the block size as the filter shows it."""
    if bits == BASELINE_BITS:
        return UNQUANTIZED
    return "whole tensor" if is_missing(block_size) else str(block_size)


def collect_measures(rows: pd.DataFrame, places: pd.Series[int]) -> list[dict[str, Any]]:
    """Return the measures of the menu, each with its measurements, the study's own first.

    Args:
        rows: measurements that have a value.
        places: the place of each experiment, by its key.
    """
    groups = [(str(metric), str(task), own) for (metric, task), own in rows.groupby(["metric", "task"], sort=True)]
    order = list(METRICS)
    groups.sort(key=lambda g: (order.index(g[0]) if g[0] in order else len(order), g[1] != ZERO_SHOT.task, g[1], g[0]))
    return [name_measure(metric, task) | collect_values(own, places) for metric, task, own in groups]


def name_measure(metric: str, task: str) -> dict[str, Any]:
    """Return how a measure is called: label and axis, its group in the menu, and whether lower values are better.

    lower is None if kbit does not know it, as of a measure of the user's own.
    """
    name, unit = METRICS.get(metric, (metric.replace("_", " "), ""))
    label = ZERO_SHOT.name if (metric, task) == (ZERO_SHOT.metric, ZERO_SHOT.task) else f"{name}: {task}"
    lower = True if metric in LOSSES else False if metric in GAINS else None
    axis = f"{label} ({unit})" if unit else label
    return {"label": label, "axis": axis, "group": "main" if metric in METRICS else "other", "lower": lower}


def collect_values(rows: pd.DataFrame, places: pd.Series[int]) -> dict[str, Any]:
    """Return the measurements of one measure: experiments' places, evaluations, values and intervals.

    The evaluations are sorted by how many experiments have them, the largest number first.
    """
    rows = rows.drop_duplicates("key")
    ways = rows["evaluation"].astype(str) if "evaluation" in rows else pd.Series("not recorded", rows.index)
    names = ways.value_counts().sort_index().sort_values(ascending=False, kind="stable").index.tolist()
    return {
        "evaluations": names,
        "evaluation": ways.map({name: code for code, name in enumerate(names)}).astype(int).tolist(),
        "point": places.loc[rows["key"]].astype(int).tolist(),
        **{name: shorten(rows[name]) for name in ("value", "low", "high")},
    }


def shorten(column: pd.Series[Any]) -> list[float | None]:
    """Return numbers with seven digits, a missing one as None."""
    return [None if is_missing(cell) else float(format(cell, DIGITS)) for cell in column.astype(object)]
