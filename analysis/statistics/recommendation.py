"""Which measured model to take for an amount of memory, how sure that is, and what would settle it.

    memory = total bits / 8 + KV cache + activations     (kbit.costs.memory)

The best is the one with the best value among those that fit. Its rivals are compared with it on the same items. P(best)
is the share of bootstrap draws in which a candidate is best of all that fit (kbit.analysis.statistics.frontier).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import TIE, ZERO_SHOT, Measure, find_cross_entropy, find_measures, precision_curves
from kbit.analysis.curves.run_time import is_rounded, leave_out_run_time
from kbit.analysis.curves.settings import name_quantizer, name_variant
from kbit.analysis.curves.trainings import leave_out_trained
from kbit.analysis.statistics.frontier import draw_values, find_pareto_frontier, share_wins
from kbit.checks import KbitError, check_choice
from kbit.costs.hardware import CARD_OVERHEAD, GB, parse_hardware
from kbit.costs.memory import Use, count_memory
from kbit.costs.shapes import find_shape
from kbit.evaluation.measurement import Z_95
from kbit.methods.config import QuantConfig
from kbit.numerics.spec import BASELINE_BITS
from kbit.store.readers import leave_out_checkpoints

COLUMNS: Final = [
    "model", "variant", "gigabytes", "weights", "cache", "activations", "fits", "value", "low", "high",
    "difference", "difference_low", "difference_high", "chance", "items", "items_to_settle", "total_bits", "key",
]  # fmt: skip
MEASURES: Final = ("mean_zero_shot", "cross_entropy")
_SURE: Final = 0.95
_MOST: Final = 200  # candidates that are drawn, those with the best values


def recommend(
    results: pd.DataFrame, memory: str, *, context: int = 2048, batch: int = 1, measure: str | None = None
) -> pd.DataFrame:
    """Return the measured models and quantizers with the memory they take, the best of those that fit first.

    Experiments compare if they were measured in one way: the way with the most of them is taken. Models that were
    trained, checkpoints that were quantized before, models that round inputs or caches while they run, and models whose
    own context is shorter are left out.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).
        memory: the memory that there is, as an amount that is free or as cards, each of which loses CARD_OVERHEAD: 6GB,
            800MB, rtx3090, 2x24GB.
        context: tokens of each sequence. 0 leaves out the KV cache and the activations.
        batch: sequences at once.
        measure: mean_zero_shot or cross_entropy. None takes the first of them that was measured.

    Returns:
        A row for each candidate: the 200 best that fit, and of the others those that are better than all of less
        memory. Columns: model, variant, gigabytes (in all) and its parts weights, cache and activations, fits, value
        with its interval low and high, difference to the best with its 95% interval, chance to be the best of all that
        fit, items that were measured, items_to_settle (about how many would part it from the best, if the difference
        stays), total_bits and key. attrs has what describe_recommendation says of them all.

    Raises:
        KbitError: nothing was measured by it, nothing fits, or cross entropies do not compare.
        ValueError: an argument is wrong.
        AmbiguousResults: several experiments claim to be one model and quantizer.
    """
    hardware, use = parse_hardware(memory, "--memory"), Use(context, batch)
    available = hardware.count_available(CARD_OVERHEAD if hardware.is_card else 0)
    chosen, points, about = _list_candidates(results, measure)
    points, left_out = _add_memory(points, use)
    points["fits"] = points["gigabytes"] * GB <= available
    if not points["fits"].any():
        least = points.sort_values("gigabytes", kind="stable").iloc[0]
        raise KbitError(
            f"nothing that was measured fits into {memory} at a context of {context} tokens and batch {batch}: the "
            f"smallest, {least['model']} {least['variant']}, takes {format_size(least['gigabytes'])}"
        )
    about |= {"memory": memory, "context": context, "batch": batch, "available": available, "left_out": left_out}
    about |= {"measured": len(points), "fitting": int(points["fits"].sum())}
    table, about["draws"] = _compare(_keep_contenders(points, chosen), chosen, results)
    table = table[COLUMNS]
    table.attrs |= about | {"measure": chosen}
    return table


def _list_candidates(results: pd.DataFrame, asked: str | None) -> tuple[Measure, pd.DataFrame, dict[str, Any]]:
    """Return the measure, a point for each untrained model and quantizer, and how they were measured.

    Raises:
        KbitError: nothing was measured by it, or cross entropies of several families do not compare.
    """
    untrained = leave_out_trained(leave_out_checkpoints(results))
    results = leave_out_run_time(untrained)
    found = find_measures(results)
    if asked is not None:
        check_choice("--measure", asked, MEASURES)
        one = ZERO_SHOT if asked == "mean_zero_shot" else find_cross_entropy(results)
        found = [] if one is None else [one]
    if not found:
        raise KbitError("no experiment has a mean zero-shot accuracy or a cross entropy")
    rows = results[(results["metric"] == found[0].metric) & (results["task"] == found[0].task)]
    if rows.empty:
        raise KbitError(f"no experiment has a {found[0].name}")
    of_all = rows["key"].nunique()
    way = str(rows["evaluation"].value_counts().sort_index().idxmax()) if "evaluation" in rows else ""
    rows = rows[rows["evaluation"] == way] if way else rows
    families = sorted(rows["family"].astype(str).unique())
    if len(families) > 1 and not found[0].higher_is_better:
        raise KbitError(
            f"losses per token of {', '.join(families)} do not compare, as each has its own tokens: --where "
            f"\"family == '{families[0]}'\", or --measure mean_zero_shot"
        )
    points = precision_curves(rows, found[0].metric, found[0].task)
    is_plain = points["bits"] == BASELINE_BITS
    points = points[~(is_plain & points.duplicated(["bits", "model"]))].reset_index(drop=True)
    names = [
        "16-bit"
        if row["bits"] == BASELINE_BITS
        else name_variant(name_quantizer(row), row["block_size"], row.get("allocation"))
        for row in points.to_dict("records")
    ]
    items = rows.drop_duplicates("key").set_index("key")["n"]
    first = points["key"].str.split().str[0]
    about = {"evaluation": way, "otherwise": of_all - rows["key"].nunique()}
    about["rounded"] = untrained.loc[is_rounded(untrained), "key"].nunique()
    return found[0], points.assign(variant=names, items=items.reindex(first).to_numpy()), about


def _add_memory(points: pd.DataFrame, use: Use) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the points with the gigabytes that each takes, and why models are left out, by model.

    Raises:
        KbitError: all are.
    """
    parts, left_out = [], {}
    for name, own in points.groupby("model", sort=False):
        model = str(name)
        try:
            shape = find_shape(model)
        except ValueError:
            left_out[model] = "its shape is not known here"
            continue
        if shape.context is not None and use.context > shape.context:
            left_out[model] = f"it takes {shape.context} tokens"
            continue
        plain, quantized = (count_memory(shape, QuantConfig(bits=bits), use) for bits in (BASELINE_BITS, 4))
        activations = np.where(own["bits"] == BASELINE_BITS, plain.activations, quantized.activations) / GB
        weights = own["total_bits"].astype(float) / 8 / GB
        parts.append(
            own.assign(
                weights=weights, cache=plain.cache / GB, activations=activations,
                gigabytes=weights + plain.cache / GB + activations,
            )
        )  # fmt: skip
    if not parts:
        raise KbitError(
            f"no measured model can be used with a context of {use.context} tokens: {_join(left_out)}. "
            "--context asks for another"
        )
    return pd.concat(parts, ignore_index=True), left_out


def _keep_contenders(points: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return those that fit, and of the others those that are better than all of less memory. The best come first."""
    fitting = points[points["fits"]].sort_values(
        ["value", "gigabytes"], ascending=[not measure.higher_is_better, True], kind="stable"
    )
    frontier = find_pareto_frontier(points.assign(total_bits=points["gigabytes"]), measure.higher_is_better)
    beyond = points.loc[frontier.index[~frontier["fits"]]]
    return pd.concat([fitting[:_MOST], beyond], ignore_index=True)


def _compare(points: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Add the difference to the first, the chance of each that fits, and the items that would part the two.

    Those that do not fit are drawn apart, so that one without items leaves the comparison of the others paired. The
    source of the draws is returned, too.
    """
    fits = points["fits"].to_numpy()
    draws = draw_values(points[fits], measure, results)
    gaps = np.empty((len(draws.values), len(points)))
    gaps[:, fits] = draws.values - draws.values[:, :1]
    with_best = np.flatnonzero(~fits | (np.arange(len(points)) == 0))
    apart = draw_values(points.iloc[with_best], measure, results).values
    gaps[:, with_best[1:]] = apart[:, 1:] - apart[:, :1]
    chance = np.full(len(points), np.nan)
    if not np.isnan(draws.values).any():  # one without an interval leaves all chances unknown
        chance[fits] = share_wins((1 if measure.higher_is_better else -1) * draws.values.T).mean(axis=1)
    difference = (points["value"] - points["value"].iloc[0]).to_numpy(dtype=np.float64)
    low, high = np.quantile(gaps, [0.025, 0.975], axis=0)
    needed = np.full(len(points), np.nan)
    apart_by = np.abs(difference) > TIE
    ratio = Z_95 * gaps.std(axis=0)[apart_by] / difference[apart_by]
    needed[apart_by] = np.ceil(points["items"].to_numpy(dtype=np.float64)[apart_by] * ratio**2)
    found = {"difference": difference, "difference_low": low, "difference_high": high, "chance": chance}
    return points.assign(**found, items_to_settle=needed), draws.source


def describe_recommendation(table: pd.DataFrame) -> list[str]:
    """Return what a recommendation says, a sentence each: what to take, its rivals, and more or less memory."""
    about, best = table.attrs, table.iloc[0]
    measure: Measure = about["measure"]
    lower = "" if measure.higher_is_better else " (lower is better)"
    lines = [
        f"{about['fitting']} of {about['measured']} measured models and quantizers fit into {about['memory']} at a "
        f"context of {about['context']:,} tokens and batch {about['batch']}.",
        f"Take {_name(best)}: {measure.name}{lower} {best['value']:.4g}{_interval(best['low'], best['high'])}, in "
        f"{format_size(best['gigabytes'])}{_chance(best['chance'])}.",
        *_describe_rivals(table),
        *_describe_other_memory(table),
        f"Measured: {about['evaluation'] or 'in one way'}. Differences: {about['draws']}.",
    ]
    if about["otherwise"]:
        lines.append(f"Left out, as they were measured in another way: {about['otherwise']} experiments.")
    if about["rounded"]:
        lines.append(
            f"Left out, as they simulate rounded inputs or caches, which take no less memory: {about['rounded']} "
            "experiments."
        )
    if about["left_out"]:
        lines.append(f"Left out: {_join(about['left_out'])}.")
    return lines


def _describe_rivals(table: pd.DataFrame) -> list[str]:
    best, rivals = table.iloc[0], table[table["fits"]].iloc[1:]
    if math.isnan(best["chance"]):
        return ["How sure that is cannot be said: a value has no interval."]
    if best["chance"] >= _SURE or rivals.empty:
        return []
    rival = rivals.sort_values("chance", ascending=False, kind="stable").iloc[0]
    named = f"{_name(rival)} (chance {rival['chance']:.0%}, {_gain(rival)})"
    if abs(rival["difference"]) <= TIE:
        return [f"Undecided: the likeliest rival, {named}, has the same value."]
    needed, items = rival["items_to_settle"], rival["items"]
    if needed <= items:
        return [f"It is better than each rival alone, but not surely than all at once: the likeliest is {named}."]
    has_all = re.search(r"\ball (items|windows)\b", table.attrs["evaluation"])
    more = f"and all {items:,.0f} were measured: other tasks or texts must decide" if has_all else f"not {items:,.0f}"
    return [
        f"Undecided: the likeliest rival is {named}. About {needed:,.0f} items or windows in all would part these two, "
        f"if the difference stays, {more}."
    ]


def _describe_other_memory(table: pd.DataFrame) -> list[str]:
    best, lines = table.iloc[0], []
    more, less = table[~table["fits"]], table[table["fits"] & (table["gigabytes"] < best["gigabytes"])]
    if len(more):
        lines.append(f"From {format_size(more.iloc[0]['gigabytes'])} on: {_name(more.iloc[0])}, {_gain(more.iloc[0])}.")
    if len(less):
        lines.append(f"Below {format_size(best['gigabytes'])}: {_name(less.iloc[0])}, {_gain(less.iloc[0])}.")
    return lines


def _join(reasons: Mapping[str, str]) -> str:
    """Return models by the reason why they are left out."""
    models: dict[str, list[str]] = {}
    for model, reason in reasons.items():
        models.setdefault(reason, []).append(model)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in models.items())


def _name(row: pd.Series) -> str:
    return f"{row['model']} {row['variant']}"


def _gain(row: pd.Series) -> str:
    return f"{row['difference']:+.3g}{_interval(row['difference_low'], row['difference_high'])}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" (95% interval {low:.4g} to {high:.4g})"


def _chance(chance: float) -> str:
    return "" if math.isnan(chance) else f". Its chance to be the best of them is {chance:.0%}"


def format_size(gigabytes: float) -> str:
    """Return for example "24 GB", "605 MB", "0.605 MB"."""
    if gigabytes < 1:
        return f"{1000 * gigabytes:.3g} MB"
    return f"{gigabytes:.3g} GB" if gigabytes < 100 else f"{gigabytes:,.0f} GB"
