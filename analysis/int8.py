"""Int8 products of weights and activations: what each method adds to the cross entropy (LLM.int8(), Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kbit.analysis.curves import find_cross_entropy, is_missing
from kbit.analysis.drawing import MissingResults, PaperFigure, describe_lack, write_verdict
from kbit.analysis.frontier import draw_values
from kbit.analysis.panels import LEGEND_WIDTH, draw_legend, format_count, set_log_axis
from kbit.analysis.published import read_published
from kbit.analysis.styles import STYLE, LineStyle, style_series
from kbit.quantconfig import INT8_METHODS

CLAIM: Final = (
    "LLM.int8() (vector-wise scales, large activations at 16 bits) keeps the 16-bit loss at every size, where one "
    "scale for a whole tensor does not (its Table 1, C4)."
)
USUAL_THRESHOLD: Final = 6.0
# nats: a log axis is linear below, so that zero and gains are on it; where none adds ten times as much, it all is
LINEAR_TO: Final = 1e-3
COLUMNS: Final = ["panel", "method", "model", "parameters", "perplexity", "added", "low", "high", "source"]


def draw_int8_methods(results: pd.DataFrame) -> PaperFigure:
    """Draw the cross entropy that each int8 method adds to the 16-bit model's, a panel per family and the paper's own.

    Raises:
        MissingResults: no model has an int8 method and its 16-bit baseline on one text.
    """
    ours = tabulate_int8_methods(results) if len(results) and "method" in results else pd.DataFrame()
    if ours.empty:
        needs = "a model's cross entropy by int8 methods (quant.method=llm_int8, absmax, ...) and at 16 bits"
        raise MissingResults(describe_lack("int8_methods", needs, ("nano/int8", "paper/llm_int8_table_1")))
    data = pd.concat([ours, read_paper()], ignore_index=True)
    with matplotlib.style.context(["default", STYLE]):
        names = list(dict.fromkeys(data["panel"]))
        fig = Figure(figsize=(3.9 * len(names) + LEGEND_WIDTH, 3.9), layout="constrained")
        styles = style_series(data["method"])
        for place, name in enumerate(names):
            axes = fig.add_subplot(1, len(names), place + 1)
            draw_methods(axes, data[data["panel"] == name], styles)
            axes.set_title(name, loc="left")
            axes.set_ylabel("" if place else "cross entropy added (nats per token)")
        draw_legend(fig, styles)
        verdict = judge_methods(ours)
        write_verdict(
            fig, "int8_methods", CLAIM, verdict, "Bars: 95% intervals, windows paired with the 16-bit model's."
        )
    return PaperFigure("int8_methods", fig, data, CLAIM, verdict)


def draw_methods(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw a line per method against the model's size."""
    for method, line in rows.groupby("method", sort=False):
        line = line.sort_values("parameters")
        style = styles[str(method)]
        looks: dict[str, Any] = {
            "color": style.color,
            "marker": style.marker,
            "linestyle": style.dashes,
            "markersize": 6,
        }
        error = np.nan_to_num(np.maximum([line["added"] - line["low"], line["high"] - line["added"]], 0))
        axes.errorbar(line["parameters"], line["added"], yerr=error, capsize=2, elinewidth=0.8, **looks)
    axes.axhline(0, color="0.3", linewidth=0.8)
    set_log_axis(axes, rows["parameters"], format_count)
    if rows["added"].abs().max() > 10 * LINEAR_TO:
        axes.set_yscale("symlog", linthresh=LINEAR_TO)
    axes.set_xlabel("parameters")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def tabulate_int8_methods(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each model and int8 method; added is over the model's 16-bit loss."""
    measure = find_cross_entropy(results)
    if measure is None:
        return pd.DataFrame()
    rows = results[(results["metric"] == measure.metric) & (results["task"] == measure.task)].drop_duplicates("key")
    tables = []
    for _, group in rows.groupby(["family", "model"], sort=False):
        base, ours = group[group["bits"] == 16], group[group["method"].isin(INT8_METHODS)]
        if base.empty or ours.empty:
            continue
        draws = draw_values(pd.concat([base.head(1), ours]), measure, results).values
        low, high = np.quantile(draws[:, 1:] - draws[:, :1], [0.025, 0.975], axis=0)
        added = ours["value"] - base["value"].iloc[0]
        names = [name_method(row) for row in ours.to_dict("records")]
        table = ours.assign(panel=ours["family"], method=names, perplexity=np.exp(ours["value"].astype(float)))
        tables.append(table.assign(added=added, low=low, high=high, source="this store")[COLUMNS])
    if not tables:
        return pd.DataFrame()
    order = {name: place for place, name in enumerate(INT8_METHODS)}
    table = pd.concat(tables, ignore_index=True)
    place = table["method"].str.split().str[0].map(order)
    return table.assign(_place=place).sort_values(["panel", "parameters", "_place", "method"]).drop(columns="_place")


def name_method(row: Mapping[Any, Any]) -> str:
    """Return the method, with its threshold if that is not the paper's."""
    threshold = row.get("activation_threshold")
    is_usual = is_missing(threshold) or threshold == USUAL_THRESHOLD
    return f"{row['method']}" if is_usual else f"{row['method']} threshold {threshold:g}"


def read_paper() -> pd.DataFrame:
    """Return the paper's perplexities as COLUMNS, without intervals."""
    table = read_published("int8_methods")
    base = table[table["method"] == "none"].set_index("model")["perplexity"]
    table = table[table["method"] != "none"]
    added = np.log(table["perplexity"] / table["model"].map(base))
    return table.assign(panel="fairseq (paper)", added=added, low=np.nan, high=np.nan)[COLUMNS]


def judge_methods(ours: pd.DataFrame) -> str:
    """Say how far LLM.int8() and absmax are from 16 bits, and in how many models the claim holds."""
    wide = ours.pivot_table(index="model", columns="method", values="added")
    if not {"llm_int8", "absmax"} <= set(wide):
        return "llm_int8 and absmax were not both measured."
    both = wide[["llm_int8", "absmax"]].dropna()
    holds = int((both["llm_int8"].abs() < both["absmax"].abs()).sum())
    word = "Holds" if holds == len(both) else "Does not hold" if not holds else "Holds in part"
    ranges = ", ".join(f"{name} {both[name].min():+.4f} to {both[name].max():+.4f}" for name in both)
    return f"{word}: llm_int8 is closer to 16 bits than absmax in {holds} of {len(both)} models ({ranges} nats)."
