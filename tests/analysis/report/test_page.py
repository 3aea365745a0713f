"""The report: one file, nothing from a network, what failed listed as failed, everything escaped."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from toy_results import fill

from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.figures.registry import FIGURES
from kbit.analysis.report.page import build_page, compare_all_laws, summarize, write_report
from kbit.analysis.report.pictures import write_pictures
from kbit.analysis.report.points import collect_data
from kbit.analysis.report.tables import format_interval, format_share, format_table, write_verdicts
from kbit.analysis.statistics.verdicts import NOT_TRIED, tabulate_verdicts

FAILURES = pd.DataFrame(
    {
        "key": ["k1"], "label": ["opt-1m 3-bit nf"], "model": ["opt-1m"], "bits": [3], "data_type": ["nf"],
        "block_size": [64], "reason": ["NonFiniteError: <loss> is NaN"], "finished": ["2026-01-01"],
        "state": ["failed"],
    }
)  # fmt: skip
ORIGIN = pd.DataFrame({"git_commit": ["abc"], "device": ["CPU"], "versions": ["torch 2"], "experiments": [3]})


@pytest.fixture(scope="module")
def small(planted: pd.DataFrame) -> pd.DataFrame:
    """Three precisions of two data types, and the baseline, of three models."""
    is_small = (
        (planted["block_size"] == 64) & planted["data_type"].isin(["nf", "int"]) & planted["bits"].isin([3, 4, 6])
    )
    is_plain = (planted["method"] == "rtn") & (planted["outlier_fraction"] == 0)
    return planted[((planted["bits"] == 16) | (is_small & is_plain)) & (planted["family"] == "opt")]


@pytest.fixture(scope="module")
def page(small: pd.DataFrame) -> str:
    return build_page(small, FAILURES, ORIGIN, FIGURES)


def read_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    assert "<" not in found[1]
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_the_data_is_in_the_page(page: str, small: pd.DataFrame) -> None:
    assert read_data(page) == collect_data(small)
    assert "21 experiments on 3 models of 1 family, 1 failed." in page


def test_nothing_comes_from_elsewhere(page: str) -> None:
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", markup)
    assert "@import" not in markup
    assert "url(" not in markup
    assert "default-src 'none'" in markup  # a browser would refuse what the page loaded


def test_a_failure_is_a_reason_and_no_point(page: str) -> None:
    assert html.escape("NonFiniteError: <loss> is NaN") in page
    assert "k1" not in read_data(page)["experiments"]["key"]


def test_key_figures_are_in_the_page_with_their_captions(page: str, small: pd.DataFrame) -> None:
    figure = FIGURES["figure_2"](small)
    found = re.search(r'<figure id="figure_2"><img src="data:image/webp;base64,([^"]+)".*?</figure>', page, re.DOTALL)
    assert found is not None
    width, height = Image.open(io.BytesIO(base64.b64decode(found[1]))).size
    assert min(width, height) > 300
    assert html.escape(figure.claim) in found[0]
    assert html.escape(figure.verdict) in found[0]
    assert "key figures are not drawn" in page  # no method but rounding to nearest was measured
    assert html.escape("run: kbit run +sweeps=nano/methods") in page


def test_a_figure_that_fails_does_not_lose_the_page(small: pd.DataFrame) -> None:
    def fail(results: pd.DataFrame) -> PaperFigure:
        raise RuntimeError("a < b")

    shown = write_pictures(small, {"figure_2": fail})
    assert "1 of 1 key figures are not drawn" in shown
    assert html.escape("figure_2 failed: RuntimeError: a < b") in shown


def test_text_is_escaped() -> None:
    table = format_table(pd.DataFrame({"<b>": ["</script><script>alert(1)</script>", None]}), "")
    assert "<script>" not in table
    assert "<td>-</td>" in table
    assert format_table(pd.DataFrame(), "none & none") == "<p>none &amp; none</p>"


def test_verdicts_have_readable_heads_and_numbers(page: str) -> None:
    table = page[page.index('id="verdicts"') : page.index('id="laws"')]
    heads = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert heads[:6] == ["family", "variant", "measure", "precisions", "best bits", "of the budgets"]
    assert "_" not in "".join(heads)
    assert "<td>nf block 64</td>" in table
    assert re.search(r"<td>[+-][\d.]+ to [+-][\d.]+</td>", table)
    assert re.search(r"<td>[\d.]+ Mbit to [\d.]+ Mbit</td>", table)


def test_verdicts_that_were_not_tried_are_a_number(small: pd.DataFrame) -> None:
    table = tabulate_verdicts(small)
    assert len(table) >= 2
    untried = table.assign(grade=[NOT_TRIED, *table["grade"][1:]])
    shown = write_verdicts(untried)
    assert shown.count("<tr>") == len(table)  # the head, and one row less
    assert html.escape(f"Left out: 1 rows of {len(table)} were {NOT_TRIED}") in shown


def test_shares_say_what_is_certain() -> None:
    shares = {0.714: "71%", 0.999: "> 99%", 0.001: "< 1%", 1.0: "100%", 0.0: "0%"}
    assert {share: format_share(share) for share in shares} == shares
    assert format_share(float("nan")) is None
    assert format_interval(-0.00478, 0.00753) == "-0.00478 to +0.00753"
    assert format_interval(float("nan"), 1.0) is None


def test_a_family_measured_in_two_ways_is_named_below_the_tables(small: pd.DataFrame) -> None:
    other = small.assign(family="pythia", key="other " + small["key"])
    is_other = other["bits"] == 4
    mixed = other.assign(evaluation=other["evaluation"].mask(is_other, "bfloat16, 8 items"))
    table = write_verdicts(tabulate_verdicts(pd.concat([small, mixed])))
    assert table.count("Left out: pythia was measured in 2 ways that do not compare") == 1
    assert "<td>opt</td>" in table
    assert "<td>pythia" not in table
    assert compare_all_laws(mixed).startswith("<p>Not computed: pythia was measured in 2 ways that do not compare")


def test_a_chosen_part_says_so(small: pd.DataFrame) -> None:
    said = summarize(small, FAILURES, "bits == 4")
    assert said == "21 experiments with bits == 4 on 3 models of 1 family, 1 failed in the whole store."


def test_checkpoints_of_other_tools_are_in_the_chart_and_in_no_figure(small: pd.DataFrame) -> None:
    base = small[small["key"] == small.loc[small["bits"] == 16, "key"].iloc[0]]
    other = base.assign(key="other", checkpoint="bitsandbytes nf4", bits_per_param=4.5)
    with pytest.warns(UserWarning, match="1 experiments on quantized checkpoints are left out of the figures"):
        page = build_page(pd.concat([small.assign(checkpoint=None), other]), FAILURES, ORIGIN, {})
    assert "other" in read_data(page)["experiments"]["key"]
    with pytest.warns(UserWarning, match="left out of the figures"):
        alone = build_page(other, FAILURES, ORIGIN, {})
    assert read_data(alone)["experiments"]["key"] == ["other"]


def test_a_16_bit_model_with_a_rounded_cache_is_no_baseline_of_the_page(small: pd.DataFrame) -> None:
    """Beside the plain model it would make each finding, verdict and law ambiguous."""
    plain = small.assign(kv_cache=None, cache_bits=np.nan)
    worse = plain[plain["bits"] == 16]
    worse = worse.assign(kv_cache="int", cache_bits=2, key=worse["key"] + "-rounded", value=1.2 * worse["value"])
    with_rounded, without = (
        build_page(rows, FAILURES, ORIGIN, {}) for rows in (pd.concat([plain, worse], ignore_index=True), plain)
    )
    findings = [re.search(r'<ul class="findings">(.*?)</ul>', text, re.DOTALL) for text in (with_rounded, without)]
    tables = [re.search(r"<h2>Which precision.*?<h2>Failed", text, re.DOTALL) for text in (with_rounded, without)]
    for first, second in (findings, tables):
        assert first is not None
        assert second is not None
        assert first[0] == second[0]


def test_a_store_without_results_is_refused(tmp_path: Path, small: pd.DataFrame) -> None:
    for nothing in (small[:0], small[:2].assign(value=float("nan"))):
        with pytest.raises(ValueError, match="no finished experiment"):
            write_report(nothing, tmp_path / "store", tmp_path / "report.html", FIGURES)
    assert not (tmp_path / "report.html").exists()


def test_the_command_takes_a_condition_and_keeps_baselines(kbit: Callable[..., Any], tmp_path: Path) -> None:
    fill(tmp_path / "store", range(8))  # of each quantizer two: none, float, nf, int
    done = kbit("report", "--results", "store", "--where", "data_type == 'nf'", "--out", "new/page.html")
    assert done.code == 0
    assert "--where keeps 8 rows, 4 of them of 16-bit baselines, and drops 8" in done.out
    page = (tmp_path / "new" / "page.html").read_text()
    assert html.escape("4 experiments with data_type == 'nf' on 4 models of 1 family") in page
    names = read_data(page)["experiments"]["data_type"]["names"]
    assert [name.split()[0] for name in names] == ["nf", "unquantized"]
    wrong = kbit("report", "--results", "store", "--where", "data_type == 'nff'", "--out", "wrong.html")
    assert wrong.code == 1
    assert "finds none of the rows" in wrong.err
    assert not (tmp_path / "wrong.html").exists()
