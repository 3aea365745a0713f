"""The report: one file, nothing from a network, what failed listed as failed; in a browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from kbit.analysis.report.page import build_page, collect_columns, format_table, list_measures, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FAILURES = pd.DataFrame(
    {
        "key": ["k1"], "model": ["opt-1m"], "bits": [3], "data_type": ["nf"], "block_size": [64],
        "reason": ["NonFiniteError: <loss> is NaN"], "finished": ["2026-01-01"],
    }
)  # fmt: skip
ORIGIN = pd.DataFrame({"git_commit": ["abc"], "device": ["CPU"], "versions": ["torch 2"], "experiments": [3]})


@pytest.fixture(scope="module")
def small(planted: pd.DataFrame) -> pd.DataFrame:
    """The planted store without all but three settings of each precision."""
    is_small = (planted["block_size"] == 64) & planted["data_type"].isin(["nf", "int"]) & (planted["method"] == "rtn")
    return planted[(planted["bits"] == 16) | is_small]


@pytest.fixture(scope="module")
def page(small: pd.DataFrame) -> str:
    return build_page(small, FAILURES, ORIGIN)


def read_data(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    assert "<" not in found[1]
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_every_shown_measurement_is_in_the_page(page: str, small: pd.DataFrame) -> None:
    data = read_data(page)
    points = data["points"]
    assert isinstance(points, dict)
    assert points == collect_columns(small)
    rows = small[small["metric"].isin(["acc", "cross_entropy", "kl_divergence"])]
    assert len(points["key"]) == len(rows)
    assert sorted(points["value"]) == sorted(rows["value"])
    assert list_measures(small)[0]["label"] == "acc: mean_zero_shot"
    assert {m["label"]: m["lower"] for m in list_measures(small)}["cross_entropy: text"]


def test_nothing_comes_from_elsewhere(page: str) -> None:
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", markup)
    assert "@import" not in markup
    assert page.count("Plotly.react") >= 1


def test_a_failure_is_a_reason_and_no_point(page: str) -> None:
    assert html.escape("NonFiniteError: <loss> is NaN") in page
    assert "1 failed" in page
    points = read_data(page)["points"]
    assert isinstance(points, dict)
    assert "k1" not in points["key"]


def test_text_is_escaped() -> None:
    table = format_table(pd.DataFrame({"<b>": ["</script><script>alert(1)</script>", None]}), "")
    assert "<script>" not in table
    assert "<td>-</td>" in table
    assert format_table(pd.DataFrame(), "none & none") == "<p>none &amp; none</p>"


def test_a_store_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results at"):
        write_report(tmp_path / "absent", tmp_path / "report.html")
    (tmp_path / "store" / "experiments").mkdir(parents=True)
    with pytest.raises(ValueError, match="no finished experiment"):
        write_report(tmp_path / "store", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def open_page(path: Path, profile: Path, view: str) -> tuple[str, str]:
    """Open the page without a network; return the document as it then is, and the browser's log."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [CHROMIUM, *flags, offline, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"{path.as_uri()}#{view}"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_a_filter_changes_the_drawn_points(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    everything, log = open_page(path, tmp_path / "profile", "")
    filtered, more = open_page(path, tmp_path / "profile", "data_type=nf&bits=4&bits=16&pareto=1")
    for text in (log, more):
        assert "CONSOLE" not in text, text
        assert "ERR_" not in text
    drawn = [len(re.findall(r'<path class="point"', document)) for document in (everything, filtered)]
    # 2 families x 3 sizes; 6 precisions of nf and int, 3 of nf with outliers, the baseline; then nf at one precision
    # and the baseline, which belongs to every data type
    assert drawn == [6 * 16, 6 * 2]
    assert "96 of 96 experiments shown" in everything
    assert "12 of 96 experiments shown" in filtered
    for family in ("opt", "pythia"):  # values of two families do not compare
        assert f"Pareto frontier: {family}, float32, all items</text>" in filtered
