"""Quantiles from a histogram, on CPU tensors: the same torch operations as on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from kbit.kernels import cpu
from kbit.numerics import fitted_codebooks as fitted
from kbit.numerics import quantiles
from kbit.numerics.backend import Backend, choose_backend
from kbit.numerics.data_types import make_codebook
from kbit.numerics.grid import find_quantiles
from kbit.numerics.quantiles import RELATIVE_ERROR

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALLEST = 2.0**-139  # 10 of the 23 bits below the normal range are not told apart: 2^(10 - 149)
FLOAT64_ROUNDING = 2.0**-51  # of the interpolation, two operations here and three in NumPy


CPU = choose_backend(torch.device("cpu"))
GPU = Backend(CPU.device, cpu, is_gpu=True)  # what is done on a GPU, done here


def estimate_quantiles(values: torch.Tensor, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    return find_quantiles(values, positions, GPU)


def find_bound(values: NDArray[Any], positions: NDArray[np.float64], relative: float) -> NDArray[np.float64]:
    """Return `relative` of the larger of the two order statistics that a quantile lies between."""
    ordered, places = np.sort(values), positions * (values.size - 1)
    below, above = (ordered[f(places).astype(int)] for f in (np.floor, np.ceil))
    bound: NDArray[np.float64] = relative * np.maximum(np.abs(below), np.abs(above))
    return bound


@given(
    values=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-65504, 65504, width=32)),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_estimate_is_within_its_bound(values: NDArray[np.float32], bits: int, dtype: str) -> None:
    tensor = torch.from_numpy(values).to(DTYPES[dtype])
    exact_values = tensor.double().numpy()
    positions = np.concatenate([[0.0], fitted.quantile_positions(bits), [1.0]])
    relative = (RELATIVE_ERROR if dtype == "float32" else 0) + FLOAT64_ROUNDING
    error = np.abs(estimate_quantiles(tensor, positions) - np.quantile(exact_values, positions))
    assert (error <= find_bound(exact_values, positions, relative) + SMALLEST).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_its_own_cell(dtype: str) -> None:
    words = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    ordered = words[words.isfinite()].sort().values
    positions = np.arange(2**15 + 1) / 2**15  # exact, so that nothing is interpolated
    for part in (ordered[: positions.size], ordered[-positions.size :]):
        np.testing.assert_array_equal(estimate_quantiles(part, positions), part.double().numpy())


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values, positions = torch.randn(1000, generator=torch.Generator().manual_seed(0)), fitted.quantile_positions(4)
    whole = estimate_quantiles(values, positions)
    monkeypatch.setattr(quantiles, "_CHUNK", 64)
    np.testing.assert_array_equal(estimate_quantiles(values, positions), whole)


def test_zeros_stay_zero() -> None:
    """A tensor of zeros but for its tails has the codebook {-1, 0, 1}, which rests on quantiles that are exactly 0."""
    values = torch.zeros(1000)
    values[:3] = torch.tensor([1.0, -1.0, -0.0])
    np.testing.assert_array_equal(estimate_quantiles(values, fitted.quantile_positions(4)), np.zeros(16))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_codebook_of_the_estimate_is_near_the_exact_one(dtype: str, bits: int) -> None:
    """q / max q with an error of at most e max |Q| in each q: 2 e max |Q| / max |q|, and two roundings to float16.

    The largest value of a codebook is 1, so a rounding to float16 moves a value by 2^-12 at most.
    """
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(bits)).to(DTYPES[dtype])
    edges = estimate_quantiles(values, fitted.quantile_positions(bits))
    estimated = make_codebook("quantile", bits, tensor=np.concatenate([edges[:1], edges, edges[-1:]]))
    exact = make_codebook("quantile", bits, tensor=values.float().numpy())
    if dtype != "float32":
        np.testing.assert_array_equal(estimated, exact)
        return
    exact_edges = np.quantile(values.double().numpy(), fitted.quantile_positions(bits))
    largest = np.abs(exact_edges[:-1] + exact_edges[1:]).max() / 2
    bound = 2 * RELATIVE_ERROR * np.abs(exact_edges).max() / largest / (1 - RELATIVE_ERROR) + 2 * 2.0**-12
    assert estimated.shape == exact.shape
    assert np.abs(estimated - exact).max() <= bound


def test_on_the_cpu_they_are_numpys() -> None:
    x = torch.randn(99_999, generator=torch.Generator().manual_seed(0))
    positions = np.append(np.arange(1, 257) / 257, [0.0, 1.0])
    expected = np.quantile(x.double().numpy(), positions)
    np.testing.assert_allclose(find_quantiles(x, positions, CPU), expected, rtol=1e-12, atol=1e-12)  # a few roundings
