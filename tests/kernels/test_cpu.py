"""What the CPU kernels promise beyond the quantizer's tests: packing, chunks, huge tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from kbit.kernels import cpu, cpu_chunks
from kbit.numerics import reference
from kbit.numerics.codebooks import decision_thresholds
from kbit.numerics.data_types import make_codebook

Array = np.ndarray[Any, Any]


@njit
def load_all(words: Any, kind: Any, out: Any) -> None:
    cpu_chunks.load(words, kind, 0, words.size, out)


@njit
def store_all(values: Any, words: Any, kind: Any) -> None:
    cpu_chunks.store(values, values.size, words, kind, 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_equals_reference_around_group_and_chunk_borders(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for n in (1, 2, 7, 8, 9, 63, 64, 65, cpu_chunks.CHUNK - 1, cpu_chunks.CHUNK, cpu_chunks.CHUNK + 1, 10_000):
        codes = rng.integers(0, 2**bits, n).astype(np.uint8)
        packed = cpu.pack(codes, bits)
        np.testing.assert_array_equal(packed, reference.pack(codes, bits))
        np.testing.assert_array_equal(cpu.unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 3, 5, 8, 4095, 4099])
def test_packed_codes_go_through_the_kernels_without_an_array_of_codes(bits: int, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float32)
    codebook = np.linspace(-1, 1, 2**bits).astype(np.float32)
    thresholds = ((codebook[:-1] + codebook[1:]) / 2).astype(np.float32)
    scales = np.full(-(-n // 64), np.abs(x).max(), np.float32)
    arguments = (scales, np.zeros_like(scales), codebook)
    codes = cpu.quantize(x, *arguments, thresholds, n, 64)
    packed = cpu.quantize(x, *arguments, thresholds, n, 64, bits=bits)
    np.testing.assert_array_equal(packed, reference.pack(codes, bits))
    unpacked_result = cpu.dequantize(codes, *arguments, n, 64, np.empty_like(x))
    packed_result = cpu.dequantize(packed, *arguments, n, 64, np.empty_like(x), bits)
    np.testing.assert_array_equal(packed_result, unpacked_result)


@pytest.mark.parametrize("bits", range(2, 9))
def test_dequantize_on_vectors_equals_reference(bits: int) -> None:
    """Whole chunks and their ends, blocks across chunks, short blocks at rows' ends, the last codes of an array."""
    rng = np.random.default_rng(bits)
    codebook = np.sort(rng.uniform(-1, 1, 2**bits)).astype(np.float32)
    for n, row, block in ((8256, 8256, 64), (5120, 1024, 96), (16, 16, 16), (12_288, 12_288, 5008), (4100, 4100, 64)):
        codes = rng.integers(0, 2**bits, n).astype(np.uint8)
        scales, offsets = (rng.uniform(-2, 2, n // row * -(-row // block)).astype(np.float32) for _ in range(2))
        arguments = (scales, offsets, codebook, row, block)
        result = cpu.dequantize(reference.pack(codes, bits), *arguments, np.empty(n, np.float32), bits)
        expected = reference.dequantize(codes, *arguments)
        np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))


FEW_VALUES = {
    "int3": make_codebook("int", 3),
    "int4": make_codebook("int", 4),
    "nf3": make_codebook("nf", 3),
    "nf4": make_codebook("nf", 4),
    "e2m1": make_codebook("float", 4, exponent_bits=2),
    "e3m0": make_codebook("float", 4, exponent_bits=3),
    "dynamic4": make_codebook("dynamic", 4),
    "quantile4": make_codebook("quantile", 4, tensor=np.random.default_rng(0).standard_normal(10_000)),
}


def count_thresholds(x: Array, scales: Array, offsets: Array, thresholds: Array, blocks: Array) -> Array:
    """Return each value's code by its definition, without the reference's loop over blocks."""
    scale = scales[blocks]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        v = np.where(scale == 0, np.float32(0), (x - offsets[blocks]) / scale)
    codes: Array = (v[:, None] >= thresholds).sum(axis=1).astype(np.uint8)
    return codes


@pytest.mark.parametrize("name", FEW_VALUES)
def test_every_bfloat16_gets_the_code_of_its_definition(name: str) -> None:
    """All finite ones, as bfloat16 and as float32, with zero scales, offsets and blocks on vectors and beside them."""
    codebook = FEW_VALUES[name]
    thresholds, bits = decision_thresholds(codebook), 3 if len(codebook) <= 8 else 4
    words = np.arange(2**16, dtype=np.uint16)
    values = (words.astype(np.uint32) << 16).view(np.float32)
    words, values = words[np.isfinite(values)], values[np.isfinite(values)]
    rng = np.random.default_rng(0)
    for row, block in ((values.size, 16), (values.size, 64), (values.size, 4096), (values.size, values.size),
                       (1088, 48), (1020, 64), (64, 64)):  # fmt: skip
        n = values.size // row * row
        in_row = np.arange(n) % row
        blocks = np.arange(n) // row * -(-row // block) + in_row // block
        scales = np.zeros(blocks[-1] + 1, np.float32)
        np.maximum.at(scales, blocks, np.abs(values[:n]))
        offsets = (scales * rng.choice([0, 0, 0.25, -1], scales.size)).astype(np.float32)
        scales[rng.random(scales.size) < 0.1] = 0
        for table in (scales, np.ones_like(scales)):
            codes = count_thresholds(values[:n], table, offsets, thresholds, blocks)
            arguments = (table, offsets, codebook, thresholds, row, block)
            for x in (words[:n], values[:n]):
                np.testing.assert_array_equal(cpu.quantize(x, *arguments, None, bits), reference.pack(codes, bits))
            restored = cpu.fake_quantize(values[:n], *arguments, None, np.empty(n, np.float32))
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(restored, codebook[codes] * table[blocks] + offsets[blocks])


@pytest.mark.parametrize("name", FEW_VALUES)
def test_a_value_on_a_threshold_belongs_to_the_code_above(name: str) -> None:
    codebook = FEW_VALUES[name]
    thresholds = decision_thresholds(codebook)
    below = np.nextafter(thresholds, np.float32(-np.inf))
    x = np.resize(np.stack([below, thresholds, np.nextafter(thresholds, np.float32(np.inf))]).T, 48 * 16)
    codes = np.resize(np.stack([np.arange(thresholds.size), *[np.arange(thresholds.size) + 1] * 2]).T, 48 * 16)
    arguments = (np.ones(48, np.float32), np.zeros(48, np.float32), codebook, thresholds, 48 * 16, 16)
    np.testing.assert_array_equal(cpu.quantize(x, *arguments), codes)
    np.testing.assert_array_equal(cpu.quantize(x, *arguments, None, 4), reference.pack(codes.astype(np.uint8), 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "row", "block"), [(4096, 4096, 64), (3 * 100, 100, 48), (9001, 9001, 9001), (5, 5, 1)])
def test_extremes_equal_reference(dtype: torch.dtype, n: int, row: int, block: int) -> None:
    rng = np.random.default_rng(n)
    for x in (rng.standard_normal(n), -np.abs(rng.standard_normal(n)), rng.choice([0.0, -0.0], n)):
        words, values = as_kernels_see(x.astype(np.float32), dtype)
        for found, expected in zip(
            cpu.block_extremes(words, row, block), reference.block_extremes(values, row, block), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan, -np.nan])
def test_extremes_are_not_finite_where_a_block_holds_such_a_value(dtype: torch.dtype, wrong: float) -> None:
    for place in (0, 63, 70, 127):
        x = np.linspace(-1, 1, 192, dtype=np.float32)
        x[place] = wrong
        low, high = cpu.block_extremes(as_kernels_see(x, dtype)[0], 192, 64)
        assert (np.isfinite(low) & np.isfinite(high)).tolist() == [b != place // 64 for b in range(3)]


def as_kernels_see(x: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """Return x in a 16- or 32-bit type as the kernels take it, and as float32."""
    tensor = torch.from_numpy(x).to(dtype)
    words = tensor.view(torch.uint16) if dtype == torch.bfloat16 else tensor
    return words.numpy(), tensor.float().numpy()


def test_every_float16_and_bfloat16_is_loaded_and_stored_exactly() -> None:
    """All 2^16 bit patterns through a quantizer that changes nothing: load, normalise, denormalise, store."""
    words = np.arange(2**16, dtype=np.uint16)
    for kind, dtype in ((cpu_chunks.FLOAT16, torch.float16), (cpu_chunks.BFLOAT16, torch.bfloat16)):
        expected = torch.from_numpy(words.copy()).view(dtype).float()
        loaded = np.empty(2**16, np.float32)
        load_all(words, kind, loaded)
        finite = expected.isfinite().numpy()
        np.testing.assert_array_equal(loaded[finite].view(np.uint32), expected.numpy()[finite].view(np.uint32))
        assert not np.isfinite(loaded[~finite]).any()
        stored = np.zeros_like(words)
        store_all(loaded, stored, kind)
        np.testing.assert_array_equal(stored[finite], words[finite])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storing_rounds_as_torch_does(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_000) * 10.0 ** rng.integers(-9, 5, 200_000)
    ties = (np.arange(-4096, 4096) + 0.5) * 2.0**-24  # between float16's subnormals
    x = np.concatenate([values, ties, [65504.0, 65519.9, 65520.0, -70000.0, 3.4e38]]).astype(np.float32)
    stored = np.zeros(x.size, np.uint16)
    kind = cpu_chunks.FLOAT16 if dtype == torch.float16 else cpu_chunks.BFLOAT16
    store_all(x, stored, kind)
    np.testing.assert_array_equal(stored, torch.from_numpy(x).to(dtype).view(torch.uint16).numpy())


def test_offsets_beyond_2_to_the_31_elements_need_no_such_tensor() -> None:
    """A block index and its ends are found for elements that 32-bit arithmetic would wrap."""
    n, block_size = 2**33, 64
    for start in (2**31 - 64, 2**31, 2**32 + 12_345 * 64, 2**33 - 64):
        assert cpu_chunks.first_block(start, n, block_size) == (start // 64, n, start + 64)
        assert cpu_chunks.first_block(start, 2**20, block_size)[0] == start // 64
    b, row_end, block_end = cpu_chunks.first_block(2**32 - 64, 2**32, block_size)
    assert cpu_chunks.next_block(b, row_end, block_end, 2**32, block_size) == (2**26, 2**33, 2**32 + 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_so_small_that_values_overflow_gives_the_ends_of_the_table(bits: int) -> None:
    x, scales, offsets = np.array([1e10, -1e10, 1e10, 0], np.float32), np.array([1e-40], np.float32), np.zeros(1)
    codebook = make_codebook("nf", bits)
    arguments = (scales, offsets.astype(np.float32), codebook, decision_thresholds(codebook), 4, 4)
    with np.errstate(over="ignore"):
        expected = reference.quantize(x, *arguments)
    assert expected.tolist() == [2**bits - 1, 0, 2**bits - 1, 2 ** (bits - 1) - 1]
    np.testing.assert_array_equal(cpu.quantize(x, *arguments), expected)
    np.testing.assert_array_equal(cpu.unpack(cpu.quantize(x, *arguments, bits=bits), bits, 4), expected)
    restored = cpu.fake_quantize(x, *arguments, None, np.empty_like(x))
    np.testing.assert_array_equal(restored, codebook[expected] * scales)
