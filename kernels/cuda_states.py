"""One step of an optimizer whose states are k-bit codes, on NVIDIA GPUs: the twin of kbit.kernels.cpu_states.

A thread takes eight neighbouring values, whose codes are whole bytes. Where both states have blocks of one size, a
power of two up to FUSED_BLOCK, a group of threads holds a block in registers and finds its peaks by shuffles, so that
all arrays are read and written once. Other block sizes take two passes: the first finds the peaks by atomic maxima, and
the second computes the states again and writes them.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
from numba import cuda, types

from kbit.kernels.cpu_states import ADAM, EXACT_BITS, LION, NO_STATE, NOT_RANDOM, Rule, State
from kbit.kernels.cuda_arrays import (
    KINDS,
    WORD_TYPES,
    DeviceArray,
    as_numba,
    count_steps,
    device_of,
    divide_up,
    launch_groups,
    mix_key,
    new_array,
    place_table,
    require_device,
)
from kbit.kernels.cuda_device import (
    MOST_THREADS,
    add,
    as_bits,
    as_float,
    compile_device,
    divide,
    find_code,
    get_value,
    multiply,
    round_up_at_random,
    square_root,
    subtract,
    to_bits,
)
from kbit.kernels.cuda_kernels import group_max, load_table

FUSED_BLOCK: Final = 8 * MOST_THREADS
_ONE_PASS, _PEAKS, _WRITE = 0, 1, 2  # what a kernel does
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def take_step(p: DeviceArray, g: DeviceArray, momentum: State, variance: State, rule: Rule) -> None:
    """Change the parameters p and their states by a step with the gradient g. See kbit.kernels.cpu_states.

    The arrays of the states are on the device of p, but for their tables.
    """
    require_device()
    with device_of(p):
        group = _choose_group([state for state in (momentum, variance) if 0 < state.bits < EXACT_BITS])
        old = [as_numba(state.scales) for state in (momentum, variance)]
        if group:
            _launch(_ONE_PASS, group, p, g, momentum, variance, old, old, rule)
            return
        fresh = [new_array(p, state.scales.shape[0], "float32") for state in (momentum, variance)]
        for scales in fresh:
            scales[:] = 0
        new = [as_numba(scales) for scales in fresh]
        for mode in (_PEAKS, _WRITE):
            _launch(mode, 1, p, g, momentum, variance, old, new, rule)
        for state, scales in zip((momentum, variance), fresh, strict=True):
            state.scales[:] = scales


def _choose_group(coded: list[State]) -> int:
    """Return how many threads share a block in one pass, or 0 for two passes."""
    sizes = {state.block_size for state in coded}
    if not sizes:
        return 1
    size = min(sizes)
    fits = len(sizes) == 1 and 8 <= size <= FUSED_BLOCK and size & (size - 1) == 0
    return size // 8 if fits else 0


def _launch(
    mode: int, group: int, p: DeviceArray, g: DeviceArray, momentum: State, variance: State, old: Any, new: Any,
    rule: Rule,
) -> None:  # fmt: skip
    words = as_numba(p)
    n, kind = words.size, KINDS[str(words.dtype)]
    steps = [count_steps(state.codebook[: state.levels]) for state in (momentum, variance)]
    kernel = make_step(mode, group, kind, rule.kind, momentum.bits, variance.bits, *steps)
    arguments: list[Any] = [as_numba(x, WORD_TYPES[words.dtype.itemsize]) for x in (p, g)]
    for state, before, after in zip((momentum, variance), old, new, strict=True):
        table = place_table(state.codebook[: state.levels], state.thresholds[: state.levels - 1])
        seed = None if state.seed == NOT_RANDOM else state.seed
        values = state.codes if 0 < state.bits < EXACT_BITS else state.values
        arguments += [as_numba(values), before, after.view(np.uint32), table, np.int64(state.block_size)]
        arguments += [np.int64(state.levels - 1), mix_key(seed), np.bool_(seed is not None)]
    arguments += [n, *rule[1:-1], np.bool_(rule.nesterov)]
    launch_groups(kernel, group, divide_up(n, 8 * group), *arguments)


@compile_device
def _move(p, g, m, v, rule, rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty, nesterov):
    """Return the new parameter, momentum and variance. See kbit.kernels.cpu_states.Rule."""
    zero, one = np.float32(0), np.float32(1)
    if penalty != zero:
        g = add(g, multiply(penalty, p))
    mixed = add(multiply(beta1, m), multiply(rest1, g))
    if rule == LION:
        m = add(multiply(beta2, m), multiply(rest2, g))
        move = mixed if mixed != mixed else zero
        move = one if mixed > zero else move
        move = -one if mixed < zero else move
    elif rule == ADAM:
        m, v = mixed, add(multiply(beta2, v), multiply(rest2, multiply(g, g)))
        move = divide(m, add(multiply(square_root(v), root), eps))
    else:
        m = mixed
        move = add(g, multiply(beta1, m)) if nesterov else m
    return subtract(multiply(p, decay), multiply(rate, move)), m, v


@compile_device
def _read_state(values, scales, table, i, block, bits, steps):
    """Return the state of element i."""
    if bits == NO_STATE:
        return np.float32(0)
    if bits == EXACT_BITS:
        return values[i]
    start = i * bits
    byte, inside = start // 8, start % 8
    pair = np.uint32(values[byte]) << np.uint32(8)
    if inside + bits > 8:
        pair |= np.uint32(values[byte + 1])
    code = (pair >> np.uint32(16 - bits - inside)) & np.uint32((1 << bits) - 1)
    return multiply(table[np.uint32((1 << steps) + code)], scales[i // block])


@compile_device
def _raise_peaks(peaks, state, start, n, block):
    """Raise the peaks of the blocks of eight values, with one atomic maximum a block."""
    peak = np.uint32(0)
    for j in range(8):
        i = start + j
        if i < n:
            peak = max(peak, np.uint32(as_bits(state[j]) & _MAGNITUDE))
            if j == 7 or i + 1 == n or (i + 1) % block == 0:
                cuda.atomic.max(peaks, i // block, peak)
                peak = np.uint32(0)


@compile_device
def _write_state(values, state, peaks, table, start, n, block, bits, steps, top, key, is_random):
    """Write eight values of a state: as they are, or as codes in units of their blocks' peaks."""
    stream = np.uint64(0)
    for j in range(8):
        i, code = start + j, np.uint32(0)
        if i < n and bits == EXACT_BITS:
            values[i] = state[j]
        elif i < n:
            scale = as_float(peaks[i // block])
            v = divide(state[j], scale) if scale != np.float32(0) else np.float32(0)
            code = find_code(v, table, steps)
            if is_random:
                code = round_up_at_random(v, code, table, steps, top, key, i)
        stream = (stream << np.uint64(bits)) | np.uint64(code)
    if bits != EXACT_BITS:
        for j in range(bits):
            byte = start // 8 * bits + j
            if byte < values.size:
                values[byte] = (stream >> np.uint64(8 * (bits - 1 - j))) & np.uint64(0xFF)


@functools.cache
def make_step(mode: int, group: int, kind: int, rule: int, m_bits: int, v_bits: int, m_steps: int, v_steps: int) -> Any:
    """The step of eight values a thread. If mode is _ONE_PASS, a group of threads takes a block."""
    m_table_size, v_table_size = 2 << m_steps, 2 << v_steps
    m_coded, v_coded = 0 < m_bits < EXACT_BITS, 0 < v_bits < EXACT_BITS

    @cuda.jit
    def states(
        p, g, m_values, m_scales, m_peaks, m_tables, m_block, m_top, m_key, m_random,
        v_values, v_scales, v_peaks, v_tables, v_block, v_top, v_key, v_random,
        n, rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty, nesterov,
    ):  # fmt: skip
        m_table, v_table = (
            cuda.shared.array(m_table_size, types.float32),
            cuda.shared.array(v_table_size, types.float32),
        )
        load_table(m_tables, m_table)
        load_table(v_tables, v_table)
        moved = cuda.local.array(8, types.float32)  # the loops over these are unrolled, so they are registers
        m, v = cuda.local.array(8, types.float32), cuda.local.array(8, types.float32)
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first, blocks = cuda.blockIdx.x * groups, (n + 8 * group - 1) // (8 * group)
        while first < blocks:  # the same for all threads, as the shuffles in it need
            start = ((first + cuda.threadIdx.x // group) * group + member) * 8
            m_peak, v_peak = np.uint32(0), np.uint32(0)
            for j in range(8):
                i = start + j
                if i < n:
                    old_m = _read_state(m_values, m_scales, m_table, i, m_block, m_bits, m_steps)
                    old_v = _read_state(v_values, v_scales, v_table, i, v_block, v_bits, v_steps)
                    moved[j], m[j], v[j] = _move(
                        get_value(np.uint64(p[i]), 0, kind), get_value(np.uint64(g[i]), 0, kind), old_m, old_v,
                        rule, rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty, nesterov,
                    )  # fmt: skip
                    m_peak = max(m_peak, np.uint32(as_bits(m[j]) & _MAGNITUDE))
                    v_peak = max(v_peak, np.uint32(as_bits(v[j]) & _MAGNITUDE))
            if mode == _ONE_PASS:
                m_peak, v_peak = group_max(m_peak, group), group_max(v_peak, group)
                if member == 0 and start < n and m_coded:
                    m_peaks[start // m_block] = m_peak
                if member == 0 and start < n and v_coded:
                    v_peaks[start // v_block] = v_peak
                cuda.syncthreads()
            if mode == _PEAKS:
                if m_coded:
                    _raise_peaks(m_peaks, m, start, n, m_block)
                if v_coded:
                    _raise_peaks(v_peaks, v, start, n, v_block)
            else:
                for j in range(8):
                    if start + j < n:
                        p[start + j] = to_bits(moved[j], kind)
                if m_bits:
                    _write_state(
                        m_values, m, m_peaks, m_table, start, n, m_block, m_bits, m_steps, m_top, m_key, m_random
                    )
                if v_bits:
                    _write_state(
                        v_values, v, v_peaks, v_table, start, n, v_block, v_bits, v_steps, v_top, v_key, v_random
                    )
            first += cuda.gridDim.x * groups

    return states
