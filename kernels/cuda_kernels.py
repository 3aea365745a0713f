"""The kernels of kbit.kernels.cuda: one function compiled for each combination of its constants that is used.

What asks for the thread's place is here as well: the simulator replaces the name `cuda` in a kernel's own module alone.
Arrays are words (see kbit.kernels.cuda), and n, row, block and shift are a Layout's, in words. Threads loop, so any
grid gives the same result.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda, types

from kbit.kernels.cpu_states import EXACT_BITS
from kbit.kernels.cuda_device import (
    ALL_BITS,
    INFINITE,
    MAGNITUDE,
    MOST_THREADS,
    SIMULATED,
    as_bits,
    as_float,
    compile_device,
    decode_word,
    encode_word,
    from_ordered,
    get_constant,
    get_value,
    move,
    multiply_add,
    primitive,
    read_state,
    round_scale,
    to_bits,
    to_ordered,
    word_peak,
    write_state,
)

ONE_PASS, FIND_PEAKS, WRITE_STATES = 0, 1, 2  # what make_step's kernel does

# ---- blocks and groups of threads ----

_EXCHANGE = np.zeros(MOST_THREADS if SIMULATED else 0, np.uint32)


def _simulated_shuffle(value, distance):
    """The simulator has no shuffles and runs one thread block at a time: exchange through memory, between barriers."""
    _EXCHANGE[cuda.threadIdx.x] = value
    cuda.syncthreads()
    value = _EXCHANGE[cuda.threadIdx.x ^ distance]
    cuda.syncthreads()
    return value


@primitive(_simulated_shuffle)
def _shuffle(value, distance):
    """Return the value of the thread at this distance (xor) in the warp. All threads of the warp must call it."""
    return np.uint32(cuda.shfl_xor_sync(0xFFFFFFFF, np.int32(value), distance))


@compile_device
def block_of(i, row, block, shift):
    """The block of word i."""
    if shift >= 0:
        return i >> shift
    r = i // row
    return r * ((row + block - 1) // block) + (i - r * row) // block


@compile_device
def block_span(b, n, row, block):
    """The first word of block b and the number of its words, none or less after the last block."""
    if row == n:  # the usual case, without the divisions
        start = b * block
        return start, min(block, n - start)
    per_row = (row + block - 1) // block
    in_row = (b % per_row) * block
    start = (b // per_row) * row + in_row
    return start, min(block, row - in_row, n - start)


@compile_device
def group_max(value, group):
    """The largest value of a group of threads, to each of them. All threads of the thread block must call it."""
    distance = min(group, 32) // 2
    while distance > 0:
        value = max(value, _shuffle(value, distance))
        distance //= 2
    if group > 32:  # several warps, and a thread block may hold several such groups
        of_warps = cuda.shared.array(32, types.uint32)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32] = value
        cuda.syncthreads()
        first = cuda.threadIdx.x // group * (group // 32)
        for warp in range(group // 32):
            value = max(value, of_warps[first + warp])
        cuda.syncthreads()
    return value


@compile_device
def group_sum(value, group):
    """The sum of a group of up to 32 threads, to each of them. All threads of the thread block must call it."""
    distance = group // 2
    while distance > 0:
        value = value + as_float(_shuffle(as_bits(value), distance))
        distance //= 2
    return value


@compile_device
def load_table(source, table):
    """Copy thresholds and codebook to shared memory."""
    i = cuda.threadIdx.x
    while i < source.size:  # a range whose step is not a constant would cost a division
        table[i] = source[i]
        i += cuda.blockDim.x
    cuda.syncthreads()


# ---- kernels ----


@functools.cache
def make_extremes(kind: int, lanes: int, group: int) -> Any:
    """Least and largest value of each block, by a group of threads that loops over it."""

    @cuda.jit
    def extremes(words, n, row, block, blocks, low, high):
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first = cuda.blockIdx.x * groups
        while first < blocks:  # the same for all threads, as the barriers and shuffles in it need
            b = first + cuda.threadIdx.x // group
            start, count = block_span(b, n, row, block)
            least, most = np.uint32(0), np.uint32(0)  # least: the largest complement
            for i in range(member, count, group):
                for lane in range(lanes):
                    ordered = to_ordered(get_value(np.uint64(words[start + i]), lane, kind))
                    least, most = max(least, np.uint32(ordered ^ ALL_BITS)), max(most, ordered)
            least, most = group_max(least, group), group_max(most, group)
            if member == 0 and b < blocks:
                low[b], high[b] = from_ordered(np.uint32(least ^ ALL_BITS)), from_ordered(most)
            first += cuda.gridDim.x * groups

    return extremes


@functools.cache
def make_encode(kind: int, lanes: int, steps: int, stochastic: bool) -> Any:
    """Values to codes, word by word."""
    size = 2 << steps

    @cuda.jit
    def encode(words, scales, offsets, tables, top, key, n, row, block, shift, codes):
        table = cuda.shared.array(size, types.float32)
        load_table(tables, table)
        i = cuda.grid(1)
        while i < n:
            b = block_of(i, row, block, shift)
            word = np.uint64(words[i])
            codes[i] = encode_word(word, scales[b], offsets[b], table, kind, lanes, steps, stochastic, top, key, i)
            i += cuda.gridsize(1)

    return encode


@functools.cache
def make_decode(kind: int, lanes: int, steps: int) -> Any:
    """Codes to values, word by word."""
    size = 2 << steps

    @cuda.jit
    def decode(codes, scales, offsets, tables, n, row, block, shift, words):
        table = cuda.shared.array(size, types.float32)
        load_table(tables, table)
        i = cuda.grid(1)
        while i < n:
            b = block_of(i, row, block, shift)
            words[i] = decode_word(np.uint64(codes[i]), scales[b], offsets[b], table, kind, lanes, steps)
            i += cuda.gridsize(1)

    return decode


@functools.cache
def make_encode_decode(kind: int, lanes: int, steps: int, stochastic: bool) -> Any:
    """Values to the values that their codes stand for, word by word."""
    size = 2 << steps

    @cuda.jit
    def encode_decode(words, scales, offsets, tables, top, key, n, row, block, shift, out):
        table = cuda.shared.array(size, types.float32)
        load_table(tables, table)
        i = cuda.grid(1)
        while i < n:
            b = block_of(i, row, block, shift)
            scale, offset, word = scales[b], offsets[b], np.uint64(words[i])
            codes = encode_word(word, scale, offset, table, kind, lanes, steps, stochastic, top, key, i)
            out[i] = decode_word(codes, scale, offset, table, kind, lanes, steps)
            i += cuda.gridsize(1)

    return encode_decode


@functools.cache
def make_absmax(kind: int, lanes: int, steps: int, group: int, held: int) -> Any:
    """The fused kernel: a group of threads holds a block in registers, `held` words each."""
    size = 2 << steps

    @cuda.jit
    def absmax(words, tables, scale_kind, smallest, largest, n, row, block, blocks, out, refused):
        table = cuda.shared.array(size, types.float32)
        load_table(tables, table)
        kept = cuda.local.array(held, types.uint64)  # the loops over it are unrolled, so it is registers
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first = cuda.blockIdx.x * groups
        while first < blocks:  # the same for all threads, as the barriers and shuffles in it need
            start, count = block_span(first + cuda.threadIdx.x // group, n, row, block)
            for j in range(held):
                i = member + j * group
                kept[j] = np.uint64(words[start + i]) if i < count else np.uint64(0)
            peak = np.uint32(0)
            for j in range(held):
                peak = max(peak, word_peak(kept[j], kind, lanes))
            peak = get_value(np.uint64(group_max(peak, group)), 0, kind)
            scale, offset = round_scale(peak, scale_kind, smallest, largest), np.float32(0)
            if member == 0 and scale != scale:  # several threads may: all write the same
                refused[0] = 1
            for j in range(held):
                codes = encode_word(kept[j], scale, offset, table, kind, lanes, steps, False, 0, np.uint64(0), 0)
                i = member + j * group
                if i < count:
                    out[start + i] = decode_word(codes, scale, offset, table, kind, lanes, steps)
            first += cuda.gridDim.x * groups

    return absmax


@functools.cache
def make_absmax_scales() -> Any:
    """Scales of blocks from their extremes, in place: low becomes the scale and high the offset 0."""

    @cuda.jit
    def absmax_scales(blocks, scale_kind, smallest, largest, low, high, refused):
        for b in range(cuda.grid(1), blocks, cuda.gridsize(1)):
            # on bits, so that NaN counts as the largest
            peak = max(np.uint32(as_bits(low[b]) & MAGNITUDE), np.uint32(as_bits(high[b]) & MAGNITUDE))
            scale = round_scale(as_float(peak), scale_kind, smallest, largest)
            low[b], high[b] = scale, np.float32(0)
            if scale != scale:
                refused[0] = 1

    return absmax_scales


@functools.cache
def make_multiply(bits: int, steps: int, batch: int, group: int, scale_kind: int, offset_kind: int) -> Any:
    """Products of a few inputs with a matrix of codes: a group of threads takes a row, and a thread 8 codes at a time.

    Eight codes are whole bytes and lie in one block. The codes' values are never stored.
    """
    size = 2 << steps

    @cuda.jit
    def multiply(
        codes, tables, scales, offsets, values, second, mean, zero, least, added, x, n, row, columns, block, shift, out
    ):
        table = cuda.shared.array(size, types.float32)
        load_table(tables, table)
        sums = cuda.local.array(batch, types.float32)  # the loops over it are unrolled, so it is registers
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first, rows = cuda.blockIdx.x * groups, n // columns
        while first < rows:  # the same for all threads, as the shuffles in it need
            r = first + cuda.threadIdx.x // group
            for m in range(batch):
                sums[m] = np.float32(0)
            i = 8 * member if r < rows else columns
            while i < columns:
                start = r * columns + i
                b = block_of(start, row, block, shift)
                scale = get_constant(scales, b, scale_kind, values, second, mean, zero, least)
                offset = get_constant(offsets, b, offset_kind, values, second, mean, zero, -INFINITE) + added
                stream = np.uint64(0)
                for j in range(bits):
                    stream = (stream << np.uint64(8)) | np.uint64(codes[start // 8 * bits + j])
                for j in range(8):
                    code = (stream >> np.uint64(bits * (7 - j))) & np.uint64((1 << bits) - 1)
                    value = multiply_add(table[np.uint32((1 << steps) + np.uint32(code))], scale, offset)
                    for m in range(batch):
                        sums[m] = multiply_add(value, x[m * columns + i + j], sums[m])
                i += 8 * group
            for m in range(batch):
                total = group_sum(sums[m], group)
                if member == 0 and r < rows:
                    out[m * rows + r] = total
            first += cuda.gridDim.x * groups

    return multiply


@compile_device
def _share_peak(peaks, state, start, n, block, bits, member, group):
    """Write the peak of the block that a group of threads holds. All threads of the thread block must call it."""
    if 0 < bits < EXACT_BITS:
        peak = np.uint32(0)
        for j in range(8):
            peak = max(peak, np.uint32(as_bits(state[j]) & MAGNITUDE))
        peak = group_max(peak, group)
        if member == 0 and start < n:
            peaks[start // block] = peak
        cuda.syncthreads()


@compile_device
def _raise_peaks(peaks, state, start, n, block, bits):
    """Raise the peaks of the blocks of eight values, with one atomic maximum a block."""
    if 0 < bits < EXACT_BITS:
        peak = np.uint32(0)
        for j in range(8):
            i = start + j
            if i < n:
                peak = max(peak, np.uint32(as_bits(state[j]) & MAGNITUDE))
                if j == 7 or i + 1 == n or (i + 1) % block == 0:
                    cuda.atomic.max(peaks, i // block, peak)
                    peak = np.uint32(0)


@functools.cache
def make_step(mode: int, group: int, kind: int, rule: int, m_bits: int, v_bits: int, m_steps: int, v_steps: int) -> Any:
    """The step of eight values a thread. If mode is ONE_PASS, a group of threads takes a block."""
    m_size, v_size = 2 << m_steps, 2 << v_steps

    @cuda.jit
    def states(
        p, g, m_values, m_scales, m_peaks, m_tables, m_block, m_top, m_key, m_random,
        v_values, v_scales, v_peaks, v_tables, v_block, v_top, v_key, v_random,
        n, rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty, nesterov,
    ):  # fmt: skip
        m_table = cuda.shared.array(m_size, types.float32)  # on lines of their own, which tell arrays apart when
        v_table = cuda.shared.array(v_size, types.float32)  # they are simulated
        load_table(m_tables, m_table)
        load_table(v_tables, v_table)
        moved = cuda.local.array(8, types.float32)  # the loops over these are unrolled, so they are registers
        m = cuda.local.array(8, types.float32)
        v = cuda.local.array(8, types.float32)
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first, blocks = cuda.blockIdx.x * groups, (n + 8 * group - 1) // (8 * group)
        while first < blocks:  # the same for all threads, as the shuffles in it need
            start = ((first + cuda.threadIdx.x // group) * group + member) * 8
            for j in range(8):
                i = start + j
                m[j], v[j] = np.float32(0), np.float32(0)
                if i < n:
                    old_m = read_state(m_values, m_scales, m_table, i, m_block, m_bits, m_steps)
                    old_v = read_state(v_values, v_scales, v_table, i, v_block, v_bits, v_steps)
                    moved[j], m[j], v[j] = move(
                        get_value(np.uint64(p[i]), 0, kind), get_value(np.uint64(g[i]), 0, kind), old_m, old_v,
                        rule, rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty, nesterov,
                    )  # fmt: skip
            if mode == ONE_PASS:
                _share_peak(m_peaks, m, start, n, m_block, m_bits, member, group)
                _share_peak(v_peaks, v, start, n, v_block, v_bits, member, group)
            if mode == FIND_PEAKS:
                _raise_peaks(m_peaks, m, start, n, m_block, m_bits)
                _raise_peaks(v_peaks, v, start, n, v_block, v_bits)
            else:
                for j in range(8):
                    if start + j < n:
                        p[start + j] = to_bits(moved[j], kind)
                write_state(m_values, m, m_peaks, m_table, start, n, m_block, m_bits, m_steps, m_top, m_key, m_random)
                write_state(v_values, v, v_peaks, v_table, start, n, v_block, v_bits, v_steps, v_top, v_key, v_random)
            first += cuda.gridDim.x * groups

    return states
