"""The key figures inside the page: pictures, with their whole captions as text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from typing import Final

import matplotlib.style
import pandas as pd

from kbit.analysis.curves.curves import AmbiguousResults, leave_out_ambiguous
from kbit.analysis.figures.drawing import MissingResults, PaperFigure
from kbit.analysis.figures.styles import STYLE, TooManyCurves

# Precisions, data types, block sizes and methods at equal total bits. Laws and verdicts are tables of the page.
KEY_FIGURES: Final = ("figure_2", "figure_13", "figure_3", "figure_14", "figure_15", "methods", "data_types_map")
RESOLUTION: Final = 150  # dots per inch: sharp at half of this page's width on a screen with two pixels per dot


def write_pictures(results: pd.DataFrame, figures: Mapping[str, Callable[[pd.DataFrame], PaperFigure]]) -> str:
    """Return the key figures that the results allow as HTML, and the reasons why there are no others.

    Args:
        results: long form, one row per experiment and measurement (kbit.read_results).
        figures: the functions that draw, by the figures' names (registry.FIGURES).
    """
    drawn, reasons = [], []
    for name in [name for name in KEY_FIGURES if name in figures]:
        try:
            figure, left_out = leave_out_ambiguous(figures[name], results)
            drawn.append(write_picture(figure, left_out))
        except (MissingResults, AmbiguousResults, TooManyCurves) as reason:
            reasons.append(f"<li>{html.escape(str(reason))}</li>")
    if not reasons:
        return "".join(drawn)
    summary = f"{len(reasons)} of {len(reasons) + len(drawn)} key figures need other results"
    return f"{''.join(drawn)}<details><summary>{summary}</summary><ul>{''.join(reasons)}</ul></details>"


def write_picture(figure: PaperFigure, left_out: list[str]) -> str:
    """Return a figure as HTML: a PNG within it, and its caption as text."""
    picture = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure.fig.savefig(picture, format="png", dpi=RESOLUTION)
    source = base64.b64encode(picture.getvalue()).decode("ascii")
    title = figure.name.replace("_", " ").capitalize()
    caption = [
        f"{title}: {figure.claim}",
        f"These results: {figure.verdict}",
        *(f"Left out: {why}" for why in left_out),
    ]
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in caption)
    image = f'<img src="data:image/png;base64,{source}" alt="{html.escape(title)}" loading="lazy">'
    return f'<figure id="{html.escape(figure.name)}">{image}<figcaption>{text}</figcaption></figure>'
