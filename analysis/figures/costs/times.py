"""Time per token by precision and batch: of the experiments of a store, and of what `kbit bench` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from kbit.analysis.figures.canvas.axes import label_plainly
from kbit.analysis.figures.canvas.page import OWN_PAGE, Page, apply_style
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.costs.points import NEEDS, STUDIES, choose_variant, gather_costs, style_points
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, describe_lack
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = "How long does a token take at each precision, by the number of sequences at once?"
MOST_PANELS: Final = 6
_PLAIN: Final = f"{BASELINE_BITS}-bit"


def draw_times(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw milliseconds per token against the batch, a line for each precision and int8 method, a panel for each model.

    Raises:
        MissingResults: no model was timed at two precisions.
    """
    costs = choose_variant(gather_costs(results, "time_per_token"))
    points = costs.points
    if points.groupby("model")["series"].nunique().max() < 2:
        raise MissingResults(describe_lack("time_per_token", NEEDS, STUDIES))
    largest = points.drop_duplicates("model").nlargest(MOST_PANELS, "parameters").sort_values("parameters")["model"]
    left = points["model"].nunique() - len(largest)
    notes = (*costs.notes, *([f"{left} smaller models are not shown."] if left else []))
    points = points[points["model"].isin(largest)]
    styles = style_points(points)
    fig = _draw_panels(points, list(largest), styles, page)
    verdict = judge_times(points) + costs.warning
    table = write_table(points)
    return PaperFigure("time_per_token", fig, points, CLAIM, verdict, notes, short=verdict, table=table)


def draw_bench(table: pd.DataFrame, shown: pd.DataFrame, page: Page = OWN_PAGE) -> PaperFigure:
    """Draw what `kbit bench` measured, a panel for each model.

    Args:
        table: see kbit.costs.bench_tables.tabulate_bench.
        shown: the table for reading.
        page: the page to draw on.
    """
    points = table[table["ms_per_token"].notna()].rename(columns={"precision": "series"})
    points = points.astype({"batch": int})
    with apply_style(page):
        fig = _draw_panels(points, list(dict.fromkeys(points["model"])), style_series(points["series"]), page)
    fig.page = page
    note = f"Measured on {', '.join(sorted(points['conditions'].unique()))}. Bars: 95% intervals of medians."
    return PaperFigure("bench", fig, table, CLAIM, judge_bench(points), (note,), table=shown)


def _draw_panels(points: pd.DataFrame, models: list[str], styles: Mapping[str, LineStyle], page: Page) -> Any:
    sheet = make_sheet(page, len(models), (3.9, 2.8), min(2, len(models)), styles)
    for axes, model in zip(sheet.add_axes(len(models)), models, strict=True):
        of_model = points[points["model"] == model]
        for series, curve in of_model.groupby("series"):
            _draw_curve(axes, curve.sort_values("batch"), styles[str(series)])
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(of_model["batch"].unique()))
        set_time_axis(axes)
        label_plainly(axes.xaxis)
        sheet.write_title(axes, model)
    sheet.label("batch (sequences at once)", "ms per token")
    draw_legend(sheet.fig.body, styles, page)
    return sheet.fig


def set_time_axis(axes: Axes) -> None:
    """Make the y axis a log axis of times with round ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    label_plainly(axes.yaxis)


def _draw_curve(axes: Axes, curve: pd.DataFrame, style: LineStyle) -> None:
    looks: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.dashes}
    below, above = curve["ms_per_token"] - curve["low"], curve["high"] - curve["ms_per_token"]
    error = np.nan_to_num(np.maximum([below, above], 0))
    width = 0.5 * float(matplotlib.rcParams["lines.linewidth"])
    axes.errorbar(
        curve["batch"], curve["ms_per_token"], yerr=error, capsize=2, elinewidth=width,
        markersize=scale_marker(style), **looks,
    )  # fmt: skip


def judge_times(points: pd.DataFrame) -> str:
    """Say how many times as fast each series is as plain weights, at the smallest and the largest batch."""
    ends = sorted({points["batch"].min(), points["batch"].max()})
    parts = []
    for batch in ends:
        at = points[points["batch"] == batch].set_index(["model", "series"])["ms_per_token"]
        at = at[~at.index.duplicated()].unstack("series")
        if _PLAIN not in at:
            return "No plain model was timed beside them."
        gains = {series: (at[_PLAIN] / at[series]).dropna() for series in at if series != _PLAIN}
        words = [f"{series} {gain.min():.2f} to {gain.max():.2f}" for series, gain in gains.items() if len(gain)]
        parts.append(f"at batch {batch} {', '.join(words)}")
    count = points["model"].nunique()
    plain = f"plain {points['dtype'].iloc[0]} weights"
    return f"Times as fast as {plain}, over {count} model{'s' if count > 1 else ''}: {'; '.join(parts)}."


def judge_bench(points: pd.DataFrame) -> str:
    """Say which is fastest at each batch, for each model."""
    parts = []
    for model, rows in points.groupby("model", sort=False):
        best = rows.loc[rows.groupby("batch")["ms_per_token"].idxmin()]
        parts.append(
            f"{model}: {', '.join(f'{s} at batch {b}' for s, b in zip(best['series'], best['batch'], strict=True))}"
        )
    return f"Fastest are, of {'; of '.join(parts)}."


def write_table(points: pd.DataFrame) -> pd.DataFrame:
    """Return milliseconds per token for reading: a row for each model and series, a column for each batch."""
    index = ["parameters", "model", "bits", "series"]
    table = points.drop_duplicates([*index, "batch"]).pivot(index=index, columns="batch", values="ms_per_token")
    shown = table.sort_index(ascending=[True, True, False, True]).map(
        lambda value: "-" if np.isnan(value) else f"{value:.3g}"
    )
    shown.columns = pd.Index([f"batch {batch}" for batch in shown])
    return shown.reset_index().drop(columns=["parameters", "bits"]).rename(columns={"series": "precision"})
