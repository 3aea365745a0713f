"""Names that the analysis has never heard of are in every figure that shows such things, whatever their characters."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.text import Text

from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.figures.registry import FIGURES
from kbit.analysis.figures.saving import write_figure
from kbit.analysis.report.page import build_page
from kbit.analysis.report.points import collect_data
from kbit.store.tables import write_csv

SHOW_METHODS = ("methods", "frontier", "verdicts", "error_loss")
SHOW_DATA_TYPES = ("figure_9", "figure_10", "figure_14", "data_types_map", "frontier", "verdicts", "error_loss")
MINE, OWN = "_mine$^{\\frac}%&é", "=own$_x^{<b>}</script>"  # a method, a data type
FAMILY = "o$p_t^\\{}%&<>é"
WRITTEN = ("methods", "data_types_map", "frontier")  # of each way to draw: curves, cells, a table
IN_THE_CSV_ALONE = ("error_loss", "verdicts")  # points told apart by precision; a page of the first variants


@pytest.fixture(scope="module")
def store(planted: pd.DataFrame) -> pd.DataFrame:
    """One family, with a method and a data type of one's own that beat all others."""
    family = planted[(planted["family"] == "opt") & planted["bits"].isin([3, 4, 6, 16])]
    family = family[family["block_size"].ne(128).fillna(True)]
    family = family.assign(family=FAMILY, model=family["model"].str.replace("opt", FAMILY))
    plain = (family["method"] == "rtn") & (family["outlier_fraction"] == 0)
    ints = family[plain & (family["data_type"] == "int")]
    own = [improve(ints, 0.995, method=MINE), improve(ints, 1.0, data_type=OWN)]
    usual = plain & family["data_type"].isin(["nf", "int"])
    return pd.concat([family[usual | (family["bits"] == 16)], *own], ignore_index=True)


def improve(rows: pd.DataFrame, gain: float, **changes: str) -> pd.DataFrame:
    """The same experiments with other settings, and with values that are better by so many nats."""
    sign = rows["metric"].map({"acc": 0.1}).fillna(-1.0)
    moved = {name: rows[name] + gain * sign for name in ("value", "low", "high")}
    kept = rows["metric"] != "kl_divergence"
    return rows.assign(key=rows["key"] + "".join(changes.values()), **moved, **changes)[kept]


@pytest.fixture(scope="module")
def figures(store: pd.DataFrame) -> dict[str, PaperFigure]:
    """Each figure, drawn once."""
    return {name: FIGURES[name](store) for name in dict.fromkeys([*SHOW_METHODS, *SHOW_DATA_TYPES])}


@pytest.fixture(scope="module")
def folder(figures: dict[str, PaperFigure], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the figures in WRITTEN, and the CSV of each other one."""
    out = tmp_path_factory.mktemp("figures")
    for name, figure in figures.items():
        if name in WRITTEN:
            write_figure(figure, out)
        else:
            write_csv(figure.data, out / f"{name}.csv")
    return out


@pytest.mark.parametrize(("name", "word"), [*((f, MINE) for f in SHOW_METHODS), *((f, OWN) for f in SHOW_DATA_TYPES)])
def test_a_figure_shows_it(name: str, word: str, figures: dict[str, PaperFigure], folder: Path) -> None:
    cells = pd.read_csv(folder / f"{name}.csv", comment="#").select_dtypes(["object", "string"]).fillna("")
    texts = {str(cell) for column in cells for cell in cells[column]}
    assert any(word in text for text in texts)
    assert not any(text.startswith(("=", "+", "-", "@")) for text in texts - {"-"})  # a spreadsheet would run them
    if name in IN_THE_CSV_ALONE:
        return
    drawn = [text for text in figures[name].fig.findobj(Text) if isinstance(text, Text) and word in text.get_text()]
    assert drawn
    assert not any(text.get_parse_math() for text in drawn)
    if name in WRITTEN:
        svg = html.unescape((folder / f"{name}.svg").read_text())
        ends = (("> ", "<"), (">", "<"), (" ", " "), (">", "4"))  # a data type stands before its bits
        assert any(f"{before}{word}{after}" in svg for before, after in ends)


def test_numbers_stay_numbers(folder: Path) -> None:
    table = pd.read_csv(folder / "error_loss.csv")
    assert table[["x", "y", "bits"]].dtypes.map(pd.api.types.is_numeric_dtype).all()
    assert (table["y"] < 0).any()


def test_a_method_has_its_curve_beside_rounding_to_nearest(figures: dict[str, PaperFigure]) -> None:
    data = figures["methods"].data
    assert set(data["series"]) == {"rtn", MINE}
    assert data.columns.tolist()[:5] == ["family", "bits", "data_type", "block_size", "model"]
    assert set(data["data_type"]) == {"int", f"int {MINE}"}


def test_the_report_shows_both_as_text(store: pd.DataFrame) -> None:
    experiments = collect_data(store)["experiments"]
    assert {MINE, "rtn", "unquantized"} == set(experiments["method"]["names"])
    assert {OWN, "int", f"int {MINE}", "nf", "unquantized"} == set(experiments["data_type"]["names"])
    one = store[store["parameters"] == 10**6]  # without curves, whose verdicts take their time
    page = build_page(one, pd.DataFrame({"data_type": [OWN, MINE]}), pd.DataFrame(), {})
    assert f"<td>{html.escape(MINE)}</td>" in page
    assert f"<td>{html.escape(OWN)}</td>" in page
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == collect_data(one)
    assert OWN not in page
