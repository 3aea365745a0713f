"""The paper's figures, rebuilt from the results: each a named function that also checks the paper's claim.

Drawn with matplotlib.figure.Figure objects alone: no pyplot, no backend choice, no global setting left
changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure

from kbit.analysis.claims import judge_four_bit
from kbit.analysis.curves import (
    VARIANT,
    ZERO_SHOT,
    AmbiguousResults,
    Measure,
    find_cross_entropy,
    precision_curves,
)
from kbit.analysis.panels import STYLE, draw_panels

STUDY: Final = "kbit run +sweeps=nano/bit_level"  # the ready study that measures what these figures need


class MissingResults(ValueError):
    """The store lacks what a figure needs; the message says which study to run."""


@dataclass(frozen=True)
class PaperFigure:
    """One figure of the paper on this store's data.

    Attributes:
        name: for example "figure_2".
        fig: the drawing.
        data: exactly what is drawn, one row per marker and panel: precision_curves' columns, then metric and
        task.
        claim: what the paper says, one sentence.
        verdict: what these results say about it, computed.
    """

    name: str
    fig: Figure
    data: pd.DataFrame
    claim: str
    verdict: str


@dataclass(frozen=True)
class SavedFigure:
    """A figure on disk, or the reason why there is none.

    Attributes:
        paths: the PNG, SVG and CSV; empty if the figure was skipped.
        claim, verdict: as in PaperFigure; empty if the figure was skipped.
        skipped: why the figure was not drawn; None if it was.
    """

    name: str
    paths: tuple[Path, ...]
    claim: str
    verdict: str
    skipped: str | None = None


def figure_2(results: pd.DataFrame) -> PaperFigure:
    """Draw mean zero-shot accuracy against total bits, a line per precision, a panel per family and variant.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).

    Raises:
        MissingResults: no family has mean zero-shot accuracy at two sizes and two precisions.

    Dettmers & Zettlemoyer 2023, figure 2 (and 7, the same with all families).
    """
    claim = "At a fixed number of total model bits, 4-bit is best for almost all sizes and families."
    tasks = 0 if results.empty else count_tasks(results)
    y_label = ZERO_SHOT.name + (f" ({tasks} task{'s' if tasks > 1 else ''})" if tasks else "")
    return draw_bit_level("figure_2", results, ZERO_SHOT, y_label, claim)


def figure_13(results: pd.DataFrame) -> PaperFigure:
    """Draw cross entropy against total model bits: figure 2 by the measure with less noise.

    Of several texts, the one with the most results. Points far above the 16-bit curve are off the axis and
    named in the panel (the paper caps its curves at perplexity 100), so that the curves in question stay
    readable.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).

    Raises:
        MissingResults: no family has cross entropy at two sizes and two precisions.

    Dettmers & Zettlemoyer 2023, figure 13.
    """
    claim = "By cross entropy, too, 4-bit is best at a fixed number of total model bits."
    measure = None if results.empty else find_cross_entropy(results)
    return draw_bit_level("figure_13", results, measure, "cross entropy (nats per token)", claim)


FIGURES: Final[dict[str, Callable[[pd.DataFrame], PaperFigure]]] = {
    "figure_2": figure_2,
    "figure_13": figure_13,
}


def count_tasks(results: pd.DataFrame) -> int:
    """Return how many tasks have an accuracy of their own beside the mean; 0 if only the mean was stored."""
    tasks = results.loc[results["metric"] == ZERO_SHOT.metric, "task"]
    return int(tasks[tasks != ZERO_SHOT.task].nunique())


def draw_bit_level(name: str, results: pd.DataFrame, measure: Measure | None, y_label: str, claim: str) -> PaperFigure:
    """Draw one measure against total model bits; below it the paper's claim and these results' verdict."""
    curves = pd.DataFrame()
    if measure is not None and not results.empty:
        curves = precision_curves(results, measure.metric, measure.task)
    if measure is None or not has_two_curves(curves):
        raise MissingResults(
            f"{name} needs {y_label.split(' (')[0]} at two precisions, each at two or more sizes of one "
            f"family, and these results lack it; run: {STUDY}"
        )
    verdict = judge_four_bit(curves, measure)
    caption = [
        f"Paper ({name.replace('_', ' ')}): {claim}",
        f"These results: {verdict}",
        describe_bars(curves, measure),
    ]
    with matplotlib.style.context(["default", STYLE]):
        fig = draw_panels(curves, y_label, measure.higher_is_better, caption)
    return PaperFigure(name, fig, curves.assign(metric=measure.metric, task=measure.task), claim, verdict)


def has_two_curves(curves: pd.DataFrame) -> bool:
    """Whether some variant has two precisions with two sizes each: less is points, not curves to compare."""
    if curves.empty:
        return False
    sizes = curves.groupby([*VARIANT, "bits"], dropna=False)["model"].nunique()
    return bool((sizes[sizes >= 2].groupby(VARIANT, dropna=False).size() >= 2).any())


def describe_bars(curves: pd.DataFrame, measure: Measure) -> str:
    """Return the caption's last line: what the bars are, and which text was read."""
    bars = "" if curves["low"].isna().all() else "Bars: 95% intervals. "
    return f"{bars}Measured on {measure.task}." if measure.metric == "cross_entropy" else bars.strip()


def save_figures(results: pd.DataFrame, out: Path, names: Sequence[str] | None = None) -> list[SavedFigure]:
    """Draw figures and write each as PNG, SVG and CSV (the data drawn) into a folder.

    Everything is drawn before anything is written, so an error leaves the folder as it was; each file is
    replaced in one step. The same results give the same bytes.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).
        out: folder, made if absent.
        names: keys of FIGURES; None for all that the results allow, the others recorded as skipped with the
        reason.

    Raises:
        ValueError: a name is not a figure; or a figure asked for by name cannot be drawn (MissingResults,
            AmbiguousResults).
    """
    unknown = [name for name in names or () if name not in FIGURES]
    if unknown:
        raise ValueError(f"unknown figures {unknown}; allowed: {', '.join(FIGURES)}")
    drawn: list[PaperFigure | SavedFigure] = []
    for name in dict.fromkeys(FIGURES if names is None else names):
        try:
            drawn.append(FIGURES[name](results))
        except (MissingResults, AmbiguousResults) as error:
            if names is not None:
                raise
            drawn.append(SavedFigure(name, (), "", "", skipped=str(error)))
    out.mkdir(parents=True, exist_ok=True)
    return [write_figure(figure, out) if isinstance(figure, PaperFigure) else figure for figure in drawn]


def write_figure(figure: PaperFigure, out: Path) -> SavedFigure:
    """Write one figure as PNG (150 dpi), SVG and CSV."""
    png, svg, csv = (out / f"{figure.name}.{suffix}" for suffix in ("png", "svg", "csv"))
    with matplotlib.style.context(["default", STYLE]):
        replace_file(png, lambda path: figure.fig.savefig(path, format="png", dpi=150))
        # Without a date: the same results give the same bytes.
        replace_file(svg, lambda path: figure.fig.savefig(path, format="svg", metadata={"Date": None}))
    replace_file(csv, lambda path: figure.data.to_csv(path, index=False))
    return SavedFigure(figure.name, (png, svg, csv), figure.claim, figure.verdict)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside path, then move it there: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
