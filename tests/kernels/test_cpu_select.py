"""Order statistics against a sort, bit for bit: every dtype, sizes, ties, signs, adversarial orders, several tasks."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.kernels import cpu_select
from kbit.kernels.cpu_select import order_statistics

Array = np.ndarray[Any, Any]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 3, 4, 5, 7, 64, 100, 4095, 4096, 4097, 20_000]


@pytest.fixture(autouse=True)
def threads_kept() -> Any:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def assert_equals_sort(x: Array, dtype: torch.dtype, ranks: Array) -> None:
    """The bits are compared: a sort of floats takes zeros of both signs for equal, so that integers are sorted."""
    tensor = torch.from_numpy(x).to(dtype)
    words = (tensor.view(torch.uint16) if dtype == torch.bfloat16 else tensor).numpy()
    bits = tensor.float().numpy().view(np.int32)
    ordered = np.sort(bits ^ (bits >> 31 & 0x7FFFFFFF))[ranks]
    found = order_statistics(words, ranks)
    np.testing.assert_array_equal(found.view(np.int32), ordered ^ (ordered >> 31 & 0x7FFFFFFF))


def draw_values(kind: str, n: int, rng: np.random.Generator) -> Array:
    """Return n values of one kind. Each is hard on some part of the search."""
    normal = rng.standard_normal(n)
    kinds = {
        "normal": normal,
        "equal": np.full(n, normal[0]),
        "ties": np.round(normal, 1),
        "signed zeros": np.where(normal > 0, 0.0, -0.0),
        "one cell": 1 + rng.random(n) * 2**-8,  # beginnings are equal
        "one negative cell": -1 - rng.random(n) * 2**-8,
        "sorted": np.sort(normal),
        "reversed": np.sort(normal)[::-1],
        "scales": normal * 10.0 ** rng.integers(-7, 4, n),
        "subnormal": normal * 1e-40,
        "negative": -np.abs(normal),
        "outlier": np.where(np.arange(n) == n // 2, 6e4, normal * 1e-3),
    }
    return kinds[kind].astype(np.float32)


KINDS = ["normal", "equal", "ties", "signed zeros", "one cell", "one negative cell", "sorted", "reversed", "scales",
         "subnormal", "negative", "outlier"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150)
@given(data=st.data())
def test_order_statistics_equal_a_sort(dtype: torch.dtype, data: st.DataObject) -> None:
    n, kind = data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from(KINDS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    threads = data.draw(st.integers(1, min(3, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    ranks = rng.integers(0, n, data.draw(st.integers(1, 600)))
    assert_equals_sort(draw_values(kind, n, rng), dtype, ranks)


@settings(max_examples=150)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_float32_is_found_at_every_rank(bits: list[int]) -> None:
    """All bit patterns but NaN: infinities, subnormals and zeros of both signs among them."""
    x = np.array(bits, np.uint32).view(np.float32)
    x = np.where(np.isnan(x), np.float32(0), x)
    assert_equals_sort(np.concatenate([x, x[:3]]), torch.float32, np.arange(x.size))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_value_is_found(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float().numpy()
    values = np.random.default_rng(0).permutation(values[~np.isnan(values)])
    assert_equals_sort(values, dtype, np.arange(values.size))


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [3, 32, 512])
def test_tasks_and_shares_of_wanted_values(tasks: int, kind: str, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few values are gathered by fours, more one by one, and many not at all. Counts are of one thread or several."""
    monkeypatch.setattr(cpu_select, "_SMALL", 1000)
    monkeypatch.setattr(numba, "get_num_threads", lambda: tasks)
    for n in (8191, 30_001):
        x = draw_values(kind, n, np.random.default_rng(n))
        assert_equals_sort(x, torch.float32, np.linspace(0, n - 1, wanted).astype(np.int64))


@pytest.mark.parametrize(("most", "few"), [(0.0, 0.0), (1.0, 0.0), (1.0, 2.0)])
def test_each_way_to_gather_gives_the_same(most: float, few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted: the words themselves, those gathered one by one, those gathered by fours."""
    monkeypatch.setattr(cpu_select, "_MOST", most)
    monkeypatch.setattr(cpu_select, "_FEW", few)
    for kind in KINDS:
        for n in (1, 2, 3, 5, 4099):
            x = draw_values(kind, n, np.random.default_rng(n))
            for tasks in (1, 2, 3):
                with monkeypatch.context() as patch:
                    patch.setattr(numba, "get_num_threads", lambda tasks=tasks: tasks)
                    assert_equals_sort(x, torch.float32, np.arange(n)[:: max(1, n // 100)])
