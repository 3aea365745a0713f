"""A data type and a method that the analysis has never heard of are in every figure that shows such things."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from kbit.analysis.figures.registry import FIGURES, save_figures
from kbit.analysis.report.page import build_page, collect_columns

SHOW_METHODS = ("methods", "frontier", "verdicts", "error_loss")
SHOW_DATA_TYPES = ("figure_9", "figure_10", "figure_14", "data_types_map", "frontier", "verdicts", "error_loss")
IN_THE_CSV_ALONE = ("error_loss", "verdicts")  # points told apart by precision; a page of the first variants


@pytest.fixture(scope="module")
def store(planted: pd.DataFrame) -> pd.DataFrame:
    """One family, with a method and a data type of one's own that beat all others."""
    family = planted[planted["family"] == "opt"]
    plain = (family["method"] == "rtn") & (family["outlier_fraction"] == 0)
    ints = family[plain & (family["data_type"] == "int")]
    own = [improve(ints, 0.9, method="mine"), improve(ints, 1.0, data_type="own")]
    usual = plain & family["data_type"].isin(["nf", "int"])
    return pd.concat([family[usual | (family["bits"] == 16)], *own], ignore_index=True)


def improve(rows: pd.DataFrame, gain: float, **changes: str) -> pd.DataFrame:
    """The same experiments with other settings, and with values that are better by so many nats."""
    sign = rows["metric"].map({"acc": 0.1}).fillna(-1.0)
    moved = {name: rows[name] + gain * sign for name in ("value", "low", "high")}
    kept = rows["metric"] != "kl_divergence"
    return rows.assign(key=rows["key"] + "".join(changes.values()), **moved, **changes)[kept]


@pytest.fixture(scope="module")
def folder(store: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    save_figures(store, out, list(dict.fromkeys([*SHOW_METHODS, *SHOW_DATA_TYPES])))
    return out


@pytest.mark.parametrize(
    ("figure", "name"), [*((f, "mine") for f in SHOW_METHODS), *((f, "own") for f in SHOW_DATA_TYPES)]
)
def test_a_figure_shows_it(figure: str, name: str, folder: Path) -> None:
    assert name in (folder / f"{figure}.csv").read_text()
    if figure not in IN_THE_CSV_ALONE:
        drawn = (folder / f"{figure}.svg").read_text()
        assert f">{name}<" in drawn or f" {name} " in drawn


def test_a_method_has_its_curve_beside_rounding_to_nearest(store: pd.DataFrame) -> None:
    data = FIGURES["methods"](store).data
    assert set(data["series"]) == {"rtn", "mine"}
    assert data.columns.tolist()[:5] == ["family", "bits", "data_type", "block_size", "model"]
    assert set(data["data_type"]) == {"int", "int mine"}


def test_the_report_shows_both(store: pd.DataFrame) -> None:
    points = collect_columns(store)
    assert {"mine", "rtn", "none"} == set(points["method"])
    assert {"own", "int", "int mine", "nf", "unquantized"} == set(points["data_type"])
    page = build_page(store, pd.DataFrame(), pd.DataFrame())
    assert "<td>int mine</td>" in page
    assert "<td>own</td>" in page
