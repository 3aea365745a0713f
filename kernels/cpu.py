"""Quantization kernels for the CPU: numba, parallel over chunks, the same functions as kbit.reference.

Arrays are one-dimensional, contiguous float32 (values, scales, tables) or uint8 (codes); index arithmetic is 64-bit.

How a code is found. The code of v is the number of thresholds <= v. The upper 16 bits of a float32 (sign, exponent, 7
fraction bits) cut [-1, 1] into cells that get finer towards zero, as codebooks do. A table holds, for each cell, the
number of thresholds at or below its lowest value; what is left is to compare v with the next threshold, or with the
next few where a cell holds more than one (tables with values closer than 2^-8 of each other). So the cost does not grow
with k, and is the same for every data type.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numba import njit, prange

Values = Float32[np.ndarray, " n"]
Codes = UInt8[np.ndarray, " n"]
Scales = Float32[np.ndarray, " blocks"]
Thresholds = Float32[np.ndarray, " thresholds"]
Codebook = Float32[np.ndarray, " values"]

# Elements that one task of a parallel loop handles: enough to hide the scheduling, few enough to stay in the L1 cache.
CHUNK = 4096

_FORMAT_CODES = {"fp32": 0, "fp16": 1, "bf16": 2}

# Cells of one sign: the upper half-words of the float32 numbers 0.0 .. 1.0, of which 1.0 = 0x3F800000 is the last.
_CELLS = 0x3F80 + 1


class SearchTable(NamedTuple):
    """Thresholds prepared for the search: see the module's docstring."""

    first: UInt8[np.ndarray, " cells"]  # thresholds at or below the cell's lowest value; cells of v >= 0, then of v < 0
    thresholds: Thresholds  # padded with +inf to 256, so that the comparison after the last one fails
    compares: int  # the most thresholds that lie inside one cell


def quantize(x: Values, thresholds: Thresholds, block_size: int, scale_format: str) -> tuple[Codes, Scales]:
    """Return the code of each value and the scale of each block. See kbit.reference.quantize."""
    scales = _block_scales(x, block_size, _FORMAT_CODES[scale_format])
    codes = np.empty(x.size, np.uint8)
    _encode(x, scales, *_search_table(thresholds.tobytes()), block_size, codes)
    return codes, scales


def dequantize(codes: Codes, scales: Scales, codebook: Codebook, block_size: int) -> Values:
    """Return codebook[code] * scale. See kbit.reference.dequantize."""
    values = np.empty(codes.size, np.float32)
    _decode(codes, scales, codebook, block_size, values)
    return values


def fake_quantize(x: Values, codebook: Codebook, thresholds: Thresholds, block_size: int, scale_format: str) -> Values:
    """Return dequantize(quantize(x)) without an array of codes. See kbit.reference.fake_quantize."""
    scales = _block_scales(x, block_size, _FORMAT_CODES[scale_format])
    values = np.empty(x.size, np.float32)
    _encode_decode(x, scales, codebook, *_search_table(thresholds.tobytes()), block_size, values)
    return values


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
    padded = np.full(256, np.inf, np.float32)
    padded[: thresholds.size] = thresholds
    return SearchTable(first.astype(np.uint8), padded, int(compares))


def _jit(parallel: bool = False) -> Any:
    return njit(parallel=parallel, cache=True, error_model="numpy")  # numpy: x / 0 is no exception, so loops vectorise


@_jit()
def _find_code(v, first, thresholds, compares):
    """Number of thresholds <= v. All thresholds lie within [-1, 1], so v may be clipped to it."""
    v = min(max(v, np.float32(-1)), np.float32(1))
    word = np.uint32(np.float32(v).view(np.int32)) >> np.uint32(16)
    code = np.int64(first[word if word < 0x8000 else word - np.uint32(0x8000 - _CELLS)])
    for _ in range(compares):
        code += v >= thresholds[code]
    return code


@_jit()
def _round_scale(scale, scale_format):
    """Round to fp16 or bf16, ties to even, never from a positive number to 0. See kbit.reference.round_scale."""
    if scale == np.float32(0) or scale_format == 0:
        return scale
    if scale_format == 2:
        return max(_round_mantissa(scale, 16), np.float32(2.0**-133))
    if scale < np.float32(2.0**-14):  # fp16 subnormals: multiples of 2^-24, the spacing of float32 in [0.5, 1)
        return max((scale + np.float32(0.5)) - np.float32(0.5), np.float32(2.0**-24))
    rounded = _round_mantissa(scale, 13)
    return rounded if rounded < np.float32(65536.0) else np.float32(np.inf)  # 65504 is the largest fp16


@_jit()
def _round_mantissa(value, dropped):
    """Round a positive float32 to 23 - dropped fraction bits, ties to even, on its bit pattern."""
    word = np.int64(np.float32(value).view(np.int32))
    word += (1 << (dropped - 1)) - 1 + ((word >> dropped) & 1)
    return np.int32((word >> dropped) << dropped).view(np.float32)


@_jit(parallel=True)
def _block_scales(x, block_size, scale_format):
    """Rounded absmax of each block. Long blocks are cut into chunks, so that one block still uses every core."""
    n = np.int64(x.size)
    blocks = (n + block_size - 1) // block_size
    scales = np.empty(blocks, np.float32)
    if block_size <= CHUNK:
        per_task = CHUNK // block_size
        for task in prange((blocks + per_task - 1) // per_task):
            for b in range(task * per_task, min(blocks, (task + 1) * per_task)):
                scales[b] = _round_scale(_absmax(x[b * block_size : min(n, (b + 1) * block_size)]), scale_format)
        return scales
    chunks = (block_size + CHUNK - 1) // CHUNK
    partial = np.zeros(blocks * chunks, np.float32)
    for c in prange(blocks * chunks):
        end = min(n, (c // chunks + 1) * block_size)
        start = (c // chunks) * block_size + (c % chunks) * CHUNK
        partial[c] = _absmax(x[min(start, end) : min(end, start + CHUNK)])
    for b in range(blocks):
        scales[b] = _round_scale(_absmax(partial[b * chunks : (b + 1) * chunks]), scale_format)
    return scales


@_jit()
def _absmax(values):
    """Maximum magnitude, on bit patterns: without the sign bit, floats order as integers do, and integers vectorise."""
    largest = np.int32(0)
    for word in values.view(np.int32):
        largest = max(largest, word & np.int32(0x7FFFFFFF))
    return np.int32(largest).view(np.float32)


@_jit(parallel=True)
def _encode(x, scales, first, thresholds, compares, block_size, codes):
    n = np.int64(x.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        i, stop = c * CHUNK, min(n, (c + 1) * CHUNK)
        while i < stop:  # one run for each block that the chunk meets
            end = min(stop, (i // block_size + 1) * block_size)
            scale = scales[i // block_size]
            for j in range(i, end):
                v = x[j] / scale if scale > 0 else np.float32(0)
                codes[j] = _find_code(v, first, thresholds, compares)
            i = end


@_jit(parallel=True)
def _decode(codes, scales, codebook, block_size, values):
    n = np.int64(codes.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        i, stop = c * CHUNK, min(n, (c + 1) * CHUNK)
        while i < stop:
            end = min(stop, (i // block_size + 1) * block_size)
            scale = scales[i // block_size]
            for j in range(i, end):
                values[j] = codebook[codes[j]] * scale
            i = end


@_jit(parallel=True)
def _encode_decode(x, scales, codebook, first, thresholds, compares, block_size, values):
    n = np.int64(x.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        i, stop = c * CHUNK, min(n, (c + 1) * CHUNK)
        while i < stop:
            end = min(stop, (i // block_size + 1) * block_size)
            scale = scales[i // block_size]
            for j in range(i, end):
                v = x[j] / scale if scale > 0 else np.float32(0)
                values[j] = codebook[_find_code(v, first, thresholds, compares)] * scale
            i = end
