"""Paired differences to the best curve, beside those computed from the items by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from toy_items import write_items

from kbit.analysis.curves.curves import Measure
from kbit.analysis.statistics.differences import compare_with_best

LOSS = Measure("cross entropy", "cross_entropy", "text", higher_is_better=False)
SIZES = {"good": (10, 1000), "bad": (10, 100, 1000)}


@pytest.fixture
def scores(tmp_path: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """The loss of each of 400 windows by curve and size. What the windows share is far larger than what differs."""
    rng = np.random.default_rng(3)
    shared = {size: rng.normal(0, 0.5, 400) for size in SIZES["bad"]}
    made = {
        f"{name}-{size}": (4 - size / 1000 + (name == "bad") * 0.02 + shared[size] + rng.normal(0, 0.01, 400))
        for name, sizes in SIZES.items()
        for size in sizes
    }
    rounded = {key: values.astype("<f4") for key, values in made.items()}
    write_items(tmp_path, {key: {"text": values} for key, values in rounded.items()}, "cross_entropy")
    return rounded


def test_a_difference_is_paired_and_at_equal_bits(
    make_points: Callable[..., pd.DataFrame],
    scores: dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]],
    tmp_path: Path,
) -> None:
    curves = {name: {s: float(scores[f"{name}-{s}"].mean()) for s in sizes} for name, sizes in SIZES.items()}
    points = make_points(curves, error=0.03)
    results = pd.DataFrame({"key": list(scores), "metric": "cross_entropy", "task": "text"})
    results.attrs["store"] = str(tmp_path)
    found, unpaired = compare_with_best(points, LOSS, results)
    assert unpaired == []
    assert set(found["reference"]) == {"good"}
    rows: Any = found.set_index(["series", "total_bits"])
    assert rows.loc["good", ["difference", "low", "high"]].abs().to_numpy().max() < 1e-6
    for size in SIZES["bad"]:
        best = scores["good-10"] / 2 + scores["good-1000"] / 2 if size == 100 else scores[f"good-{size}"]
        gaps = scores[f"bad-{size}"].astype(float) - best
        row = rows.loc[("bad", size)]
        error = gaps.std() / 20
        assert row["difference"] == pytest.approx(gaps.mean(), abs=1e-5)
        # an end rests on 25 of 1,000 draws: its chance is near 0.1 of an error
        assert [row["low"], row["high"]] == pytest.approx(
            [gaps.mean() - 1.96 * error, gaps.mean() + 1.96 * error], abs=0.4 * error
        )
    assert rows.loc[("bad", 10), "high"] - rows.loc[("bad", 10), "low"] < 0.005 < 0.03  # each value's own: 0.12


def test_a_curve_is_extended_by_the_bits_of_a_codebook_alone(
    make_points: Callable[..., pd.DataFrame], tmp_path: Path
) -> None:
    curves = {"best": {100: 2.0, 200: 1.0}, "near": {99: 3.0, 201: 3.0}, "far": {90: 3.0, 230: 3.0, 150: 3.0}}
    points = make_points(curves, error=0.03)
    values = dict(zip(points["key"], points["value"], strict=True))
    write_items(tmp_path, {key: {"text": [value, value]} for key, value in values.items()}, "cross_entropy")
    results = pd.DataFrame({"key": list(values), "metric": "cross_entropy", "task": "text"})
    results.attrs["store"] = str(tmp_path)
    found = compare_with_best(points, LOSS, results)[0].set_index(["series", "total_bits"])["difference"]
    assert found["best"].tolist() == [0, 0]
    # the line through (ln 100, 2) and (ln 200, 1), at the points' own bits
    expected = {size: 3 - (2 - np.log(size / 100) / np.log(2)) for size in (99, 150, 201)}
    assert found["near"].to_dict() == pytest.approx({size: expected[size] for size in (99, 201)})
    assert found["far"].to_dict() == pytest.approx({150: expected[150]})


def test_there_are_none_without_items(make_points: Callable[..., pd.DataFrame]) -> None:
    points = make_points({"a": {10: 1.0, 100: 0.5}, "b": {10: 0.9, 100: 0.4}})
    found, unpaired = compare_with_best(points, LOSS, None)
    assert found.empty
    assert unpaired == ["toy"]


def test_a_panel_without_items_leaves_others_their_differences(
    make_points: Callable[..., pd.DataFrame], tmp_path: Path
) -> None:
    curves = {"a": {10: 1.0, 100: 0.5}, "b": {10: 0.9, 100: 0.4}}
    points, bare = make_points(curves), make_points(curves)
    bare = bare.assign(panel="bare", key=bare["key"] + "-bare")
    values = dict(zip(points["key"], points["value"], strict=True))
    write_items(tmp_path, {key: {"text": [value, value]} for key, value in values.items()}, "cross_entropy")
    both = pd.concat([bare, points], ignore_index=True)
    results = pd.DataFrame({"key": both["key"], "metric": "cross_entropy", "task": "text"})
    results.attrs["store"] = str(tmp_path)
    found, unpaired = compare_with_best(both, LOSS, results)
    assert unpaired == ["bare"]
    assert set(found["panel"]) == set(points["panel"])
    assert found.set_index("series")["difference"].to_dict() == pytest.approx({"a": 0.1, "b": 0.0})
