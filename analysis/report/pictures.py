"""The key figures inside the page: pictures, with their whole captions as text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import pandas as pd

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.curves.families import leave_out_ambiguous
from kbit.analysis.figures.canvas.styles import TooManyCurves
from kbit.analysis.figures.drawing import MissingResults, PaperFigure

# Precisions, data types, block sizes and methods at equal total bits. Laws and verdicts are tables of the page.
KEY_FIGURES: Final = ("figure_2", "figure_13", "figure_3", "figure_14", "figure_15", "methods", "data_types_map")
RESOLUTION: Final = 110  # dots per inch: a figure of 13 inches is as wide as the page
# WebP: half of a PNG's bytes, in a second for a large figure
LOSSLESS: Final = {"lossless": True, "quality": 40, "method": 2}


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
            drawn.append(write_picture(figure, left_out.values()))
        except (MissingResults, AmbiguousResults, TooManyCurves) as reason:
            reasons.append(str(reason))
        except Exception as error:  # an error of one figure, of whatever kind, must not lose the page
            reasons.append(f"{name} failed: {type(error).__name__}: {error}")
    if not reasons:
        return "".join(drawn)
    summary = f"{len(reasons)} of {len(reasons) + len(drawn)} key figures are not drawn"
    items = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return f"{''.join(drawn)}<details><summary>{summary}</summary><ul>{items}</ul></details>"


def write_picture(figure: PaperFigure, left_out: Iterable[str]) -> str:
    """Return a figure as HTML: a picture within it, and its caption as text."""
    picture = io.BytesIO()
    figure.fig.savefig(picture, format="webp", dpi=RESOLUTION, pil_kwargs=LOSSLESS)
    source = base64.b64encode(picture.getvalue()).decode("ascii")
    title = figure.name.replace("_", " ").capitalize()
    caption = [*figure.write_paragraphs("full"), *(f"Left out: {reason}" for reason in left_out)]
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in caption)
    image = f'<img src="data:image/webp;base64,{source}" alt="{html.escape(title)}" loading="lazy">'
    return f'<figure id="{html.escape(figure.name)}">{image}<figcaption>{text}</figcaption></figure>'
