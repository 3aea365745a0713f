"""What the page's chart holds: every measurement once, under readable names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from random_stores import Shape, make_store

from kbit.analysis.curves.curves import split_families
from kbit.analysis.figures.canvas.styles import LINE_STYLES, style_data_type
from kbit.analysis.report.page import embed_json
from kbit.analysis.report.points import collect_data, name_block_size, name_measure

MARKERS_OF_THE_PAGE = set("ov^<>sDdphH8*PX+x")  # those that chart.js draws


@pytest.fixture(scope="module")
def data(planted: pd.DataFrame) -> dict[str, Any]:
    return collect_data(planted)


def test_every_measurement_is_there_once(data: dict[str, Any], planted: pd.DataFrame) -> None:
    assert len(data["experiments"]["key"]) == planted["key"].nunique()
    assert sum(len(measure["value"]) for measure in data["measures"]) == len(planted)
    keys = np.array(data["experiments"]["key"])
    labels = {"mean zero-shot accuracy": ("acc", "mean_zero_shot"), "cross entropy: text": ("cross_entropy", "text")}
    for measure in data["measures"]:
        if measure["label"] in labels:
            metric, task = labels.pop(measure["label"])
            rows = planted[(planted["metric"] == metric) & (planted["task"] == task)].set_index("key")
            own = rows.loc[keys[measure["point"]]]
            for name in ("value", "low", "high"):
                assert measure[name] == pytest.approx(own[name].tolist(), rel=1e-6)  # seven digits
    assert not labels


def test_an_experiment_has_its_names(data: dict[str, Any], planted: pd.DataFrame) -> None:
    experiments = data["experiments"]
    place = experiments["key"].index("opt-1m-20")
    row = planted[planted["key"] == "opt-1m-20"].iloc[0]
    names = {name: column["names"][column["codes"][place]] for name, column in experiments.items() if "codes" in column}
    wanted = {"family": "opt", "model": "opt-1m", "bits": str(row["bits"]), "block_size": str(row["block_size"])}
    assert {name: names[name] for name in wanted} == wanted
    assert names["data_type"].split()[0] == row["data_type"]
    assert {"nf4", "float4-e3m0", "int3 gptq", "unquantized"} <= set(experiments["quantizer"]["names"])
    assert {"float e1", "float e2", "float e3", "int", "int gptq", "nf"} <= set(experiments["data_type"]["names"])
    assert names["method"] == row["method"]
    assert experiments["total_bits"][place] == row["total_bits"]
    baseline = experiments["key"].index(planted.loc[planted["bits"] == 16, "key"].iloc[0])
    for name in ("data_type", "block_size", "method"):
        assert experiments[name]["names"][experiments[name]["codes"][baseline]] == "unquantized"


def test_a_checkpoint_of_another_tool_has_its_own_name_and_precision(planted: pd.DataFrame) -> None:
    """It is no 16-bit model, and belongs to no data type."""
    rows = planted.assign(checkpoint=None)
    found = rows[rows["key"] == rows.loc[rows["bits"] == 16, "key"].iloc[0]].assign(
        key="other", checkpoint="gptq 4 bits group_size=128", bits_per_param=4.125, total_bits=12345
    )
    experiments = collect_data(pd.concat([rows, found]))["experiments"]
    place = experiments["key"].index("other")
    names = {name: column["names"][column["codes"][place]] for name, column in experiments.items() if "codes" in column}
    assert (names["bits"], names["data_type"], names["quantizer"]) == ("4", *["gptq 4 bits group_size=128"] * 2)
    assert names["block_size"] == names["method"] == "as the checkpoint has it"
    assert (experiments["total_bits"][place], experiments["bits_per_param"][place]) == (12345, 4.125)
    assert experiments["curve"].count(experiments["curve"][place]) == 1
    without = collect_data(rows)["experiments"]
    for name in ("data_type", "quantizer", "bits"):  # nothing else changes
        assert {*without[name]["names"]} == {*experiments[name]["names"]} - {"gptq 4 bits group_size=128"}


def test_names_are_in_a_readers_order(data: dict[str, Any]) -> None:
    experiments = data["experiments"]
    assert experiments["bits"]["names"] == ["2", "3", "4", "5", "6", "7", "8", "16"]
    assert experiments["block_size"]["names"] == ["64", "128", "256", "1024", "unquantized"]
    assert experiments["data_type"]["names"][0] == "float e1"
    assert experiments["data_type"]["names"][-1] == "unquantized"


def test_precisions_look_as_in_the_figures(data: dict[str, Any]) -> None:
    bits = data["experiments"]["bits"]
    looks = dict(zip(bits["names"], bits["looks"], strict=True))
    assert looks == {str(k): {"color": s.color, "marker": s.marker} for k, s in LINE_STYLES.items()}


def test_one_data_type_has_one_colour(data: dict[str, Any]) -> None:
    column = data["experiments"]["data_type"]
    colors = {name: look["color"] for name, look in zip(column["names"], column["looks"], strict=True)}
    assert colors["int"] == colors["int gptq"]
    assert len({colors[name] for name in ("float e2", "int", "nf", "quantile", "dynamic", "unquantized")}) == 6
    for name in ("int", "nf", "quantile", "dynamic"):
        assert colors[name] == style_data_type(name, 4).color
    assert colors["float e2"] == style_data_type("float", 4, 2).color != colors["float e3"]
    assert len({(look["color"], look["marker"]) for look in column["looks"]}) == len(column["names"])


def test_the_largest_evaluation_is_first() -> None:
    row = {"family": "f", "model": "m", "bits": 16, "data_type": None, "exponent_bits": None, "block_size": None}
    row |= {"method": None, "total_bits": 16, "bits_per_param": 16.0, "metric": "acc", "task": "piqa", "n": 4}
    row |= {"low": None, "high": None}
    ways = ["a few", "many", "many", "as many", "as many"]
    rows = [row | {"key": f"k{place}", "value": 0.5, "evaluation": way} for place, way in enumerate(ways)]
    (measure,) = collect_data(pd.DataFrame(rows))["measures"]
    assert measure["evaluations"] == ["as many", "many", "a few"]  # a tie: by name
    assert measure["evaluation"] == [2, 1, 1, 0, 0]
    assert measure["low"] == [None] * 5


def test_measures_have_words_and_a_direction() -> None:
    assert name_measure("acc", "mean_zero_shot")["label"] == "mean zero-shot accuracy"
    loss = name_measure("cross_entropy", "text")
    assert (loss["axis"], loss["lower"]) == ("cross entropy: text (nats per token)", True)
    assert name_measure("acc", "piqa")["lower"] is False
    own = name_measure("share", "repetition")
    assert (own["label"], own["lower"], own["group"]) == ("share: repetition", None, "other")


@pytest.mark.parametrize(
    "shape",
    [
        Shape((2, 2), (3, 4), (0, 8, 9, 13), 0.5, 0.5, 0.02, 0.0, 1, True, 1),  # no baseline, no intervals
        Shape((1, 1, 1), (3, 16), (5, 10, 14, 17, 18, 19, 20), 0.1, 0.1, 0.1, 0.9, 2, False, 2),
        Shape((2,), (4, 8), (21, 22, 23, 24, 25), 0.0, 0.0, 0.0, 1.0, 6, False, 3),  # int8 products, single layers
    ],
)
def test_any_store_can_be_shown(shape: Shape) -> None:
    store = make_store(shape)
    measured = store[store["value"].notna()]
    found = json.loads(embed_json(collect_data(store)))
    assert sum(len(measure["value"]) for measure in found["measures"]) == len(measured)
    experiments = found["experiments"]
    assert len({len(column.get("codes", ())) for column in experiments.values() if isinstance(column, dict)}) == 1
    for column in experiments.values():
        if isinstance(column, dict):
            assert len(column["names"]) == len(set(column["names"])) == len(column["looks"])
            assert all(0 <= code < len(column["names"]) for code in column["codes"])
            assert {look["marker"] for look in column["looks"]} <= MARKERS_OF_THE_PAGE


def test_block_sizes_are_named() -> None:
    assert [name_block_size(*pair) for pair in ((64, 4), (pd.NA, 4), (pd.NA, 16))] == [
        "64",
        "whole tensor",
        "unquantized",
    ]


def test_families_of_two_architectures_are_two_curves(planted: pd.DataFrame) -> None:
    mixed = planted.assign(architecture=planted["family"].map({"opt": "Opt", "pythia": "Neox"}), family="runs")
    names = collect_data(split_families(mixed))["experiments"]["family"]["names"]
    assert names == ["runs (Neox)", "runs (Opt)"]
