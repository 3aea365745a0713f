"""Quantization kernels for the CPU: numba, parallel over chunks, the same functions as kbit.reference.

Arrays are one-dimensional and contiguous. Values (x, out) are float32, float16, or the bits of bfloat16 as uint16; they
are converted chunk by chunk, so no float32 copy of the tensor is made. Index arithmetic is 64-bit.

How a code is found. The code of v is the number of thresholds <= v. The upper 16 bits of a float32 (sign, exponent, 7
fraction bits) cut [-2, 2] into cells that get finer towards zero, as codebooks do. A table holds, for each cell, the
number of thresholds at or below its lowest value; what is left is to compare v with the next threshold, or with the
next few where a cell holds more than one (tables with values closer than 2^-8 of each other). So the cost does not grow
with k, and is the same for every data type.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from numba import njit, prange, types
from numba.extending import overload

Values = Float[np.ndarray, " n"]
Codes = UInt8[np.ndarray, " n"]
Packed = UInt8[np.ndarray, " bytes"]
Scales = Float32[np.ndarray, " blocks"]
Thresholds = Float32[np.ndarray, " thresholds"]
Codebook = Float32[np.ndarray, " values"]

# Elements that one task of a parallel loop handles: enough to hide the scheduling, few enough to stay in the L1 cache.
CHUNK = 4096

# Cells of one sign: the upper half-words of the float32 numbers 0.0 .. 2.0, of which 2.0 = 0x40000000 is the last.
_CELLS = 0x4000 + 1

_FLOAT32, _FLOAT16, _BFLOAT16 = 0, 1, 2


class SearchTable(NamedTuple):
    """Thresholds prepared for the search: see the module's docstring."""

    first: UInt8[np.ndarray, " cells"]  # thresholds at or below the cell's lowest value; cells of v >= 0, then of v < 0
    thresholds: Thresholds  # padded with +inf to 256, so that the comparison after the last one fails
    compares: int  # the most thresholds that lie inside one cell


def block_extremes(x: Values, row: int, block_size: int) -> tuple[Scales, Scales]:
    """Return the least and the largest value of each block; NaN or Inf where a block holds one."""
    words, kind = _as_words(x)
    find = _short_block_extremes if block_size <= CHUNK else _long_block_extremes
    low, high = find(words, kind, row, block_size)
    return low, high


def quantize(
    x: Values,
    scales: Scales,
    offsets: Scales,
    codebook: Codebook,
    thresholds: Thresholds,
    row: int,
    block_size: int,
    seed: int | None = None,
) -> Codes:
    """Return the code of each value. See kbit.reference.quantize."""
    words, kind = _as_words(x)
    codes = np.empty(x.size, np.uint8)
    table = _search_table(thresholds.tobytes())
    _encode(words, kind, scales, offsets, _pad(codebook), *table, codebook.size, row, block_size, *_key(seed), codes)
    return codes


def dequantize(
    codes: Codes, scales: Scales, offsets: Scales, codebook: Codebook, row: int, block_size: int, out: Values
) -> Values:
    """Fill out with codebook[code] * scale + offset. See kbit.reference.dequantize."""
    words, kind = _as_words(out)
    _decode(codes, scales, offsets, _pad(codebook), row, block_size, words, kind)
    return out


def fake_quantize(
    x: Values,
    scales: Scales,
    offsets: Scales,
    codebook: Codebook,
    thresholds: Thresholds,
    row: int,
    block_size: int,
    seed: int | None,
    out: Values,
) -> Values:
    """Fill out with dequantize(quantize(x)), without an array of codes. See kbit.reference.fake_quantize."""
    words, kind = _as_words(x)
    table = _search_table(thresholds.tobytes())
    out_words, _ = _as_words(out)
    _encode_decode(
        words, kind, scales, offsets, _pad(codebook), *table, codebook.size, row, block_size, *_key(seed), out_words
    )
    return out


def pack(codes: Codes, bits: int) -> Packed:
    """Write the codes one after the other, bits each. See kbit.reference.pack."""
    packed = np.empty((codes.size * bits + 7) // 8, np.uint8)
    _pack(codes, bits, packed)
    return packed


def unpack(packed: Packed, bits: int, n: int) -> Codes:
    """Return the n codes that pack wrote. See kbit.reference.unpack."""
    codes = np.empty(n, np.uint8)
    _unpack(packed, bits, codes)
    return codes


def _as_words(x: Values) -> tuple[Any, int]:
    """Return the array as float32, or as uint16 bits, with the kind of number they are."""
    if x.dtype == np.float32:
        return x, _FLOAT32
    if x.dtype == np.float16:
        return x.view(np.uint16), _FLOAT16
    return x, _BFLOAT16


def _pad(codebook: Codebook) -> Codebook:
    """Pad to 256 values with the last one, so that any uint8 is a valid index."""
    padded = np.full(256, codebook[-1], np.float32)
    padded[: codebook.size] = codebook
    return padded


def _key(seed: int | None) -> tuple[bool, np.uint64]:
    """Return whether the rounding is stochastic, and the mixed seed."""
    if seed is None:
        return False, np.uint64(0)
    return True, np.uint64(_mix(np.uint64(seed)))


@functools.lru_cache(maxsize=64)
def _search_table(thresholds_bytes: bytes) -> SearchTable:
    """Count, for each cell, the thresholds at or below its lowest value and inside it (bytes, to be hashable)."""
    thresholds = np.frombuffer(thresholds_bytes, np.float32)
    magnitude = np.arange(_CELLS, dtype=np.uint32) << 16
    inner, outer = magnitude.view(np.float32), (magnitude | 0xFFFF).view(np.float32)
    lowest = np.concatenate([inner, -outer])  # a negative cell begins at its largest magnitude
    highest = np.concatenate([outer, -inner])
    first = np.searchsorted(thresholds, lowest, side="right")
    compares = (np.searchsorted(thresholds, highest, side="right") - first).max()
    padded = np.full(257, np.inf, np.float32)
    padded[: thresholds.size] = thresholds
    return SearchTable(first.astype(np.uint8), padded, int(compares))


def _jit(parallel: bool = False) -> Any:
    return njit(parallel=parallel, cache=True, error_model="numpy")  # numpy: x / 0 is no exception, so loops vectorise


def _load(words: Any, kind: int, start: int, end: int, buffer: Any) -> None:
    """Convert values start..end to float32 in the buffer; compiled per type by _load_any."""
    raise NotImplementedError


@overload(_load, inline="never")
def _load_any(words, kind, start, end, buffer):
    if isinstance(words.dtype, types.Float):

        def load_float32(words, kind, start, end, buffer):
            for i in range(end - start):
                buffer[i] = words[start + i]

        return load_float32

    def load_16_bits(words, kind, start, end, buffer):
        if kind == _BFLOAT16:
            for i in range(end - start):
                buffer[i] = np.int32(np.int32(words[start + i]) << 16).view(np.float32)
            return
        for i in range(end - start):
            # float16: shift exponent and fraction into float32's place; 2^112 corrects the bias, for subnormals too
            word = np.int32(words[start + i])
            magnitude = np.int32((word & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
            magnitude = magnitude if magnitude < np.float32(65536) else np.float32(np.inf)  # exponent 31: Inf and NaN
            buffer[i] = -magnitude if word & 0x8000 else magnitude

    return load_16_bits


def _store(values: Any, count: int, words: Any, kind: int, start: int) -> None:
    """Round float32 values to the type of words; compiled per type by _store_any."""
    raise NotImplementedError


@overload(_store, inline="never")
def _store_any(values, count, words, kind, start):
    if isinstance(words.dtype, types.Float):

        def store_float32(values, count, words, kind, start):
            for i in range(count):
                words[start + i] = values[i]

        return store_float32

    def store_16_bits(values, count, words, kind, start):
        if kind == _BFLOAT16:
            for i in range(count):
                word = np.int64(np.float32(values[i]).view(np.int32))
                words[start + i] = (word + 0x7FFF + ((word >> 16) & 1)) >> 16  # to nearest, ties to even
            return
        for i in range(count):
            words[start + i] = _to_float16(values[i])

    return store_16_bits


@_jit()
def _to_float16(value):
    """Bits of the nearest float16, ties to even; beyond its range infinite."""
    word = np.int64(np.float32(value).view(np.int32))
    sign, magnitude = (word >> 16) & 0x8000, word & 0x7FFFFFFF
    normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13  # 112: difference of the biases
    # below 2^-14 a float16 is a multiple of 2^-24, which is the spacing of float32 from 0.5 to 1
    small = np.float32(abs(np.float32(value)) + np.float32(0.5)) - np.float32(0.5)
    subnormal = np.int64(small * np.float32(2.0**24))
    return sign | (subnormal if magnitude < (113 << 23) else min(normal, 0x7C00))


@_jit(parallel=True)
def _short_block_extremes(words, kind, row, block_size):
    """Extremes of blocks no longer than a chunk: each task takes whole blocks."""
    n = np.int64(words.size)
    per_row = (row + block_size - 1) // block_size
    blocks = (n // row) * per_row
    low, high = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    per_task = max(1, CHUNK // block_size)
    for task in prange((blocks + per_task - 1) // per_task):
        buffer = np.empty(CHUNK, np.float32)
        for b in range(task * per_task, min(blocks, (task + 1) * per_task)):
            start = (b // per_row) * row + (b % per_row) * block_size
            end = min(start + block_size, (b // per_row + 1) * row)
            _load(words, kind, start, end, buffer)
            low[b], high[b] = _extremes(buffer[: end - start])
    return low, high


@_jit(parallel=True)
def _long_block_extremes(words, kind, row, block_size):
    """Extremes of blocks longer than a chunk: each task takes a chunk, so that one block still uses every core."""
    n = np.int64(words.size)
    per_row = (row + block_size - 1) // block_size
    blocks = (n // row) * per_row
    chunks = (min(block_size, row) + CHUNK - 1) // CHUNK
    low, high = np.full(blocks * chunks, np.inf, np.float32), np.full(blocks * chunks, -np.inf, np.float32)
    for c in prange(blocks * chunks):
        buffer = np.empty(CHUNK, np.float32)
        b = c // chunks
        start = (b // per_row) * row + (b % per_row) * block_size
        end = min(start + block_size, (b // per_row + 1) * row)
        start += (c % chunks) * CHUNK
        if start < end:
            end = min(end, start + CHUNK)
            _load(words, kind, start, end, buffer)
            low[c], high[c] = _extremes(buffer[: end - start])
    block_low, block_high = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    for b in range(blocks):
        block_low[b], _ = _extremes(low[b * chunks : (b + 1) * chunks])
        _, block_high[b] = _extremes(high[b * chunks : (b + 1) * chunks])
    return block_low, block_high


@_jit()
def _extremes(values):
    """Least and largest value, on integers that order as floats do (NaN outside +-Inf), since integers vectorise."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for word in values.view(np.int32):
        ordered = np.int32(word ^ ((word >> 31) & 0x7FFFFFFF))
        low, high = min(low, ordered), max(high, ordered)
    return _from_ordered(low), _from_ordered(high)


@_jit()
def _from_ordered(ordered):
    return np.int32(ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)


@_jit(parallel=True)
def _encode(
    words, kind, scales, offsets, codebook, first, thresholds, compares, levels, row, block_size, stochastic, key, codes
):
    n = np.int64(words.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        buffer = np.empty(CHUNK, np.float32)
        _load(words, kind, start, end, buffer)
        _normalize(buffer, start, end, scales, offsets, row, block_size)
        _find_codes(buffer, end - start, first, thresholds, compares, codes[start:end])
        if stochastic:
            _round_up_at_random(buffer, codebook, levels, key, start, codes[start:end])


@_jit(parallel=True)
def _decode(codes, scales, offsets, codebook, row, block_size, words, kind):
    n = np.int64(codes.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        buffer = np.empty(CHUNK, np.float32)
        _denormalize(codes[start:end], codebook, start, end, scales, offsets, row, block_size, buffer)
        _store(buffer, end - start, words, kind, start)


@_jit(parallel=True)
def _encode_decode(
    words, kind, scales, offsets, codebook, first, thresholds, compares, levels, row, block_size, stochastic, key, out
):
    n = np.int64(words.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        buffer, codes = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8)
        _load(words, kind, start, end, buffer)
        _normalize(buffer, start, end, scales, offsets, row, block_size)
        _find_codes(buffer, end - start, first, thresholds, compares, codes)
        if stochastic:
            _round_up_at_random(buffer, codebook, levels, key, start, codes[: end - start])
        _denormalize(codes, codebook, start, end, scales, offsets, row, block_size, buffer)
        _store(buffer, end - start, out, kind, start)


@_jit()
def _block_of(i, row, block_size):
    """Return the block of element i and the element after the block's last."""
    r = i // row
    in_row = (i - r * row) // block_size
    return r * ((row + block_size - 1) // block_size) + in_row, min((r + 1) * row, r * row + (in_row + 1) * block_size)


@_jit()
def _normalize(buffer, start, end, scales, offsets, row, block_size):
    """Replace the buffer's values by v = (x - offset) / scale, 0 where the scale is 0."""
    i = start
    while i < end:
        b, stop = _block_of(i, row, block_size)
        scale, offset, stop = scales[b], offsets[b], min(stop, end)
        for j in range(i - start, stop - start):
            buffer[j] = (buffer[j] - offset) / scale
        if scale == np.float32(0):
            buffer[i - start : stop - start] = np.float32(0)
        i = stop


@_jit()
def _denormalize(codes, codebook, start, end, scales, offsets, row, block_size, buffer):
    """Fill the buffer with codebook[code] * scale + offset."""
    i = start
    while i < end:
        b, stop = _block_of(i, row, block_size)
        scale, offset, stop = scales[b], offsets[b], min(stop, end)
        for j in range(i - start, stop - start):
            buffer[j] = codebook[codes[j]] * scale + offset
        i = stop


@_jit()
def _find_codes(buffer, count, first, thresholds, compares, codes):
    """Codes of normalised values. All thresholds lie within [-2, 2], so values may be clipped to it."""
    for j in range(count):
        v = min(max(buffer[j], np.float32(-2)), np.float32(2))
        word = np.uint32(np.float32(v).view(np.int32)) >> np.uint32(16)
        code = np.int64(first[word if word < 0x8000 else word - np.uint32(0x8000 - _CELLS)])
        for _ in range(compares):
            code += v >= thresholds[code]
        codes[j] = code


@_jit()
def _round_up_at_random(buffer, codebook, levels, key, start, codes):
    """Stochastic rounding: from the value below, up by one with the probability that makes it unbiased."""
    for j in range(codes.size):
        code = np.int64(codes[j])
        if code + 1 < levels:
            share = (buffer[j] - codebook[code]) / (codebook[code + 1] - codebook[code])
            bits = _mix(np.uint64(start + j) * np.uint64(0x9E3779B97F4A7C15) + key) >> np.uint64(40)
            codes[j] = code + (share > np.float32(bits) * np.float32(2.0**-24))


@_jit()
def _mix(z):
    """The finalizer of splitmix64. See kbit.reference.uniform."""
    z = np.uint64(z)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_jit(parallel=True)
def _pack(codes, bits, packed):
    """Eight codes fill exactly `bits` bytes, so tasks of CHUNK codes write disjoint bytes."""
    n = np.int64(codes.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        position, held, word = start * bits // 8, 0, np.uint32(0)
        for i in range(start, end):
            word = np.uint32((word << np.uint32(bits)) | np.uint32(codes[i]))
            held += bits
            while held >= 8:
                held -= 8
                packed[position] = (word >> np.uint32(held)) & np.uint32(0xFF)
                position += 1
        if held:
            packed[position] = (word << np.uint32(8 - held)) & np.uint32(0xFF)


@_jit(parallel=True)
def _unpack(packed, bits, codes):
    n = np.int64(codes.size)
    mask = np.uint32((1 << bits) - 1)
    for c in prange((n + CHUNK - 1) // CHUNK):
        start, end = c * CHUNK, min(n, (c + 1) * CHUNK)
        position, held, word = start * bits // 8, 0, np.uint32(0)
        for i in range(start, end):
            while held < bits:
                word = np.uint32((word << np.uint32(8)) | np.uint32(packed[position]))
                position += 1
                held += 8
            held -= bits
            codes[i] = (word >> np.uint32(held)) & mask
