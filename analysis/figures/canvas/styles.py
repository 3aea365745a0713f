"""How curves look: colours safe for colour-blind readers, a marker and a line style for each (readable in grey).

A precision, a data type and a block size look the same in every figure. A data type of a user's own takes its look from
its name, so that neither other data types nor the order of registration change it. A style's own colours
(axes.prop_cycle) replace the palette's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from kbit.analysis.curves.settings import is_missing
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS
from kbit.numerics.spec import BASELINE_BITS


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
_MARKERS: Final = "ov^DsPX<>phdH8+x"

# Curves that are neither precisions nor data types: one marker each, colours and dashes in cycles of different length
# (8 and 7).
SERIES_STYLES: Final = tuple(
    LineStyle(_COLORS[place % len(_COLORS)], marker, _DASHES[(place + 2) % len(_DASHES)])
    for place, marker in enumerate(_MARKERS)
)

# Numbers of exponent bits make data types of their own: float4-e2m1 is not float4-e3m0.
TYPE_STYLES: Final = {
    "nf": LineStyle("#0072B2", "o", "solid"),
    "int": LineStyle("#D55E00", "v", (0, (3.5, 1.5))),
    "float e3": LineStyle("#009E73", "^", (0, (6, 2, 1, 2))),
    "float e2": LineStyle("#7A7A1F", "s", (0, (8, 2))),
    "float e1": LineStyle("#882255", "D", (0, (2, 2))),
    "float e4": LineStyle("#44AA99", "<", (0, (3, 1, 1, 1))),
    "float e5": LineStyle("#999999", ">", (0, (1, 1))),
    "quantile": LineStyle("#CC79A7", "P", (0, (1, 1))),
    "dynamic": LineStyle("#E69F00", "X", (0, (6, 2, 1, 2, 1, 2))),
    "af": LineStyle("#56B4E9", "p", (0, (5, 1))),
    "learned": LineStyle("#5D3A9B", "h", (0, (4, 2))),
    "table": LineStyle("#661100", "d", (0, (2, 1))),
}
OWN_COLORS: Final = ("#332288", "#117733", "#AA4499", "#6699CC", "#AA4466", "#4477AA", "#BB5566", "#228833")


class TooManyCurves(ValueError):
    """More curves than styles that a reader can tell apart."""


def style_precision(bits: int) -> LineStyle:
    """Return the style of a precision."""
    return recolor(LINE_STYLES[bits], sorted(LINE_STYLES).index(bits))


def style_data_type(data_type: str, bits: int, exponent_bits: Any = None) -> LineStyle:
    """Return the style of a data type: the same in every figure, whatever else a figure shows.

    Args:
        data_type: a name of kbit's or a user's own.
        bits: the precision, which decides a float's exponent bits where they are missing.
        exponent_bits: a float's, perhaps missing.
    """
    name = data_type
    if data_type == "float":
        name = f"float e{PAPER_EXPONENT_BITS[bits] if is_missing(exponent_bits) else exponent_bits}"
    if name in TYPE_STYLES:
        return recolor(TYPE_STYLES[name], list(TYPE_STYLES).index(name))
    place = zlib.crc32(name.encode())
    own = LineStyle(
        OWN_COLORS[place % len(OWN_COLORS)],
        _MARKERS[(place >> 8) % len(_MARKERS)],
        _DASHES[(place >> 16) % len(_DASHES)],
    )
    return recolor(own, place)


def style_block_size(block_size: Any) -> LineStyle:
    """Return the style of a block size, or of the whole tensor where it is missing: the same in every figure."""
    last = len(SERIES_STYLES) - 1
    place = last if is_missing(block_size) else (round(np.log2(block_size)) - 4) % last  # blocks of 16 are the first
    return recolor(SERIES_STYLES[place], place)


def recolor(style: LineStyle, place: int) -> LineStyle:
    """Return the style in the color of a style sheet's own cycle, if that is not matplotlib's default."""
    cycle = matplotlib.rcParams["axes.prop_cycle"]
    if cycle == matplotlib.rcParamsDefault["axes.prop_cycle"] or style.color == LINE_STYLES[BASELINE_BITS].color:
        return style
    colors = cycle.by_key().get("color", [style.color])
    return replace(style, color=to_hex(colors[place % len(colors)]))  # a browser knows not all of matplotlib's names


def style_curves(curves: pd.DataFrame) -> dict[str, LineStyle]:
    """Return a style for each curve: that of the precision, data type or block size in which it differs, or a free one.

    Args:
        curves: points with the columns series, varied, bits, data_type, block_size, exponent_bits, outlier_fraction.

    Raises:
        TooManyCurves: more curves than styles.
    """
    first = curves.drop_duplicates("series").set_index("series", drop=False)
    known: dict[str, LineStyle] = {}
    for row in first.to_dict("records"):
        name = str(row["series"])
        has_outliers = row["varied"] == "outlier_fraction" and row["outlier_fraction"] > 0
        if row["varied"] in ("bits", "outlier_fraction") and not has_outliers:
            known[name] = style_precision(int(row["bits"]))
        elif row["varied"] == "block_size":
            known[name] = style_block_size(row["block_size"])
        elif row["varied"] in ("data_type", "exponent_bits"):
            known[name] = style_data_type(str(row["data_type"]), int(row["bits"]), row["exponent_bits"])
    return style_series(map(str, first["series"]), known)


def style_series(names: Iterable[str], known: Mapping[str, LineStyle] | None = None) -> dict[str, LineStyle]:
    """Return a style for each name. No two have the same color and marker.

    Args:
        names: names of curves.
        known: styles of some of them. One whose color and marker are taken gets another marker. The others take the
            next free style.

    Raises:
        TooManyCurves: more names than styles.
    """
    known = known or {}
    styles: dict[str, LineStyle] = {}
    for name in dict.fromkeys(names):
        taken = {(style.color, style.marker) for style in (*styles.values(), *known.values())}
        used = {(style.color, style.marker) for style in styles.values()}
        if name in known:
            others = (replace(known[name], marker=marker) for marker in _MARKERS)
            free = next((style for style in (known[name], *others) if (style.color, style.marker) not in used), None)
        else:
            series = (recolor(style, place) for place, style in enumerate(SERIES_STYLES))
            free = next((style for style in series if (style.color, style.marker) not in taken), None)
        if free is None:
            raise TooManyCurves(f"more than {len(SERIES_STYLES)} curves cannot be told apart: draw fewer with --where")
        styles[name] = free
    return styles


def style_precisions(precisions: Iterable[int]) -> dict[str, LineStyle]:
    """Return the styles of precisions by their names, as "4-bit"."""
    return {f"{bits}-bit": style_precision(int(bits)) for bits in precisions}


def scale_marker(style: LineStyle) -> float:
    """Return the size of a curve's markers, points. A star needs more than others."""
    return float(matplotlib.rcParams["lines.markersize"]) * (1.5 if style.marker == "*" else 1.0)


def draw_handle(name: str, style: LineStyle) -> Line2D:
    """Return the legend's entry of one curve.

    A legend leaves out labels that begin with an underscore, so that such a name has a blank before it.
    """
    looks: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.dashes}
    label = f" {name}" if name.startswith("_") else name
    return Line2D([], [], label=label, markersize=scale_marker(style), **looks)
