"""Panels of curves: quality against total model bits, a line per curve, and below it each curve's distance to the best.

The drawing is made to be read, see styles.py. The legend stands outside the panels.
"""

from __future__ import annotations

from typing import Any, Final

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from kbit.analysis.curves.curves import Floats
from kbit.analysis.figures.canvas.axes import set_bits_axis, set_value_axis
from kbit.analysis.figures.canvas.page import Page, StyledFigure, get_line_height, get_small_size, wrap_text
from kbit.analysis.figures.canvas.sheets import Sheet, draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_curves

PANEL: Final = (3.9, 3.1)  # inches, where the page leaves it open; of a figure with one panel SINGLE
SINGLE: Final = (6.6, 4.5)
STRIP_HEIGHT: Final = 1.4  # inches more for a panel with a strip
LEAST_WITH_STRIP: Final = 1.85  # inches: a lower panel has no room for a strip
IN_STRIP: Final = 0.8  # the share of the differences for which a strip's y axis is made, if all need one FAR as long
FAR: Final = 4.0
ABREAST: Final = 0.35  # the distance of curves that stand side by side, in sizes of the font
Offsets = dict[str, float]  # points to the right, by series


def draw_panels(
    curves: pd.DataFrame,
    y_label: str,
    higher_is_better: bool,
    published: pd.DataFrame,
    differences: pd.DataFrame,
    page: Page,
) -> StyledFigure:
    """Draw every panel's curves. Panels of one family share their axes' limits.

    Args:
        curves: points with the columns panel and series, which say where each is drawn, in order of appearance.
        y_label: the measure with its unit.
        higher_is_better: False lets collapsed points leave the axes (view_limits).
        published: points of papers to draw beside them, perhaps none, with panel, total_bits and value.
        differences: each point's paired difference to the panel's best curve (differences.compare_with_best), perhaps
            none. Each panel then has a strip with them, if the page has room for it.
        page: the page.
    """
    names = list(dict.fromkeys(curves["panel"]))
    styles = style_curves(curves)
    width, height = SINGLE if len(names) == 1 else PANEL
    columns = 2 if len(names) == 4 else 3
    more = STRIP_HEIGHT if len(differences) else 0.0
    sheet = make_sheet(page, len(names), (width, height + more), columns, styles)
    with_strips = len(differences) > 0 and sheet.panel_height >= LEAST_WITH_STRIP
    for (axes, strip), name in zip(sheet.add_panels(len(names), with_strips=with_strips), names, strict=True):
        group = curves[curves["panel"] == name]
        limits = view_limits(curves[curves["family"].isin(group["family"])], higher_is_better)
        offsets = find_offsets(group)
        draw_panel(axes, group, styles, limits, sheet, offsets)
        draw_published(axes, published[published["panel"] == name])
        if strip is not None:
            own = differences[differences["panel"] == name]
            draw_strip(strip, own, styles, offsets, sheet)
            axes.tick_params(labelbottom=own.empty)  # without a strip the panel has the labels of their x axis
    sheet.label("total model bits", y_label)
    shown = () if published.empty else (Line2D([], [], label="published", **look_published()),)
    draw_legend(sheet.fig.body, styles, page, more=shown)
    return sheet.fig


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


def find_offsets(curves: pd.DataFrame) -> Offsets:
    """Return how far each curve of a panel is moved, so that curves with points at equal bits stand side by side.

    Curves that share no budget with another one are not moved.
    """
    is_shared = curves.groupby("total_bits")["series"].transform("nunique") > 1
    names = list(dict.fromkeys(curves.loc[is_shared & (curves["bits"] < 16), "series"]))
    step = ABREAST * float(matplotlib.rcParams["font.size"])
    return {str(name): (place - (len(names) - 1) / 2) * step for place, name in enumerate(names)}


def draw_panel(
    axes: Axes,
    curves: pd.DataFrame,
    styles: dict[str, LineStyle],
    limits: tuple[float, float, float, float],
    sheet: Sheet,
    offsets: Offsets,
) -> None:
    """Draw the curves of one panel with their 95% intervals, on a log axis of total bits, with its name as the title.

    What lies above the axis is named between title and axis.
    """
    for series, curve in curves.groupby("series", sort=False):
        name = str(series)
        draw_curve(axes, curve.sort_values("total_bits"), "value", name, styles[name], offsets.get(name, 0.0))
    left, right, bottom, top = limits
    set_value_axis(axes, bottom, top)
    aside = (right / left) ** (max(offsets.values(), default=0.0) / 72 / (0.7 * sheet.panel_width))
    set_bits_axis(axes, left / aside, right * aside)
    title_pad = None
    hidden = curves[curves["value"] > top]
    if not hidden.empty:
        worst = hidden.groupby("series", sort=False)["value"].max()
        notes = ", ".join(f"{series} up to {value:.2f}" for series, value in worst.items())
        size = get_small_size()
        lines = wrap_text(f"above the axis: {notes}", sheet.measure_room(), size)
        # It stands above the panel, where no curve runs, and the title above it.
        axes.annotate("\n".join(lines), (0, 1), (0, 3), "axes fraction", "offset points", fontsize=size, va="bottom")
        title_pad = float(matplotlib.rcParams["axes.titlepad"]) + 72 * get_line_height(size) * len(lines)
    sheet.write_title(axes, str(curves["panel"].iloc[0]), title_pad)


def draw_curve(axes: Axes, curve: pd.DataFrame, column: str, name: str, style: LineStyle, offset: float) -> None:
    """Draw one curve: markers, the straight lines that are the interpolation, intervals as bars.

    Args:
        axes: where to draw.
        curve: its points with total_bits, the column, low and high.
        column: the column to draw.
        name: the label of what is drawn.
        style: how it looks.
        offset: points by which it is moved to the right.
    """
    value = curve[column].to_numpy(dtype=np.float64)
    # Rounding can put an end of an interval a hair on the wrong side. A measure without an interval has NaN: no bar.
    below = np.nan_to_num(np.maximum(value - curve["low"].to_numpy(dtype=np.float64), 0.0))
    above = np.nan_to_num(np.maximum(curve["high"].to_numpy(dtype=np.float64) - value, 0.0))
    is_filled = style.marker not in "+x"
    width = float(matplotlib.rcParams["lines.linewidth"])
    moved: dict[str, Any] = {}
    if offset:
        scale = axes.get_figure(root=True).dpi_scale_trans  # type: ignore[union-attr]
        moved = {"transform": axes.transData + ScaledTranslation(offset / 72, 0, scale)}
    _, _, bars = axes.errorbar(
        curve["total_bits"],
        value,
        yerr=np.stack([below, above]),
        label=name,
        color=style.color,
        marker=style.marker,
        linestyle=style.dashes,
        markersize=scale_marker(style),
        markeredgecolor="white" if is_filled else style.color,
        markeredgewidth=0.5 if is_filled else 1.5,
        elinewidth=0.5 * width,
        zorder=3,
        **moved,
    )
    for bar in bars:
        bar.set_alpha(0.55)  # bars of close curves overlap: they must not hide the markers
    if "stopped" in curve and curve["stopped"].any():
        draw_hollow(axes, curve.loc[curve["stopped"], "total_bits"], value[curve["stopped"].to_numpy()], style, moved)


def draw_hollow(axes: Axes, bits: pd.Series[float], value: Floats, style: LineStyle, moved: dict[str, Any]) -> None:
    """Draw points of experiments that stopped early over the others' markers."""
    looks: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white", "markeredgewidth": 1.2}
    looks |= {"markeredgecolor": style.color, "markersize": scale_marker(style)}
    marker = style.marker if style.marker not in "+x" else "o"
    axes.plot(bits, value, marker=marker, zorder=3.5, **looks, **moved)


def draw_strip(
    axes: Axes, differences: pd.DataFrame, styles: dict[str, LineStyle], offsets: Offsets, sheet: Sheet
) -> None:
    """Draw each curve's paired difference to the panel's best curve, which is the line at 0."""
    if differences.empty:
        axes.set_axis_off()
        return
    reference = str(differences["reference"].iloc[0])
    for series, curve in differences[differences["series"] != reference].groupby("series", sort=False):
        name = str(series)
        draw_curve(axes, curve.sort_values("total_bits"), "difference", name, styles[name], offsets.get(name, 0.0))
    axes.axhline(0, color=styles[reference].color, linewidth=0.8 * float(matplotlib.rcParams["lines.linewidth"]))
    ends = differences.loc[differences["series"] != reference, ["low", "high"]].to_numpy(dtype=np.float64)
    low, high = min(0.0, float(ends[:, 0].min())), max(0.0, float(ends[:, 1].max()))
    inner = min(0.0, float(np.quantile(ends[:, 0], 1 - IN_STRIP))), max(0.0, float(np.quantile(ends[:, 1], IN_STRIP)))
    if high - low > FAR * (inner[1] - inner[0]):  # collapsed points would press all others flat
        low, high = inner
    pad = 0.1 * (high - low) or 0.01
    set_value_axis(axes, low - pad, high + pad)
    sheet.write_title(axes, f"difference to {reference}", size=get_small_size())


def draw_published(axes: Axes, points: pd.DataFrame) -> None:
    """Draw points of papers: large hollow circles, so that a marker of ours that agrees shows inside."""
    if not points.empty:
        axes.plot(points["total_bits"], points["value"], zorder=4, **look_published())


def look_published() -> dict[str, Any]:
    """Return what published points look like."""
    looks = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markeredgecolor": "0.35"}
    return looks | {"markersize": 2 * float(matplotlib.rcParams["lines.markersize"])}
