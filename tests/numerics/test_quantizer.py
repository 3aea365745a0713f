"""Quantize, dequantize, fake_quantize: the kernel against the NumPy reference, properties, outside oracles."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from kbit.numerics import reference
from kbit.numerics.backend import choose_backend
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.grid import make_grid
from kbit.numerics.quantizer import dequantize, fake_quantize, quantize
from kbit.numerics.scale_formats import SCALE_FORMATS
from kbit.numerics.spec import NORMALIZATIONS, ROUNDINGS, QuantSpec

BITS = range(2, 9)
BLOCK_SIZES = [1, 3, 16, 64, 4096, None]
TYPES = ["int", "float", "dynamic", "quantile", "nf", "af", "learned"]


def awkward_values(n: int) -> np.ndarray[Any, Any]:
    """Normal values of very different scales, with zero blocks, exact ties, both zeros, and tiny numbers."""
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-7, 4, n)).astype(np.float32)
    x[: n // 8] = 0.0
    x[n // 8 : n // 4] = rng.integers(-14, 15, n // 4 - n // 8) / np.float32(14)
    x[n // 4 : n // 4 + 4] = [1e-41, -1e-41, -0.0, 3e-8]
    return x


def reference_values(x: np.ndarray[Any, Any], spec: QuantSpec) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return codes and dequantized values by the plain NumPy definition, on the grid that the product chose."""
    values = torch.from_numpy(x.ravel())
    grid = make_grid(values, torch.Size(x.shape), spec, choose_backend(values.device))
    tables, shape = (grid.scales, grid.offsets, grid.codebook), (grid.row, grid.block_size)
    codes = reference.quantize(x.ravel(), *tables, grid.thresholds, *shape, grid.seed)
    return codes, reference.dequantize(codes, *tables, *shape).reshape(x.shape)


def assert_same_bits(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


def assert_equals_reference(x: np.ndarray[Any, Any], spec: QuantSpec) -> None:
    codes, values = reference_values(x, spec)
    q = quantize(x, spec)
    np.testing.assert_array_equal(q.unpack_codes(), codes)
    assert_same_bits(dequantize(q).numpy(), values)
    assert_same_bits(fake_quantize(x, spec), values)
    assert q.nbytes == -(-spec.count_bits(x.shape) // 8)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("data_type", TYPES)
def test_kernel_equals_reference_bit_for_bit(data_type: str, bits: int, block_size: int | None) -> None:
    if data_type == "af" and block_size != 64:
        pytest.skip("a table of af takes seconds, and kernels see only its values")
    x = awkward_values(4201)  # more than a chunk of 4096, and no multiple of any block size
    assert_equals_reference(x, QuantSpec(bits=bits, data_type=data_type, block_size=block_size))


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_combination_of_fields_equals_the_reference(scale_format: str, normalization: str, rounding: str) -> None:
    if scale_format == "e8m0" and normalization != "absmax":
        pytest.skip("e8m0 has neither sign nor fraction")
    x = awkward_values(573).reshape(3, 191)  # few, as the best groups of a learned table take the values' square
    # Two data types take turns beside each combination of the others, at 3 and 8 bits: codes of up to 4 bits are
    # decoded in pairs, others one by one.
    types = itertools.cycle(itertools.product(("int", "quantile", "float", "learned", "dynamic", "nf"), (3, 8)))
    for _ in range(sum(map(len, (scale_format, normalization, rounding)))):
        next(types)  # another pair in every test
    for centering, layout, block_size, _ in itertools.product((False, True), ("flat", "row"), (64, None), range(2)):
        data_type, bits = next(types)
        spec = QuantSpec(
            bits=bits, data_type=data_type, block_size=block_size, layout=layout, normalization=normalization,
            centering=centering, scale_format=scale_format, rounding=rounding, seed=7,
        )  # fmt: skip
        assert_equals_reference(x, spec)


@pytest.mark.parametrize("bias", ["ieee", "bnb", "paper"])
@pytest.mark.parametrize(("bits", "exponent_bits"), [(b, e) for b in BITS for e in range(1, b)])
def test_kernel_equals_reference_for_every_float(bits: int, exponent_bits: int, bias: str) -> None:
    spec = QuantSpec(bits, "float", exponent_bits, float_bias=bias, scale_format="fp32")
    assert_equals_reference(awkward_values(4100), spec)


def test_kernel_finds_values_closer_than_one_cell_of_its_table() -> None:
    table = tuple(np.unique([-1, -0.5, *np.linspace(0.5, 0.501, 64), 1]).tolist())
    x = np.random.default_rng(0).uniform(0.4995, 0.5015, 4096).astype(np.float32)
    x[0] = 1.0
    assert_equals_reference(x, QuantSpec(bits=7, data_type="table", table=table, block_size=None, scale_format="fp32"))


def test_users_own_table() -> None:
    x = np.array([10, -3, 5, 4], np.float32)
    q = quantize(x, QuantSpec(bits=2, data_type="table", table=(-1.0, 0.3, 0.5, 1.0), block_size=4))
    assert q.unpack_codes().tolist() == [3, 1, 2, 2]
    assert dequantize(q).tolist() == [10, 3, 5, 5]


def test_truncation_goes_towards_zero() -> None:
    x = np.array([1, 0.99, 0.5, 0.49, -0.49, -0.5, -0.51, -1], np.float32)
    spec = QuantSpec(bits=3, data_type="table", table=(-1.0, -0.5, 0.0, 0.5, 1.0), block_size=None, rounding="truncate")
    assert fake_quantize(x, spec).tolist() == [1, 0.5, 0.5, 0, 0, -0.5, -0.5, -1]


@pytest.mark.parametrize("fields", [{"normalization": "minmax"}, {"centering": True}])
def test_truncation_goes_towards_an_offset(fields: dict[str, Any]) -> None:
    x = torch.linspace(1, 3, 64)  # about 2
    truncated = fake_quantize(x, QuantSpec(bits=3, data_type="int", rounding="truncate", scale_format="fp32", **fields))
    assert bool(((truncated - 2).abs() <= (x - 2).abs() + 1e-6).all())
    assert bool((truncated[:32] > x[:32] + 0.01).any())


def test_stochastic_rounding_is_unbiased_with_the_variance_of_a_coin() -> None:
    n, v = 2**18, np.float32(0.3)
    x = np.full(n, v, np.float32)
    x[0] = 1.0  # the scale
    spec = QuantSpec(
        bits=3, data_type="table", table=(-1.0, 0.0, 0.5, 1.0), block_size=None, rounding="stochastic", seed=3
    )
    result = fake_quantize(x, spec)[1:]
    p = 0.3 / 0.5  # of going up to 0.5
    assert set(np.unique(result).tolist()) == {0.0, 0.5}
    # 5 standard errors of a mean of n coins, and of their sample variance
    assert abs(result.mean() - 0.3) < 5 * 0.5 * np.sqrt(p * (1 - p) / n)
    assert abs((result > 0).var() - p * (1 - p)) < 5 * np.sqrt(p * (1 - p) / n)


def test_stochastic_rounding_depends_on_the_seed_and_the_index_alone() -> None:
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    spec = QuantSpec(bits=4, rounding="stochastic", seed=1, block_size=100)
    first = fake_quantize(x, spec)
    np.testing.assert_array_equal(first, fake_quantize(x, spec))
    np.testing.assert_array_equal(first[:10_000], fake_quantize(x[:10_000], spec))
    assert (first != fake_quantize(x, dataclasses.replace(spec, seed=2))).any()


def test_minmax_keeps_the_extremes_of_an_uneven_block() -> None:
    x = np.linspace(3, 5, 64, dtype=np.float32)
    error = np.abs(
        fake_quantize(x, QuantSpec(bits=4, data_type="int", normalization="minmax", scale_format="fp32")) - x
    )
    assert error.max() <= 2 / 14 / 2 * (1 + 1e-5)  # half a step of 14 over the range of 2
    absmax = np.abs(fake_quantize(x, QuantSpec(bits=4, data_type="int", scale_format="fp32")) - x)
    assert absmax.max() > 0.3  # half a step of 7 over 5


def test_centering_removes_a_common_offset() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    spec = QuantSpec(bits=4, data_type="int", centering=True, scale_format="fp32")
    shifted = fake_quantize(x + 100, spec) - 100
    centred = fake_quantize(x, spec)
    # the float16 mean near 100 is good to 2^-5, which moves values to other codes by at most a step
    assert np.sqrt(((shifted - x) ** 2).mean()) < 1.5 * np.sqrt(((centred - x) ** 2).mean())
    without = fake_quantize(x + 100, dataclasses.replace(spec, centering=False)) - 100
    assert np.sqrt(((without - x) ** 2).mean()) > 1  # the step near 100 is 14


def test_signed_absmax_reaches_the_negative_end_of_an_asymmetric_type() -> None:
    x = np.array([-1.0, 0.5, 0.25, 0.0], np.float32)
    assert fake_quantize(x, QuantSpec(bits=4, data_type="dynamic")).min() == pytest.approx(-0.8875)
    assert fake_quantize(x, QuantSpec(bits=4, data_type="dynamic", normalization="signed_absmax")).min() == -1


def test_row_layout_keeps_rows_apart() -> None:
    x = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    spec = QuantSpec(bits=4, layout="row", block_size=64)
    rows = np.stack([fake_quantize(row, spec) for row in x])
    np.testing.assert_array_equal(fake_quantize(x, spec), rows)
    assert (fake_quantize(x, dataclasses.replace(spec, layout="flat")) != rows).any()


def test_double_quantization_costs_little_error() -> None:
    x = np.random.default_rng(0).standard_normal(2**16).astype(np.float32)
    plain = fake_quantize(x, QuantSpec(bits=4, data_type="nf", scale_format="fp32"))
    double = fake_quantize(x, QuantSpec(bits=4, data_type="nf", scale_format="dq8"))
    rmse = [float(np.sqrt(((x - y) ** 2).mean())) for y in (plain, double)]
    assert rmse[0] < rmse[1] < 1.01 * rmse[0]  # QLoRA: no loss of quality


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
@pytest.mark.parametrize("data_type", TYPES)
def test_zero_block_gives_exact_zeros_and_leaves_its_neighbour_alone(data_type: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, data_type=data_type, block_size=64)
    assert (fake_quantize(np.zeros((2, 64), np.float32), spec) == 0).all()
    normal = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    mixed = np.concatenate([np.zeros(64, np.float32), normal])
    together = fake_quantize(mixed, spec)
    assert (together[:64] == 0).all()
    if data_type not in ADAPTIVE:
        np.testing.assert_array_equal(together[64:], fake_quantize(normal, spec))


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


@pytest.mark.parametrize(
    ("x", "spec", "message"),
    [
        (torch.ones(4), QuantSpec(bits=16), "bits=16 is the unquantized baseline"),
        (torch.empty(4, device="meta"), QuantSpec(), "a meta tensor holds no values"),
        (torch.ones(4, dtype=torch.int32), QuantSpec(), "int32 is not a floating-point type"),
        (torch.empty(0, 3), QuantSpec(), r"shape \(0, 3\) has no elements"),
        (torch.tensor([1.0, float("nan"), float("inf")]), QuantSpec(), "2 of 3 values are NaN or Inf"),
        (torch.tensor([1e5]), QuantSpec(), "beyond fp16"),
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


@pytest.mark.parametrize("block_size", [3, 64, 4096, 4097, None])
def test_two_threads_give_what_the_reference_gives(block_size: int | None) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rounding in ROUNDINGS:
            assert_equals_reference(awkward_values(30_001), QuantSpec(block_size=block_size, rounding=rounding))
    finally:
        torch.set_num_threads(before)
