"""Exact order statistics of a tensor without sorting it: passes of counting, parallel, in the tensor's own dtype.

The first pass counts the values by their upper 16 bits (cells), which are all bits of a 16-bit type. In the order of
the cells' values, the counts tell which cell holds each rank. Of float32, the second pass gathers the values of these
cells, mostly a few percent of all. In what was gathered, two more counts find the two bytes that are left.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt32
from numba import prange

from kbit.kernels.cpu_chunks import BFLOAT16, FLOAT16, jit, typed_words

_CELLS, _BYTES = 2**16, 2**8
_NEGATIVE = 2**15  # the first cell of negative values. Bits ascend with the magnitude, from -0.0 on
_ASCENDING = np.concatenate([np.arange(_CELLS - 1, _NEGATIVE - 1, -1), np.arange(_NEGATIVE)])  # cells by their values

_MOST = 1 / 3  # of the values may be gathered, which bounds the memory: 4/3 bytes for each value of the tensor
_FEW = 1 / 16  # of the values are so rarely wanted that a branch is guessed right: 0.47 ns a value instead of 0.68
_SMALL = 2**19  # values that one thread counts in less than a millisecond. A busy machine's threads wait longer


def order_statistics(x: Float[np.ndarray, " n"], ranks: Int64[np.ndarray, " r"]) -> Float32[np.ndarray, " r"]:
    """Return the values at these ranks (0 .. n - 1) of sorted x. x as in kbit.kernels.cpu, without NaN.

    -0.0 is below 0.0.
    """
    words, kind = typed_words(x)
    tasks = numba.get_num_threads()
    edges = np.arange(tasks + 1) * words.size // tasks
    bounds = np.stack([edges[:-1], edges[1:]], axis=1)
    task_counts = _count_cells(words.view(np.uint16), words.itemsize // 2, bounds)
    counts = task_counts.sum(axis=0)
    places, within = _locate(counts[_ASCENDING], np.zeros_like(ranks), ranks)
    cells = _ASCENDING[places]
    if kind == FLOAT16:
        return np.asarray(cells.astype(np.uint16).view(np.float16), np.float32)
    if kind == BFLOAT16:
        return _as_floats(cells << 16)
    within = np.where(cells < _NEGATIVE, within, counts[cells] - 1 - within)  # from now on among ascending magnitudes
    bits, bounds = _gather_cells(words.view(np.uint32), bounds, np.unique(cells), task_counts)
    first = _number(cells, _CELLS)
    counts = _count_bytes(bits, bounds, first, np.empty(0, np.int32), _BYTES * (first.max() + 1))
    middles, within = _locate(counts, first[cells] * _BYTES, within)
    second = _number(middles, counts.size)
    counts = _count_bytes(bits, bounds, first, second, _BYTES * (second.max() + 1))
    lowest, _ = _locate(counts, second[middles] * _BYTES, within)
    return _as_floats(cells << 16 | middles % _BYTES << 8 | lowest % _BYTES)


def _as_floats(bits: Int64[np.ndarray, " r"]) -> Float32[np.ndarray, " r"]:
    return np.asarray(bits.astype(np.uint32).view(np.float32))


def _locate(
    counts: Int64[np.ndarray, " places"], first: Int64[np.ndarray, " r"], within: Int64[np.ndarray, " r"]
) -> tuple[Int64[np.ndarray, " r"], Int64[np.ndarray, " r"]]:
    """Return the place of each rank, which counts from the place `first` on, and the rank within that place."""
    ends = np.cumsum(counts)
    starts = ends - counts
    ranks = starts[first] + within
    places = np.searchsorted(ends, ranks, side="right")
    return places, ranks - starts[places]


def _number(places: Int64[np.ndarray, " r"], size: int) -> Int32[np.ndarray, " size"]:
    """Number the wanted places, each once. All others have the number after the last."""
    wanted = np.unique(places)
    numbers = np.full(size, wanted.size, np.int32)
    numbers[wanted] = np.arange(wanted.size)
    return numbers


def _gather_cells(
    words: UInt32[np.ndarray, " n"],
    bounds: Int64[np.ndarray, "tasks 2"],
    cells: Int64[np.ndarray, " wanted"],
    task_counts: Int64[np.ndarray, "tasks cells"],
) -> tuple[UInt32[np.ndarray, " gathered"], Int64[np.ndarray, "tasks 2"]]:
    """Return an array with the words of these cells, and each task's bounds in it.

    If more than _MOST of the words are in these cells, as when all are equal, the words themselves are returned.
    """
    wanted = task_counts[:, cells].sum(axis=1)
    if wanted.sum() > _MOST * words.size:
        return words, bounds
    ends = np.cumsum(wanted + 1) - 1  # one word more for each task, which it may overwrite
    to = np.stack([ends - wanted, ends], axis=1)
    gathered = np.empty(ends[-1] + 1, np.uint32)
    is_wanted = np.zeros(_CELLS, np.uint8)
    is_wanted[cells] = 1
    _gather(words, bounds, is_wanted, wanted.sum() < _FEW * words.size, gathered, to)
    return gathered, to


def _count_bytes(
    words: UInt32[np.ndarray, " n"],
    bounds: Int64[np.ndarray, "tasks 2"],
    first: Int32[np.ndarray, " cells"],
    second: Int32[np.ndarray, " middles"],
    size: int,
) -> Int64[np.ndarray, " size"]:
    """Count the next byte of each word, at 2^8 * number of what is before it + byte.

    Args:
        words: the bits of float32 values.
        bounds: where each task starts and ends.
        first: the numbers of the cells.
        second: the numbers of cell and middle byte. Empty where middle bytes are counted.
        size: the number of counts.
    """
    if words.size > _SMALL:
        counts: Int64[np.ndarray, " size"] = _count_all_bytes(words, bounds, first, second, size)
        return counts
    counts = np.zeros(size, np.int64)
    for start, end in bounds:
        _count_task_bytes(words, start, end, first, second, counts)
    return counts


@jit(parallel=True)
def _count_cells(halves, step, bounds):
    """Return how often each task found each cell: the last of the `step` halves of a value."""
    tasks = bounds.shape[0]
    counts = np.zeros((tasks, _CELLS), np.int64)
    for task in prange(tasks):
        _count_task_cells(halves, step, bounds[task, 0], bounds[task, 1], counts[task])
    return counts


@jit()
def _count_task_cells(halves, step, start, end, counts):
    last = np.uint64(step - 1)
    for i in range(np.uint64(start), np.uint64(end)):
        counts[halves[np.uint64(step) * i + last]] += 1


@jit(parallel=True)
def _gather(words, bounds, is_wanted, are_few, gathered, to):
    """Copy each task's words of wanted cells to gathered[to[task, 0] : to[task, 1]], and perhaps one more."""
    for task in prange(bounds.shape[0]):
        _gather_task(words, bounds[task, 0], bounds[task, 1], is_wanted, are_few, gathered, to[task, 0])


@jit()
def _gather_task(words, start, end, is_wanted, are_few, gathered, place):
    """Write every word to the next place, which moves on if the word is wanted: a branch would often guess wrong."""
    place, half = np.uint64(place), np.uint32(16)
    fours = (end - start) // 4 if are_few else 0
    for four in range(np.uint64(fours)):
        i = np.uint64(start) + np.uint64(4) * four
        a, b, c, d = words[i], words[i + np.uint64(1)], words[i + np.uint64(2)], words[i + np.uint64(3)]
        is_a, is_b, is_c, is_d = is_wanted[a >> half], is_wanted[b >> half], is_wanted[c >> half], is_wanted[d >> half]
        if is_a | is_b | is_c | is_d:
            gathered[place] = a
            place += np.uint64(is_a)
            gathered[place] = b
            place += np.uint64(is_b)
            gathered[place] = c
            place += np.uint64(is_c)
            gathered[place] = d
            place += np.uint64(is_d)
    for i in range(np.uint64(start + 4 * fours), np.uint64(end)):
        word = words[i]
        gathered[place] = word
        place += np.uint64(is_wanted[word >> half])


@jit(parallel=True)
def _count_all_bytes(words, bounds, first, second, size):
    tasks = bounds.shape[0]
    counts = np.zeros((tasks, size), np.int64)
    for task in prange(tasks):
        _count_task_bytes(words, bounds[task, 0], bounds[task, 1], first, second, counts[task])
    return counts.sum(axis=0)


@jit()
def _count_task_bytes(words, start, end, first, second, counts):
    byte = np.uint32(0xFF)
    for i in range(np.uint64(start), np.uint64(end)):
        word = words[i]
        place = np.uint32(first[word >> np.uint32(16)]) << np.uint32(8) | ((word >> np.uint32(8)) & byte)
        if second.size > 0:
            place = np.uint32(second[place]) << np.uint32(8) | (word & byte)
        counts[place] += 1
