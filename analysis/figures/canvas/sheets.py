"""Sheets: where on a page the panels and the legend of a figure are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D

from kbit.analysis.figures.canvas.captions import CaptionedFigure, TooSmallPage
from kbit.analysis.figures.canvas.page import (
    FONT_SIZE,
    FULL_WIDTH,
    Page,
    get_line_height,
    get_size,
    measure_text,
    wrap_text,
)
from kbit.analysis.figures.canvas.styles import LineStyle, draw_handle

LEAST_PANEL: Final = (0.85, 0.7)  # inches: a panel that small has room for two ticks
PANEL_SHAPE: Final = 1.3  # width by height of a panel where the page leaves it open
HANDLE: Final = 3.2  # the length of a line in the legend, in sizes of its font
BESIDE_TEXT: Final = 1.8  # what is around a text in the legend, in sizes of its font


@dataclass(frozen=True)
class Sheet:
    """A figure with room for panels.

    Attributes:
        fig: the figure.
        rows, columns: how the panels stand.
        panel_width, panel_height: inches from the left (top) of one panel to that of the next.
    """

    fig: CaptionedFigure
    rows: int
    columns: int
    panel_width: float
    panel_height: float

    def add_axes(self, count: int) -> list[Axes]:
        """Return the axes of so many panels, row by row."""
        return [axes for axes, _ in self.add_panels(count)]

    def add_panels(self, count: int, *, with_strips: bool = False) -> list[tuple[Axes, Axes | None]]:
        """Return the axes of so many panels, row by row, each with those of a strip below it or with none.

        A strip has the x axis of its panel.
        """
        if not with_strips:
            return [(self.fig.body.add_subplot(self.rows, self.columns, place + 1), None) for place in range(count)]
        grid = self.fig.body.add_gridspec(2 * self.rows, self.columns, height_ratios=[1.8, 1] * self.rows)
        pairs: list[tuple[Axes, Axes | None]] = []
        for place in range(count):
            row, column = divmod(place, self.columns)
            panel = self.fig.body.add_subplot(grid[2 * row, column])
            pairs.append((panel, self.fig.body.add_subplot(grid[2 * row + 1, column], sharex=panel)))
        return pairs

    def label(self, x_label: str, y_label: str) -> None:
        """Name the axes that all panels share, wrapped to the sheet's size."""
        size = get_size("axes.labelsize")
        width, height = self.fig.get_size_inches()
        weight = matplotlib.rcParams["axes.labelweight"]
        for write, text, room in (
            (self.fig.body.supxlabel, x_label, width),
            (self.fig.body.supylabel, y_label, height),
        ):
            if text:
                write("\n".join(wrap_text(text, 0.9 * room, size)), fontsize=size, weight=weight)

    def write_title(self, axes: Axes, title: str, pad: float | None = None, size: float | None = None) -> None:
        """Write a panel's title, wrapped to the panel's width."""
        size = size or get_size("axes.titlesize")
        axes.set_title("\n".join(wrap_text(title, self.measure_room(), size)), pad=pad, fontsize=size)

    def measure_room(self) -> float:
        """Return the width that text above a panel has, inches, beside the labels of the y axis."""
        size = get_size("axes.titlesize")
        labels = measure_text("0.000", size) + 2 * get_line_height(size) / self.columns
        return max(0.9 * self.panel_width - labels, 0.6)


def make_sheet(
    page: Page,
    count: int,
    panel: tuple[float, float],
    columns: int,
    legend: Mapping[str, LineStyle] | None = None,
    *,
    least_width: float | None = None,
) -> Sheet:
    """Return a new sheet for panels and a legend, which stands to their right on a wide page and else above them.

    Args:
        page: the page. What it leaves open follows from the panels.
        count: the number of panels.
        panel: width and height of a panel, inches, where the page leaves them open.
        columns: how many panels stand side by side, at most.
        legend: the legend's entries, which draw_legend draws.
        least_width: inches that a panel needs. None: what two ticks need.

    Raises:
        TooSmallPage: the page has no room for that many panels.
    """
    least = least_width or 1.6 * page.font_size / FONT_SIZE
    columns = min(columns, count)
    beside = is_beside(page)
    legend_width, legend_height = measure_legend(legend or {}, page)
    if page.width is None:
        width, inner = panel[0] * columns + legend_width, panel[0] * columns
    else:
        width, inner = page.width, page.width - legend_width
        columns = min(columns, max(1, int(inner / least)))
    above = 0.0 if beside else legend_height
    if page.height is None:
        rows = -(-count // columns)
        tall = panel[1] if page.width is None else inner / columns * min(panel[1] / panel[0], 1 / PANEL_SHAPE) + 0.25
        height = max(rows * tall, legend_height if beside else 0.0) + above
    else:
        height = page.height
        columns = choose_columns(count, columns, inner, height - above)
        rows = -(-count // columns)
    pitch = inner / columns, (height - above) / rows
    if pitch[0] < LEAST_PANEL[0] or pitch[1] < LEAST_PANEL[1]:
        raise TooSmallPage(
            f"{count} panels do not fit on {width:.2g} x {height:.2g} inches: give a larger --width or --height, or "
            "draw fewer with --where"
        )
    return Sheet(CaptionedFigure(width, height), rows, columns, *pitch)


def choose_columns(count: int, most: int, width: float, height: float) -> int:
    """Return how many panels stand side by side, so that each is as near to PANEL_SHAPE as can be."""
    shapes = {columns: (width / columns) / (height / -(-count // columns)) for columns in range(1, most + 1)}
    return min(shapes, key=lambda columns: float(abs(np.log(shapes[columns] / PANEL_SHAPE))))


def is_beside(page: Page) -> bool:
    """Whether the legend stands to the right of the panels."""
    return page.width is None or page.width >= FULL_WIDTH


def measure_legend(legend: Mapping[str, LineStyle], page: Page) -> tuple[float, float]:
    """Return the width that a legend takes from the panels, and its height, inches."""
    if not legend:
        return 0.0, 0.0
    size = get_size("legend.fontsize")
    line = 1.5 * size / 72
    if is_beside(page):
        return measure_entry(legend), (len(legend) + 1) * line
    return 0.0, -(-len(legend) // count_columns(legend, page)) * line + 0.1


def measure_entry(legend: Mapping[str, LineStyle]) -> float:
    """Return the width of the legend's longest entry, inches."""
    size = get_size("legend.fontsize")
    return max(measure_text(name, size) for name in legend) + (HANDLE + BESIDE_TEXT) * size / 72


def count_columns(legend: Mapping[str, LineStyle], page: Page) -> int:
    """Return in how many columns a legend above the panels stands."""
    assert page.width is not None  # it would be beside them
    return min(len(legend), max(1, int((page.width - 0.1) / measure_entry(legend))))


def draw_legend(
    body: SubFigure, legend: Mapping[str, LineStyle], page: Page, *, lines: bool = True, more: tuple[Line2D, ...] = ()
) -> None:
    """Draw one legend for all panels. Without lines its entries are markers alone.

    Args:
        body: the part of the figure above its caption.
        legend: a style for each entry.
        page: the page, whose width says where the legend stands.
        lines: whether the entries are lines.
        more: entries that are no curves.
    """
    handles = [draw_handle(name, style) for name, style in legend.items()]
    for handle in handles if not lines else ():
        handle.set_linestyle("none")
    place: dict[str, Any] = {"loc": "outside right upper"}
    if not is_beside(page):
        place = {"loc": "outside upper center", "ncols": count_columns(legend, page), "columnspacing": 0.8}
    body.legend(handles=[*handles, *more], handlelength=HANDLE if lines else 1.0, handletextpad=0.6, **place)
