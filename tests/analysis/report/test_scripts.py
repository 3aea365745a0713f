"""points.js, the part of the page that chooses, groups and orders, in V8 without a browser and against pandas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_mini_racer import MiniRacer
from random_stores import Shape, make_store

from kbit.analysis.report.page import FOLDER
from kbit.analysis.report.points import collect_data

Call = Callable[..., Any]
MIXED = Shape((3, 2, 3), (3, 4, 16), (0, 1, 6, 14), 0.1, 0.1, 0.3, 0.9, 2, False, 7)


@pytest.fixture(scope="module")
def racer() -> MiniRacer:
    racer = MiniRacer()
    racer.eval((FOLDER / "points.js").read_text(encoding="utf-8"))
    return racer


@pytest.fixture(scope="module")
def call(racer: MiniRacer) -> Call:
    """Call a function of the script with values of Python."""

    def run(name: str, *arguments: Any) -> Any:
        source = f"JSON.stringify({name}({', '.join(map(json.dumps, arguments))}))"
        return json.loads(str(racer.eval(source)))

    return run


@pytest.fixture(scope="module")
def store() -> pd.DataFrame:
    """Three families measured in two ways, with gaps and ties."""
    return make_store(MIXED)


@pytest.fixture(scope="module")
def data(store: pd.DataFrame) -> dict[str, Any]:
    return collect_data(store)


@pytest.fixture(scope="module")
def table(data: dict[str, Any]) -> pd.DataFrame:
    """The points of the first measure, as a table made from what the page holds."""
    measure, experiments = data["measures"][0], data["experiments"]
    own = {"place": measure["point"], "way": measure["evaluation"], "value": measure["value"]}
    rows = pd.DataFrame(own)
    for name in ("family", "bits", "data_type", "block_size", "method"):
        names = np.array(experiments[name]["names"], dtype=object)
        rows[name] = names[np.array(experiments[name]["codes"])[rows["place"]]]
    for name in ("total_bits", "curve"):
        rows[name] = np.array(experiments[name])[rows["place"]]
    return rows


def take_codes(data: dict[str, Any], column: str, names: list[str]) -> list[int]:
    return [data["experiments"][column]["names"].index(name) for name in names]


def test_filters_choose_what_pandas_chooses(call: Call, data: dict[str, Any], table: pd.DataFrame) -> None:
    measure = data["measures"][0]
    shown = {"data_type": ["int"], "block_size": ["64"], "bits": ["4", "16"], "family": ["opt", "third"]}
    codes = {column: take_codes(data, column, names) for column, names in shown.items()}
    is_baseline = table["bits"] == "16"
    quantized = (table["data_type"] == "int") & (table["block_size"] == "64") & (table["bits"] == "4")
    wanted = table[(quantized | is_baseline) & table["family"].isin(["opt", "third"])]
    assert 0 < len(wanted) < len(table)
    assert call("choosePoints", data, measure, codes, None) == wanted.index.tolist()
    for way in (0, 1):
        assert call("choosePoints", data, measure, codes, way) == wanted.index[wanted["way"] == way].tolist()
    # with no data type the 16-bit baselines stay, and with no precision nothing does
    assert call("choosePoints", data, measure, {"data_type": []}, None) == table.index[is_baseline].tolist()
    assert call("choosePoints", data, measure, {"bits": []}, None) == []


def test_a_frontier_stays_within_a_family_and_an_evaluation(
    call: Call, data: dict[str, Any], table: pd.DataFrame
) -> None:
    measure = data["measures"][0]
    assert measure["lower"] is False
    found = call("listFrontiers", data, measure, table.index.tolist())
    fields = table.groupby(["family", "way"])
    assert len(found) == len(fields) == 6
    for frontier in found:
        way = measure["evaluations"].index(frontier["evaluation"])
        rows = fields.get_group((frontier["family"], way))
        best = [
            place
            for place, row in rows.iterrows()
            if not ((rows["total_bits"] <= row["total_bits"]) & (rows["value"] > row["value"])).any()
            and not ((rows["total_bits"] < row["total_bits"]) & (rows["value"] >= row["value"])).any()
        ]
        # of equal points one is enough
        own = rows.loc[frontier["points"], ["total_bits", "value"]].to_numpy().tolist()
        assert (
            own == rows.loc[best, ["total_bits", "value"]].drop_duplicates().sort_values("total_bits").values.tolist()
        )


def test_what_has_no_known_direction_has_no_frontier(call: Call, data: dict[str, Any]) -> None:
    assert call("listFrontiers", data, data["measures"][0] | {"lower": None}, [0, 1]) == []


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=12), st.booleans())
def test_no_point_beats_one_of_the_frontier(call: Call, pairs: list[tuple[int, int]], lower: bool) -> None:
    data = {"experiments": {"total_bits": [size for size, _ in pairs]}}
    values = [value for _, value in pairs]
    measure = {"point": list(range(len(pairs))), "value": values, "lower": lower}
    found = [pairs[place] for place in call("findFrontier", data, measure, list(range(len(pairs))))]
    sign = -1 if lower else 1
    best = {s: max(sign * v for t, v in pairs if t <= s) for s, _ in pairs}
    wanted = sorted({(s, sign * b) for s, b in best.items() if all(best[t] < b for t in best if t < s)})
    assert found == wanted


def test_curves_join_one_variant_in_one_evaluation(call: Call, data: dict[str, Any], table: pd.DataFrame) -> None:
    found = call("listCurves", data, data["measures"][0], table.index.tolist())
    wanted = [
        [[int(str(size)), value] for size, value in rows.groupby("total_bits")["value"].mean().items()]
        for _, rows in table.groupby(["curve", "way"])
    ]
    assert sorted(curve["line"] for curve in found) == sorted(wanted)
    assert any(len(curve["line"]) > 1 for curve in found)
    kinds = table.groupby("curve")[["family", "bits", "data_type", "block_size"]].nunique()
    assert (kinds == 1).all(axis=None)


def test_seeds_are_one_point_of_a_curve(call: Call) -> None:
    data = {"experiments": {"total_bits": [9, 5, 5], "curve": [0, 0, 0]}}
    measure = {"point": [0, 1, 2], "evaluation": [0, 0, 0], "evaluations": ["all"], "value": [1.0, 2.0, 4.0]}
    assert call("listCurves", data, measure, [0, 1, 2]) == [{"first": 0, "line": [[5, 3.0], [9, 1.0]]}]


def test_sorting_puts_numbers_first_and_missing_ones_last(racer: MiniRacer) -> None:
    cells = [3, "whole tensor", 1024, None, 64, "a", 3]
    for descending, wanted in (("false", [0, 6, 4, 2, 5, 1, 3]), ("true", [1, 5, 2, 4, 0, 6, 3])):
        source = f"const c{descending} = {json.dumps(cells)};"
        source += f"JSON.stringify(sortPoints([...c{descending}.keys()], (p) => c{descending}[p], {descending}))"
        assert json.loads(str(racer.eval(source))) == wanted


@pytest.mark.parametrize(
    ("low", "high", "most", "wanted"),
    [
        (1.9e6, 2.7e8, 20, [2e6, 5e6, 1e7, 2e7, 5e7, 1e8, 2e8]),
        (1.9e6, 2.7e8, 5, [2e6, 1e7, 5e7, 2e8]),
        (1e6, 1e12, 9, [10.0**power for power in range(6, 13)]),
        (2.2e6, 8.8e6, 12, [3e6, 4e6, 5e6, 6e6, 8e6]),
        (2.2e6, 3.3e6, 6, [2.2e6, 2.4e6, 2.6e6, 2.8e6, 3e6, 3.2e6]),
    ],
)
def test_ticks_are_round(call: Call, low: float, high: float, most: float, wanted: list[float]) -> None:
    assert call("listTicks", low, high, most, True) == wanted


@settings(max_examples=40)
@given(st.floats(1e-6, 1e12), st.floats(1.001, 1e6), st.integers(3, 20), st.booleans())
def test_there_are_some_ticks_and_not_too_many(call: Call, low: float, ratio: float, most: int, is_log: bool) -> None:
    ticks = call("listTicks", low, low * ratio, most, is_log)
    assert 1 <= len(ticks) <= most + 1
    assert ticks == sorted(set(ticks))
    assert all(low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6) for tick in ticks)


def test_numbers_are_readable(call: Call) -> None:
    counts = {2e6: "2M", 5e9: "5G", 2.5e6: "2.5M", 1234567: "1.23M", 17: "17", 1.7e13: "17T"}
    assert {number: call("formatCount", number) for number in counts} == counts
    assert call("formatCount", 2024000, " ") == "2.02 M"
    values = {
        0.61234567: "0.6123",
        3.5: "3.5000",
        0.0123456: "0.0123",
        2.35e-5: "0.0000235",
        0: "0.0000",
        12345.67: "12345.7",
    }
    assert {number: call("formatValue", number) for number in values} == values
    assert call("formatValue", None) == "-"


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, from 1 to 21: WCAG 2.2, "contrast ratio" and "relative luminance"."""

    def luminance(color: str) -> float:
        shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else math.pow((s + 0.055) / 1.055, 2.4) for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_are_the_figures_own_on_white_and_seen_on_black(call: Call, data: dict[str, Any]) -> None:
    looks = [
        look["color"] for column in ("bits", "data_type", "family") for look in data["experiments"][column]["looks"]
    ]
    for color in {*looks, "#000000", "#332288"}:
        assert call("adaptColor", color, "#ffffff") == color
        seen = call("adaptColor", color, "#16181d")
        assert contrast(seen, "#16181d") >= 4.5
        assert seen == color.lower() or contrast(color, "#16181d") < 4.5
