"""Inputs of the CUDA kernels, and how their results differ from kbit.numerics.reference: in the simulator or on a GPU.

put and get, arguments of the checks, copy an array to and from where the kernels run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.kernels import cuda as kernels
from kbit.numerics import reference
from kbit.numerics.codebooks import ADAPTIVE, decision_thresholds
from kbit.numerics.data_types import DATA_TYPES, make_codebook
from kbit.numerics.scale_formats import SCALE_FORMATS

Array = NDArray[Any]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One input and quantizer: everything that can select another path through the kernels."""

    data_type: str = "nf"
    bits: int = 4
    block_size: int = 16
    row: int = 104
    n: int = 104
    dtype: str = "float32"
    scale_format: str = "fp16"
    rounding: str = "nearest"
    normalization: str = "absmax"
    skip: int = 0  # elements before the first: the array is then not aligned to a word
    limit: int = 4096  # MAX_FUSED_BLOCK, lowered to have the paths for longer blocks in small tensors

    def __str__(self) -> str:
        rows = f"{self.n}" if self.row == self.n else f"{self.n // self.row}x{self.row}"
        words = [self.data_type + str(self.bits), f"block{self.block_size}", rows, self.dtype, self.scale_format]
        words += [self.rounding, self.normalization] + ["unaligned"] * bool(self.skip)
        words += [f"limit{self.limit}"] * (self.limit != 4096)
        return "-".join(words)


def list_cases() -> list[Case]:
    """Every data type at 2, 3, 4 and 8 bits; block size, layout, dtype, format and rounding take turns beside it."""
    shapes = [(16, 104), (64, 104), (100, 104), (104, 104), (16, 26), (16, 52), (1, 104), (5, 13)]
    turns = [(name, bits) for bits in (2, 3, 4, 8) for name in DATA_TYPES]
    cases = [
        Case(
            name, bits, *shapes[(i + i // 8) % 8], 104, list(DTYPES)[i % 3], ("fp16", "bf16", "fp32")[i // 3 % 3],
            ("nearest", "truncate", "stochastic", "nearest_even")[i // 2 % 4],
            ("absmax", "signed_absmax", "minmax")[i // 5 % 3],
        )
        for i, (name, bits) in enumerate(turns)
    ]  # fmt: skip
    cases += [Case(dtype=dtype, rounding="stochastic", skip=1) for dtype in DTYPES]
    cases += [Case(block_size=64, dtype=dtype, scale_format=f) for dtype in DTYPES for f in ("fp16", "bf16", "fp32")]
    # a thread block for each block, its last one short
    cases += [Case("int", 3, 600, 900, 900, "float16"), Case("float", 4, 300, 400, 400, "float32", "fp32")]
    # two passes: a thread block for each long block; pieces of a whole tensor; and pieces of pieces
    cases += [Case("float", 4, 72, 200, 200, "float16", limit=64), Case("nf", 3, 300, 300, 300, "bfloat16", limit=64)]
    cases += [Case("int", 4, 272, 272, 272, "float32", limit=16), Case("nf", 4, 64, 100, 200, "float16", limit=16)]
    return cases


CASES = list_cases()

# for a GPU: the simulator would take hours
LARGE = [
    Case(name, bits, block_size, n, n, dtype, rounding=rounding)
    for name, bits in (("int", 3), ("nf", 4), ("dynamic", 8))
    for block_size, n in ((16, 40960), (64, 40007), (100, 40000), (4096, 40960), (5000, 40000), (40000, 40000))
    for dtype in DTYPES
    for rounding in ("nearest", "stochastic")
]


# ---- inputs and expectations, from kbit.numerics.reference ----


def round_scales(scales: Array, scale_format: str) -> Array:
    """Return the scales as their format stores them."""
    return SCALE_FORMATS[scale_format].decode(SCALE_FORMATS[scale_format].encode(scales))


def awkward_values(n: int) -> Array:
    """Normal values of very different scales, with a zero block, ties, both zeros, subnormals and tiny numbers."""
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-7, 4, n)).astype(np.float32)
    x[: n // 5] = 0.0
    x[n // 4 : n // 2] = rng.integers(-14, 15, n // 2 - n // 4) / np.float32(14)
    x[n // 2 : n // 2 + 4] = [1e-41, -1e-41, -0.0, -3e-8]
    return x


def as_words(tensor: torch.Tensor) -> Array:
    words: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return words


def bits_of(array: Array) -> Array:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])


def choose_grid(case: Case, x: Array) -> tuple[Array, Array, Array, Array]:
    """Return scales, offsets, codebook and thresholds."""
    low, high = reference.block_extremes(x, case.row, case.block_size)
    name, tensor = case.data_type, x if case.data_type in ADAPTIVE else None
    table = [-1, 0.3, 0.5, 1] if name == "table" else None
    block_size = 64 if name == "af" else None
    codebook = make_codebook(name, case.bits, tensor=tensor, table=table, block_size=block_size)
    match case.normalization:
        case "minmax":
            scales = (high - low) / (codebook[-1] - codebook[0])
        case "signed_absmax":
            scales = np.where(high >= -low, high, low)
        case _:
            scales = np.maximum(high, -low)
    scales = round_scales(scales, case.scale_format)
    offsets = low - codebook[0] * scales if case.normalization == "minmax" else np.zeros_like(scales)
    rounding = "floor" if case.rounding == "stochastic" else case.rounding
    return scales, offsets, codebook, decision_thresholds(codebook, rounding)


def compare(name: str, actual: Array, expected: Array) -> list[str]:
    different = np.flatnonzero(bits_of(actual) != bits_of(expected))
    return [f"{name}: {different.size} of {expected.size} differ, first {different[0]}"] if different.size else []


def check_case(case: Case, put: Any, get: Any) -> list[str]:
    """Return how the kernels differ from the reference; put and get copy an array to and from where they run."""
    with patch.object(kernels, "MAX_FUSED_BLOCK", case.limit):
        return list(find_differences(case, put, get))


def find_differences(case: Case, put: Any, get: Any) -> Iterator[str]:
    tensor = torch.from_numpy(awkward_values(case.n + case.skip)).to(DTYPES[case.dtype])
    x = tensor[case.skip :].float().numpy()
    device_x = put(as_words(tensor))[case.skip :]
    shape, seed = (case.row, case.block_size), 7 if case.rounding == "stochastic" else None
    scales, offsets, codebook, thresholds = choose_grid(case, x)
    device = put(scales), put(offsets)
    low, high = kernels.block_extremes(device_x, *shape)
    yield from compare("low", get(low) + np.float32(0), reference.block_extremes(x, *shape)[0] + np.float32(0))
    yield from compare("high", get(high) + np.float32(0), reference.block_extremes(x, *shape)[1] + np.float32(0))
    codes = reference.quantize(x, scales, offsets, codebook, thresholds, *shape, seed)
    packed = kernels.quantize(device_x, *device, codebook, thresholds, *shape, seed, case.bits)
    yield from compare("quantize", get(packed), reference.pack(codes, case.bits))
    values = reference.dequantize(codes, scales, offsets, codebook, *shape)
    expected = as_words(torch.from_numpy(values).to(DTYPES[case.dtype]))
    out = put(np.zeros_like(as_words(tensor)))[case.skip :]
    kernels.dequantize(packed, *device, codebook, *shape, out, case.bits)
    yield from compare("dequantize", get(out), expected)
    out = put(np.zeros_like(as_words(tensor)))[case.skip :]
    kernels.fake_quantize(device_x, *device, codebook, thresholds, *shape, seed, out)
    yield from compare("fake_quantize", get(out), expected)
    if case.normalization == "absmax" and seed is None:
        out = put(np.zeros_like(as_words(tensor)))[case.skip :]
        refused = put(np.zeros(1, np.uint8))
        kernels.fake_quantize_absmax(device_x, codebook, thresholds, *shape, case.scale_format, out, refused)
        yield from compare("fake_quantize_absmax", get(out), expected)
        yield from compare("refused", get(refused), np.zeros(1, np.uint8))


def check_pack(put: Any, get: Any) -> list[str]:
    differences = []
    for bits in range(2, 9):
        for n in (1, 8, 37):
            codes = np.random.default_rng(n).integers(0, 2**bits, n).astype(np.uint8)
            packed = kernels.pack(put(codes), bits)
            differences += compare(f"pack {bits} {n}", get(packed), reference.pack(codes, bits))
            differences += compare(f"unpack {bits} {n}", get(kernels.unpack(packed, bits, n)), codes)
    return differences


def check_nothing(put: Any, get: Any) -> list[str]:
    """Arrays without elements give arrays without elements, and leave the flag of refused blocks alone."""
    nothing, codebook = put(np.zeros(0, np.float32)), make_codebook("int", 4)
    thresholds, refused = decision_thresholds(codebook), put(np.zeros(1, np.uint8))
    low, high = kernels.block_extremes(nothing, 0, 64)
    codes = kernels.quantize(nothing, low, high, codebook, thresholds, 0, 64, None, 4)
    kernels.dequantize(codes, low, high, codebook, 0, 64, nothing, 4)
    kernels.fake_quantize(nothing, low, high, codebook, thresholds, 0, 64, None, nothing)
    kernels.fake_quantize_absmax(nothing, codebook, thresholds, 0, 64, "fp16", nothing, refused)
    sizes = {"low": get(low).size, "high": get(high).size, "codes": get(codes).size}
    sizes["refused"] = int(get(refused)[0])
    return [f"{name}: {size}" for name, size in sizes.items() if size]


def check_tiny_scales(put: Any, get: Any) -> list[str]:
    """A block whose maximum rounds to 0 in the scale's format keeps the format's smallest number as its scale."""
    x = np.repeat(np.array([3e-9, -1e-8, 1e-42, 4e-41], np.float32), 8)  # 2^-25 is 3e-8 and 2^-134 is 5e-41
    codebook, shape, differences = make_codebook("int", 8), (32, 8), []
    thresholds, largest = decision_thresholds(codebook), np.abs(x[::8])
    for scale_format in ("fp16", "bf16", "fp32"):
        scales = round_scales(largest, scale_format)
        expected = reference.fake_quantize(x, scales, np.zeros_like(scales), codebook, thresholds, *shape)
        out = put(np.zeros_like(x))
        refused = put(np.zeros(1, np.uint8))
        kernels.fake_quantize_absmax(put(x), codebook, thresholds, *shape, scale_format, out, refused)
        differences += compare(scale_format, get(out), expected)
    return differences


def check_special_values(put: Any, get: Any) -> list[str]:
    """A block with NaN or Inf, or a maximum beyond the scale's format, becomes NaN and its neighbours do not."""
    codebook = make_codebook("int", 4)
    x = np.ones(80, np.float32)
    x[[0, 17]] = np.nan, -np.inf
    differences = []
    for dtype in DTYPES:
        x[34] = 65520 if dtype == "float16" else 65505  # the first to be refused: it rounds to Inf, it is beyond 65504
        for block_size in (16, 80):
            tensor = torch.from_numpy(x).to(DTYPES[dtype])
            out = put(as_words(torch.zeros_like(tensor)))
            shape = (80, block_size)
            refused = put(np.zeros(1, np.uint8))
            kernels.fake_quantize_absmax(
                put(as_words(tensor)), codebook, decision_thresholds(codebook), *shape, "fp16", out, refused
            )
            words = torch.from_numpy(get(out))
            values = (words.view(torch.bfloat16) if dtype == "bfloat16" else words).float().numpy()
            expected = np.repeat([np.nan, np.nan, np.nan, 1, 1] if block_size == 16 else [np.nan], block_size)
            if not np.array_equal(values, expected, equal_nan=True):
                differences.append(f"{dtype} {block_size}: {values}")
            if not get(refused)[0]:
                differences.append(f"{dtype} {block_size}: not refused")
            low, high = kernels.block_extremes(put(as_words(tensor)), *shape)
            if np.isfinite(get(low) - get(high))[:2].any():
                differences.append(f"{dtype} {block_size}: finite extremes of a block with NaN or Inf")
    return differences
