"""Does the number of bits that a step loads predict its time? The slope of time against bytes, both as logarithms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_precisions
from kbit.analysis.figures.costs.points import NEEDS, STUDIES, choose_variant, gather_costs, leave_int8
from kbit.analysis.figures.costs.times import set_time_axis
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, describe_lack
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "Inference costs what loading the bits costs: a step's time is proportional to the weights' bytes (section 2.1)."
)
_NEAR: Final = 0.2  # a slope of 1 to within this counts as in proportion


@dataclass(frozen=True)
class Slope:
    """How the time of a step follows the bytes of the weights that it reads.

    Attributes:
        batch: the number of sequences.
        slope: d log(time) / d log(bytes) within a model, from precision to precision. 1: in proportion.
        low, high: its 95% interval.
        points, models: how many there are.
    """

    batch: int
    slope: float
    low: float
    high: float
    points: int
    models: int


def fit_slope(points: pd.DataFrame, batch: int) -> Slope | None:
    """Return the slope of log(ms) against log(bytes) with an intercept for each model, or None of too few points.

    Least squares. The interval is Student's of the residuals, with points - models - 1 degrees of freedom. A model at
    one precision, or with the same bytes at all of them, says nothing.
    """
    at = points[points["batch"] == batch].dropna(subset=["step_megabytes", "ms_per_token"])
    at = at[at.groupby("model")["step_megabytes"].transform("nunique") > 1]
    models = at["model"].nunique()
    freedom = len(at) - models - 1
    if freedom < 1:
        return None
    logs = at[["step_megabytes", "ms_per_token"]].astype(float).map(math.log)
    x, y = (logs - logs.groupby(at["model"]).transform("mean")).to_numpy().T
    slope = float(x @ y / (x @ x))
    error = float(np.sqrt(((y - slope * x) ** 2).sum() / freedom / (x @ x)))
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Slope(batch, slope, slope - half, slope + half, len(at), models)


def judge_slope(found: Slope) -> str:
    """Say what a slope's interval means: time is in proportion to bytes, or follows them less, more, or not at all."""
    if found.low >= 1 - _NEAR and found.high <= 1 + _NEAR:
        return "in proportion"
    if found.low > 1:
        return "more than in proportion"
    if found.high <= 0:
        return "does not rise with the bytes"
    if found.high < 1:
        return "less than in proportion" if found.low > 0 else "less than in proportion, perhaps not at all"
    return "rises with the bytes, perhaps in proportion" if found.low > 0 else "undecided"


def draw_slope(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw a step's time against the bytes of the weights that it reads, a panel for each batch.

    Raises:
        MissingResults: too few models were timed at several precisions.
    """
    costs = leave_int8(choose_variant(gather_costs(results, "time_by_bits")))
    points = costs.points
    slopes = [found for batch in sorted(points["batch"].unique()) if (found := fit_slope(points, int(batch)))]
    if not slopes:
        raise MissingResults(describe_lack("time_by_bits", f"{NEEDS}, three of them at least", STUDIES))
    points = points[points["batch"].isin([found.batch for found in slopes])].dropna(subset=["step_megabytes"])
    points = points.assign(ms_per_step=points["ms_per_token"] * points["batch"])
    styles = style_precisions(sorted(points["bits"].unique()))
    sheet = make_sheet(page, len(slopes), (3.4, 2.8), min(3, len(slopes)), styles)
    for axes, found in zip(sheet.add_axes(len(slopes)), slopes, strict=True):
        _draw_batch(axes, points[points["batch"] == found.batch], styles)
        sheet.write_title(axes, f"batch {found.batch}: slope {found.slope:.2f}")
    sheet.label("weights that a step reads (MB)", "ms per step")
    draw_legend(sheet.fig.body, styles, page, lines=False)
    first = slopes[0]
    verdict = "; ".join(f"at batch {s.batch} slope {_write(s)}: {judge_slope(s)}" for s in slopes)
    short = f"At batch {first.batch} the slope is {_write(first)}, where 1 is in proportion."
    notes = (_describe_slopes(points, first), *costs.notes)
    return PaperFigure(
        "time_by_bits", sheet.fig, points, CLAIM, f"{verdict}.{costs.warning}", notes, short + costs.warning
    )


def _write(found: Slope) -> str:
    return f"{found.slope:.2f} ({found.low:.2f} to {found.high:.2f})"


def _describe_slopes(points: pd.DataFrame, first: Slope) -> str:
    """Say what the slopes are of, and what they are without the 16-bit weights, which another kernel multiplies."""
    packed = points[points["bits"] < BASELINE_BITS]
    within = [found for batch in sorted(packed["batch"].unique()) if (found := fit_slope(packed, int(batch)))]
    without = ", ".join(f"{_write(found)} at batch {found.batch}" for found in within)
    return (
        f"Slope: of log time against log bytes within a model, from precision to precision ({first.points} points of "
        f"{first.models} models), with its 95% interval by residuals. Grey lines join the precisions of a model. "
        f"Weights of 16 bits are multiplied by another kernel. Slope of packed weights alone: {without or 'too few'}."
    )


def _draw_batch(axes: Axes, points: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    """Draw a marker for each experiment, and a line through those of each model."""
    thin = 0.5 * float(matplotlib.rcParams["lines.linewidth"])
    for _, model in points.groupby("model"):
        line = model.sort_values("step_megabytes")
        axes.plot(line["step_megabytes"], line["ms_per_step"], color="0.75", linewidth=thin, zorder=1)
    for bits, group in points.groupby("bits"):
        style = styles[f"{bits}-bit"]
        axes.plot(
            group["step_megabytes"], group["ms_per_step"], linestyle="none", color=style.color, marker=style.marker,
            markersize=scale_marker(style),
        )  # fmt: skip
    set_log_axis(axes, points["step_megabytes"], "{:g}".format)
    set_time_axis(axes)
