"""Int8 products of weights and activations: what each method adds to the cross entropy (LLM.int8(), Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import find_cross_entropy, pick_rows
from kbit.analysis.curves.published import read_published
from kbit.analysis.curves.settings import is_missing
from kbit.analysis.curves.units import format_count
from kbit.analysis.figures.canvas.axes import label_plainly, set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, describe_lack, describe_sample
from kbit.analysis.statistics.degradation import measure_lost
from kbit.analysis.statistics.grades import NEGLIGIBLE, count_grades, grade_interval, grade_level
from kbit.layers.int8_schemes import SCHEMES
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "LLM.int8() (vector-wise scales, large activations at 16 bits) keeps the 16-bit loss at every size, where one "
    "scale for a whole tensor does not (its Table 1, C4)."
)

CLAIMED: Final = ("llm_int8", "absmax")  # the first keeps the 16-bit loss, the second does not
USUAL_THRESHOLD: Final = 6.0
# Nats. Below it a log axis is linear, so that zero and gains are on it. Where no method adds ten times as much, the
# whole axis is linear.
LINEAR_TO: Final = 1e-3
COLUMNS: Final = ["panel", "method", "model", "parameters", "perplexity", "added", "low", "high", "key", "source"]


def draw_int8_methods(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the cross entropy that each int8 method adds to the 16-bit model's, a panel per family and the paper's own.

    Raises:
        MissingResults: no model has an int8 method and its 16-bit baseline on one text.
    """
    ours = tabulate_int8_methods(results) if len(results) and "method" in results else pd.DataFrame()
    if ours.empty:
        needs = "a model's cross entropy by int8 methods (quant.method=llm_int8, absmax, ...) and at 16 bits"
        raise MissingResults(describe_lack("int8_methods", needs, ("nano/int8", "paper/llm_int8_table_1")))
    data = pd.concat([ours, read_paper()], ignore_index=True)
    names = list(dict.fromkeys(data["panel"]))
    styles = style_series(data["method"])
    sheet = make_sheet(page, len(names), (3.9, 3.9), 3, styles)
    panels = sheet.add_axes(len(names))
    for axes, name in zip(panels, names, strict=True):
        draw_methods(axes, data[data["panel"] == name], styles)
        sheet.write_title(axes, name)
    share_losses(panels, data)
    sheet.label("parameters", "cross entropy added (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    notes = (
        "Bars: 95% intervals, windows paired with the 16-bit model's. All panels have the same y axis.",
        describe_used(results, ours),
    )
    return PaperFigure("int8_methods", sheet.fig, data, CLAIM, judge_methods(ours), notes)


def share_losses(panels: list[Axes], data: pd.DataFrame) -> None:
    """Give all panels one y axis, which is linear around zero and logarithmic beyond."""
    ends = data[["added", "low", "high"]].to_numpy(dtype=np.float64)
    low, high = min(0.0, float(np.nanmin(ends))), max(0.0, float(np.nanmax(ends)))
    is_log = max(-low, high) > 10 * LINEAR_TO
    for axes in panels:
        if is_log:
            axes.set_yscale("symlog", linthresh=LINEAR_TO)
            label_plainly(axes.yaxis)
        pad = 1.3 if is_log else 1.05
        axes.set_ylim(pad * low - 0.05 * LINEAR_TO, pad * high + 0.05 * LINEAR_TO)


def describe_used(results: pd.DataFrame, ours: pd.DataFrame) -> str:
    """Return the line that says how much data the figure rests on: int8 experiments and their 16-bit baselines."""
    measure = find_cross_entropy(results)
    assert measure is not None  # the points have it
    base = pick_rows(results[results["bits"] == BASELINE_BITS], measure.metric, measure.task)
    base = base[base["model"].isin(ours["model"])].drop_duplicates("model")
    return describe_sample(results, [*base["key"], *ours["key"]], measure)


def draw_methods(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw a line per method against the model's size."""
    width = 0.5 * float(matplotlib.rcParams["lines.linewidth"])
    for method, line in rows.groupby("method", sort=False):
        line = line.sort_values("parameters")
        style = styles[str(method)]
        looks: dict[str, Any] = {
            "color": style.color,
            "marker": style.marker,
            "linestyle": style.dashes,
            "markersize": scale_marker(style),
        }
        error = np.nan_to_num(np.maximum([line["added"] - line["low"], line["high"] - line["added"]], 0))
        axes.errorbar(line["parameters"], line["added"], yerr=error, capsize=2, elinewidth=width, **looks)
    axes.axhline(0, color="0.3", linewidth=0.8)
    set_log_axis(axes, rows["parameters"], format_count)


def tabulate_int8_methods(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each model and int8 method. Column added is relative to the model's 16-bit loss."""
    measure = find_cross_entropy(results)
    if measure is None:
        return pd.DataFrame()
    of_figure = results[(results["bits"] == BASELINE_BITS) | results["method"].isin(SCHEMES)]
    table = measure_lost(pick_rows(of_figure, measure.metric, measure.task), measure, results)
    if table.empty:
        return pd.DataFrame()
    names = [name_method(row) for row in table.to_dict("records")]
    table = table.assign(panel=table["family"], perplexity=np.exp(table["value"].astype(float)), added=table["lost"])
    order = {name: place for place, name in enumerate(SCHEMES)}
    table = table.assign(_place=table["method"].map(order), method=names, source="this store")
    return table.sort_values(["panel", "parameters", "_place", "method"], ignore_index=True)[COLUMNS]


def name_method(row: Mapping[Any, Any]) -> str:
    """Return the method, with its threshold if that is not the paper's, and which part of the model it quantizes."""
    words = [str(row["method"])]
    threshold = row.get("activation_threshold")
    if not is_missing(threshold) and threshold != USUAL_THRESHOLD:
        words.append(f"threshold {threshold:g}")
    parts = {"with": row.get("include"), "without": row.get("exclude")}
    words += [f"{word} {pattern}" for word, pattern in parts.items() if not is_missing(pattern)]
    return " ".join(words)


def read_paper() -> pd.DataFrame:
    """Return the paper's perplexities as COLUMNS, without intervals."""
    table = read_published("int8_methods")
    base = table[table["method"] == "none"].set_index("model")["perplexity"]
    table = table[table["method"] != "none"]
    added = np.log(table["perplexity"] / table["model"].map(base))
    return table.assign(panel="fairseq (paper)", added=added, low=np.nan, high=np.nan, key="")[COLUMNS]


def judge_methods(ours: pd.DataFrame) -> str:
    """Return in how many models llm_int8 keeps the 16-bit loss and absmax does not, by the intervals of what each adds.

    To keep the loss is to add less than NEGLIGIBLE, and not to keep it is to add more. The claim says both.
    """
    limit = NEGLIGIBLE[False]
    index = {name: ours[ours["method"] == name].drop_duplicates("model").set_index("model") for name in CLAIMED}
    models = list(index["llm_int8"].index.intersection(index["absmax"].index))
    if not models:
        return "Not tested: llm_int8 and absmax were not both measured."
    keeps, loses = (index[name].loc[models] for name in CLAIMED)
    kept = [grade_level(low, high, limit) for low, high in zip(keeps["low"], keeps["high"], strict=True)]
    lost = [grade_interval(low - limit, high - limit) for low, high in zip(loses["low"], loses["high"], strict=True)]
    both = [
        next(g for g in ("does not hold", "undecided", "holds") if g in pair) for pair in zip(kept, lost, strict=True)
    ]
    head = count_grades(both).capitalize() if len(both) == 1 else f"Of {len(both)} models: {count_grades(both)}"
    first, second = (f"{rows['added'].min():+.4f} to {rows['added'].max():+.4f} nats" for rows in (keeps, loses))
    return (
        f"{head}. llm_int8 adds less than {limit:g} nats: {count_grades(kept)} ({first}); absmax adds more: "
        f"{count_grades(lost)} ({second})."
    )
