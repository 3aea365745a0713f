"""How large figures are and what they look like: sizes, widths of text, and kbit's settings below a user's own.

A setting counts as a user's own if a style file sets it, or if matplotlibrc or the program gives it another value than
matplotlib's default. Each other setting is kbit's. The same results on the same page give the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

INCHES: Final = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72}
FONT_SIZE: Final = 10.0  # points, on a page of FULL_WIDTH or wider
SMALLEST: Final = 7.0  # points: what journals ask for in a column
FULL_WIDTH: Final = 6.0  # inches: the text of a page
SMALL_TEXT: Final = 0.9  # ticks, captions and cells: this share of the font's size

# matplotlib's names of sizes, as shares of the font's size
SIZES: Final = {
    "axes.titlesize": 1.1, "axes.labelsize": 1.0, "figure.labelsize": 1.0, "xtick.labelsize": SMALL_TEXT,
    "ytick.labelsize": SMALL_TEXT, "legend.fontsize": 0.95,
}  # fmt: skip
# matplotlib's names of lengths in points, as shares of the font's size
LENGTHS: Final = {
    "lines.linewidth": 0.16, "lines.markersize": 0.6, "axes.titlepad": 0.6, "axes.labelpad": 0.3,
    "xtick.major.pad": 0.3, "ytick.major.pad": 0.3, "xtick.major.size": 0.3, "ytick.major.size": 0.3,
}  # fmt: skip

FONT_LISTS: Final = ("font.sans-serif", "font.serif", "font.monospace", "font.cursive", "font.fantasy")
STYLE: Final[dict[str, Any]] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and edited
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "ps.fonttype": 42,
}
# These have no other value. Names of models and tasks are text, whatever characters they have.
FIXED: Final[dict[str, Any]] = {
    "text.usetex": False,
    "text.parse_math": False,
    "svg.hashsalt": "kbit",
    "savefig.bbox": None,  # "tight" gives files another width than the page's
}
QUICKLY: Final = {"compress_level": 2}  # of 9: files 3% larger than at 6, Pillow's own choice, in a seventh less time
# Without a date: the same results give the same bytes.
WRITTEN_AS: Final[dict[str, dict[str, Any]]] = {
    "png": {"pil_kwargs": QUICKLY},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}


@dataclass(frozen=True)
class Page:
    """How large a figure is, and which style it has.

    Attributes:
        width: inches. None: what the figure's panels need.
        height: inches, with the caption. None: it follows from the width and the number of panels.
        style: a style of matplotlib, by its name or as a file. It beats kbit's own.
    """

    width: float | None = None
    height: float | None = None
    style: str | None = None

    @property
    def font_size(self) -> float:
        """Points, unless the user sets font.size: smaller on a narrow page."""
        return FONT_SIZE if self.width is None else min(max(SMALLEST, FONT_SIZE * self.width / FULL_WIDTH), FONT_SIZE)


OWN_PAGE: Final = Page()  # each figure in its own size


class StyledFigure(Figure):
    """A figure whose files have its page's style too: matplotlib reads some settings only when it writes.

    Attributes:
        page: the page on which it was drawn.
    """

    page: Page = OWN_PAGE

    def savefig(self, fname: Any, *, transparent: bool | None = None, **kwargs: Any) -> None:
        """Write the figure, as Figure.savefig does, in its page's style and without a date. Arguments beat both."""
        named = Path(fname).suffix[1:] if isinstance(fname, str | os.PathLike) else ""
        suffix = kwargs.get("format") or named or matplotlib.rcParams["savefig.format"]
        for name, values in WRITTEN_AS.get(suffix.lower(), {}).items():
            kwargs[name] = values | (kwargs.get(name) or {})
        with apply_style(self.page):
            super().savefig(fname, transparent=transparent, **kwargs)


def parse_length(text: str) -> float:
    """Return a length such as 3.3in, 8.4cm, 84mm or 240pt in inches.

    Raises:
        ValueError: it has no unit, is not positive, or is longer than 100 inches.
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(in|cm|mm|pt)\s*", text)
    length = float(found[1]) * INCHES[found[2]] if found else 0.0
    if not 0 < length <= 100:
        raise ValueError(f"{text!r} is no length: write a number and its unit, such as 3.3in, 8.4cm, 84mm or 240pt")
    return length


def read_style(style: str) -> dict[str, Any]:
    """Return the settings of a style: those of a file, or of one that matplotlib knows by name.

    Raises:
        ValueError: there is neither.
    """
    known: Any = matplotlib.style.library
    if style in known:
        return dict(known[style])
    if not Path(style).is_file():
        raise ValueError(f"style {style!r} is no file, and matplotlib knows no style of this name")
    settings: Any = matplotlib.rc_params_from_file(style, use_default_template=False)
    return dict(settings)


@contextmanager
def apply_style(page: Page) -> Iterator[None]:
    """Draw and write with kbit's settings wherever the user's own, or the page's style, say nothing."""
    params: Any = matplotlib.rcParams
    defaults: Any = matplotlib.rcParamsDefault
    with matplotlib.rc_context():
        # To read the backend makes matplotlib choose one, and a context does not restore it.
        chosen = {name for name in params if name != "backend" and params[name] != defaults[name]}
        if page.style is not None:
            settings = read_style(page.style)
            chosen |= set(settings)
            matplotlib.style.use(settings)  # which leaves out, with a warning, what is no style: the backend
        base = float(params["font.size"]) if "font.size" in chosen else page.font_size
        scaled = {name: share * base for name, share in (SIZES | LENGTHS).items()}
        ours = STYLE | scaled | {"font.size": base}
        params.update({name: value for name, value in ours.items() if name not in chosen} | FIXED)
        yield


def get_size(name: str) -> float:
    """Return one of matplotlib's sizes of text in points, such as axes.titlesize, which may be a word ("large")."""
    params: Any = matplotlib.rcParams
    return float(FontProperties(size=params[name]).get_size_in_points())


def get_small_size() -> float:
    """Return the size of small text, points."""
    return SMALL_TEXT * float(matplotlib.rcParams["font.size"])


def get_line_height(size: float) -> float:
    """Return the height of one line of text of so many points, inches."""
    return 1.35 * size / 72


def measure_text(text: str, size: float) -> float:
    """Return the width of a line of text of so many points, inches."""
    fonts = tuple(tuple(matplotlib.rcParams[name]) for name in FONT_LISTS)
    return _measure_text(text, FontProperties(size=size), fonts)


@lru_cache(maxsize=1 << 14)  # a large table repeats its words
def _measure_text(text: str, font: FontProperties, _fonts: tuple[tuple[str, ...], ...]) -> float:
    """Return the width of a line, inches. `_fonts` are the lists in which matplotlib looks for the font's file."""
    width: float = text_to_path.get_text_width_height_descent(text, font, False)[0]
    return width / 72


def wrap_text(text: str, width: float, size: float) -> list[str]:
    """Return the lines into which a text of so many points is wrapped to be at most `width` inches wide.

    A longer word has a line of its own.
    """
    blank = measure_text(" ", size)
    lines: list[list[str]] = [[]]
    filled = 0.0
    for word in text.split():
        length = measure_text(word, size)
        if lines[-1] and filled + blank + length > width:
            lines.append([])
            filled = 0.0
        filled += length + (blank if lines[-1] else 0.0)
        lines[-1].append(word)
    return [" ".join(words) for words in lines]
