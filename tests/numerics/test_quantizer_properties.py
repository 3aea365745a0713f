"""Properties of quantization that hold for any array and any quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.spec import QuantSpec

finite = st.floats(-1000, 1000, width=32)
specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    data_type=st.sampled_from(["int", "float", "dynamic", "nf"]),
    block_size=st.one_of(st.none(), st.integers(1, 80)),
    scale_format=st.just("fp32"),
)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=12), elements=finite)


@settings(max_examples=150)
@given(arrays, specs)
def test_error_is_at_most_half_the_local_gap(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    q = quantize(x, spec)
    codebook = q.codebook.double().numpy()
    scales = np.repeat(q.scales["scales"].double().numpy(), spec.block_size or x.size)[: x.size]
    v = np.divide(x.ravel(), scales, out=np.zeros(x.size), where=scales > 0)
    best = np.abs(v[:, None] - codebook).min(axis=1)
    chosen = np.abs(v - codebook[q.unpack_codes().numpy()])
    # nearest in exact arithmetic, up to float32 rounding of the division and of the threshold (2^-23 each)
    assert (chosen <= best + 2.0**-22).all()


@settings(max_examples=100)
@given(arrays, specs, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_result(x: np.ndarray[Any, Any], spec: QuantSpec, power: int) -> None:
    x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x)  # stay clear of subnormals
    factor = np.float32(2.0**power)
    np.testing.assert_array_equal(fake_quantize(x * factor, spec), fake_quantize(x, spec) * factor)


@settings(max_examples=100)
@given(arrays, specs)
def test_symmetric_types_treat_negation_alike(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    if spec.data_type in ("int", "float"):
        np.testing.assert_array_equal(fake_quantize(-x, spec), -fake_quantize(x, spec))


@settings(max_examples=100)
@given(hnp.arrays(np.float32, st.integers(1, 60), elements=finite), specs)
def test_order_is_kept_within_a_block(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    whole = QuantSpec(bits=spec.bits, data_type=spec.data_type, block_size=None, scale_format="fp32")
    order = np.argsort(x, kind="stable")
    assert (np.diff(fake_quantize(x, whole)[order]) >= 0).all()


@settings(max_examples=60)
@given(hnp.arrays(np.float32, st.integers(1, 200), elements=finite), specs)
def test_short_last_block_uses_only_its_own_elements(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    size = spec.block_size or x.size
    pieces = [fake_quantize(x[i : i + size], spec) for i in range(0, x.size, size)]
    np.testing.assert_array_equal(fake_quantize(x, spec), np.concatenate(pieces))
