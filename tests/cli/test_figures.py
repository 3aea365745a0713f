"""`kbit figures` for a paper: formats, sizes, captions, styles, and the same figures in Python."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
from PIL import Image
from toy_curves import make_results
from toy_results import fill

import kbit as kbit_library
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.registry import FIGURES

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> None:
    """A store in the folder where kbit runs. figure_16 needs no result of it."""
    fill(tmp_path / "results", range(8))


def test_a_figure_has_the_size_formats_and_resolution_asked_for(kbit: Kbit, tmp_path: Path) -> None:
    size = ("--width", "84mm", "--height", "2.5in", "--dpi", "300", "--caption", "none")
    done = kbit("figures", "figure_16", "--format", "pdf,png", *size)
    assert (done.code, done.err) == (0, "")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"figure_16.{x}" for x in ("pdf", "png", "csv", "md")
    }
    assert Image.open(tmp_path / "figures" / "figure_16.png").size == (round(84 / 25.4 * 300), 750)
    pdf = (tmp_path / "figures" / "figure_16.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", pdf)
    assert box is not None
    assert [float(side) for side in box.groups()] == pytest.approx([84 / 25.4 * 72, 180], abs=0.01)
    assert b"CreationDate" not in pdf  # the same results give the same bytes
    assert b"/Type3" not in pdf


def test_captions_are_as_long_as_asked_for_and_nothing_is_lost(kbit: Kbit, tmp_path: Path) -> None:
    texts = {}
    for caption in ("none", "short", "full"):
        assert kbit("figures", "figure_16", "--format", "svg", "--caption", caption, "--out", caption).code == 0
        svg = re.sub(r"<[^>]+>|\s+", " ", (tmp_path / caption / "figure_16.svg").read_text())
        texts[caption] = " ".join(svg.split())
        markdown = (tmp_path / caption / "figure_16.md").read_text()
        assert "Memory-bound up to batch" in markdown
        assert "Lines are computed, not measured" in markdown
    assert "Paper (figure 16)" not in texts["none"]
    assert "lasts for small batches only. These results: Holds by the roofline" in texts["short"]
    assert "Memory-bound up to batch" not in texts["short"]
    assert "Memory-bound up to batch" in texts["full"]
    assert "Lines are computed, not measured" in texts["full"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--width", "3.3"], "'3.3' is no length: write a number and its unit, such as 3.3in"),
        (["--format", "pdf,jpeg"], "--format='jpeg' is not one of: png, svg, pdf"),
        (["--format", ""], "--format='' is not one of: png, svg, pdf"),
        (["--caption", "long"], "--caption='long' is not one of: none, short, full"),
        (["--dpi", "1"], "--dpi 1 is not between 10 and 2400"),
        (["--dpi", "nan"], "--dpi nan is not between 10 and 2400"),
        (["--style", "no.mplstyle"], "style 'no.mplstyle' is no file, and matplotlib knows no style of this name"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_drawn(
    kbit: Kbit, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = kbit("figures", "figure_16", *arguments)
    assert done.code == 1
    assert said in done.err
    assert not (tmp_path / "figures").exists()


def test_a_page_that_is_too_small_is_said_and_loses_no_other_figure(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("figures", "figure_16", "--width", "1in", "--height", "1in")
    assert done.code == 1
    assert "figure_16: not drawn: 4 panels do not fit on 1 x 1 inches: give a larger --width or --height" in done.out


def test_where_keeps_the_baselines_and_counts_what_it_drops(kbit: Kbit) -> None:
    done = kbit("figures", "figure_16", "--where", "bits == 3 and method == 'rtn'")
    assert done.code == 0
    assert "--where keeps 8 rows, 4 of them of 16-bit baselines, and drops 8" in done.out


def test_figures_are_drawn_in_python_at_any_size(tmp_path: Path) -> None:
    results = make_results(("int", "nf"))
    before = dict(matplotlib.rcParams)
    fig = kbit_library.figures.draw("figure_9", results, width="3.3in", height=2.5)
    assert tuple(fig.get_size_inches()) == (3.3, 2.5)
    assert fig.texts == []
    short = kbit_library.figures.draw("figure_9", results, caption="short")
    assert short.texts[0].get_text().startswith("Paper (figure 9): At 4 bits")
    made = kbit_library.figures.make("figure_9", results, measure="a/acc")
    assert set(made.data["task"]) == {"a"}
    assert made.claim.endswith("Here of another measure, a acc.")
    assert made.name == "figure_9_a_acc"
    assert made.write_paragraphs("full")[0].startswith("Paper (figure 9): ")
    assert kbit_library.figures.draw("figure_16", tmp_path / "results").axes  # a store's folder
    assert dict(matplotlib.rcParams) == before
    assert kbit_library.figures.names() == list(FIGURES)
    assert sys.modules["kbit.figures"] is kbit_library.figures


@pytest.mark.parametrize("name", ["figure_9", "laws"])
def test_a_figure_saved_in_python_is_as_the_command_writes_it(name: str, tmp_path: Path) -> None:
    results = make_results(("int", "nf"))
    with matplotlib.rc_context({"savefig.bbox": "tight"}):
        fig = kbit_library.figures.draw(name, results, width="3.3in")
        for path in ("one.pdf", "two.pdf", "one.svg"):
            fig.savefig(tmp_path / path)
    pdf = (tmp_path / "one.pdf").read_bytes()
    assert b"/Type3" not in pdf  # publishers refuse it
    assert b"CreationDate" not in pdf
    assert pdf == (tmp_path / "two.pdf").read_bytes()
    svg = (tmp_path / "one.svg").read_text()
    assert "<dc:date>" not in svg
    assert "<text" in svg
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ", pdf)
    assert box is not None
    assert float(box[1]) == pytest.approx(72 * fig.get_size_inches()[0], abs=0.01)
    fig.savefig(tmp_path / "titled.pdf", metadata={"Title": "Mine"})
    titled = (tmp_path / "titled.pdf").read_bytes()
    assert b"Mine" in titled
    assert b"CreationDate" not in titled


def test_wrong_requests_in_python_name_what_is_allowed(tmp_path: Path) -> None:
    results = make_results(("nf",))
    with pytest.raises(ValueError, match="unknown figure 'figure_99'; did you mean"):
        kbit_library.figures.draw("figure_99", results)
    with pytest.raises(ValueError, match="caption='long' is not one of: none, short, full"):
        kbit_library.figures.draw("figure_2", results, caption="long")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown figure 'figure_16'"):
        kbit_library.figures.draw("figure_16", results, measure="a/acc")
    with pytest.raises(
        ValueError, match=r"lower_is_better says of a measure .*: give the measure \(TASK/METRIC\), too"
    ):
        kbit_library.figures.draw("figure_2", results, lower_is_better=True)
    with pytest.raises(MissingResults, match="figure_9 needs"):
        kbit_library.figures.draw("figure_9", pd.DataFrame())
    with pytest.raises(FileNotFoundError, match="no results at"):
        kbit_library.figures.draw("figure_2", tmp_path / "none")
