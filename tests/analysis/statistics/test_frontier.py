"""Probabilities with known answers: paired items, separated and equal curves, budgets that need not be spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from toy_items import write_items
from toy_results import make_result

from kbit.analysis.curves.curves import ZERO_SHOT, Measure, interpolate, shared_budgets
from kbit.analysis.statistics.frontier import (
    best_chances,
    choose_precision,
    draw_values,
    find_pareto_frontier,
    read_scores,
    resample_means,
    weigh_curve,
    weigh_points,
)
from kbit.evaluation.measurement import encode_items
from kbit.evaluation.rounds.order import TEXT, list_places
from kbit.evaluation.rounds.sample import SampledPart
from kbit.store.store import Store

LOSS = Measure("cross entropy", "cross_entropy", "text", higher_is_better=False)
Build = Callable[..., pd.DataFrame]


@given(
    points=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=30),
    higher=st.booleans(),
)
def test_the_frontier_is_every_point_that_none_beats(points: list[tuple[int, int]], higher: bool) -> None:
    table = pd.DataFrame(points, columns=["total_bits", "value"], dtype=float)
    sign = 1 if higher else -1
    expected = {
        (bits, value)
        for bits, value in points
        if not any(b <= bits and sign * v >= sign * value and (b, v) != (bits, value) for b, v in points)
    }
    frontier = find_pareto_frontier(table, higher)
    assert set(zip(frontier["total_bits"], frontier["value"], strict=True)) == expected
    assert len(frontier) == len(expected)


def test_weights_are_the_interpolation(make_points: Build) -> None:
    points = make_points({3: {10: 0.1, 100: 0.4, 1000: 0.9}, 4: {20: 0.3, 2000: 0.5}})
    budgets = shared_budgets(points)
    for bits, matrix in weigh_points(points, budgets).items():
        curve = points[points["bits"] == bits].sort_values("total_bits")
        exact = interpolate(curve["total_bits"].to_numpy(float), curve["value"].to_numpy(), budgets)
        assert matrix @ points["value"].to_numpy() == pytest.approx(exact)
        assert matrix.sum(axis=1) == pytest.approx(1)


def test_chances_are_certain_for_clear_curves_and_even_for_equal_ones(make_points: Build) -> None:
    clear = make_points({3: {10: 0.1, 100: 0.2}, 4: {10: 0.5, 100: 0.6}})
    chances = best_chances(clear, draw_values(clear, ZERO_SHOT), higher_is_better=True)
    assert (chances[4] == 1).all()
    assert (best_chances(clear, draw_values(clear, LOSS), higher_is_better=False)[3] == 1).all()
    equal = make_points({3: {10: 0.5, 100: 0.6}, 4: {10: 0.5, 100: 0.6}})
    chances = best_chances(equal, draw_values(equal, ZERO_SHOT), higher_is_better=True)
    assert chances.sum(axis=1).to_numpy() == pytest.approx(1)
    assert chances[4].to_numpy() == pytest.approx(0.5, abs=5 * 0.5 / 1000**0.5)


def test_a_chance_is_the_normal_one_for_independent_points(make_points: Build) -> None:
    points = make_points({3: {10: 0.5, 100: 0.5}, 4: {10: 0.51, 100: 0.51}}, error=0.01)
    ends = best_chances(points, draw_values(points, ZERO_SHOT, count=4000), higher_is_better=True)[4].iloc[[0, -1]]
    assert ends.to_numpy() == pytest.approx(stats.norm.cdf(0.01 / (0.01 * 2**0.5)), abs=0.04)


def test_resampled_means_have_the_error_of_a_mean_and_move_together() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random((2, 400)) < 0.5).astype(float)
    scores[1, :390] = scores[0, :390]  # two variants that differ on 10 items at most
    draws = resample_means(scores, 2000, rng)
    assert draws.mean(axis=0) == pytest.approx(scores.mean(axis=1), abs=0.005)
    assert draws.std(axis=0) == pytest.approx(scores.std(axis=1) / 20, rel=0.1)
    difference = (draws[:, 1] - draws[:, 0]).std()
    assert difference == pytest.approx((scores[1] - scores[0]).std() / 20, rel=0.1)
    assert difference < 0.3 * draws[:, 0].std()


def test_a_point_without_interval_counts_only_where_it_is_needed(make_points: Build) -> None:
    points = make_points({4: {10: 0.50, 100: 0.60, 1000: 0.70}, 5: {12: 0.51, 120: 0.61, 1200: 0.69}})
    points.loc[points["total_bits"] == 1200, ["low", "high"]] = np.nan
    chosen = choose_precision(points, ZERO_SHOT, [50, 500])
    near, far = (chosen[chosen["total_bits"] == budget].set_index("bits") for budget in (50, 500))
    whole = choose_precision(points.fillna({"low": 0.67, "high": 0.71}), ZERO_SHOT, [50, 500])
    expected = whole[whole["total_bits"] == 50].set_index("bits")
    pd.testing.assert_frame_equal(near, expected)
    assert 0.1 < near["chance"].min() < near["chance"].max() < 0.9
    assert far["chance"].isna().all()  # nobody knows
    assert far["low"].isna().to_dict() == {4: False, 5: True}


def test_a_curve_is_never_best_by_a_draw_that_is_unknown(make_points: Build) -> None:
    points = make_points({4: {10: 0.5, 100: 0.6}, 5: {10: 0.4, 100: 0.5}})
    draws = draw_values(points, ZERO_SHOT)
    draws.values[:, 3] = np.nan
    assert (best_chances(points, draws, higher_is_better=True)[4] == 1).all()


def make_paired(make_points: Build, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Points of two precisions whose items differ a little, always to the advantage of 4 bits; and their results."""
    rng = np.random.default_rng(1)
    scores: dict[str, dict[str, Any]] = {}
    for size in (10, 100):
        hard = rng.random((2, 300))
        for bits, level in ((3, 0.50), (4, 0.52)):
            scores[f"{bits}-{size}"] = {task: (hard[k] < level).astype(float) for k, task in enumerate("ab")}
    write_items(folder, scores)
    curves = {
        bits: {size: float(np.mean([scores[f"{bits}-{size}"][t].mean() for t in "ab"])) for size in (10, 100)}
        for bits in (3, 4)
    }
    points = make_points(curves, error=0.02)
    rows = [{"key": key, "metric": "acc", "task": task} for key in scores for task in ("a", "b", "mean_zero_shot")]
    results = pd.DataFrame(rows)
    results.attrs["store"] = str(folder)
    return points, results


def test_pairing_makes_a_small_lead_certain(make_points: Build, tmp_path: Path) -> None:
    points, results = make_paired(make_points, tmp_path)
    paired, unpaired = draw_values(points, ZERO_SHOT, results), draw_values(points, ZERO_SHOT)
    assert (paired.paired, unpaired.paired) == (True, False)
    assert paired.values.mean(axis=0) == pytest.approx(points["value"].to_numpy(), abs=0.003)
    sure = best_chances(points, paired, higher_is_better=True)[4]
    unsure = best_chances(points, unpaired, higher_is_better=True)[4]
    assert sure.min() > 0.97
    assert 0.5 < unsure.mean() < 0.9


def test_a_store_that_lacks_an_item_falls_back_and_says_so(make_points: Build, tmp_path: Path) -> None:
    points, results = make_paired(make_points, tmp_path)
    write_items(tmp_path, {"4-100": {"a": [1, 0]}})  # scored on other items, and not at all on b
    draws = draw_values(points, ZERO_SHOT, results)
    assert not draws.paired
    assert "no items of these values in this store" in draws.source


def test_the_tasks_behind_a_mean_are_the_stores(make_points: Build, tmp_path: Path) -> None:
    """Rows that --where leaves out do not change what a mean is of."""
    points, results = make_paired(make_points, tmp_path)
    everything = draw_values(points, ZERO_SHOT, results)
    for tasks in (["mean_zero_shot"], ["mean_zero_shot", "a"], []):
        kept = results[results["task"].isin(tasks)]
        draws = draw_values(points, ZERO_SHOT, kept)
        assert draws.paired
        assert np.array_equal(draws.values, everything.values)


def test_items_of_another_mean_are_not_drawn(make_points: Build, tmp_path: Path) -> None:
    points, results = make_paired(make_points, tmp_path)
    moved = points.assign(value=points["value"] + 0.001)
    assert not draw_values(moved, ZERO_SHOT, results).paired


def test_the_choice_for_a_budget_ranks_all_curves(make_points: Build) -> None:
    points = make_points(
        {3: {10: 0.1, 100: 0.2}, 4: {10: 0.5, 100: 0.6}, 8: {50: 0.3, 500: 0.4}, 5: {200: 0.9, 400: 1.0}}
    )
    table = choose_precision(points, ZERO_SHOT, [100])
    assert table["bits"].tolist() == [4, 8, 3]  # no 5-bit model is that small
    assert table["chance"].tolist() == [1, 0, 0]
    assert (table["low"] < table["value"]).all()
    assert (table["value"] < table["high"]).all()


def test_the_rival_is_the_likeliest_not_the_second_best_value(make_points: Build) -> None:
    steady = make_points({4: {10: 0.60, 100: 0.60}, 5: {10: 0.595, 100: 0.595}}, error=0.001)
    noisy = make_points({8: {10: 0.59, 100: 0.59}}, error=0.05)
    table = choose_precision(pd.concat([steady, noisy], ignore_index=True), ZERO_SHOT, [50])
    assert table["bits"].tolist() == [4, 8, 5]  # 5 bits come second by value and are hardly ever best
    assert table["chance"].iloc[1] > 0.3 > 0.01 > table["chance"].iloc[2]


def test_a_budget_need_not_be_spent(make_points: Build) -> None:
    points = make_points({4: {10: 0.5, 100: 0.6}, 8: {50: 0.3, 500: 0.4}})
    table = choose_precision(points, ZERO_SHOT, [400])  # 4 bits have no model that large: the largest serves
    assert (table["bits"].iloc[0], table["value"].iloc[0]) == (4, pytest.approx(0.6))
    assert choose_precision(points, ZERO_SHOT, [5]).empty


def test_the_baseline_competes_once(make_points: Build) -> None:
    points = make_points({4: {10: 0.5, 100: 0.6}, 16: {40: 0.3, 400: 0.4}})
    twice = pd.concat([points, points[points["bits"] == 16].assign(data_type="int")], ignore_index=True)
    assert choose_precision(twice, ZERO_SHOT, [100])["bits"].tolist() == [4, 16]


def test_equal_curves_share_their_chance(make_points: Callable[..., pd.DataFrame]) -> None:
    """Of two curves that are equal in each draw neither comes first."""
    curves = make_points({3: {10: 0.4, 100: 0.6}, 4: {10: 0.4, 100: 0.6}}, error=0.0)
    chances = best_chances(curves, draw_values(curves, ZERO_SHOT), higher_is_better=True)
    assert (chances == 0.5).all().all()


def test_scores_of_stopped_experiments_change_with_each_round(tmp_path: Path) -> None:
    """Figures of one process are drawn before and after a study went on."""
    store, values = Store(tmp_path), np.arange(64.0)
    key = make_result(1).key
    for rounds in (1, 2):
        own = values[list_places(64, rounds)]
        result = dataclasses.replace(
            make_result(1),
            items=(encode_items("text", "cross_entropy", own.tolist(), exactly=True),),
            sampled=(SampledPart(TEXT, rounds, {"text": 64}),),
        )
        store.write(result)
        found = read_scores(store.root, "cross_entropy", [key], {key})["text"][key]
        assert found.mean() == pytest.approx(own.mean())
    store.write(dataclasses.replace(make_result(1), items=(encode_items("text", "cross_entropy", values.tolist()),)))
    assert read_scores(store.root, "cross_entropy", [key], set())["text"][key].tolist() == values.tolist()


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8, unique=True),
    budgets=st.lists(st.floats(0.5, 80), max_size=6),
    extend=st.booleans(),
)
def test_weights_of_a_curve_are_those_of_numpys_interpolation(
    sizes: list[int], budgets: list[float], extend: bool
) -> None:
    """Bit for bit, at points and between them, below the curve, and beyond it."""
    x, at = np.sort(np.array(sizes, dtype=float)), np.array([*budgets, *sizes], dtype=float)
    right = None if extend else np.nan
    units = [np.interp(np.log(at), np.log(x), unit, left=np.nan, right=right) for unit in np.eye(x.size)]
    np.testing.assert_array_equal(weigh_curve(x, at, extend=extend), np.stack(units, axis=1))
