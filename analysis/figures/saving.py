"""Figures as files: pictures, the data drawn as CSV, the full caption as Markdown, and tables for papers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.figures.canvas.captions import TooSmallPage, write_caption
from kbit.analysis.figures.canvas.page import OWN_PAGE, Page, apply_style
from kbit.analysis.figures.canvas.styles import TooManyCurves
from kbit.analysis.figures.canvas.text_tables import write_latex, write_markdown
from kbit.analysis.figures.drawing import Caption, MissingResults, PaperFigure
from kbit.store.filesystem import replace_file
from kbit.store.tables import write_csv


@dataclass(frozen=True)
class Files:
    """Which files a figure becomes.

    Attributes:
        formats: keys of WRITTEN_AS.
        dpi: dots per inch of a PNG.
        caption: what is written below the drawing. The Markdown has all of it in any case.
    """

    formats: tuple[str, ...] = ("png", "svg")
    dpi: float = 150
    caption: Caption = "short"


USUAL_FILES: Final = Files()


@dataclass(frozen=True)
class SavedFigure:
    """A figure on disk, or the reason why there is none.

    Attributes:
        name: the figure's name.
        paths: the pictures, the CSV, the Markdown and a table's LaTeX. Empty if the figure was skipped.
        claim, verdict: as in PaperFigure. Empty if the figure was skipped.
        skipped: why the figure was not drawn, or None if it was.
        lacks: whether it was skipped as the results lack what it shows.
        failed: whether drawing or writing it raised an error that says nothing about the results.
    """

    name: str
    paths: tuple[Path, ...]
    claim: str
    verdict: str
    skipped: str | None = None
    lacks: bool = False
    failed: bool = False


def save_figure(
    name: str, draw: Callable[[], PaperFigure], out: Path, page: Page = OWN_PAGE, files: Files = USUAL_FILES
) -> SavedFigure:
    """Draw and write one figure, or return the reason why there is none, whatever was raised."""
    try:
        return write_figure(draw(), out, page, files)
    except (MissingResults, AmbiguousResults, TooManyCurves) as error:
        return SavedFigure(name, (), "", "", skipped=str(error), lacks=isinstance(error, MissingResults))
    except TooSmallPage as error:
        return SavedFigure(name, (), "", "", skipped=str(error), failed=True)
    except Exception as error:  # an error of one figure, of whatever kind, must not lose the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return SavedFigure(name, (), "", "", skipped=reason, failed=True)


def write_figure(figure: PaperFigure, out: Path, page: Page = OWN_PAGE, files: Files = USUAL_FILES) -> SavedFigure:
    """Write one figure into a folder that is made if it is absent."""
    with apply_style(page):
        write_caption(figure.fig, figure.write_paragraphs(files.caption), page)
        lay_out(figure.fig)
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / f"{figure.name}.{suffix}" for suffix in files.formats]
        for path in paths:
            replace_file(path, partial(write_picture, figure.fig, path.suffix[1:], files.dpi))
    full = figure.write_paragraphs("full")
    csv, text, latex = (out / f"{figure.name}.{suffix}" for suffix in ("csv", "md", "tex"))
    replace_file(csv, lambda path: write_csv(figure.data, path, [figure.name, *full]))
    replace_file(text, lambda path: write_markdown(path, figure.name, full, figure.table))
    paths += [csv, text]
    if figure.table is not None:
        table = figure.table
        replace_file(latex, lambda path: write_latex(path, full, table))
        paths.append(latex)
    return SavedFigure(figure.name, tuple(paths), figure.claim, figure.verdict)


def lay_out(fig: Figure) -> None:
    """Lay the panels out, once for all files."""
    engine = fig.get_layout_engine()
    if engine is not None:
        engine.execute(fig)
        fig.set_layout_engine(None)  # not "none", whose placeholder draws everything twice


def write_picture(fig: Figure, suffix: str, dpi: float, path: Path) -> None:
    """Write a drawing in one format."""
    fig.savefig(path, format=suffix, dpi=dpi)
