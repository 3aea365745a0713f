"""The paper's figures of results, in Python: matplotlib figures to show, change and save.

fig = kbit.figures.draw("figure_2", "results", width="3.3in")
fig.savefig("figure_2.pdf")
kbit.figures.make("figure_2", kbit.read_results("results")).verdict
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kbit.analysis.figures.canvas.captions import write_caption
from kbit.analysis.figures.canvas.notebooks import show_figures
from kbit.analysis.figures.canvas.page import Page, apply_style, parse_length
from kbit.analysis.figures.curve_figures import choose_measure
from kbit.analysis.figures.drawing import CAPTIONS, Caption, PaperFigure
from kbit.analysis.figures.registry import FIGURES, draw_figure
from kbit.checks import check_choice
from kbit.store.readers import leave_out_checkpoints, read_results

Length = str | float  # "3.3in", or inches


def names() -> list[str]:
    """Return the names of all figures and tables."""
    return list(FIGURES)


def draw(
    name: str,
    results: pd.DataFrame | str | Path = "results",
    *,
    width: Length | None = None,
    height: Length | None = None,
    caption: Caption = "none",
    style: str | Path | None = None,
    measure: str | None = None,
    lower_is_better: bool = False,
) -> Figure:
    """Return one figure of what was measured.

    Args:
        name: one of names().
        results: kbit.read_results' table, or parts of it, or the folder of a store, of which experiments that stopped
            early (study.until.decided) are drawn, too.
        width: the width, such as "3.3in", "84mm", or inches. None: what the panels need.
        height: the height of the whole figure, with its caption. None: it follows from the width. Tables have the size
            of their text, whatever width and height.
        caption: what is written below: "none", "short" (claim and verdict) or "full".
        style: a style of matplotlib, by its name or as a file. Where it says nothing, matplotlibrc and kbit do.
        measure: TASK/METRIC, what a figure of curves shows instead of its own measure.
        lower_is_better: whether the measure is a loss, if kbit does not know it.

    Raises:
        ValueError: there is no such figure, measure, style or length, the results lack what the figure needs, or the
            page is too small for it.
        FileNotFoundError: there is no store.
    """
    check_choice("caption", caption, CAPTIONS)
    page = make_page(width, height, style)
    figure = _make(name, results, page, measure, lower_is_better)
    with apply_style(page):
        write_caption(figure.fig, figure.write_paragraphs(caption), page)
    show_figures()
    return figure.fig


def make(
    name: str,
    results: pd.DataFrame | str | Path = "results",
    *,
    width: Length | None = None,
    height: Length | None = None,
    style: str | Path | None = None,
    measure: str | None = None,
    lower_is_better: bool = False,
) -> PaperFigure:
    """Return one figure with the data drawn, the claim, the verdict and its notes. A notebook shows it as a picture.

    The arguments and errors are those of draw.
    """
    show_figures()
    return _make(name, results, make_page(width, height, style), measure, lower_is_better)


def make_page(width: Length | None, height: Length | None, style: str | Path | None) -> Page:
    """Return the page of these sizes, where a number is inches.

    Raises:
        ValueError: a size is no length.
    """
    return Page(_read_length(width), _read_length(height), None if style is None else str(style))


def _read_length(length: Length | None) -> float | None:
    if length is None:
        return None
    return parse_length(length if isinstance(length, str) else f"{length}in")


def _make(
    name: str, results: pd.DataFrame | str | Path, page: Page, measure: str | None, lower_is_better: bool
) -> PaperFigure:
    table = results if isinstance(results, pd.DataFrame) else read_results(results, stopped=True)
    table = leave_out_checkpoints(table) if "checkpoint" in table else table
    chosen = choose_measure(table, measure, lower_is_better=lower_is_better)
    return draw_figure(name, table, page, chosen)
