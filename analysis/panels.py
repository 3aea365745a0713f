"""Drawing: quality against total model bits, one line per precision, one panel per family and variant.

Made to be read: an order of colours safe for colour-blind readers, a marker and a line style of its own for
each precision (readable in grey), no text under 9 points, the legend outside the panels.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kbit.analysis.curves import name_variant, split_variants
from kbit.spec import BASELINE_BITS

# On top of matplotlib's defaults, whatever the caller's own settings: the same results give the same file.
STYLE: Final[dict[str, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and edited
    "svg.hashsalt": "kbit",  # fixed ids, or each file would differ from the last
}
LEGEND_WIDTH: Final = 1.5  # inches, as all widths here
AXIS_WIDTH: Final = 0.7  # left of a panel's axis: its tick labels and y label
TICK_WIDTH: Final = 0.6  # a tick label ("100 Mbit") and a space
MARGIN: Final = 0.1
CAPTION_SIZE: Final = 9.0  # points
CHARACTER_WIDTH: Final = 0.56 * CAPTION_SIZE / 72  # DejaVu Sans: just under 0.56 em on average in English
LINE_HEIGHT: Final = 1.35 * CAPTION_SIZE / 72


@dataclass(frozen=True)
class LineStyle:
    """How one precision looks in every figure."""

    color: str
    marker: str
    dashes: tuple[int, tuple[float, ...]] | Literal["solid"]


# Okabe and Ito's palette (2008), black for the baseline; their yellow is too light on white: olive instead.
LINE_STYLES: Final = {
    2: LineStyle("#CC79A7", "P", (0, (1, 1))),
    3: LineStyle("#D55E00", "v", (0, (3.5, 1.5))),
    4: LineStyle("#0072B2", "o", "solid"),
    5: LineStyle("#009E73", "^", (0, (6, 2, 1, 2))),
    6: LineStyle("#56B4E9", "D", (0, (2, 2))),
    7: LineStyle("#7A7A1F", "X", (0, (6, 2, 1, 2, 1, 2))),
    8: LineStyle("#E69F00", "s", (0, (8, 2))),
    BASELINE_BITS: LineStyle("#000000", "*", (0, (1, 2))),
}
TICK_STEPS: Final = (
    (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
    (1.0, 2.0, 3.0, 5.0),
    (1.0, 2.0, 5.0),
    (1.0, 3.0),
    (1.0,),
)
UNITS: Final = ((1e12, "Tbit"), (1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit"))


@dataclass(frozen=True)
class Panel:
    """The curves of one variant and the cell of the grid, counted by rows, where they are drawn."""

    title: str
    family: str
    cell: int
    curves: pd.DataFrame


def draw_panels(curves: pd.DataFrame, y_label: str, higher_is_better: bool, caption: list[str]) -> Figure:
    """Draw every variant in a panel of its own; panels of one family share their axes' limits.

    Args:
        curves: from precision_curves.
        y_label: of the measure, with its unit.
        higher_is_better: False lets collapsed points leave the axes (view_limits).
        caption: paragraphs below the panels.
    """
    panels, columns = place_panels(curves)
    rows = panels[-1].cell // columns + 1
    width, height = (6.6, 4.5) if len(panels) == 1 else (3.9 * columns, 3.1 * rows)
    fig = Figure(figsize=(width + LEGEND_WIDTH, height), layout="constrained")
    cells = {panel.cell for panel in panels}
    for panel in panels:
        axes = fig.add_subplot(rows, columns, panel.cell + 1)
        limits = view_limits(curves[curves["family"] == panel.family], higher_is_better)
        draw_variant(axes, panel.curves, limits, tick_gap=TICK_WIDTH / (width / columns - AXIS_WIDTH))
        axes.set_title(panel.title, loc="left")
        # Only where no panel follows to the left or below.
        axes.set_ylabel(y_label if panel.cell % columns == 0 or panel.cell - 1 not in cells else "")
        axes.set_xlabel("total model bits" if panel.cell + columns not in cells else "")
    draw_legend(fig, curves)
    write_caption(fig, caption)
    return fig


def place_panels(curves: pd.DataFrame) -> tuple[list[Panel], int]:
    """Return the panels in order of their cells, and the number of columns.

    Several families in several variants make a table, a column per family and a row per variant (a
    combination that was not measured leaves its cell empty); otherwise the panels fill rows of two or three.
    """
    variants = [
        (str(variant["family"]), name_variant(variant["data_type"], variant["block_size"]), group)
        for variant, group in split_variants(curves)
    ]
    families = list(dict.fromkeys(family for family, _, _ in variants))
    names = list(dict.fromkeys(name for _, name, _ in variants))
    if len(families) > 1 and len(names) > 1:
        columns = len(families)
        cells = [names.index(name) * columns + families.index(family) for family, name, _ in variants]
    else:
        columns = 2 if len(variants) == 4 else min(len(variants), 3)
        cells = list(range(len(variants)))
    panels = [
        Panel(f"{family}, {name}", family, cell, group)
        for cell, (family, name, group) in zip(cells, variants, strict=True)
    ]
    return sorted(panels, key=lambda panel: panel.cell), columns


def view_limits(curves: pd.DataFrame, higher_is_better: bool) -> tuple[float, float, float, float]:
    """Return x and y limits (left, right, bottom, top) for the panels of one family.

    All points are in view but for one case. A loss can explode when the bits run out, and would press all
    other curves flat; so losses are shown up to one span of the 16-bit curve above its worst point:
        top = max + (max - min) of the baseline's losses.
    """
    left, right = (float(end) for end in (curves["total_bits"].min(), curves["total_bits"].max()))
    bottom = float(np.nanmin(curves[["value", "low"]].to_numpy(dtype=np.float64)))
    top = float(np.nanmax(curves[["value", "high"]].to_numpy(dtype=np.float64)))
    baseline = curves.loc[curves["bits"] == BASELINE_BITS, "value"].to_numpy(dtype=np.float64)
    if not higher_is_better and baseline.size and np.ptp(baseline) > 0:
        top = min(top, float(baseline.max() + np.ptp(baseline)))
    x_pad = (right / left) ** 0.04
    y_pad = 0.04 * (top - bottom)
    return left / x_pad, right * x_pad, bottom - y_pad, top + y_pad


def draw_variant(axes: Axes, curves: pd.DataFrame, limits: tuple[float, float, float, float], tick_gap: float) -> None:
    """Draw the precisions of one variant with their 95% intervals, on a log axis of total bits."""
    for bits, curve in curves.groupby("bits"):
        draw_precision(axes, curve.sort_values("total_bits"), int(str(bits)))
    left, right, bottom, top = limits
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.xaxis.set_major_locator(FixedLocator(choose_ticks(left, right, tick_gap)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(format_bits))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    hidden = curves[curves["value"] > top]
    if not hidden.empty:
        worst = hidden.groupby("bits")["value"].max()
        note = ", ".join(f"{bits}-bit up to {value:.2f}" for bits, value in worst.items())
        corner: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
        axes.text(0.99, 0.99, f"above the axis: {note}", fontsize=CAPTION_SIZE, **corner)


def draw_precision(axes: Axes, curve: pd.DataFrame, bits: int) -> None:
    """Draw one precision: markers, the straight lines that are the interpolation, intervals as bars."""
    style = LINE_STYLES[bits]
    value = curve["value"].to_numpy()
    # Rounding can put an end of an interval a hair on the wrong side; a measure without an interval has NaN:
    # no bar.
    below = np.nan_to_num(np.maximum(value - curve["low"].to_numpy(), 0.0))
    above = np.nan_to_num(np.maximum(curve["high"].to_numpy() - value, 0.0))
    _, _, bars = axes.errorbar(
        curve["total_bits"],
        value,
        yerr=np.stack([below, above]),
        label=f"{bits}-bit",
        color=style.color,
        marker=style.marker,
        linestyle=style.dashes,
        markersize=9 if style.marker == "*" else 6,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linewidth=1.6,
        elinewidth=0.8,
        zorder=3,
    )
    for bar in bars:
        bar.set_alpha(0.55)  # bars of close curves overlap: they must not hide the markers


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


def format_bits(total_bits: float, position: int | None = None) -> str:
    """Return for example "20 Mbit"; `position` is what matplotlib's formatters are also given."""
    for size, unit in UNITS:
        if total_bits >= size:
            return f"{total_bits / size:.3g} {unit}"
    return f"{total_bits:g} bit"


def draw_legend(fig: Figure, curves: pd.DataFrame) -> None:
    """Put one legend for all panels to their right."""
    handles = [
        Line2D(
            [],
            [],
            label=f"{bits}-bit",
            color=LINE_STYLES[bits].color,
            marker=LINE_STYLES[bits].marker,
            linestyle=LINE_STYLES[bits].dashes,
            markersize=9 if LINE_STYLES[bits].marker == "*" else 6,
            linewidth=1.6,
        )
        for bits in sorted(curves["bits"].unique())
    ]
    fig.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=4.2, title="precision")


def write_caption(fig: Figure, paragraphs: list[str]) -> None:
    """Write the paragraphs below the panels, wrapped, and make the figure taller by their height."""
    width, height = fig.get_size_inches()
    characters = int((width - 2 * MARGIN) / CHARACTER_WIDTH)
    text = "\n".join(textwrap.fill(paragraph, characters) for paragraph in paragraphs)
    room = (text.count("\n") + 1) * LINE_HEIGHT + 2 * MARGIN
    fig.set_size_inches(width, height + room)
    left, bottom = MARGIN / width, MARGIN / (height + room)
    share = room / (height + room)
    fig.set_layout_engine("constrained", rect=(0.0, share, 1.0, 1.0 - share - bottom))
    fig.text(left, bottom, text, fontsize=CAPTION_SIZE, va="bottom", linespacing=1.3)
