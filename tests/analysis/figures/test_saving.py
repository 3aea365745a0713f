"""Figures as files: which there are, what is in them, and that one that fails loses no other."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from toy_curves import make_results

from kbit.analysis.figures.canvas.page import Page, StyledFigure
from kbit.analysis.figures.curve_figures import shorten_parts
from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.figures.paper import Part
from kbit.analysis.figures.registry import FIGURES, save_figures
from kbit.analysis.figures.saving import SavedFigure

CURVES = ("figure_2", "figure_13")
figure_2 = FIGURES["figure_2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[SavedFigure]:
    return list(save_figures(make_results(), tmp_path_factory.mktemp("saved") / "figures", CURVES))


def test_saved_files_hold_the_figure_and_its_data(saved: list[SavedFigure]) -> None:
    assert [figure.name for figure in saved] == ["figure_2", "figure_13"]
    png, svg, csv, text = saved[0].paths
    assert {path.name for path in png.parent.iterdir()} == {
        f"figure_{k}.{suffix}" for k in (2, 13) for suffix in ("png", "svg", "csv", "md")
    }
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "mean zero-shot accuracy (4 tasks)" in svg.read_text()
    figure, read = figure_2(make_results()), pd.read_csv(csv, comment="#")
    assert read.columns.tolist() == figure.data.columns.tolist()
    assert read["value"].tolist() == figure.data["value"].tolist()
    assert read["total_bits"].tolist() == figure.data["total_bits"].tolist()
    assert saved[0].verdict == figure.verdict
    full = figure.write_paragraphs("full")
    assert text.read_text() == "\n\n".join(["# figure_2", *full]) + "\n"
    assert csv.read_text().splitlines()[: len(full) + 1] == [f"# {line}" for line in ("figure_2", *full)]


def test_a_figure_is_laid_out_once_for_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("matplotlib.layout_engine.do_constrained_layout", lambda *args, **_: calls.append(args))
    list(save_figures(make_results(), tmp_path, ["figure_2"]))
    assert len(calls) == 1


def test_the_same_results_give_the_same_bytes_and_settings_stay(tmp_path: Path, saved: list[SavedFigure]) -> None:
    before = dict(matplotlib.rcParams)
    (again,) = save_figures(make_results().sample(frac=1, random_state=0), tmp_path, ["figure_2"])
    assert dict(matplotlib.rcParams) == before
    for one, other in zip(saved[0].paths, again.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_drawn_is_skipped_with_its_reason(tmp_path: Path) -> None:
    results = make_results()
    saved = list(save_figures(results[results["metric"] == "cross_entropy"], tmp_path, ["figure_13", "figure_2"]))
    assert [bool(figure.paths) for figure in saved] == [True, False]
    assert saved[0].skipped is None
    assert "figure_2 needs mean zero-shot accuracy" in str(saved[1].skipped)


def test_a_figure_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(results: pd.DataFrame, page: Page) -> PaperFigure:
        raise TypeError("'<' not supported")

    empty = PaperFigure("figure_3", StyledFigure(), pd.DataFrame({"a": [1]}), "Claim.", "Verdict.")
    empty.fig.add_subplot()
    monkeypatch.setitem(FIGURES, "figure_2", fail)
    monkeypatch.setitem(FIGURES, "figure_3", lambda results, page: empty)
    failed, drawn = save_figures(make_results(), tmp_path, ["figure_2", "figure_3"])
    assert failed.failed
    assert drawn.paths
    assert re.match(r"TypeError: '<' not supported \(test_saving\.py, line \d+\)", str(failed.skipped))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in drawn.paths}


def test_a_family_measured_in_two_ways_leaves_others_their_figure(tmp_path: Path) -> None:
    results = make_results(families=("alpha", "beta")).assign(evaluation="all items")
    mixed = results["family"].eq("alpha") & results["bits"].eq(4)
    results.loc[mixed, "evaluation"] = "8 items"
    (saved,) = save_figures(results, tmp_path, ["figure_2"])
    alone = figure_2(results[results["family"] == "beta"])
    assert saved.verdict.startswith(f"{alone.verdict} Left out: alpha was measured in 2 ways")
    svg = saved.paths[1].read_text()
    assert "Left out: alpha was measured in 2 ways" in saved.paths[3].read_text()
    assert "beta, nf block 64</text>" in svg
    assert "alpha, nf" not in svg
    assert "Left out: alpha." in " ".join(re.findall(r">([^<]+)</text>", svg))  # in the short caption
    (skipped,) = save_figures(results[results["family"] == "alpha"], tmp_path, ["figure_2"])
    assert str(skipped.skipped).startswith("alpha was measured in 2 ways")


def test_a_short_caption_counts_the_outcomes_of_many_parts() -> None:
    parts = [Part(f"[{k}] ", f"Undecided. Mean lead: 0.{k}.") for k in range(3)]
    parts.append(Part("[4] ", "Holds (a difference below 0.01 counts as level). Mean lead: 1."))
    assert shorten_parts(parts[:2]) == "[0] Undecided. [1] Undecided."
    assert shorten_parts(parts) == "Undecided (3 of 4 parts); Holds (1 of 4 parts)."


def test_a_folder_is_made_only_for_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FIGURES, "figure_16")  # the one that needs no results
    saved = list(save_figures(pd.DataFrame(), tmp_path / "a" / "b"))
    assert [figure.name for figure in saved] == list(FIGURES)
    assert all(figure.skipped for figure in saved)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_lists_the_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown figures \['figure_99'\]; allowed: figure_1, figure_2"):
        save_figures(make_results(), tmp_path, ["figure_2", "figure_99"])
