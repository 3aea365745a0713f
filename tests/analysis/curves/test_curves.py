"""Curves with known answers: a planted crossing, exact interpolation, ties, and what stores can lack."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.analysis.curves.curves import (
    ZERO_SHOT,
    AmbiguousResults,
    best_precision,
    interpolate,
    optimal_share,
    precision_curves,
    sort_curves,
    split_families,
    tabulate_curves,
)
from kbit.analysis.statistics.findings import finding
from kbit.analysis.statistics.verdicts import judge_four_bit
from kbit.store.conditions import select_rows

Points = dict[int, dict[int, float]]  # bits -> total bits -> value


def make_row(bits: int, total_bits: int, value: float, **changes: Any) -> dict[str, Any]:
    """One row of results, as kbit.read_results gives it; the model's name is its place in the family."""
    baseline = bits == 16
    row = {
        "key": f"{bits}-{total_bits}",
        "model": f"m{total_bits}",
        "family": "toy",
        "parameters": total_bits // bits,
        "quantized_parameters": total_bits // bits,
        "bits": bits,
        "data_type": None if baseline else "nf",
        "exponent_bits": pd.NA,
        "float_bias": None,
        "block_size": pd.NA if baseline else 64,
        "method": "none" if baseline else "rtn",
        "seed": 0,
        "bits_per_param": float(bits),
        "total_bits": total_bits,
        "task": "mean_zero_shot",
        "metric": "acc",
        "value": value,
        "low": value - 0.01,
        "high": value + 0.02,
        "n": 400,
    }
    return row | changes


def make_results(points: Points, **changes: Any) -> pd.DataFrame:
    """A store with one row per point."""
    rows = [make_row(bits, size, y, **changes) for bits, curve in points.items() for size, y in curve.items()]
    frame = pd.DataFrame(rows)
    return frame.astype({"exponent_bits": "Int64", "block_size": "Int64"})


def mean_curves(results: pd.DataFrame) -> pd.DataFrame:
    return precision_curves(results, ZERO_SHOT.metric, ZERO_SHOT.task)


# 3-bit is flat at 0.5, 4-bit rises from 0.4 to 0.6: they cross at the geometric mean of the ends, 10^7 bits.
CROSSING: Points = {3: {10**6: 0.5, 10**8: 0.5}, 4: {10**6: 0.4, 10**8: 0.6}}
LOSS = {"metric": "cross_entropy", "task": "text"}


def test_a_planted_crossing_is_found() -> None:
    best = best_precision(mean_curves(make_results(CROSSING)), higher_is_better=True)
    assert len(best) == 200
    assert set(best.loc[best["total_bits"] < 1e7, "bits"]) == {3}
    assert set(best.loc[best["total_bits"] > 1e7, "bits"]) == {4}
    assert best["margin"].iloc[[0, -1]].tolist() == pytest.approx([0.1, 0.1])
    assert best["value"].iloc[[0, -1]].tolist() == pytest.approx([0.5, 0.6])


def test_the_crossing_reads_the_other_way_for_a_loss() -> None:
    best = best_precision(mean_curves(make_results(CROSSING)), higher_is_better=False)
    assert set(best.loc[best["total_bits"] < 1e7, "bits"]) == {4}
    assert best["value"].iloc[0] == pytest.approx(0.4)


def test_shares_are_of_the_log_range_and_sum_to_one() -> None:
    points: Points = {
        3: {10**6: 0.5, 10**8: 0.5},
        4: {10**6: 0.45, 10**8: 0.6},
    }  # cross at 1/3
    shares = optimal_share(best_precision(mean_curves(make_results(points)), higher_is_better=True))
    assert shares["bits"].tolist() == [4, 3]
    assert shares["share"].tolist() == pytest.approx([2 / 3, 1 / 3], abs=0.5 / 200 + 1e-9)
    assert shares["share"].sum() == pytest.approx(1.0)


@given(
    slope=st.floats(-1, 1),
    at_one=st.floats(-10, 10),
    sizes=st.lists(st.integers(10, 10**12), min_size=2, max_size=8, unique=True),
    where=st.floats(0, 1),
)
def test_interpolation_is_exact_on_a_log_linear_curve(
    slope: float, at_one: float, sizes: list[int], where: float
) -> None:
    ordered = np.array(sorted(sizes), dtype=np.float64)
    values = at_one + slope * np.log(ordered)
    budget = min(sizes) ** (1 - where) * max(sizes) ** where
    budget = min(max(budget, min(sizes)), max(sizes))
    assert interpolate(ordered, values, [budget])[0] == pytest.approx(at_one + slope * math.log(budget), abs=1e-9)


def test_interpolation_never_extrapolates() -> None:
    sizes, values = np.array([10.0, 100.0]), np.array([1.0, 2.0])
    assert np.isnan(interpolate(sizes, values, [9.999, 100.001])).all()
    assert interpolate(sizes, values, [10, 100]).tolist() == [1.0, 2.0]


def test_rows_may_come_in_any_order() -> None:
    curves = pd.DataFrame({"bits": [4, 3, 4, 3], "total_bits": [100, 1000, 10, 10], "value": [2.0, 5.0, 1.0, 3.0]})
    table = tabulate_curves(curves)
    assert [own.tolist() for own in sort_curves(curves).values()] == [[3, 1], [2, 0]]
    assert (table.index[0], table.index[-1]) == (pytest.approx(10), pytest.approx(100))
    assert table.iloc[0].to_dict() == {3: 3.0, 4: 1.0}
    assert table.iloc[-1].to_dict() == {3: pytest.approx(4.0), 4: pytest.approx(2.0)}


def test_budgets_stay_where_every_quantized_precision_is_defined() -> None:
    points: Points = {3: {10: 0.1, 100: 0.2}, 4: {50: 0.1, 1000: 0.9}, 16: {500: 0.1, 2000: 0.2}}
    budgets = best_precision(mean_curves(make_results(points)), higher_is_better=True)["total_bits"]
    assert (budgets.min(), budgets.max()) == (50, pytest.approx(100))


def test_one_quantized_precision_is_compared_with_the_baseline() -> None:
    points: Points = {4: {50: 0.1, 1000: 0.9}, 16: {500: 0.1, 2000: 0.2}}
    budgets = best_precision(mean_curves(make_results(points)), higher_is_better=True)["total_bits"]
    assert (budgets.min(), budgets.max()) == (pytest.approx(500), pytest.approx(1000))


def test_equal_curves_are_a_tie_not_a_winner() -> None:
    results = make_results({3: {10: 0.5, 100: 0.5}, 4: {10: 0.5, 100: 0.5}})
    shares = optimal_share(best_precision(mean_curves(results), higher_is_better=True))
    assert shares["bits"].isna().tolist() == [True]
    assert shares["share"].tolist() == [1.0]
    assert "the precisions tie over 100% of the budgets" in finding(results)
    assert judge_four_bit(mean_curves(results), ZERO_SHOT).startswith("Undecided: the mean lead of 4-bit")


def test_the_baseline_belongs_to_every_variant_of_its_family_only() -> None:
    parts = [
        make_results({4: {10: 0.1, 100: 0.2}}, data_type="nf", block_size=64),
        make_results({4: {11: 0.1, 110: 0.2}}, data_type="int", block_size=pd.NA),
        make_results({16: {40: 0.1, 400: 0.2}}),
        make_results({16: {40: 0.1, 400: 0.2}}, family="other"),
    ]
    curves = mean_curves(pd.concat(parts, ignore_index=True))
    baseline = curves[curves["bits"] == 16]
    variants = baseline[["family", "label", "block_size"]].drop_duplicates()
    assert len(baseline) == 6
    assert variants["family"].tolist() == ["other", "toy", "toy"]
    assert variants["label"].tolist()[1:] == ["int", "nf"]
    assert variants["block_size"].isna().tolist() == [True, True, False]
    assert curves.columns.tolist()[:4] == ["family", "bits", "data_type", "block_size"]


def test_other_exponents_biases_and_methods_are_variants_of_their_own() -> None:
    settings: list[dict[str, Any]] = [
        {"data_type": "float", "exponent_bits": 3, "float_bias": "ieee"},
        {"data_type": "float", "exponent_bits": 2, "float_bias": "ieee"},
        {"data_type": "float", "exponent_bits": 2, "float_bias": "bnb"},
        {"data_type": "nf", "method": "gptq"},
    ]
    parts = [make_results({4: {10: 0.1}}, **setting) for setting in settings]
    curves = mean_curves(pd.concat(parts, ignore_index=True))
    assert curves["label"].tolist() == ["float", "float E2", "float E2 bnb", "nf gptq"]


def test_other_settings_are_variants_of_their_own() -> None:
    settings: list[dict[str, Any]] = [{}, {"scale_format": "fp32"}, {"layout": "row", "centering": True}]
    parts = [make_results({4: {10: 0.1}}, **setting) for setting in settings]
    curves = mean_curves(pd.concat(parts, ignore_index=True))
    assert curves["label"].tolist() == ["nf", "nf fp32 scales", "nf row centred"]


def test_seeds_are_averaged() -> None:
    points: Points = {4: {10: 0.2, 100: 0.4}}
    other: Points = {4: {10: 0.4, 100: 0.6}}
    curves = mean_curves(pd.concat([make_results(points), make_results(other, seed=1)], ignore_index=True))
    assert curves["value"].tolist() == pytest.approx([0.3, 0.5])
    assert curves["low"].tolist() == pytest.approx([0.29, 0.49])


def test_two_results_for_one_point_are_refused_and_what_differs_is_named() -> None:
    parts = [make_results(CROSSING, dtype="float32"), make_results(CROSSING, dtype="float16", low=0.0)]
    results = pd.concat(parts, ignore_index=True)
    with pytest.raises(AmbiguousResults, match=r"m1000000 at 3 bit \(nf block 64\) has 2 results .* dtype;"):
        mean_curves(results)
    assert "has 2 results that differ in dtype" in finding(results)
    with pytest.raises(AmbiguousResults, match="a setting that is not a column"):
        mean_curves(results.drop(columns="dtype"))


def test_values_measured_in_different_ways_are_never_in_one_curve() -> None:
    easy, hard = "float32, all items, nano_cloze", "float32, 5 items, piqa"
    parts = [make_results(CROSSING, evaluation=easy), make_results({5: {10: 0.1}}, evaluation=hard)]
    with pytest.raises(AmbiguousResults, match=r"toy was measured in 2 ways that do not compare: .*5 items.*--where"):
        mean_curves(pd.concat(parts, ignore_index=True))


def test_the_advice_for_several_ways_keeps_every_other_kind_of_result() -> None:
    """Each kind of measurement describes its evaluation in its own words."""
    words = {"mean_zero_shot": "float32, {} items, a b", "a": "float32, {} items", "text": "float32, all windows"}
    parts = [
        make_results(CROSSING, task=task, evaluation=words[task].format(items), metric=metric, key=key)
        for items, key in (("all", "k"), ("all", "k2"), ("100", "other"))
        for task, metric in (("mean_zero_shot", "acc"), ("a", "acc"), ("text", "cross_entropy"))
    ]
    results = pd.concat(parts, ignore_index=True)
    with pytest.raises(AmbiguousResults) as refusal:
        mean_curves(results)
    advice = re.search(r'--where "(.*)"', str(refusal.value))
    assert advice is not None
    kept = select_rows(results, advice[1])
    assert set(kept["task"]) == set(words)
    assert set(kept.loc[kept["task"] == "mean_zero_shot", "evaluation"]) == {"float32, all items, a b"}
    assert mean_curves(kept).equals(mean_curves(results[results["key"] == "k"]))


def test_a_store_without_seeds_is_read() -> None:
    results = make_results(CROSSING)
    pd.testing.assert_frame_equal(mean_curves(results.drop(columns="seed")), mean_curves(results))


def test_missing_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"lack the columns .*total_bits"):
        mean_curves(make_results(CROSSING).drop(columns="total_bits"))


def test_the_finding_names_both_measures() -> None:
    # One model per (bits, size) is enough: curves are told apart by bits.
    losses: Points = {3: {10**6: 4.0, 10**8: 3.0}, 4: {10**6: 3.9, 10**8: 2.9}}
    results = pd.concat([make_results(CROSSING), make_results(losses, **LOSS)], ignore_index=True)
    assert re.sub(r"[+-]\d\.\d{4}", "#", finding(results)) == (
        "toy, nf block 64, at equal total bits: 3-bit is best over 50% of the budgets by mean zero-shot accuracy "
        "(4-bit 50%): undecided, mean lead over 4-bit # (95% interval # to #); 4-bit is best over 100% of the budgets "
        "by cross entropy: holds, mean lead over 3-bit # nats (95% interval # to #)."
    )


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (pd.DataFrame(), "No results yet."),
        (make_results(CROSSING, metric="other"), "neither mean zero-shot accuracy nor cross entropy was"),
        (make_results(CROSSING), "cross entropy was not measured"),
        (make_results(CROSSING, **LOSS), "mean zero-shot accuracy was not measured"),
        (make_results({16: {10: 0.1, 20: 0.2}}), "needs at least two precisions (has 16-bit only)"),
        (make_results(CROSSING, model="one"), "needs at least two model sizes (has one only)"),
        (make_results({3: {10: 0.1, 20: 0.2}, 4: {30: 0.1, 40: 0.2}}), "needs two quantized precisions that overlap"),
    ],
)
def test_the_finding_says_what_is_missing(results: pd.DataFrame, sentence: str) -> None:
    assert sentence in finding(results)


def test_the_finding_has_a_sentence_per_family_and_sums_up_variants() -> None:
    parts = [
        make_results(CROSSING, family="alpha", block_size=block, data_type=data_type)
        for block, data_type in itertools.product((64, 128), ("int", "nf"))
    ]
    text = finding(pd.concat([*parts, make_results(CROSSING, family="beta")], ignore_index=True))
    assert text.startswith("alpha, 4 variants (data type, block size, method, outliers), at equal total bits: ")
    assert "in 4 of 4 variants" in text
    assert ". beta, nf block 64, at equal total bits: " in text


def test_a_family_of_two_architectures_is_two_families() -> None:
    rows = pd.DataFrame({"family": ["runs", "runs", "opt", "runs"], "architecture": ["A", "B", "C", None]})
    assert split_families(rows)["family"].tolist() == ["runs (A)", "runs (B)", "opt", "runs"]
    assert split_families(split_families(rows)).equals(split_families(rows))
    assert split_families(rows.drop(columns="architecture"))["family"].tolist() == ["runs", "runs", "opt", "runs"]
