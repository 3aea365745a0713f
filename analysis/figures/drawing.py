"""What every figure is: a drawing, the data drawn, the claim it tests and the verdict, or why there is none."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import pandas as pd

from kbit.analysis.curves.curves import Measure
from kbit.analysis.curves.settings import rank_data_type
from kbit.analysis.figures.canvas.captions import MARGIN
from kbit.analysis.figures.canvas.page import (
    FULL_WIDTH,
    StyledFigure,
    get_line_height,
    get_size,
    get_small_size,
    measure_text,
    wrap_text,
)
from kbit.checks import tabulate_html

CELL: Final = 3.1  # inches
Caption = Literal["none", "short", "full"]
CAPTIONS: Final[tuple[Caption, ...]] = ("none", "short", "full")
NAMED_FAMILIES: Final = 6
MOST_PANELS: Final = 12  # of a figure, which is read at one glance: four families with three data types each
# What intervals leave out: those of values and differences, and those of correlations and laws.
LIMIT: Final = "Intervals are about these items alone: not about other texts, tasks or trainings of the models."
LIMIT_OF_MODELS: Final = "Other families, texts and tasks may give another answer."


class MissingResults(ValueError):
    """The store lacks what a figure needs. The message says which study to run."""


@dataclass(frozen=True)
class PaperFigure:
    """One figure or table on this store's data.

    Attributes:
        name: its name, for example "figure_2".
        fig: the drawing, without a caption.
        data: exactly what is drawn, a tidy table.
        claim: what the paper says. Figures that are not the paper's have a question instead.
        verdict: what these results say about the claim, computed, with leads and intervals.
        notes: the rest of the full caption: what is drawn, how much data it rests on, what was left out.
        short: the verdict in one sentence. Empty: the verdict's first one.
        table: a table's cells as they are read, for figures that are tables.
    """

    name: str
    fig: StyledFigure
    data: pd.DataFrame
    claim: str
    verdict: str
    notes: tuple[str, ...] = ()
    short: str = ""
    table: pd.DataFrame | None = None

    def write_paragraphs(self, caption: Caption) -> list[str]:
        """Return the paragraphs of a caption: none, claim and verdict in a sentence each, or all that is to be said."""
        paper = re.match(r"(figure|table)_(\d+)", self.name)
        who = f"Paper ({paper[1]} {paper[2]})" if paper else "Question"
        if caption == "none":
            return []
        if caption == "short":
            short = self.short or take_sentence(self.verdict)
            return [f"{who}: {take_sentence(self.claim)} These results: {short}"]
        return [f"{who}: {self.claim}", f"These results: {self.verdict}", *self.notes]

    def _repr_html_(self) -> str:
        """Return the picture with its claim and verdict, for notebooks."""
        picture = io.BytesIO()
        self.fig.savefig(picture, format="png")
        image = base64.b64encode(picture.getvalue()).decode("ascii")
        alt = html.escape(f"{self.name}: {self.verdict}")
        return f'<img src="data:image/png;base64,{image}" alt="{alt}">' + tabulate_html(
            {"claim": self.claim, "verdict": self.verdict}
        )


def take_sentence(text: str) -> str:
    """Return the first sentence of a claim or a verdict, which has no name of a family or a model in it."""
    found = re.match(r".*?[.?](?= )", text)
    return found[0] if found else text


def describe_lack(name: str, needs: str, studies: Sequence[str]) -> str:
    """Return the message of MissingResults: what a figure needs, and which ready studies measure it."""
    root = Path(str(files("kbit"))) / "sweeps"
    ready = [study for study in studies if (root / f"{study}.yaml").is_file()]
    advice = " or ".join(f"kbit run +sweeps={study}" for study in ready)
    advice = f"run: {advice}" if ready else "no ready study measures it yet"
    return f"{name} needs {needs}, and these results lack it; {advice}"


def split_keys(keys: Iterable[str]) -> set[str]:
    """Return the experiments' keys, where one string may hold several, separated by blanks."""
    return {key for group in keys for key in str(group).split()}


def describe_choice(points: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Say how many of the experiments with the figure's measure it leaves out."""
    families = points[points["family"].isin(curves["family"])]
    left = len(split_keys(families["key"]) - split_keys(curves["key"]))
    why = "with other settings or too few of their kind for a panel (choose with --where)"
    return [f"Left out: {count_things(left, 'experiment')} of the same families, {why}."] if left else []


def describe_sample(results: pd.DataFrame, keys: Iterable[str], *measures: Measure) -> str:
    """Return the line of a caption that says how much data a figure rests on.

    Args:
        results: long form. Keys and measures say which rows are drawn.
        keys: experiments' keys, see split_keys.
        measures: the measures drawn.
    """
    wanted = split_keys(keys)
    measured = [results[(results["metric"] == m.metric) & (results["task"] == m.task)] for m in measures]
    # as objects: of Arrow strings pandas makes a scalar for each one that is wanted
    parts = [rows[rows["key"].astype(object).isin(wanted)] for rows in measured]
    rows = pd.concat(parts)
    families = sorted(map(str, rows["family"].unique()))
    named = ", ".join(families) if len(families) <= NAMED_FAMILIES else f"{len(families)} families"
    counts = f"{count_things(rows['key'].nunique(), 'experiment')} on {count_things(rows['model'].nunique(), 'model')}"
    sizes = "; ".join(f"{m.name}: n = {describe_size(part)}" for m, part in zip(measures, parts, strict=True))
    return f"Data: {counts} of {named}. {sizes[:1].upper()}{sizes[1:]}."


def choose_panels(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of MOST_PANELS panels, at most: the first one of each family, then the second ones, and so on.

    Args:
        rows: what is drawn, with the columns family and panel. If there is a column data_type, the panels of a family
            are in the order of the data types.
    """
    panels = rows.drop_duplicates("panel")
    if "data_type" in rows:
        panels = panels.sort_values("data_type", key=lambda types: types.map(rank_data_type), kind="stable")
    turns = panels.groupby("family", sort=False).cumcount().sort_values(kind="stable")
    return rows[rows["panel"].isin(panels.loc[turns.index[:MOST_PANELS], "panel"])]


def describe_undrawn(rows: pd.DataFrame, drawn: pd.DataFrame, noun: str = "panels", held: str = "points") -> str:
    """Say how many of the panels choose_panels has left out, and that the CSV holds theirs. Empty: none."""
    count, all_of_them = drawn["panel"].nunique(), rows["panel"].nunique()
    if count == all_of_them:
        return ""
    return (
        f"Drawn: {count} of {all_of_them} {noun}, the first of each family, then the second, and so on (choose with "
        f"--where). The verdict counts all, and the CSV has their {held}."
    )


def count_things(count: int, noun: str) -> str:
    """Return for example "1 model", "2,000 models"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def describe_size(rows: pd.DataFrame) -> str:
    """Return for example "2,000 (float32, 500 items)": what one value rests on, and how it was measured."""
    size = f"{rows['n'].min():,}" + ("" if rows["n"].nunique() == 1 else f" to {rows['n'].max():,}")
    ways = sorted(rows["evaluation"].unique()) if "evaluation" in rows else []
    return size + (f" ({'; '.join(ways)})" if ways else "")


def draw_table(table: pd.DataFrame, title: str) -> StyledFigure:
    """Draw a table of strings: a header, a line below it, and the rows.

    A column is as wide as its longest cell. Longer cells than CELL inches are wrapped.
    """
    size, head = get_small_size(), get_size("axes.titlesize")
    line, gap = get_line_height(size), 2 * measure_text("n", size)
    cells = [[wrap_text(str(cell), CELL, size) for cell in row] for row in table.to_numpy()]
    names = [str(name) for name in table]
    columns = [[words for row in cells for words in row[column]] for column in range(len(names))]
    widths = [
        1.03 * max(1.15 * measure_text(name, size), *(measure_text(words, size) for words in column))  # room to round
        for name, column in zip(names, columns, strict=True)
    ]
    starts = [MARGIN + sum(widths[:column]) + column * gap for column in range(len(widths))]
    width = max(starts[-1] + widths[-1] + MARGIN, FULL_WIDTH)
    counts = [max(map(len, row)) for row in cells]
    height = (sum(counts) + 0.25 * len(counts) + 4) * line + MARGIN
    fig = StyledFigure(figsize=(width, height))
    axes = fig.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.text(MARGIN, MARGIN + line, title, fontsize=head)
    place = MARGIN + 2.8 * line
    for start, name in zip(starts, names, strict=True):
        axes.text(start, place, name, fontsize=size, weight="bold")
    axes.plot([MARGIN, width - MARGIN], [place + 0.4 * line] * 2, color="0.3", linewidth=0.8)
    for row, count in zip(cells, counts, strict=True):
        for start, lines in zip(starts, row, strict=True):
            for number, words in enumerate(lines, start=1):
                axes.text(start, place + (number + 0.3) * line, words, fontsize=size)
        place += (count + 0.25) * line
    return fig
