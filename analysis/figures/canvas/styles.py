"""How the figures look: an order of colours safe for colour-blind readers, a marker and a line style of its own for
each curve (readable in grey), no text under 9 points.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from matplotlib.lines import Line2D

from kbit.numerics.spec import BASELINE_BITS

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
    "text.parse_math": False,  # names of models and tasks are text, whatever characters they have
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and edited
    "svg.hashsalt": "kbit",  # fixed ids, or each file would differ from the last
}


@dataclass(frozen=True)
class LineStyle:
    """How one curve looks."""

    color: str
    marker: str
    dashes: tuple[int, tuple[float, ...]] | Literal["solid"]


# Okabe and Ito's palette (2008), black for the baseline. Their yellow is too light on white, so olive replaces it.
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

_COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A1F", "#5D3A9B")
_DASHES: Final = tuple(style.dashes for bits, style in LINE_STYLES.items() if bits != BASELINE_BITS)

# Curves that are not precisions: one marker each, colours and dashes in cycles of different length (8 and 7).
SERIES_STYLES: Final = tuple(
    LineStyle(_COLORS[place % len(_COLORS)], marker, _DASHES[(place + 2) % len(_DASHES)])
    for place, marker in enumerate("ov^DsPX<>phdH8+x")
)


class TooManyCurves(ValueError):
    """More curves than styles that a reader can tell apart."""


def style_series(names: Iterable[str]) -> dict[str, LineStyle]:
    """Return a style for each name: "4-bit" always looks the same, other names take the next free style.

    Raises:
        TooManyCurves: more names than styles.
    """
    names = list(dict.fromkeys(names))
    fixed = {name: find_precision_style(name) for name in names}
    taken = {(style.color, style.marker) for style in fixed.values() if style}
    free = iter(style for style in SERIES_STYLES if (style.color, style.marker) not in taken)
    styles: dict[str, LineStyle] = {}
    for name in names:
        style = fixed[name] or next(free, None)
        if style is None:
            raise TooManyCurves(f"more than {len(SERIES_STYLES)} curves cannot be told apart: draw fewer with --where")
        styles[name] = style
    return styles


def find_precision_style(name: str) -> LineStyle | None:
    """Return the style of "4-bit", None for a name that is no precision."""
    bits = name.removesuffix("-bit")
    return LINE_STYLES.get(int(bits)) if bits.isdigit() and bits != name else None


def draw_handle(name: str, style: LineStyle) -> Line2D:
    """Return the legend's entry of one curve.

    A legend leaves out labels that begin with an underscore, so that such a name has a blank before it.
    """
    size = 9 if style.marker == "*" else 6
    looks: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.dashes}
    label = f" {name}" if name.startswith("_") else name
    return Line2D([], [], label=label, markersize=size, linewidth=1.6, **looks)
