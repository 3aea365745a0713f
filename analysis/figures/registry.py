"""Every figure and table by name: draw and save what the results allow, or say what is missing.

The figures are matplotlib.figure.Figure objects: no pyplot, no choice of a backend, no global setting left changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import pandas as pd

from kbit.analysis.curves.curves import Measure, split_families
from kbit.analysis.curves.families import keep_curves, leave_out_ambiguous
from kbit.analysis.curves.run_time import leave_out_rounded
from kbit.analysis.curves.stopped import describe_stopped
from kbit.analysis.curves.trainings import leave_out_trained
from kbit.analysis.figures.canvas.page import OWN_PAGE, Page, apply_style
from kbit.analysis.figures.costs.against import COST_FIGURES, draw_costs
from kbit.analysis.figures.costs.slope import draw_slope
from kbit.analysis.figures.costs.times import draw_times
from kbit.analysis.figures.curve_figures import draw_curves
from kbit.analysis.figures.drawing import PaperFigure, take_sentence
from kbit.analysis.figures.emergence import draw_features
from kbit.analysis.figures.int8 import draw_int8_methods
from kbit.analysis.figures.law_table import draw_laws
from kbit.analysis.figures.maps import draw_data_types_map, draw_sensitivity
from kbit.analysis.figures.mixes.allocation import draw_allocation
from kbit.analysis.figures.paper import CURVE_FIGURES
from kbit.analysis.figures.relations import RELATIONS, draw_relation
from kbit.analysis.figures.roofline import draw_roofline
from kbit.analysis.figures.run_time.activations import draw_activations_map
from kbit.analysis.figures.run_time.bit_law_table import draw_bit_laws
from kbit.analysis.figures.run_time.cache import draw_cache_bits
from kbit.analysis.figures.run_time.rotations import draw_rotation
from kbit.analysis.figures.saving import USUAL_FILES, Files, SavedFigure, save_figure
from kbit.analysis.figures.tables import draw_anchors, draw_frontier, draw_verdicts, table_1, table_2
from kbit.analysis.figures.training.exchange import draw_exchange
from kbit.analysis.figures.training.fast_precision import draw_fast_precision
from kbit.analysis.figures.training.law import draw_training_law
from kbit.analysis.figures.training.optimizer_ablation import draw_optimizer_ablation
from kbit.analysis.figures.training.qat import draw_qat
from kbit.analysis.figures.training.qlora import draw_qlora
from kbit.analysis.figures.training.states import draw_states
from kbit.analysis.figures.training.training_curves import draw_training_curves
from kbit.checks import suggest


class Draw(Protocol):
    """A function that draws a figure of what a store holds."""

    def __call__(self, results: pd.DataFrame, page: Page) -> PaperFigure:
        """Return the figure, or raise MissingResults."""


class DrawStyled(Protocol):
    """A function that draws a figure in kbit's style and the user's."""

    def __call__(self, results: pd.DataFrame, page: Page = ...) -> PaperFigure:
        """Return the figure, or raise MissingResults."""


def style_figure(draw: Draw) -> DrawStyled:
    """Return the function that draws a figure in style, of families with one architecture each (split_families)."""

    def draw_styled(results: pd.DataFrame, page: Page = OWN_PAGE) -> PaperFigure:
        with apply_style(page):
            figure = draw(split_families(results), page)
        figure.fig.page = page
        return figure

    return draw_styled


def style_figures(figures: Mapping[str, Draw]) -> dict[str, DrawStyled]:
    """Return style_figure of each."""
    return {name: style_figure(draw) for name, draw in figures.items()}


def as_table(draw: Callable[[pd.DataFrame], PaperFigure]) -> Draw:
    """Return the function that draws a table, which has the size of its text on every page."""
    return lambda results, page: draw(results)


def of_untrained(draw: Draw) -> Draw:
    """Return the function that draws a figure of the results that no training has a part in."""
    return lambda results, page: draw(leave_out_trained(results), page)


def of_whole(draw: Draw) -> Draw:
    """Return the function that draws a figure in which 16 bits mean that nothing is rounded."""
    return lambda results, page: draw(leave_out_rounded(results), page)


PLAIN: Final[dict[str, Draw]] = {
    **{definition.name: partial(draw_curves, definition) for definition in CURVE_FIGURES},
    "figure_16": draw_roofline,
    "table_1": as_table(table_1),
    "table_2": as_table(table_2),
    "verdicts": as_table(draw_verdicts),
    "frontier": as_table(draw_frontier),
    "laws": as_table(draw_laws),
    "data_types_map": draw_data_types_map,
    **{relation.name: partial(draw_relation, relation) for relation in RELATIONS},
    "sensitivity": draw_sensitivity,
    "allocation": draw_allocation,
    "int8_methods": draw_int8_methods,
    "features": draw_features,
    **{definition.name: partial(draw_costs, definition) for definition in COST_FIGURES},
    "time_per_token": draw_times,
    "time_by_bits": draw_slope,
    "anchors": as_table(draw_anchors),
}
TRAINED: Final[dict[str, Draw]] = {
    "qat": draw_qat,
    "qlora": as_table(draw_qlora),
    "optimizer_ablation": as_table(draw_optimizer_ablation),
    "states": draw_states,
    "training_curves": draw_training_curves,
    "fast_precision": draw_fast_precision,
    "exchange": draw_exchange,
    "training_law": draw_training_law,
}
_RUN_TIME: Final[dict[str, Draw]] = {
    "activations_map": of_untrained(draw_activations_map),
    "cache_bits": of_untrained(draw_cache_bits),
    "rotation": of_untrained(draw_rotation),
    "bit_laws": of_untrained(as_table(draw_bit_laws)),
}
_WHOLE: Final = {name: of_untrained(draw) for name, draw in PLAIN.items()} | TRAINED
FIGURES: Final = style_figures({name: of_whole(draw) for name, draw in _WHOLE.items()} | _RUN_TIME)


def list_figures(measure: Measure | None = None) -> dict[str, DrawStyled]:
    """Return every figure, or those of curves on another measure than their own."""
    if measure is None:
        return FIGURES
    curves = {f.name: partial(draw_curves, f, measure=measure) for f in CURVE_FIGURES}
    return style_figures({name: of_whole(of_untrained(draw)) for name, draw in curves.items()})


def draw_figure(name: str, results: pd.DataFrame, page: Page = OWN_PAGE, measure: Measure | None = None) -> PaperFigure:
    """Return one figure without the families whose results are ambiguous, which its notes and its verdict name.

    Args:
        name: a key of FIGURES.
        results: long form, one row per experiment and measurement (kbit.read_results).
        page: the page to draw on.
        measure: what a figure of curves shows instead of its own measure.

    Raises:
        ValueError: there is no such figure, or it is not one of curves, which alone show another measure.
        MissingResults: the results lack what it needs.
        AmbiguousResults: all families are ambiguous.
    """
    figures = list_figures(measure)
    if name not in figures:
        raise ValueError(f"unknown figure {name!r}; {suggest(name, figures)}")
    figure, left_out = leave_out_ambiguous(lambda rows: figures[name](rows, page), results)
    if early := describe_stopped(results):
        figure = replace(figure, notes=(*figure.notes, early))
    if not left_out:
        return figure
    reasons = [f"Left out: {reason}" for reason in left_out.values()]
    short = f"{figure.short or take_sentence(figure.verdict)} Left out: {', '.join(left_out)}."
    return replace(figure, verdict=" ".join([figure.verdict, *reasons]), short=short)


def save_figures(
    results: pd.DataFrame,
    out: Path,
    names: Sequence[str] | None = None,
    measure: Measure | None = None,
    page: Page = OWN_PAGE,
    files: Files = USUAL_FILES,
) -> Iterator[SavedFigure]:
    """Draw figures and write each into a folder. Return an iterator, which draws the next when it is asked for it.

    Each is written when it is drawn, so that one that fails loses no other. A family whose results are ambiguous is
    left out of the figures that others allow, and their verdicts say so. Each file is replaced in one step. The same
    results give the same bytes.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).
        out: the folder, made if it is absent and there is something to write.
        names: keys of FIGURES, or None for all. A figure that the results do not allow is recorded as skipped,
            with the reason, and one that raises any other error as failed.
        measure: what the figures of curves show instead of their own measure. Other figures cannot be named then.
        page: the page that each is drawn on.
        files: which files to write.

    Raises:
        ValueError: a name is not a figure, or not one of curves. Nothing is written then.
    """
    figures = list_figures(measure)
    unknown = [name for name in names or () if name not in figures]
    if unknown:
        raise ValueError(f"unknown figures {unknown}; allowed: {', '.join(figures)}")
    chosen = dict.fromkeys(figures if names is None else names)
    results = keep_curves(results) if len(chosen) > 1 else results
    draws = {name: partial(draw_figure, name, results, page, measure) for name in chosen}
    return (save_figure(name, draw, out, page, files) for name, draw in draws.items())
