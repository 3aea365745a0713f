"""Figures of curves: a definition of paper.py, drawn on a store's results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import pandas as pd
from matplotlib.figure import Figure

from kbit.analysis.curves.curves import LOSSES, READING, ZERO_SHOT, Measure, find_cross_entropy
from kbit.analysis.curves.families import find_curves
from kbit.analysis.curves.published import match_published
from kbit.analysis.curves.selections import keep_comparable
from kbit.analysis.curves.settings import FLOATS
from kbit.analysis.curves.stopped import is_stopped
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.panels import draw_panels, find_offsets
from kbit.analysis.figures.drawing import (
    LIMIT,
    MissingResults,
    PaperFigure,
    choose_panels,
    describe_choice,
    describe_lack,
    describe_sample,
    describe_undrawn,
    split_keys,
    take_sentence,
)
from kbit.analysis.statistics.differences import compare_with_best
from kbit.analysis.statistics.grades import SIGN
from kbit.checks import suggest

if TYPE_CHECKING:
    from kbit.analysis.figures.paper import CurveFigure, Part

# in the CSV
DRAWN: Final = ["family", "bits", "label", "block_size", "model", "exponent_bits", *READING, "key", "panel", "series"]


def draw_curves(
    definition: CurveFigure, results: pd.DataFrame, page: Page, measure: Measure | None = None
) -> PaperFigure:
    """Draw a figure of curves with the paper's claim and these results' verdict.

    Points far above the best curve's losses are off the axis and named in the panel (the paper caps its curves at
    perplexity 100), so that the curves in question stay readable. Of several texts the one with the most results is
    shown.

    Args:
        definition: the figure's definition, see paper.CURVE_FIGURES.
        results: long form, one row per experiment and measurement (kbit.read_results).
        page: the page to draw on.
        measure: another measure than the figure's own, see choose_measure.

    Raises:
        MissingResults: no panel has two curves of two sizes each. The message names the study to run.
        AmbiguousResults: see curves.precision_curves.
    """
    own = measure is None
    measure = find_measure(results, loss=definition.loss) if measure is None else measure
    points = pd.DataFrame() if measure is None else find_curves(results, measure.metric, measure.task)
    curves = pd.DataFrame() if points.empty else keep_comparable(definition.select(points))
    if measure is None or curves.empty:
        what = measure.name if measure else "cross entropy" if definition.loss else ZERO_SHOT.name
        raise MissingResults(describe_lack(definition.name, f"{what}: {definition.needs}", definition.studies))
    curves = curves.assign(stopped=is_stopped(curves, results, measure))
    parts = definition.judge(curves, measure, results)
    drawn = choose_panels(curves)
    published = match_published(drawn, measure)
    differences, unpaired = compare_with_best(curves, measure, results)
    y_label = name_axis(results, curves["key"], measure)
    fig = draw_panels(drawn, y_label, measure.higher_is_better, published, differences, page)
    sign = SIGN if own else describe_direction(measure)
    sample = f"{describe_sample(results, curves['key'], measure)} {LIMIT}"
    notes = [f"{sign} {describe_bars(curves, measure)}", describe_panels(drawn, differences, unpaired, fig)]
    notes += [describe_undrawn(curves, drawn), sample, *describe_choice(points, curves)]
    notes += [describe_sources(published), describe_hollow(drawn)]
    return PaperFigure(
        definition.name if own else f"{definition.name}_{measure.task}_{measure.metric}".replace("/", "_"),
        fig,
        tabulate_points(curves, differences).assign(metric=measure.metric, task=measure.task),
        definition.claim if own else f"{definition.claim} Here of another measure, {measure.name}.",
        " ".join(f"{part.about}{part.said}" for part in parts),
        tuple(note for note in notes if note),
        shorten_parts(parts),
    )


def describe_hollow(curves: pd.DataFrame) -> str:
    """Say what hollow markers are, if there are any."""
    count = int(curves["stopped"].sum())
    return f"Hollow: {count} of {len(curves)} points stopped early." if count else ""


def shorten_parts(parts: Sequence[Part]) -> str:
    """Return a verdict in a sentence for each part, or of more than two parts how many have each outcome."""
    if len(parts) <= 2:
        return " ".join(f"{part.about}{take_sentence(part.said)}" for part in parts)
    outcomes = Counter(re.split(r" \(|\.(?: |$)", part.said)[0] for part in parts)
    counted = [f"{outcome} ({count} of {len(parts)} parts)" for outcome, count in outcomes.items()]
    return f"{'; '.join(counted)}."


def tabulate_points(curves: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Return the points drawn, each with its difference to the panel's best curve where that is known."""
    data = curves[DRAWN].rename(columns={"label": "data_type"})
    if differences.empty:
        return data
    renamed = {"low": "difference_low", "high": "difference_high", "reference": "best"}
    return data.merge(differences.rename(columns=renamed), how="left", on=["panel", "series", "total_bits"])


def describe_panels(curves: pd.DataFrame, differences: pd.DataFrame, unpaired: list[str], fig: Figure) -> str:
    """Say what of the panels a reader cannot know: strips, curves that were moved, axes that differ."""
    sentences = []
    panels = curves["panel"].nunique()
    if len(differences):
        where = "Below each panel" if len(fig.axes) > panels else "In the CSV, as this page has no room for it"
        sentences.append(
            f"{where}: the difference to the panel's best curve at equal bits, with its 95% interval (paired bootstrap "
            "over items). The CSV has the points outside the axis, too."
        )
        if unpaired:
            sentences.append(f"Without differences, as the store lacks their items: {'; '.join(unpaired)}.")
    if any(find_offsets(group) for _, group in curves.groupby("panel", sort=False)):
        sentences.append("Points at equal bits stand side by side.")
    if curves["family"].nunique() > 1:
        sentences.append("Panels of one family share their axes, those of two families do not.")
    if ((curves["varied"] == "bits") & (curves["label"] == "float")).any():
        sentences.append(FLOATS)
    return " ".join([*sentences, *describe_options(curves[curves["varied"] == "method"])])


def describe_options(curves: pd.DataFrame) -> list[str]:
    """Say the options of each method that all of its points share, as the curves' names leave them out."""
    options = curves.groupby("method")["method_options"].unique()
    return [f"{method} has {shared[0]}." for method, shared in options.items() if len(shared) == 1 and shared[0]]


def find_measure(results: pd.DataFrame, *, loss: bool) -> Measure | None:
    """Return the measure that a figure shows, or None if the results lack it."""
    if results.empty:
        return None
    return find_cross_entropy(results) if loss else ZERO_SHOT


def choose_measure(results: pd.DataFrame, asked: str | None, *, lower_is_better: bool) -> Measure | None:
    """Return the measure that a user names as TASK/METRIC, such as nano_cloze/acc, or None if none is asked for.

    kbit knows which of its own metrics are losses. Of another one, lower_is_better says it.

    Raises:
        ValueError: no result has it, or lower_is_better is said of no measure.
    """
    if not asked:
        if lower_is_better:
            raise ValueError("lower_is_better says of a measure that it is a loss: give the measure (TASK/METRIC), too")
        return None
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
