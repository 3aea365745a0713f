"""What a notebook shows of kbit's own values: small tables and pictures in place of long reprs."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import pandas as pd
from toy_results import make_result

import kbit
from kbit.analysis.figures.canvas.page import StyledFigure
from kbit.analysis.figures.drawing import PaperFigure


def test_a_quantizer_shows_its_name_and_what_is_not_at_its_default() -> None:
    shown = kbit.QuantSpec(bits=3, data_type="int", block_size=None)._repr_html_()
    cells = re.findall(r"<th>(.*?)</th><td>(.*?)</td>", shown)
    assert cells == [("quantizer", "int3"), ("bits", "3"), ("data_type", "int"), ("block_size", "None")]


def test_a_report_and_a_result_are_short(build_tiny: Callable[..., Any]) -> None:
    report = kbit.quantize_model(build_tiny("llama"), kbit.QuantSpec())
    assert "<th>quantizer</th><td>nf4</td>" in report._repr_html_()
    assert f"<td>{report.total_bits:,}</td>" in report._repr_html_()
    shown = make_result(1)._repr_html_()
    assert "<th>nano_cloze acc</th><td>0.5 (0.4 to 0.6; n = 100)</td>" in shown
    assert len(shown) < 1000


def test_names_cannot_bring_markup() -> None:
    assert "<b>" not in kbit.QuantConfig(exclude="<b>x</b>")._repr_html_()


def test_a_figure_shows_its_picture_claim_and_verdict() -> None:
    shown = PaperFigure("figure_0", StyledFigure(), pd.DataFrame(), "A claim.", "It < holds.")._repr_html_()
    [image] = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert "<td>A claim.</td>" in shown
    assert "It &lt; holds." in shown
