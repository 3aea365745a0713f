"""Figures of random stores: none raises, and each of their sentences says what its numbers say."""

from __future__ import annotations

import random
import re

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from random_stores import SETTINGS, Shape, draw_shapes, make_store
from sentence_races import check_finding
from sentences import check_sentences

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.curves.families import leave_out_ambiguous
from kbit.analysis.figures.canvas.styles import TooManyCurves
from kbit.analysis.figures.drawing import MissingResults, PaperFigure
from kbit.analysis.figures.registry import FIGURES
from kbit.analysis.statistics.findings import finding

FEW = 3  # figures that are drawn of each store


def draw(name: str, store: pd.DataFrame) -> PaperFigure | None:
    """Draw a figure without its ambiguous families, or return None where the store lacks what it needs."""
    try:
        figure, _ = leave_out_ambiguous(FIGURES[name], store)
    except (MissingResults, AmbiguousResults, TooManyCurves):
        return None
    return figure


@settings(
    max_examples=16,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(shape=draw_shapes(), chance=st.integers(0, 2**16))
def test_any_figure_of_any_store_is_drawn_and_says_what_is_true(shape: Shape, chance: int) -> None:
    store = make_store(shape)
    if len(store):
        check_finding(finding(store), store)
    for name in random.Random(chance).sample(list(FIGURES), FEW):
        figure = draw(name, store)
        if figure is not None:
            caption = " ".join(figure.write_paragraphs("full"))
            check_sentences(name, figure.verdict, caption, figure.data, store)
            texts = [text for text in figure.fig.findobj(Text) if isinstance(text, Text)]
            assert not any(text.get_parse_math() for text in texts if "$" in text.get_text())


def test_what_outliers_gain_beside_a_control_is_true() -> None:
    kept = tuple(place for place, setting in enumerate(SETTINGS) if setting.get("outlier_fraction"))
    store = make_store(Shape((3,), (3, 4, 16), (0, *kept), 0, 0, 0, 1, 6, False, 1))
    for name in ("figure_4", "outliers"):
        figure = FIGURES[name](store)
        caption = " ".join(figure.write_paragraphs("full"))
        control = re.findall(r"over 4-bit with 2% random: ([+-][.\d]+)", figure.verdict)[0]
        check_sentences(name, figure.verdict, caption, figure.data, store)
        with pytest.raises(AssertionError):
            check_sentences(name, figure.verdict.replace(control, "+0.9"), caption, figure.data, store)
