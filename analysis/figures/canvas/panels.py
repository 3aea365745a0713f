"""Drawing: quality against total model bits, a line per curve, one panel beside the other.

The drawing is made to be read, see styles.py. The legend stands outside the panels, and below them is what they show.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.canvas.styles import LineStyle, draw_handle, style_series

LEGEND_WIDTH: Final = 1.5  # inches, as all widths here
AXIS_WIDTH: Final = 0.7  # left of a panel's axis: its tick labels and y label
TICK_WIDTH: Final = 0.6  # a tick label ("100 Mbit") and a space
MARGIN: Final = 0.1
CAPTION_SIZE: Final = 9.0  # points
CHARACTER_WIDTH: Final = 0.56 * CAPTION_SIZE / 72  # DejaVu Sans: just under 0.56 em on average in English
LINE_HEIGHT: Final = 1.35 * CAPTION_SIZE / 72
TITLE_PAD: Final = 6.0  # points, between a title and what is below it

PUBLISHED: Final[dict[str, Any]] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 12,
    "markerfacecolor": "none",
    "markeredgecolor": "0.35",
}

TICK_STEPS: Final = (
    (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
    (1.0, 2.0, 3.0, 5.0),
    (1.0, 2.0, 5.0),
    (1.0, 3.0),
    (1.0,),
)


def draw_panels(curves: pd.DataFrame, y_label: str, higher_is_better: bool, published: pd.DataFrame) -> Figure:
    """Draw every panel's curves. Panels of one family share their axes' limits.

    Args:
        curves: points with the columns panel and series, which say where each is drawn, in order of appearance.
        y_label: the measure with its unit.
        higher_is_better: False lets collapsed points leave the axes (view_limits).
        published: points of papers to draw beside them, perhaps none, with panel, total_bits and value.
    """
    names = list(dict.fromkeys(curves["panel"]))
    columns = 2 if len(names) == 4 else min(len(names), 3)
    rows = -(-len(names) // columns)
    width, height = (6.6, 4.5) if len(names) == 1 else (3.9 * columns, 3.1 * rows)
    fig = Figure(figsize=(width + LEGEND_WIDTH, height), layout="constrained")
    styles = style_series(curves["series"])
    for cell, name in enumerate(names):
        axes = fig.add_subplot(rows, columns, cell + 1)
        group = curves[curves["panel"] == name]
        limits = view_limits(curves[curves["family"].isin(group["family"])], higher_is_better)
        draw_panel(axes, group, styles, limits, panel_width=width / columns - AXIS_WIDTH)
        draw_published(axes, published[published["panel"] == name])
        axes.set_ylabel(y_label if cell % columns == 0 else "")
        axes.set_xlabel("total model bits" if cell + columns >= len(names) else "")
    draw_legend(fig, styles, with_published=not published.empty)
    return fig


def view_limits(curves: pd.DataFrame, higher_is_better: bool) -> tuple[float, float, float, float]:
    """Return x and y limits (left, right, bottom, top) for the panels of one family.

    All points are in view but for one case. A loss can explode when the bits run out, and would press all other curves
    flat. So losses are shown up to one span of the best curve above its worst point. With y(m) the least loss of each
    model m (the 16-bit curve's, where there is one):
        top = max_m y + (max_m y - min_m y).
    """
    left, right = (float(end) for end in (curves["total_bits"].min(), curves["total_bits"].max()))
    bottom = float(np.nanmin(curves[["value", "low"]].to_numpy(dtype=np.float64)))
    top = float(np.nanmax(curves[["value", "high"]].to_numpy(dtype=np.float64)))
    best = curves.groupby("model")["value"].min().to_numpy(dtype=np.float64)
    if not higher_is_better and np.ptp(best) > 0:
        top = min(top, float(best.max() + np.ptp(best)))
    x_pad = (right / left) ** 0.04
    y_pad = 0.04 * (top - bottom) or 0.05  # all values are equal
    return left / x_pad, right * x_pad, bottom - y_pad, top + y_pad


def draw_panel(
    axes: Axes,
    curves: pd.DataFrame,
    styles: dict[str, LineStyle],
    limits: tuple[float, float, float, float],
    panel_width: float,
) -> None:
    """Draw the curves of one panel with their 95% intervals, on a log axis of total bits, with its name as the title.

    What lies above the axis is named between title and axis. The axis is panel_width inches wide.
    """
    for series, curve in curves.groupby("series", sort=False):
        draw_curve(axes, curve.sort_values("total_bits"), str(series), styles[str(series)])
    left, right, bottom, top = limits
    axes.set_ylim(bottom, top)
    set_bits_axis(axes, left, right, tick_gap=TICK_WIDTH / panel_width)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    title_pad = TITLE_PAD
    hidden = curves[curves["value"] > top]
    if not hidden.empty:
        worst = hidden.groupby("series", sort=False)["value"].max()
        notes = ", ".join(f"{series} up to {value:.2f}" for series, value in worst.items())
        lines = textwrap.wrap(f"above the axis: {notes}", int(panel_width / CHARACTER_WIDTH))
        # It stands above the panel, where no curve runs, and the title above it.
        axes.annotate(
            "\n".join(lines), (0, 1), (0, 3), "axes fraction", "offset points", fontsize=CAPTION_SIZE, va="bottom"
        )
        title_pad += 72 * LINE_HEIGHT * len(lines)
    axes.set_title(str(curves["panel"].iloc[0]), loc="left", pad=title_pad)


def set_bits_axis(axes: Axes, left: float, right: float, tick_gap: float) -> None:
    """Make the x axis a log axis of bits with round budgets as ticks."""
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(FixedLocator(choose_ticks(left, right, tick_gap)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(format_bits))


def draw_curve(axes: Axes, curve: pd.DataFrame, name: str, style: LineStyle) -> None:
    """Draw one curve: markers, the straight lines that are the interpolation, intervals as bars."""
    value = curve["value"].to_numpy()
    # Rounding can put an end of an interval a hair on the wrong side. A measure without an interval has NaN: no bar.
    below = np.nan_to_num(np.maximum(value - curve["low"].to_numpy(), 0.0))
    above = np.nan_to_num(np.maximum(curve["high"].to_numpy() - value, 0.0))
    is_filled = style.marker not in "+x"
    _, _, bars = axes.errorbar(
        curve["total_bits"],
        value,
        yerr=np.stack([below, above]),
        label=name,
        color=style.color,
        marker=style.marker,
        linestyle=style.dashes,
        markersize=9 if style.marker == "*" else 6,
        markeredgecolor="white" if is_filled else style.color,
        markeredgewidth=0.5 if is_filled else 1.5,
        linewidth=1.6,
        elinewidth=0.8,
        zorder=3,
    )
    for bar in bars:
        bar.set_alpha(0.55)  # bars of close curves overlap: they must not hide the markers


def draw_published(axes: Axes, points: pd.DataFrame) -> None:
    """Draw points of papers: large hollow circles, so that a marker of ours that agrees shows inside."""
    if not points.empty:
        axes.plot(points["total_bits"], points["value"], zorder=4, **PUBLISHED)


def choose_ticks(left: float, right: float, gap: float) -> list[float]:
    """Return the densest round budgets whose labels do not touch.

    Args:
        left, right: ends of the log axis, bits.
        gap: least distance of two ticks, as a fraction of the axis.
    """
    powers = range(int(np.floor(np.log10(left))), int(np.ceil(np.log10(right))) + 1)
    for steps in TICK_STEPS:
        candidates = np.array([step * 10.0**power for power in powers for step in steps])
        ticks = candidates[(candidates >= left) & (candidates <= right)]
        if ticks.size < 2:
            return [left, right]  # too short an axis for round numbers this far apart
        if np.diff(np.log(ticks)).min() >= gap * np.log(right / left):
            return [float(tick) for tick in ticks]
    # Only decades are left, and there are too many of them: every second, third, ...
    return [float(tick) for tick in ticks[:: int(np.ceil(gap * np.log10(right / left)))]]


def set_log_axis(axes: Axes, values: pd.Series[float], format_value: Callable[[float], str]) -> None:
    """Make the x axis a log axis around positive values, with a few round ticks."""
    left, right = float(values.min()), float(values.max())
    pad = max((right / left) ** 0.05, 1.05)
    axes.set_xscale("log")
    axes.set_xlim(left / pad, right * pad)
    axes.xaxis.set_major_locator(FixedLocator(choose_ticks(left / pad, right * pad, gap=0.2)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))


def label_plainly(axis: Axis) -> None:
    """Label a log axis with plain numbers, as "0.01", which need no mathematical typesetting."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_legend(fig: Figure, styles: dict[str, LineStyle], *, with_published: bool = False, lines: bool = True) -> None:
    """Put one legend for all panels to their right. Without lines its entries are markers alone."""
    handles = [draw_handle(name, style) for name, style in styles.items()]
    for handle in handles if not lines else ():
        handle.set_linestyle("none")
    if with_published:
        handles.append(Line2D([], [], label="published", **PUBLISHED))
    fig.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=4.2 if lines else 1.5)


def write_caption(fig: Figure, paragraphs: list[str]) -> None:
    """Write the paragraphs below the panels, wrapped, and make the figure taller by their height."""
    width, height = fig.get_size_inches()
    characters = int((width - 2 * MARGIN) / CHARACTER_WIDTH)
    text = "\n".join(textwrap.fill(paragraph, characters) for paragraph in paragraphs)
    room = measure_caption(text)
    fig.set_size_inches(width, height + room)
    left, bottom = MARGIN / width, MARGIN / (height + room)
    share = room / (height + room)
    if fig.get_layout_engine() is not None:
        fig.set_layout_engine("constrained", rect=(0.0, share, 1.0, 1.0 - share - bottom))
    else:  # a table, whose axes fill the figure
        fig.axes[0].set_position((0.0, share, 1.0, 1.0 - share))
    fig.text(left, bottom, text, fontsize=CAPTION_SIZE, va="bottom", linespacing=1.3, parse_math=False)


def extend_caption(fig: Figure, paragraph: str) -> None:
    """Write one more paragraph below the caption that write_caption wrote."""
    (caption,) = fig.texts
    text = caption.get_text()
    caption.remove()
    width, height = fig.get_size_inches()
    fig.set_size_inches(width, height - measure_caption(text))
    write_caption(fig, [*text.split("\n"), paragraph])


def measure_caption(text: str) -> float:
    """Return the height of a caption, inches."""
    return (text.count("\n") + 1) * LINE_HEIGHT + 2 * MARGIN
