"""Medians, turns and lack of memory, on clocks and calls of the tests' own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from scipy.stats import binom

from kbit.evaluation.speed.generation import find_peak
from kbit.evaluation.speed.record import find_batch, name_batch
from kbit.evaluation.speed.timing import interleave, make_clock, measure_ceilings, measure_median


@pytest.mark.parametrize("n", [1, 5, 6, 7, 8, 9, 12, 30])
def test_the_interval_of_a_median_covers_it(n: int) -> None:
    """The interval holds the median unless r or fewer values are on one side: the narrowest one of 95% or more."""
    values = [float(value) for value in range(n)]
    found = measure_median("speed", "ms", values[::-1])
    assert (found.value, found.n) == ((n - 1) / 2, n)
    if n < 6:
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        return
    r = int(found.low)
    assert found.high == n - 1 - r
    assert 1 - 2 * binom.cdf(r, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(r + 1, n, 0.5)


def test_calls_take_turns_after_a_first_round() -> None:
    order: list[str] = []

    def call(name: str) -> int:
        order.append(name)
        return len(order)

    done, reasons = interleave({"a": lambda: call("a"), "b": lambda: call("b")}, 2)
    assert order == ["a", "b", "b", "a", "a", "b"]  # none is always first
    assert (done, reasons) == ({"a": [4, 5], "b": [3, 6]}, {})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("no"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["MemoryError", "OutOfMemoryError", "RuntimeError"],
)
def test_what_does_not_fit_has_a_reason_and_no_numbers(error: Exception) -> None:
    tries = []

    def fail_later() -> int:
        tries.append(1)
        if len(tries) == 3:
            raise error
        return 0

    assert interleave({"large": fail_later, "small": lambda: 1}, 4) == ({"small": [1] * 4}, {"large": "oom"})
    assert len(tries) == 3


def test_another_error_is_none_of_memory() -> None:
    def fail() -> int:
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        interleave({"wrong": fail}, 1)


def test_ceilings_are_work_by_time() -> None:
    readings = iter(range(100))
    found = measure_ceilings("cpu", lambda: float(next(readings)))
    assert found.gigaflops == pytest.approx(2 * 768**3 / 1e9)
    assert found.gigabytes_per_second == pytest.approx(128 * 2**20 / 1e9)


def test_short_work_is_repeated_until_it_can_be_timed() -> None:
    def tell() -> Iterator[float]:
        now = 0.0
        for calls in itertools.cycle((1, 8)):  # of a trial that takes 1 ms a call
            yield now
            now += calls / 1000
            yield now

    readings = tell()
    assert measure_ceilings("cpu", lambda: next(readings)).gigaflops == pytest.approx(2 * 768**3 / 0.001 / 1e9)


def test_the_clock_runs_on() -> None:
    clock = make_clock("cpu")
    assert clock() < clock()


def test_the_peak_is_of_what_is_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def allocate() -> None:
        first = torch.empty(300_000, dtype=torch.uint8)
        del first
        second = torch.empty(200_000, dtype=torch.uint8)
        third = torch.empty(50_000, dtype=torch.uint8)
        del second, third

    assert find_peak(allocate) == 300_000
    assert capfd.readouterr().err == ""


def test_a_batch_has_a_name_that_leads_back() -> None:
    assert [find_batch(name_batch(batch)) for batch in (1, 32)] == [1, 32]
    assert [find_batch(task) for task in ("speed", "nano_cloze")] == [None, None]
