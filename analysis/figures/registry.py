"""Every figure and table by name: draw what the results allow, write it, or say what is missing.

The figures are matplotlib.figure.Figure objects: no pyplot, no choice of a backend, no global setting left changed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import matplotlib.style
import pandas as pd

from kbit.analysis.curves.curves import (
    READING,
    ZERO_SHOT,
    AmbiguousResults,
    Measure,
    find_cross_entropy,
    leave_out_ambiguous,
    precision_curves,
    split_families,
)
from kbit.analysis.curves.published import match_published
from kbit.analysis.curves.selections import keep_comparable
from kbit.analysis.figures.canvas.panels import draw_panels, extend_caption
from kbit.analysis.figures.canvas.styles import STYLE, TooManyCurves
from kbit.analysis.figures.drawing import (
    LIMIT,
    MissingResults,
    PaperFigure,
    describe_choice,
    describe_lack,
    describe_sample,
    split_keys,
    write_verdict,
)
from kbit.analysis.figures.emergence import draw_features
from kbit.analysis.figures.int8 import draw_int8_methods
from kbit.analysis.figures.law_table import draw_laws
from kbit.analysis.figures.maps import draw_data_types_map, draw_sensitivity
from kbit.analysis.figures.paper import CURVE_FIGURES, CurveFigure
from kbit.analysis.figures.relations import RELATIONS, draw_relation
from kbit.analysis.figures.roofline import draw_roofline
from kbit.analysis.figures.tables import draw_anchors, draw_frontier, draw_verdicts, table_1, table_2
from kbit.analysis.statistics.grades import SIGN
from kbit.checks import suggest
from kbit.store.filesystem import replace_file
from kbit.store.tables import write_csv

DRAWN: Final = ["family", "bits", "label", "block_size", "model", *READING, "key", "panel", "series"]  # in the CSV
# kbit's own metrics that are better if they are lower
LOSSES: Final = (
    "cross_entropy", "perplexity", "kl_divergence", "bits_per_byte", "word_cross_entropy", "word_perplexity",
    "byte_perplexity",
)  # fmt: skip
QUICKLY: Final = {"compress_level": 2}  # of 9: files 3% larger than at 6, Pillow's own choice, in a seventh less time


@dataclass(frozen=True)
class SavedFigure:
    """A figure on disk, or the reason why there is none.

    Attributes:
        name: the figure's name.
        paths: the PNG, SVG and CSV. Empty if the figure was skipped.
        claim, verdict: as in PaperFigure. Empty if the figure was skipped.
        skipped: why the figure was not drawn, or None if it was.
        failed: whether drawing or writing it raised an error that says nothing about the results.
    """

    name: str
    paths: tuple[Path, ...]
    claim: str
    verdict: str
    skipped: str | None = None
    failed: bool = False


def draw_curves(definition: CurveFigure, results: pd.DataFrame, measure: Measure | None = None) -> PaperFigure:
    """Draw a figure of curves, and write the paper's claim and these results' verdict below it.

    Points far above the best curve's losses are off the axis and named in the panel (the paper caps its curves at
    perplexity 100), so that the curves in question stay readable. Of several texts the one with the most results is
    shown.

    Args:
        definition: the figure's definition, see paper.CURVE_FIGURES.
        results: long form, one row per experiment and measurement (kbit.read_results).
        measure: another measure than the figure's own, see choose_measure.

    Raises:
        MissingResults: no panel has two curves of two sizes each. The message names the study to run.
        AmbiguousResults: see curves.precision_curves.
    """
    own = measure is None
    measure = find_measure(results, loss=definition.loss) if measure is None else measure
    points = pd.DataFrame() if measure is None else precision_curves(results, measure.metric, measure.task)
    curves = pd.DataFrame() if points.empty else keep_comparable(definition.select(points))
    if measure is None or curves.empty:
        what = measure.name if measure else "cross entropy" if definition.loss else ZERO_SHOT.name
        raise MissingResults(describe_lack(definition.name, f"{what}: {definition.needs}", definition.studies))
    verdict = definition.judge(curves, measure, results)
    published = match_published(curves, measure)
    with matplotlib.style.context(["default", STYLE]):
        sample = f"{describe_sample(results, curves['key'], measure)} {LIMIT}"
        sign = SIGN if own else describe_direction(measure)
        notes = [f"{sign} {describe_bars(curves, measure)}", sample, *describe_choice(points, curves)]
        notes.append(describe_sources(published))
        fig = draw_panels(curves, name_axis(results, curves["key"], measure), measure.higher_is_better, published)
        name = definition.name if own else f"{definition.name}_{measure.task}_{measure.metric}".replace("/", "_")
        claim = definition.claim if own else f"{definition.claim} Here of another measure, {measure.name}."
        write_verdict(fig, definition.name, claim, verdict, *notes)
    data = curves[DRAWN].rename(columns={"label": "data_type"}).assign(metric=measure.metric, task=measure.task)
    return PaperFigure(name, fig, data, definition.claim, verdict)


def find_measure(results: pd.DataFrame, *, loss: bool) -> Measure | None:
    """Return the measure that a figure shows, or None if the results lack it."""
    if results.empty:
        return None
    return find_cross_entropy(results) if loss else ZERO_SHOT


def choose_measure(results: pd.DataFrame, asked: str, *, lower_is_better: bool) -> Measure:
    """Return the measure that a user names as TASK/METRIC, such as nano_cloze/acc or a measure of the user's own.

    kbit knows which of its own metrics are losses. Of another one, lower_is_better says it.

    Raises:
        ValueError: no result has it.
    """
    task, _, metric = asked.rpartition("/")
    there = sorted({f"{task}/{metric}" for task, metric in results[["task", "metric"]].drop_duplicates().to_numpy()})
    if asked not in there:
        raise ValueError(f"measure {asked!r} is in no result; {suggest(asked, there)}")
    is_loss = lower_is_better or metric in LOSSES
    return Measure(f"{task} {metric}", metric, task, higher_is_better=not is_loss)


def name_axis(results: pd.DataFrame, keys: Iterable[str], measure: Measure) -> str:
    """Return the label of the y axis: the measure with its unit, or with how many tasks the experiments drawn have."""
    if measure.metric == "cross_entropy":
        return f"{measure.name} (nats per token)"
    if measure != ZERO_SHOT:
        return measure.name
    tasks = count_tasks(results, keys)
    return measure.name + (f" ({tasks} tasks)" if tasks not in ("", "1") else f" ({tasks} task)" if tasks else "")


def describe_direction(measure: Measure) -> str:
    """Say which values of a measure are taken as better."""
    return f"A lead above 0 is better: {'higher' if measure.higher_is_better else 'lower'} {measure.name}."


def count_tasks(results: pd.DataFrame, keys: Iterable[str]) -> str:
    """Return how many tasks have an accuracy of their own beside the mean, "4" or "2 to 4", or "" if none has."""
    wanted = split_keys(keys)
    is_task = (results["metric"] == ZERO_SHOT.metric) & (results["task"] != ZERO_SHOT.task)
    rows = results[is_task & results["key"].astype(object).isin(wanted)]
    counts = rows.groupby("key")["task"].nunique().reindex(sorted(wanted), fill_value=0)
    low, high = int(counts.min()), int(counts.max())
    return "" if high == 0 else f"{high}" if low == high else f"{low} to {high}"


def describe_bars(curves: pd.DataFrame, measure: Measure) -> str:
    """Return the line of the caption that says what the bars are, and which text was read."""
    bars = "" if curves["low"].isna().all() else "Bars: 95% intervals. "
    return f"{bars}Measured on {measure.task}." if measure.metric == "cross_entropy" else bars.strip()


def describe_sources(published: pd.DataFrame) -> str:
    """Say where the published points are from."""
    if published.empty:
        return ""
    return "Circles: published values; " + "; ".join(sorted(published["source"].unique())) + "."


Draw = Callable[[pd.DataFrame], PaperFigure]


def of_one_architecture(draw: Draw) -> Draw:
    """Return the function that draws a figure of families with one architecture each, see curves.split_families."""
    return lambda results: draw(split_families(results))


def list_figures(figures: dict[str, Draw]) -> dict[str, Draw]:
    """Return functions that draw figures of families with one architecture each."""
    return {name: of_one_architecture(draw) for name, draw in figures.items()}


FIGURES: Final = list_figures(
    {
        **{definition.name: partial(draw_curves, definition) for definition in CURVE_FIGURES},
        "figure_16": draw_roofline,
        "table_1": table_1,
        "table_2": table_2,
        "verdicts": draw_verdicts,
        "frontier": draw_frontier,
        "laws": draw_laws,
        "data_types_map": draw_data_types_map,
        **{relation.name: partial(draw_relation, relation) for relation in RELATIONS},
        "sensitivity": draw_sensitivity,
        "int8_methods": draw_int8_methods,
        "features": draw_features,
        "anchors": draw_anchors,
    }
)


def save_figures(
    results: pd.DataFrame, out: Path, names: Sequence[str] | None = None, measure: Measure | None = None
) -> list[SavedFigure]:
    """Draw figures and write each as PNG, SVG and CSV (the data drawn) into a folder.

    Each is written when it is drawn, so that one that fails loses no other. A family whose results are ambiguous is
    left out of the figures that others allow, and their captions say so. Each file is replaced in one step. The same
    results give the same bytes.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).
        out: the folder, made if it is absent and there is something to write.
        names: keys of FIGURES, or None for all. A figure that the results do not allow is recorded as skipped, with the
            reason, and one that raises any other error as failed.
        measure: what the figures of curves show instead of their own measure. Other figures cannot be named then.

    Raises:
        ValueError: a name is not a figure, or not one of curves. Nothing is written then.
    """
    figures = FIGURES
    if measure is not None:
        figures = {f.name: of_one_architecture(partial(draw_curves, f, measure=measure)) for f in CURVE_FIGURES}
    unknown = [name for name in names or () if name not in figures]
    if unknown:
        raise ValueError(f"unknown figures {unknown}; allowed: {', '.join(figures)}")
    return [
        save_figure(name, figures[name], results, out) for name in dict.fromkeys(figures if names is None else names)
    ]


def save_figure(name: str, draw: Draw, results: pd.DataFrame, out: Path) -> SavedFigure:
    """Draw and write one figure, or return the reason why there is none, whatever was raised."""
    try:
        figure, left_out = leave_out_ambiguous(draw, results)
        for reason in left_out:
            figure = add_note(figure, f"Left out: {reason}")
        return write_figure(figure, out)
    except (MissingResults, AmbiguousResults, TooManyCurves) as error:
        return SavedFigure(name, (), "", "", skipped=str(error))
    except Exception as error:  # an error of one figure, of whatever kind, must not lose the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return SavedFigure(name, (), "", "", skipped=reason, failed=True)


def add_note(figure: PaperFigure, note: str) -> PaperFigure:
    """Return the figure with one more sentence in its verdict and its caption."""
    extend_caption(figure.fig, note)
    return replace(figure, verdict=f"{figure.verdict} {note}")


def write_figure(figure: PaperFigure, out: Path) -> SavedFigure:
    """Write one figure as PNG (150 dpi), SVG and CSV, into a folder that is made if it is absent."""
    out.mkdir(parents=True, exist_ok=True)
    png, svg, csv = (out / f"{figure.name}.{suffix}" for suffix in ("png", "svg", "csv"))
    with matplotlib.style.context(["default", STYLE]):
        if figure.fig.get_layout_engine() is not None:  # once: each file would lay the panels out again
            figure.fig.draw_without_rendering()
            figure.fig.set_layout_engine(None)  # not "none", whose placeholder draws everything twice
        replace_file(png, lambda path: figure.fig.savefig(path, format="png", dpi=150, pil_kwargs=QUICKLY))
        # Without a date: the same results give the same bytes.
        replace_file(svg, lambda path: figure.fig.savefig(path, format="svg", metadata={"Date": None}))
    replace_file(csv, partial(write_csv, figure.data))
    return SavedFigure(figure.name, (png, svg, csv), figure.claim, figure.verdict)
