"""Quantize, dequantize, fake_quantize: the kernel against the NumPy reference, properties, outside oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kbit import reference
from kbit.datatypes import DATA_TYPES, decision_thresholds, float_codebook, make_codebook
from kbit.kernels import cpu
from kbit.quantizer import dequantize, fake_quantize, quantize
from kbit.spec import QuantSpec

BITS = range(2, 9)
BLOCK_SIZES = [1, 3, 16, 64, 4096, None]
FORMATS = ["fp16", "bf16", "fp32"]


def awkward_values(n: int) -> np.ndarray[Any, Any]:
    """Normal values of very different scales, with zero blocks, exact ties, both zeros, and tiny numbers."""
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-7, 4, n)).astype(np.float32)
    x[: n // 8] = 0.0
    x[n // 8 : n // 4] = rng.integers(-14, 15, n // 4 - n // 8) / np.float32(14)
    x[n // 4 : n // 4 + 4] = [1e-41, -1e-41, -0.0, 3e-8]
    return x


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_kernel_equals_reference_bit_for_bit(data_type: str, bits: int, block_size: int | None) -> None:
    x = awkward_values(9001)  # not a multiple of any block size
    size = block_size or x.size
    codebook = make_codebook(data_type, bits, tensor=x)
    thresholds = decision_thresholds(codebook)
    codes, scales = cpu.quantize(x, thresholds, size, "fp16")
    expected_codes, expected_scales = reference.quantize(x, thresholds, size, "fp16")
    np.testing.assert_array_equal(scales.view(np.uint32), expected_scales.view(np.uint32))
    np.testing.assert_array_equal(codes, expected_codes)
    expected = reference.dequantize(codes, scales, codebook, size)
    np.testing.assert_array_equal(
        cpu.dequantize(codes, scales, codebook, size).view(np.uint32), expected.view(np.uint32)
    )
    fused = cpu.fake_quantize(x, codebook, thresholds, size, "fp16")
    np.testing.assert_array_equal(fused.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("bias", ["ieee", "bnb", "paper"])
@pytest.mark.parametrize(("bits", "exponent_bits"), [(b, e) for b in BITS for e in range(1, b)])
def test_kernel_equals_reference_for_every_float(bits: int, exponent_bits: int, bias: str) -> None:
    x = awkward_values(4100)
    thresholds = decision_thresholds(float_codebook(bits, exponent_bits, bias))
    np.testing.assert_array_equal(
        cpu.quantize(x, thresholds, 64, "fp32")[0], reference.quantize(x, thresholds, 64, "fp32")[0]
    )


def test_kernel_finds_values_closer_than_one_cell_of_its_table() -> None:
    codebook = np.unique(np.array([-1, -0.5, *np.linspace(0.5, 0.501, 64), 1], np.float32))
    thresholds = decision_thresholds(codebook)
    x = np.random.default_rng(0).uniform(0.4995, 0.5015, 4096).astype(np.float32)
    x[0] = 1.0
    np.testing.assert_array_equal(
        cpu.quantize(x, thresholds, x.size, "fp32")[0], reference.quantize(x, thresholds, x.size, "fp32")[0]
    )


@pytest.mark.parametrize("scale_format", FORMATS)
def test_scales_round_as_numpy_and_torch_do(scale_format: str) -> None:
    words = np.random.default_rng(0).integers(1, 0x477FE000, 200_000).astype(np.uint32)  # up to fp16's largest
    x = np.concatenate(
        [words.view(np.float32), np.array([2.0**-24, 2.0**-25, 2.0**-14, 65504, 65519.99, 0], np.float32)]
    )
    scales = cpu.quantize(x, np.zeros(1, np.float32), 1, scale_format)[1]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[scale_format]
    rounded = torch.from_numpy(x).to(dtype).float().numpy()
    smallest = {"fp16": 2.0**-24, "bf16": 2.0**-133, "fp32": 2.0**-149}[scale_format]
    np.testing.assert_array_equal(scales, np.where((rounded == 0) & (x > 0), np.float32(smallest), rounded))
    some = np.random.default_rng(1).choice(x, 500)
    expected = [reference.round_scale(float(value), scale_format) for value in some]
    np.testing.assert_array_equal(cpu.quantize(some, np.zeros(1, np.float32), 1, scale_format)[1], expected)


def test_users_own_table() -> None:
    codebook = np.array([-1, 0.3, 0.5, 1], np.float32)
    x = np.array([10, -3, 5, 4], np.float32)
    codes, scales = cpu.quantize(x, decision_thresholds(codebook), 4, "fp16")
    assert codes.tolist() == [3, 1, 2, 2]
    assert cpu.dequantize(codes, scales, codebook, 4).tolist() == [10, 3, 5, 5]


@pytest.mark.parametrize(
    ("block_size", "spec", "rmse"),
    [
        (64, {"bits": 4, "data_type": "int"}, 0.1078),
        (64, {"bits": 4, "data_type": "nf"}, 0.0920),
        (64, {"bits": 4, "data_type": "float", "exponent_bits": 2, "float_bias": "bnb"}, 0.1164),
        (64, {"bits": 3, "data_type": "int"}, 0.2516),
        (64, {"bits": 8, "data_type": "int"}, 0.0059),
        (4096, {"bits": 4, "data_type": "int"}, 0.1577),
        (4096, {"bits": 4, "data_type": "nf"}, 0.1101),
        (4096, {"bits": 4, "data_type": "float", "exponent_bits": 2, "float_bias": "bnb"}, 0.1448),
        (4096, {"bits": 3, "data_type": "int"}, 0.3678),
        (4096, {"bits": 8, "data_type": "int"}, 0.0087),
        (32, {"bits": 4, "data_type": "nf"}, 0.0873),
    ],
)
def test_error_on_normal_values_is_the_recorded_one(block_size: int, spec: dict[str, Any], rmse: float) -> None:
    x = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)
    error = x - fake_quantize(x, QuantSpec(block_size=block_size, **spec))
    # recorded for bitsandbytes and plain NumPy (bitsandbytes 565, 2086), to four decimals and 1%
    assert np.sqrt((error**2).mean()) == pytest.approx(rmse, rel=0.01, abs=5e-5)


def mean_squared_errors(data_type: str, bits: int) -> list[float]:
    """Return the error on N(0, 1) for growing block sizes."""
    x = np.random.default_rng(3).standard_normal(2**17).astype(np.float32)
    results = [
        fake_quantize(x, QuantSpec(bits=bits, data_type=data_type, block_size=size)) for size in (16, 64, 256, 1024)
    ]
    return [float(((x - result) ** 2).mean()) for result in results]


@pytest.mark.parametrize(
    ("data_type", "bits"),
    [
        *((t, k) for t in ("int", "float", "dynamic") for k in BITS),
        *((t, k) for t in ("nf", "quantile") for k in (2, 3, 4, 5)),
    ],
)
def test_error_grows_with_block_size(data_type: str, bits: int) -> None:
    errors = mean_squared_errors(data_type, bits)
    assert errors == sorted(errors)


@pytest.mark.parametrize("data_type", ["nf", "quantile"])
def test_error_of_wide_quantile_types_falls_with_block_size(data_type: str) -> None:
    # In a small block most values are a large share of the maximum, where these tables are sparse: their error there
    # exceeds what the finer scales gain. Not so for int; it is why small blocks do not pay beyond 6 bits.
    errors = mean_squared_errors(data_type, 8)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_zero_block_gives_exact_zeros_and_leaves_its_neighbour_alone(data_type: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, data_type=data_type, block_size=64)
    assert (fake_quantize(np.zeros((2, 64), np.float32), spec) == 0).all()
    normal = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    mixed = np.concatenate([np.zeros(64, np.float32), normal])
    codebook = spec.make_codebook(mixed)
    thresholds = decision_thresholds(codebook)
    alone = cpu.fake_quantize(normal, codebook, thresholds, 64, "fp16")
    together = cpu.fake_quantize(mixed, codebook, thresholds, 64, "fp16")
    assert (together[:64] == 0).all()
    np.testing.assert_array_equal(together[64:], alone)


def test_strided_views_give_what_their_contiguous_copies_give() -> None:
    a = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for view in (a[::2], a.t(), a[:, 3:77]):
        before = view.clone()
        assert torch.equal(fake_quantize(view, QuantSpec()), fake_quantize(view.contiguous(), QuantSpec()))
        assert torch.equal(view, before)
    reversed_array = a.numpy()[::-1]
    np.testing.assert_array_equal(
        fake_quantize(reversed_array, QuantSpec()), fake_quantize(reversed_array.copy(), QuantSpec())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(100, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = fake_quantize(x, QuantSpec(bits=5, data_type="nf"))
    assert result.dtype == dtype
    assert torch.equal(result, fake_quantize(x.float(), QuantSpec(bits=5, data_type="nf")).to(dtype))
    assert torch.equal(dequantize(quantize(x, QuantSpec(bits=5, data_type="nf"))), result)


def test_tiny_fp16_weights_do_not_vanish() -> None:
    x = torch.full((64,), 1e-6, dtype=torch.float16)
    result = fake_quantize(x, QuantSpec(bits=4, data_type="int"))
    assert (result.float() / 1e-6 - 1).abs().max() < 0.1


def test_scale_below_its_format_bounds_the_error_by_the_formats_smallest_number() -> None:
    x = torch.tensor([1e-9, -5e-10, 0.0])
    result = fake_quantize(x, QuantSpec(bits=4, data_type="int"))
    assert (result - x).abs().max() <= 2.0**-24
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("data_type", ["int", "float", "nf"])
@pytest.mark.parametrize("bits", BITS)
def test_quantizing_a_quantized_tensor_changes_nothing(data_type: str, bits: int) -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=bits, data_type=data_type)
    once = fake_quantize(x, spec)
    assert torch.equal(fake_quantize(once, spec), once)


finite = st.floats(-1000, 1000, width=32)
specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    data_type=st.sampled_from(["int", "float", "dynamic", "nf"]),
    block_size=st.one_of(st.none(), st.integers(1, 80)),
    scale_format=st.just("fp32"),
)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=12), elements=finite)


@settings(max_examples=150, deadline=None)
@given(arrays, specs)
def test_error_is_at_most_half_the_local_gap(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    q = quantize(x, spec)
    codebook = q.codebook.astype(np.float64)
    scales = np.repeat(q.scales.astype(np.float64), spec.block_size or x.size)[: x.size]
    v = np.divide(x.ravel(), scales, out=np.zeros(x.size), where=scales > 0)
    best = np.abs(v[:, None] - codebook).min(axis=1)
    chosen = np.abs(v - codebook[q.codes])
    # nearest in exact arithmetic, up to float32 rounding of the division and of the threshold (2^-23 each)
    assert (chosen <= best + 2.0**-22).all()


@settings(max_examples=100, deadline=None)
@given(arrays, specs, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_result(x: np.ndarray[Any, Any], spec: QuantSpec, power: int) -> None:
    x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x)  # stay clear of subnormals
    factor = np.float32(2.0**power)
    np.testing.assert_array_equal(fake_quantize(x * factor, spec), fake_quantize(x, spec) * factor)


@settings(max_examples=100, deadline=None)
@given(arrays, specs)
def test_symmetric_types_treat_negation_alike(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    if spec.data_type in ("int", "float"):
        np.testing.assert_array_equal(fake_quantize(-x, spec), -fake_quantize(x, spec))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 60), elements=finite), specs)
def test_order_is_kept_within_a_block(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    whole = QuantSpec(bits=spec.bits, data_type=spec.data_type, block_size=None, scale_format="fp32")
    order = np.argsort(x, kind="stable")
    assert (np.diff(fake_quantize(x, whole)[order]) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 200), elements=finite), specs)
def test_short_last_block_uses_only_its_own_elements(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    size = spec.block_size or x.size
    pieces = [fake_quantize(x[i : i + size], spec) for i in range(0, x.size, size)]
    np.testing.assert_array_equal(fake_quantize(x, spec), np.concatenate(pieces))


def test_bitsandbytes_nf4_and_fp4_agree() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    pairs = [
        ("nf4", QuantSpec(bits=4, data_type="nf", scale_format="fp32")),
        ("fp4", QuantSpec(bits=4, data_type="float", exponent_bits=2, float_bias="paper", scale_format="fp32")),
    ]
    for quant_type, spec in pairs:
        packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=quant_type)
        theirs = functional.dequantize_4bit(packed, state).flatten()
        assert torch.equal(fake_quantize(x, spec), theirs)


def test_bitsandbytes_dynamic_8_bit_agrees() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    quantized, state = functional.quantize_blockwise(x, blocksize=256)
    theirs = functional.dequantize_blockwise(quantized, state)
    codebook = make_codebook("dynamic", 8)
    np.testing.assert_allclose(np.sort(state.code.numpy()), codebook, rtol=1e-6)
    ours = fake_quantize(x, QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32"))
    # bitsandbytes' CPU search is not exactly nearest (up to 5% of the gap off), so ours may be nearer, never farther
    scale = x.view(-1, 256).abs().amax(dim=1).repeat_interleave(256)
    assert ((ours - x).abs() <= (theirs - x).abs() + scale * 2.0**-22).all()
    same_code = (ours - theirs).abs() <= scale * 2.0**-22
    assert same_code.float().mean() > 0.995


@pytest.mark.parametrize(
    ("x", "spec", "message"),
    [
        (torch.ones(4), QuantSpec(bits=16), "bits=16 is the unquantized baseline"),
        (torch.empty(4, device="meta"), QuantSpec(), "a meta tensor holds no values"),
        (torch.ones(4, dtype=torch.int32), QuantSpec(), "int32 is not a floating-point type"),
        (torch.empty(0, 3), QuantSpec(), r"shape \(0, 3\) has no elements"),
        (torch.tensor([1.0, float("nan"), float("inf")]), QuantSpec(), "2 of 3 values are NaN or Inf"),
        (torch.tensor([1e5]), QuantSpec(), "beyond scale_format=fp16"),
    ],
)
def test_bad_tensors_are_refused(x: torch.Tensor, spec: QuantSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_quantize(x, spec)
    with pytest.raises(ValueError, match=message):
        quantize(x, spec)


def test_other_scale_formats_hold_what_fp16_cannot() -> None:
    for scale_format in ("bf16", "fp32"):
        result = fake_quantize(torch.tensor([1e5]), QuantSpec(scale_format=scale_format))
        assert result.item() == pytest.approx(1e5, rel=2.0**-8)


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_leave_torchs_thread_count_alone(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fake_quantize(torch.ones(1000), QuantSpec())
        dequantize(quantize(torch.ones(1000), QuantSpec()))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
