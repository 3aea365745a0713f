"""Quantization kernels for the CPU: numba, parallel over chunks, the same functions as kbit.numerics.reference.

Arrays are one-dimensional and contiguous. Values (x, out) are float32, float16, or the bits of bfloat16 as uint16.
They are converted chunk by chunk, so no float32 copy of the tensor is made. Index arithmetic is 64-bit.

How a code is found. The code of v is the number of thresholds <= v. The upper 16 bits of a float32 (sign, exponent, 7
fraction bits) cut the line into cells that get finer towards zero, as codebooks do. A table holds, for each cell, the
number of thresholds at or below its least value. Then v is compared with the next threshold, or with the next few where
a cell holds more than one (tables with values closer than 2^-8 of each other). So the cost does not grow with k, and is
the same for every data type.

At most 15 thresholds (k <= 4) need no table: a vector of values is compared with the middle one, then each lane with
the middle one of the half that is left to it, which a permutation finds, and so on (simd.find_codes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt64
from numba import prange
from numba.extending import overload

from kbit.kernels import simd
from kbit.kernels.cpu_chunks import (
    CHUNK,
    FLOAT16,
    FLOAT32,
    SearchTable,
    Thresholds,
    block_start,
    copy_bytes,
    denormalize,
    extremes,
    find_codes,
    first_block,
    jit,
    load,
    look_up,
    make_search_table,
    mix,
    next_block,
    normalize,
    pack_codes,
    pad_codebook,
    round_up_at_random,
    round_values,
    store,
    typed_words,
    unpack_codes,
)
from kbit.kernels.simd import LEVELS

Values = Float[np.ndarray, " n"]
Codes = UInt8[np.ndarray, " n"]
Packed = UInt8[np.ndarray, " bytes"]
Scales = Float32[np.ndarray, " blocks"]
Codebook = Float32[np.ndarray, " values"]


class Grid(NamedTuple):
    """The blocks of a tensor, and what their codes mean."""

    scales: Scales
    offsets: Scales
    codebook: Codebook  # padded to 256 with its last value, so that any uint8 is a valid index
    row: int
    block_size: int


class Rounding(NamedTuple):
    """How to round beside the search table: on vectors, or stochastically and with which numbers."""

    tree: Thresholds  # simd.arrange_in_tree, or empty where the table is searched
    stochastic: bool
    key: np.uint64  # the mixed seed
    levels: int  # values of the codebook


def block_extremes(x: Values, row: int, block_size: int) -> tuple[Scales, Scales]:
    """Return the least and the largest value of each block, NaN or Inf where a block holds one."""
    words, kind = typed_words(x)
    find = _short_block_extremes if block_size <= CHUNK else _long_block_extremes
    low, high = find(words.view(f"i{words.itemsize}"), kind, row, block_size)
    return low, high


def quantize(
    x: Values, scales: Scales, offsets: Scales, codebook: Codebook, thresholds: Thresholds, row: int, block_size: int,
    seed: int | None = None, bits: int = 8,
) -> Packed:  # fmt: skip
    """Return the code of each value, packed at `bits` each (8: one code a byte). See kbit.numerics.reference."""
    words, kind = typed_words(x)
    packed = np.empty((x.size * bits + 7) // 8, np.uint8)
    grid = Grid(scales, offsets, pad_codebook(codebook), row, block_size)
    _encode(words, kind, grid, *_prepare(thresholds, seed, codebook), bits, packed)
    return packed


def dequantize(
    codes: Packed, scales: Scales, offsets: Scales, codebook: Codebook, row: int, block_size: int, out: Values,
    bits: int = 8,
) -> Values:  # fmt: skip
    """Fill out with codebook[code] * scale + offset. See kbit.numerics.reference.dequantize."""
    words, kind = typed_words(out)
    grid = Grid(scales, offsets, pad_codebook(codebook), row, block_size)
    _decode(codes, bits, grid, _pairs(codebook, bits), _is_fast(bits, row, block_size), words, kind)
    return out


def fake_quantize(
    x: Values, scales: Scales, offsets: Scales, codebook: Codebook, thresholds: Thresholds, row: int, block_size: int,
    seed: int | None, out: Values,
) -> Values:  # fmt: skip
    """Fill out, which may be x, with dequantize(quantize(x)), without codes. See kbit.numerics.reference."""
    words, kind = typed_words(x)
    out_words, _ = typed_words(out)
    grid = Grid(scales, offsets, pad_codebook(codebook), row, block_size)
    _encode_decode(words, kind, grid, *_prepare(thresholds, seed, codebook), out_words)
    return out


def pack(codes: Codes, bits: int) -> Packed:
    """Write the codes one after the other, bits each. See kbit.numerics.reference.pack."""
    packed = np.empty((codes.size * bits + 7) // 8, np.uint8)
    _pack(codes, bits, packed)
    return packed


def unpack(packed: Packed, bits: int, n: int) -> Codes:
    """Return the n codes that pack wrote. See kbit.numerics.reference.unpack."""
    codes = np.empty(n, np.uint8)
    _unpack(packed, bits, codes)
    return codes


def _is_fast(bits: int, row: int, block_size: int) -> bool:
    """Whether _decode_vectors takes such codes: few bits, and rows and blocks of whole vectors on every CPU."""
    return bits <= simd.find_isa().permuted_bits and row % 16 == 0 and block_size % 16 == 0


def _pairs(codebook: Codebook, bits: int) -> UInt64[np.ndarray, " 256"]:
    """Return the two values of each pair of codes, code_1 * 2^bits + code_2, as one word. They serve bits <= 4."""
    pairs = np.zeros((256, 2), np.float32)
    if bits <= 4:
        values = pad_codebook(codebook)[: 2**bits]
        pairs[: 4**bits] = np.stack([np.repeat(values, 2**bits), np.tile(values, 2**bits)], axis=1)
    return pairs.view(np.uint64)[:, 0]


def _prepare(thresholds: Thresholds, seed: int | None, codebook: Codebook) -> tuple[SearchTable, Rounding]:
    """Return what rounding needs. Stochastic rounding searches the table, whatever the number of thresholds."""
    tree = simd.arrange_in_tree(thresholds) if seed is None else np.empty(0, np.float32)
    key = np.uint64(0) if seed is None else np.uint64(mix(np.uint64(seed)))
    return make_search_table(thresholds.tobytes()), Rounding(tree, seed is not None, key, codebook.size)


# A parallel loop only hands out chunks: what is written inside of it numba optimises less well (measured: 1.5 times
# slower) than a function that it calls.


@jit(parallel=True)
def _short_block_extremes(integers, kind, row, block_size):
    """Extremes of blocks no longer than a chunk: each task takes whole blocks."""
    blocks = np.int64(integers.size) // row * ((row + block_size - 1) // block_size)
    low, high = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    per_task = CHUNK // block_size
    for task in prange((blocks + per_task - 1) // per_task):
        _find_extremes(integers, kind, row, block_size, task * per_task, min(blocks, (task + 1) * per_task), low, high)
    return low, high


@jit()
def _find_extremes(integers, kind, row, block_size, b, last, low, high):
    start = block_start(b, row, block_size)
    _, row_end, block_end = first_block(start, row, block_size)
    while b < last:
        low[b], high[b] = extremes(integers, kind, start, block_end - start)
        start = block_end
        b, row_end, block_end = next_block(b, row_end, block_end, row, block_size)


@jit(parallel=True)
def _long_block_extremes(integers, kind, row, block_size):
    """Extremes of blocks longer than a chunk: each task takes a chunk, so that one block still uses every core."""
    blocks = np.int64(integers.size) // row * ((row + block_size - 1) // block_size)
    chunks = (block_size + CHUNK - 1) // CHUNK
    low, high = np.empty(blocks * chunks, np.float32), np.empty(blocks * chunks, np.float32)
    for c in prange(blocks * chunks):
        low[c], high[c] = _find_chunk_extremes(integers, kind, row, block_size, c // chunks, c % chunks)
    block_low, block_high = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    for b in range(blocks):
        block_low[b], _ = extremes(low.view(np.int32), FLOAT32, b * chunks, chunks)
        _, block_high[b] = extremes(high.view(np.int32), FLOAT32, b * chunks, chunks)
    return block_low, block_high


@jit()
def _find_chunk_extremes(integers, kind, row, block_size, b, chunk):
    start = block_start(b, row, block_size)
    _, _, end = first_block(start, row, block_size)
    start += chunk * CHUNK
    count = min(end - start, CHUNK)
    if count <= 0:  # the last block of a row may be shorter
        return np.float32(np.inf), np.float32(-np.inf)
    return extremes(integers, kind, start, count)


@jit(parallel=True)
def _encode(words, kind, grid, table, rounding, bits, packed):
    n = np.int64(words.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        _encode_chunk(words, kind, grid, table, rounding, bits, packed, c * CHUNK, min(n, (c + 1) * CHUNK))


@jit()
def _encode_chunk(words, kind, grid, table, rounding, bits, packed, start, end):
    codes = np.empty(CHUNK, np.uint8)
    codes[end - start :] = 0
    if rounding.tree.size and kind != FLOAT16 and grid.row % 16 == 0 and grid.block_size % 16 == 0:
        _find_codes_on_vectors(words, start, end, grid, rounding.tree, codes)
    else:
        buffer = np.empty(CHUNK, np.float32)
        load(words, kind, start, end - start, buffer)
        normalize(buffer, start, end, grid.scales, grid.offsets, grid.row, grid.block_size)
        _round_to_codes(buffer, start, end - start, grid.codebook, table, rounding, codes)
    pack_codes(codes, end - start, bits, packed, start * bits // 8)


@jit()
def _round_to_codes(buffer, start, count, codebook, table, rounding, codes):
    find_codes(buffer, count, table.first, table.thresholds, table.compares, codes)
    if rounding.stochastic:
        round_up_at_random(buffer, count, codebook, rounding.levels, rounding.key, start, codes)


@jit()
def _find_codes_on_vectors(words, start, end, grid, tree, codes):
    """Load, normalise and find the codes of values start .. end - 1, for at most 15 thresholds."""
    levels, step = simd.load_levels(tree), simd.count_lanes()
    b, row_end, block_end = first_block(start, grid.row, grid.block_size)
    i, place, j = start, np.uint64(start), np.uint64(0)
    while i < end:
        stop = min(block_end, end)
        scale, offset = simd.splat(grid.scales[b]), simd.splat(grid.offsets[b])
        for _ in range(np.uint64(stop - i) // step):
            values = simd.normalize(simd.load(words, place), scale, offset)
            simd.store_bytes(codes, j, simd.find_codes(levels, values))
            place, j = place + step, j + step
        i = stop
        b, row_end, block_end = next_block(b, row_end, block_end, grid.row, grid.block_size)


@jit()
def _round_on_vectors(buffer, count, tree, codebook):
    """Do what round_values does, for at most 15 thresholds."""
    levels, values = simd.load_levels(tree), simd.load_table(codebook, np.float32(0), LEVELS)
    step = simd.count_lanes()
    for i in range((np.uint64(count) + step - np.uint64(1)) // step):
        codes = simd.find_codes(levels, simd.load(buffer, i * step))
        simd.store(buffer, i * step, simd.look_up(values, codes, LEVELS))


@jit(parallel=True)
def _decode(packed, bits, grid, pairs, fast, words, kind):
    n = np.int64(words.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        _decode_chunk(packed, bits, grid, pairs, fast, words, kind, c * CHUNK, min(n, (c + 1) * CHUNK))


@jit()
def _decode_chunk(packed, bits, grid, pairs, fast, words, kind, start, end):
    buffer = np.empty(CHUNK, np.float32)
    if fast and end * bits // 8 + simd.OVERREAD <= packed.size:
        _decode_vectors(packed, start, end, bits, grid, buffer)
    else:
        _decode_codes(packed, bits, grid, pairs, start, end, buffer)
    store(buffer, end - start, words, kind, start)


@jit()
def _decode_codes(packed, bits, grid, pairs, start, end, buffer):
    codes = np.empty(CHUNK, np.uint8)
    if bits <= 4:  # two codes of k bits are one of 2k: half of the work
        count = (end - start + 1) // 2
        unpack_codes(packed, start * bits // 8, count, 2 * bits, codes)
        look_up(codes, count, pairs, buffer.view(np.uint64))
    else:
        unpack_codes(packed, start * bits // 8, end - start, bits, codes)
        look_up(codes, end - start, grid.codebook, buffer)
    denormalize(buffer, start, end, grid.scales, grid.offsets, grid.row, grid.block_size)


@jit()
def _decode_vectors(packed, start, end, bits, grid, buffer):
    """Fill the buffer with codebook[code] * scale + offset of codes start .. end - 1.

    It reads simd.OVERREAD bytes after the first code of the last vector.
    """
    if bits == 2:
        _fill(packed, start, end, grid, buffer, 2)
    elif bits == 3:
        _fill(packed, start, end, grid, buffer, 3)
    elif bits == 4:
        _fill(packed, start, end, grid, buffer, 4)
    elif bits == 5:
        _fill(packed, start, end, grid, buffer, 5)
    elif bits == 6:
        _fill(packed, start, end, grid, buffer, 6)
    elif bits == 7:
        _fill(packed, start, end, grid, buffer, 7)
    else:
        _fill(packed, start, end, grid, buffer, 8)


def _fill(*arguments: Any) -> None:
    """Fill the buffer. _fill_of compiles it per number of bits."""
    raise NotImplementedError


@overload(_fill, inline="never", prefer_literal=True)
def _fill_of(packed, start, end, grid, buffer, bits):
    k, lanes = bits.literal_value, simd.find_isa().lanes
    if k > simd.find_isa().permuted_bits:
        return lambda packed, start, end, grid, buffer, bits: None  # _is_fast says that nobody calls it
    step, vector_bytes = np.uint64(lanes), np.uint64(lanes * k // 8)

    def fill_blocks(packed, start, end, grid, buffer, bits):
        table = simd.load_table(grid.codebook, np.float32(0), k)
        b, row_end, block_end = first_block(start, grid.row, grid.block_size)
        i, place, j = start, np.uint64(start * k // 8), np.uint64(0)
        while i < end:
            stop = min(block_end, end)
            scale, offset = simd.splat(grid.scales[b]), simd.splat(grid.offsets[b])
            for _ in range(np.uint64(stop - i) // step):
                values = simd.look_up(table, simd.load_codes(packed, place, k), k)
                simd.store(buffer, j, simd.add(simd.multiply(values, scale), offset))
                place, j = place + vector_bytes, j + step
            i = stop
            b, row_end, block_end = next_block(b, row_end, block_end, grid.row, grid.block_size)

    return fill_blocks


@jit(parallel=True)
def _encode_decode(words, kind, grid, table, rounding, out):
    n = np.int64(words.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        _encode_decode_chunk(words, kind, grid, table, rounding, out, c * CHUNK, min(n, (c + 1) * CHUNK))


@jit()
def _encode_decode_chunk(words, kind, grid, table, rounding, out, start, end):
    buffer, count = np.empty(CHUNK, np.float32), end - start
    load(words, kind, start, count, buffer)
    normalize(buffer, start, end, grid.scales, grid.offsets, grid.row, grid.block_size)
    if rounding.tree.size:
        _round_on_vectors(buffer, count, rounding.tree, grid.codebook)
    elif table.compares == 1 and not rounding.stochastic:
        round_values(buffer, count, table.first, table.thresholds, grid.codebook)
    else:
        codes = np.empty(CHUNK, np.uint8)
        _round_to_codes(buffer, start, count, grid.codebook, table, rounding, codes)
        look_up(codes, count, grid.codebook, buffer)
    denormalize(buffer, start, end, grid.scales, grid.offsets, grid.row, grid.block_size)
    store(buffer, count, out, kind, start)


@jit(parallel=True)
def _pack(codes, bits, packed):
    n = np.int64(codes.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        buffer = np.zeros(CHUNK, np.uint8)
        copy_bytes(codes, start, buffer, 0, end - start)
        pack_codes(buffer, end - start, bits, packed, start * bits // 8)


@jit(parallel=True)
def _unpack(packed, bits, codes):
    n = np.int64(codes.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        buffer = np.empty(CHUNK, np.uint8)
        unpack_codes(packed, start * bits // 8, end - start, bits, buffer)
        copy_bytes(buffer, 0, codes, start, end - start)
