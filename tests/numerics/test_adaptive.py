"""Codebooks fitted to a tensor (quantile, learned): fitted to what is coded, the values less their offsets."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kbit.numerics import fitted_codebooks as fitted
from kbit.numerics import reference
from kbit.numerics.backend import choose_backend
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.grid import make_grid
from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.spec import NORMALIZATIONS, QuantSpec

SHAPE = (5, 37)
BLOCKS = [(64, "flat"), (16, "row"), (7, "row"), (None, "row"), (None, "flat")]


def relative_error(x: torch.Tensor, spec: QuantSpec) -> float:
    return float((fake_quantize(x, spec) - x).square().mean().sqrt() / x.std())


@pytest.mark.parametrize(("block_size", "layout"), BLOCKS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("centering", [False, True])
def test_quantile_table_is_of_the_values_less_their_offsets_and_without_the_sign_of_their_scale(
    block_size: int | None, layout: str, normalization: str, centering: bool
) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + torch.arange(5.0)[:, None]
    spec = QuantSpec(4, "quantile", None, block_size=block_size, layout=layout, normalization=normalization)
    spec = dataclasses.replace(spec, centering=centering)
    grid = make_grid(x.view(-1), x.shape, spec, choose_backend(x.device))
    shifted = x.view(-1).numpy().copy()
    for b, block in enumerate(reference.iterate_blocks(x.numel(), grid.row, grid.block_size)):
        shifted[block] -= grid.offsets[b]
        if normalization == "signed_absmax":
            shifted[block] /= grid.scales[b]
    np.testing.assert_array_equal(grid.codebook, fitted.quantile_values(4, shifted).astype(np.float32))


@pytest.mark.parametrize("data_type", ADAPTIVE)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("removed_by", [{"centering": True}, {"normalization": "minmax"}])
def test_an_offset_that_is_removed_costs_nothing(data_type: str, bits: int, removed_by: dict[str, object]) -> None:
    """A multiple of 1/8 is added to values on a grid of 2^-12, so that sums are exact and float16 holds the mean.

    Within 5%: of a shifted tensor, the mean and the offsets are rounded to float16, at 3 to a step of 2^-9.
    """
    x = torch.randn(2**14, generator=torch.Generator().manual_seed(bits)).mul(2**12).round().div(2**12)
    spec = dataclasses.replace(QuantSpec(bits, data_type, scale_format="fp32"), **removed_by)  # type: ignore[arg-type]
    assert relative_error(x + 3, spec) == pytest.approx(relative_error(x, spec), rel=0.05)
    assert quantize(x + 3, spec).codebook[0] < 0


@pytest.mark.parametrize("data_type", ADAPTIVE)
@pytest.mark.parametrize("sign", [1, -1])
def test_scales_with_a_sign_cost_nothing_of_one_signed_values(data_type: str, sign: int) -> None:
    x = sign * torch.randn(2**14, generator=torch.Generator().manual_seed(0)).abs()
    plain, signed = (
        relative_error(x, QuantSpec(4, data_type, normalization=normalization))
        for normalization in ("absmax", "signed_absmax")
    )
    assert signed < 1.2 * plain


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("values", [[0.5], [-0.5], [-1.0, 1.0], [0.25, 0.5, 1.0], [0.0]])
def test_a_learned_table_has_room_for_few_values_beside_zero(bits: int, values: list[float]) -> None:
    x = torch.tensor(values * 48)
    assert torch.equal(fake_quantize(x, QuantSpec(bits, "learned")), x)
    assert 0 in quantize(x, QuantSpec(bits, "learned")).codebook


@pytest.mark.parametrize("seed", range(20))
def test_a_learned_table_of_few_values_is_the_best_there_is(seed: int) -> None:
    """Beside 0 two bits leave three values: no cut of eight kinds into three groups of neighbours is better."""
    generator = np.random.default_rng(seed)
    kinds = np.sort(generator.uniform(-1, 1, 8)).astype(np.float16)
    kinds /= np.abs(kinds).max()
    x = generator.choice(kinds, 500).astype(np.float64)

    def error_of(table: list[float] | NDArray[np.float64]) -> float:
        return float((np.abs(x[:, None] - np.append(table, 0.0)).min(axis=1) ** 2).mean())

    cuts = [(-2.0, first, second, 2.0) for first, second in combinations(kinds[1:], 2)]
    tables = [[x[(x >= low) & (x < high)].mean() for low, high in pairwise(edges)] for edges in cuts]
    found = quantize(torch.tensor(x), QuantSpec(2, "learned", block_size=None, scale_format="fp32")).codebook
    assert (
        error_of(found.tolist()) <= min(map(error_of, tables)) * 1.001 + 2.0**-22
    )  # the rounding of values to float16


def test_the_mean_of_many_values_is_added_up_in_float64() -> None:
    x = torch.full((2**21 + 3,), 0.1, dtype=torch.bfloat16)
    spec = QuantSpec(4, "int", centering=True)
    assert float(quantize(x, spec).center[0]) == float(x[0])  # a float32 sum of 2^21 equal numbers is off


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 8),
    zeros=st.floats(0, 0.9999),
    kinds=st.integers(1, 400),
    normalization=st.sampled_from(["absmax", "signed_absmax"]),
)
@settings(max_examples=40)
def test_a_learned_table_serves_what_is_not_zero(
    seed: int, bits: int, zeros: float, kinds: int, normalization: str
) -> None:
    """However many values are 0: of few distinct values each has its own, and of many none is lost.

    K-means ends in a local optimum. Three times the error of evenly spaced values is far from that of a table of 0.
    """
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(kinds, generator=generator)
    x = distinct[torch.randint(kinds, (2**12,), generator=generator)]
    x[torch.rand(x.shape, generator=generator) < zeros] = 0
    x[0] = distinct.abs().max()  # the scale is the same for both tables
    spec = QuantSpec(bits, "learned", block_size=None, scale_format="fp32", normalization=normalization)
    found = fake_quantize(x, spec)
    assert (found[x == 0] == 0).all()
    if len(torch.unique(x[x != 0])) < 2**bits:
        torch.testing.assert_close(found, x, rtol=2**-10, atol=2**-24 * float(x.abs().max()))  # a value is float16
    rival = fake_quantize(x, QuantSpec(bits, "int", block_size=None, scale_format="fp32", normalization=normalization))
    largest = x.abs().max().double()
    error, other = (((x - y).double() / largest).square().mean() for y in (found, rival))
    assert error <= 3 * other + 2.0**-22  # the rounding of values to float16
