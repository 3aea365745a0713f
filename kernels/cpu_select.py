"""Exact order statistics of a tensor without sorting it: three passes of counting, parallel, in the tensor's own dtype.

Floats, as integers that order alike, are narrowed down digit by digit: the first 16 bits of every value are counted,
then the next 8 bits of the values that share their beginning with a wanted one, then the last 8.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Float, Float32, Int64
from numba import prange

from kbit.kernels.cpu_chunks import BFLOAT16, CHUNK, FLOAT16, FLOAT32, jit, load, typed_words

_DIGITS = (2**16, 2**8, 2**8)
_PASSES = {FLOAT32: 3, FLOAT16: 2, BFLOAT16: 1}  # as float32, the last 13 bits of a float16 are 0, 16 of a bfloat16


def order_statistics(x: Float[np.ndarray, " n"], ranks: Int64[np.ndarray, " r"]) -> Float32[np.ndarray, " r"]:
    """Return the values at these ranks (0 .. n - 1) of sorted x. x as in kbit.kernels.cpu, without NaN."""
    words, kind = typed_words(x)
    tables = [np.zeros(1, np.int32)] * 2  # place of a beginning in the last counts -> its slot in the next
    beginnings, slots, within = np.zeros_like(ranks), np.zeros_like(ranks), ranks.copy()
    half = 1 / 2  # of the integers that the digits so far can express: those below are of negative values
    for depth, digits in enumerate(_DIGITS):
        if depth >= _PASSES[kind]:
            rest = np.where(beginnings < half, digits - 1, 0)  # the zeros at the end, turned over in a negative value
            beginnings, half = beginnings * digits + rest, half * digits
            continue
        wanted = int(slots.max()) + 1
        counts = _count(words, kind, *tables, depth, digits * (wanted + 1), numba.get_num_threads())
        ends = np.cumsum(counts.reshape(-1, digits), axis=1)
        found = np.array([np.searchsorted(ends[s], rank, side="right") for s, rank in zip(slots, within, strict=True)])
        within -= np.where(found > 0, ends[slots, np.maximum(found, 1) - 1], 0)
        beginnings, half = beginnings * digits + found, half * digits
        places, slots = np.unique(slots * digits + found, return_inverse=True)
        if depth < len(tables):
            tables[depth] = np.full(counts.size, places.size, np.int32)  # one slot more, for what is not wanted:
            tables[depth][places] = np.arange(places.size)  # counting it costs less than a branch that guesses wrong
    ordered = (beginnings - 2**31).astype(np.int32)
    return np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32).view(np.float32)


@jit(parallel=True)
def _count(words, kind, first, second, depth, size, tasks):
    n = np.int64(words.size)
    counts = np.zeros((tasks, size), np.int64)
    chunks = (n + CHUNK - 1) // CHUNK
    for task in prange(tasks):
        for c in range(task * chunks // tasks, (task + 1) * chunks // tasks):
            _count_chunk(words, kind, c * CHUNK, min(n, (c + 1) * CHUNK), first, second, depth, counts[task])
    return counts.sum(axis=0)


@jit()
def _count_chunk(words, kind, start, end, first, second, depth, counts):
    """Count a chunk's digits of this depth, at 2^8 * (slot of the digits before) + digit."""
    buffer, byte = np.empty(CHUNK, np.float32), np.uint32(0xFF)
    load(words, kind, start, end - start, buffer)
    ordered = buffer.view(np.uint32)
    for i in range(np.uint64(end - start)):
        word = np.float32(buffer[i]).view(np.int32)
        # the integer that orders as the float does, made unsigned by turning its sign bit over
        ordered[i] = np.uint32(word ^ np.int32(np.int32(word >> np.int32(31)) & np.int32(0x7FFFFFFF))) ^ np.uint32(
            2**31
        )
    for i in range(np.uint64(end - start)):
        place = ordered[i] >> np.uint32(16)
        if depth > 0:
            place = np.uint32(first[place]) << np.uint32(8) | ((ordered[i] >> np.uint32(8)) & byte)
        if depth > 1:
            place = np.uint32(second[place]) << np.uint32(8) | (ordered[i] & byte)
        counts[place] += 1
