"""Intervals of accuracies and means, and the compact form of their items."""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.evaluation.measurement import (
    Z_95,
    Measurement,
    decode_items,
    encode_items,
    exponentiate,
    mean_accuracy,
    measure_accuracy,
    measure_mean,
    measure_ratio,
    quantile_95,
    transform,
    wilson_interval,
)

proportions = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
finite = st.floats(-1e6, 1e6)


def test_wilson_of_24_right_out_of_24() -> None:
    low, high = wilson_interval(24, 24)
    assert round(low, 3) == 0.862  # n / (n + z^2) = 24 / 27.84
    assert high == 1.0


def test_wilson_of_half_right_is_the_textbook_interval() -> None:
    low, high = wilson_interval(50, 100)
    # centre 1/2; half = z sqrt(1/400 + z^2/40000) / (1 + z^2/100) = 1.96 * 0.05095 / 1.03841 = 0.09617
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)


def test_wilson_is_symmetric_between_right_and_wrong() -> None:
    low, high = wilson_interval(7, 30)
    mirrored_low, mirrored_high = wilson_interval(23, 30)
    assert (low, high) == pytest.approx((1 - mirrored_high, 1 - mirrored_low), abs=1e-12)


@pytest.mark.parametrize(("successes", "expected"), [(0, (0.0, 0.793)), (1, (0.207, 1.0))])
def test_wilson_of_one_item(successes: int, expected: tuple[float, float]) -> None:
    low, high = wilson_interval(successes, 1)
    assert (round(low, 3), round(high, 3)) == expected  # 1 / (1 + z^2) = 0.207


@given(proportions)
def test_wilson_holds_the_proportion_and_has_a_width(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_an_accuracy_lies_within_its_interval(correct: list[bool]) -> None:
    m = measure_accuracy("task", "acc", [float(c) for c in correct])
    assert m.low <= m.value <= m.high
    assert m.n == len(correct)
    assert m.value == pytest.approx(sum(correct) / len(correct), abs=1e-12)


def test_a_mean_of_few_values_has_students_interval() -> None:
    m = measure_mean("text", "cross_entropy", [1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom; s^2 = (2.25 + 0.25 + 0.25 + 2.25) / 3, n = 4
    assert (m.value, m.low, m.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)
    assert m.n == 4


def test_a_mean_of_many_values_has_the_normal_interval() -> None:
    values = [float(i % 2) for i in range(256)]
    m = measure_mean("text", "cross_entropy", values)
    assert m.high - 0.5 == pytest.approx(1.959964 * math.sqrt(64 / 255) / 16, rel=1e-6)


def test_quantiles_fall_from_students_to_the_normal_one() -> None:
    quantiles = [quantile_95(n) for n in range(2, 40)]
    assert quantiles[0] == pytest.approx(12.7062, abs=1e-4)  # tables of Student's t, 1 and 28 degrees of freedom
    assert quantiles[27] == pytest.approx(2.0484, abs=1e-4)
    assert quantiles[28] == Z_95
    assert quantiles == sorted(quantiles, reverse=True)


def test_a_single_value_has_no_interval() -> None:
    m = measure_mean("text", "cross_entropy", [1.5])
    assert m.value == 1.5
    assert math.isnan(m.low)
    assert math.isnan(m.high)
    assert m.n == 1


@given(st.lists(finite, min_size=2, max_size=50))
def test_a_mean_lies_within_its_interval(values: list[float]) -> None:
    m = measure_mean("text", "cross_entropy", values)
    assert m.low <= m.value <= m.high


shares = st.lists(st.floats(0, 1), min_size=2, max_size=6)


@settings(max_examples=50, deadline=None)
@given(shares, st.sampled_from(["top1_agreement", "top1_probability", "share", "f1", "exact_match"]))
def test_an_interval_of_shares_stays_between_0_and_1(values: list[float], metric: str) -> None:
    m = measure_mean("text", metric, values)
    assert 0 <= m.low <= m.value <= m.high <= 1
    whole = measure_mean("text", "contains", [float(value > 0.5) for value in values])  # a task's metric of 0 and 1
    assert 0 <= whole.low <= whole.value <= whole.high <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=6), st.sampled_from(["kl_divergence", "cross_entropy"]))
def test_an_interval_of_nats_is_never_below_0(values: list[float], metric: str) -> None:
    low = measure_mean("text", metric, values).low
    assert low >= 0
    free = measure_mean("text", "length", values).low  # what has no range keeps its interval
    assert low == max(free, 0.0) or set(values) <= {0.0, 1.0}
    assert (
        measure_ratio("text", f"word_{metric}" if "cross" in metric else metric, values, [2.0] * len(values)).low >= 0
    )


def test_shares_in_percent_are_no_shares() -> None:
    assert measure_mean("task", "f1", [40.0, 90.0]).high > 100


def test_a_ratio_of_totals_is_textbook() -> None:
    m = measure_ratio("text", "word_perplexity", [2.0, 8.0], [1.0, 3.0])
    # r = 10/4; deviations 2 - 2.5 and 8 - 7.5: sqrt(2/1 (0.25 + 0.25)) / 4 = 1/4; t of 1 degree of freedom
    assert (m.value, m.low, m.high) == pytest.approx((2.5, 2.5 - 12.706205 / 4, 2.5 + 12.706205 / 4), rel=1e-6)
    assert math.isnan(measure_ratio("text", "word_perplexity", [2.0], [1.0]).low)


@given(st.lists(finite, min_size=2, max_size=50))
def test_a_ratio_to_equal_weights_is_a_mean(values: list[float]) -> None:
    ratio, mean = measure_ratio("t", "m", values, [1.0] * len(values)), measure_mean("t", "m", values)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((mean.value, mean.low, mean.high), rel=1e-6, abs=1e-6)


def test_a_transformed_measurement_keeps_its_task_and_count() -> None:
    m = transform(Measurement("text", "cross_entropy", 1.0, 0.5, 2.0, 8), "perplexity", math.exp)
    assert m == Measurement("text", "perplexity", math.e, math.exp(0.5), math.exp(2.0), 8)


def test_a_missing_interval_stays_missing_when_transformed() -> None:
    assert math.isnan(transform(measure_mean("text", "cross_entropy", [1.0]), "perplexity", math.exp).low)


@pytest.mark.parametrize(
    ("value", "high", "left"), [(2.0, 3.0, 1), (709.7, 709.7, 1), (709.8, 709.8, 0), (700.0, 720.0, 0)]
)
def test_a_perplexity_beyond_float64_is_left_out(value: float, high: float, left: int) -> None:
    """The largest float64 is exp(709.783)."""
    perplexities = exponentiate(Measurement("text", "cross_entropy", value, 1.0, high, 8), "perplexity")
    assert [m.metric for m in perplexities] == ["perplexity"] * left
    assert all((m.value, m.high) == (math.exp(value), math.exp(high)) for m in perplexities)


def test_the_mean_accuracy_adds_the_distances_in_squares() -> None:
    one = Measurement("a", "acc", 0.5, 0.5 - 0.03, 0.5 + 0.06, 100)
    two = Measurement("b", "acc", 0.7, 0.7 - 0.04, 0.7 + 0.08, 300)
    mean = mean_accuracy([one, two])
    assert mean.value == pytest.approx(0.6)
    assert mean.low == pytest.approx(0.6 - 0.05 / 2)  # sqrt(0.03^2 + 0.04^2) = 0.05
    assert mean.high == pytest.approx(0.6 + 0.10 / 2)
    assert (mean.task, mean.metric, mean.n) == ("mean_zero_shot", "acc", 400)


def test_each_task_weighs_the_same_in_the_mean() -> None:
    large, small = measure_accuracy("a", "acc", [1.0] * 1000), measure_accuracy("b", "acc", [0.0] * 10)
    assert mean_accuracy([large, small]).value == 0.5


@given(st.lists(proportions, min_size=2, max_size=6))
def test_the_mean_accuracy_lies_within_its_interval(cases: list[tuple[int, int]]) -> None:
    mean = mean_accuracy([Measurement("t", "acc", k / n, *wilson_interval(k, n), n) for k, n in cases])
    assert mean.low <= mean.value <= mean.high
    assert mean.low < mean.high


# ---- the items a measurement was computed from


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_zeros_and_ones_take_one_bit_each(correct: list[bool]) -> None:
    items = encode_items("task", "acc", [float(c) for c in correct])
    assert (items.task, items.metric, items.n, items.encoding) == ("task", "acc", len(correct), "bits")
    assert len(base64.b64decode(items.data)) == math.ceil(len(correct) / 8)
    assert decode_items(items).tolist() == correct


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_other_values_come_back_as_float32(values: list[float]) -> None:
    items = encode_items("text", "cross_entropy", values)
    assert decode_items(items).tolist() == values


def test_the_stored_form_of_items_is_fixed() -> None:
    """What stores on disk hold: the first item is the highest bit; float32 is little-endian."""
    assert encode_items("t", "acc", [1.0, 0.0, 1.0]).data == base64.b64encode(bytes([0b1010_0000])).decode()
    assert encode_items("t", "cross_entropy", [1.5]).data == base64.b64encode(struct.pack("<f", 1.5)).decode()


def test_an_accuracy_is_the_mean_of_its_items() -> None:
    correct = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert decode_items(encode_items("t", "acc", correct)).mean() == measure_accuracy("t", "acc", correct).value


@pytest.mark.parametrize(
    ("change", "why"),
    [({"encoding": "float16"}, "'float16' is not bits or a float's"), ({"n": 99}, "1 bytes do not hold 99 items")],
)
def test_damaged_items_are_an_error(change: dict[str, Any], why: str) -> None:
    items = encode_items("t", "acc", [1.0, 0.0])
    with pytest.raises(ValueError, match=why):
        decode_items(dataclasses.replace(items, **change))
