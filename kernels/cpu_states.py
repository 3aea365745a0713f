"""One step of an optimizer whose states are k-bit codes, on the CPU: the twin of kbit.numerics.reference.take_step.

The step decodes the states, moves the parameters and encodes the new states, a chunk at a time, so that a state is
never in memory as float32. The new scale of a block is its new largest magnitude, which is known once the whole block
is computed. Where a chunk holds whole blocks, that is the same pass. Longer blocks, and block sizes that fit no chunk,
take two passes: the first finds the scales, and the second computes the states again and writes them.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from numba import prange, types
from numba.extending import overload

from kbit.kernels.cpu_chunks import (
    CHUNK,
    find_codes,
    jit,
    load,
    make_search_table,
    mix,
    pack_codes,
    pad_codebook,
    round_up_at_random,
    store,
    typed_words,
    unpack_codes,
)

ADAM, SGD, LION = 0, 1, 2
EXACT_BITS: Final = 32  # a state that is not quantized
NO_STATE: Final = 0  # bits of a state that the rule does not have
NOT_RANDOM: Final = -1
_USUAL_CHUNK: Final = 2048  # elements. Measured: 1024 takes 16% longer, 256 40%, and 4096 3%
TASK: Final = 2**15  # elements that a thread takes at once

Values = Float[np.ndarray, " n"]
Codes = UInt8[np.ndarray, " bytes"]
Scales = Float32[np.ndarray, " blocks"]


class State(NamedTuple):
    """A state of an optimizer for one parameter: codes and the scales of their blocks, or float32 values.

    Attributes:
        bits: bits of a code, 2..8. EXACT_BITS has values instead of codes, NO_STATE has nothing.
        block_size: elements that share a scale.
        codes: the packed codes (kbit.numerics.reference.pack), changed in place.
        scales: the largest magnitude of each block, changed in place.
        values: the state at EXACT_BITS, changed in place.
        codebook: the values of codes in units of the scale, padded to 256.
        first, thresholds, compares: where codes begin, see kbit.kernels.cpu_chunks.SearchTable.
        levels: the number of the codebook's values.
        seed: seed of stochastic rounding, or NOT_RANDOM.
    """

    bits: int
    block_size: int
    codes: Codes
    scales: Scales
    values: Scales
    codebook: Scales
    first: Codes
    thresholds: Scales
    compares: int
    levels: int
    seed: int


class Rule(NamedTuple):
    """The numbers of a step. All are float32, so that NumPy and compiled code compute alike.

    With g' = g + penalty p, the rules are

        ADAM   m = beta1 m + rest1 g',  v = beta2 v + rest2 g' g',  u = m / (sqrt(v) root + eps)
        SGD    m = beta1 m + rest1 g',  u = m, or g' + beta1 m if nesterov
        LION   u = sign(beta1 m + rest1 g'),  m = beta2 m + rest2 g'

    and p becomes p decay - rate u.
    """

    kind: int
    rate: np.float32
    beta1: np.float32
    rest1: np.float32
    beta2: np.float32
    rest2: np.float32
    root: np.float32
    eps: np.float32
    decay: np.float32
    penalty: np.float32
    nesterov: bool


def make_state(bits: int, block_size: int, codebook: Scales, thresholds: Scales) -> State:
    """Return a quantized state that lacks its arrays: state._replace(codes=codes, scales=scales)."""
    table, nothing = make_search_table(thresholds.tobytes()), np.empty(0, np.float32)
    no_codes = np.empty(0, np.uint8)
    return State(
        bits, block_size, no_codes, nothing, nothing, pad_codebook(codebook), *table, codebook.size, NOT_RANDOM
    )


# A state of float32 values, which lacks them, and the variance of SGD and Lion.
EXACT: Final = make_state(EXACT_BITS, 1, np.zeros(1, np.float32), np.empty(0, np.float32))
ABSENT: Final = EXACT._replace(bits=NO_STATE)


def take_step(p: Values, g: Values, momentum: State, variance: State, rule: Rule) -> None:
    """Change the parameters p and their states by a step with the gradient g.

    p and g are of one type: float32, float16, or the bits of bfloat16 as uint16. All arithmetic is float32.
    """
    words, kind = typed_words(p)
    gradients, _ = typed_words(g)
    chunk = _choose_chunk(momentum.block_size, variance.block_size)
    if chunk:
        _step(words, gradients, kind, momentum, variance, momentum.scales, variance.scales, rule, chunk, True)
        return
    peaks = _find_scales(words, gradients, kind, momentum, variance, rule)
    _step(words, gradients, kind, momentum, variance, *peaks, rule, CHUNK, False)
    for state, scales in zip((momentum, variance), peaks, strict=True):
        state.scales[:] = scales


def _choose_chunk(*block_sizes: int) -> int:
    """Return the elements of a chunk that holds whole blocks of each size and whole bytes of codes, or 0."""
    whole = math.lcm(8, *block_sizes)
    if whole > CHUNK:
        return 0
    return whole * max(1, _USUAL_CHUNK // whole)


@jit(parallel=True)
def _step(words, gradients, kind, momentum, variance, momentum_scales, variance_scales, rule, chunk, whole_blocks):
    n = np.int64(words.size)
    per_task = max(np.int64(1), TASK // chunk) * chunk
    for task in prange((n + per_task - 1) // per_task):
        start, end = task * per_task, min(n, (task + 1) * per_task)
        _step_task(
            words, gradients, kind, momentum, variance, momentum_scales, variance_scales, rule, chunk, whole_blocks,
            start, end,
        )  # fmt: skip


@jit()
def _step_task(
    words, gradients, kind, momentum, variance, momentum_scales, variance_scales, rule, chunk, whole_blocks, start, end
):
    buffers, codes = np.empty((4, CHUNK), np.float32), np.zeros(CHUNK, np.uint8)
    while start < end:
        count = min(chunk, end - start)
        p = _open_chunk(words, kind, start, count, buffers[0])
        g = _open_chunk(gradients, kind, start, count, buffers[1])
        m = _decode(momentum, start, count, codes, buffers[2])
        v = _decode(variance, start, count, codes, buffers[3])
        _move(p, g, m, v, count, rule)
        _close_chunk(p, words, kind, start, count)
        if whole_blocks:
            _write_peaks(m, start, count, momentum)
            _write_peaks(v, start, count, variance)
        _encode(m, start, count, momentum, momentum_scales, codes)
        _encode(v, start, count, variance, variance_scales, codes)
        start += count


def _open_chunk(words: Any, kind: int, start: int, count: int, buffer: Any) -> Any:
    """Return `count` values from `start` on as float32: as they lie, or converted into the buffer."""
    raise NotImplementedError


@overload(_open_chunk, inline="never")
def _open_any(words, kind, start, count, buffer):
    if isinstance(words.dtype, types.Float):  # a copy would read each page in one go, faster than it is prefetched
        return lambda words, kind, start, count, buffer: words[start : start + count]

    def open_16_bits(words, kind, start, count, buffer):
        load(words, kind, start, count, buffer)
        return buffer

    return open_16_bits


def _close_chunk(p: Any, words: Any, kind: int, start: int, count: int) -> None:
    """Write values that _open_chunk returned, and that have changed, to where they came from."""
    raise NotImplementedError


@overload(_close_chunk, inline="never")
def _close_any(p, words, kind, start, count):
    if isinstance(words.dtype, types.Float):
        return lambda p, words, kind, start, count: None
    return lambda p, words, kind, start, count: store(p, count, words, kind, start)


@jit()
def _move(p, g, m, v, count, rule):
    """Compute the new parameters and states in place."""
    if rule.kind == ADAM:
        _move_adam(p, g, m, v, count, rule)
    elif rule.kind == SGD:
        _move_sgd(p, g, m, count, rule)
    else:
        _move_lion(p, g, m, count, rule)


@jit()
def _move_adam(p, g, m, v, count, rule):
    beta1, rest1, beta2, rest2, penalty = rule.beta1, rule.rest1, rule.beta2, rule.rest2, rule.penalty
    root, eps, decay, rate, is_penalized = rule.root, rule.eps, rule.decay, rule.rate, rule.penalty != np.float32(0)
    for j in range(np.uint64(count)):
        gradient = g[j] + penalty * p[j] if is_penalized else g[j]
        momentum = beta1 * m[j] + rest1 * gradient
        variance = beta2 * v[j] + rest2 * (gradient * gradient)
        m[j], v[j] = momentum, variance
        p[j] = p[j] * decay - rate * (momentum / (np.sqrt(variance) * root + eps))


@jit()
def _move_sgd(p, g, m, count, rule):
    beta1, rest1, decay, rate, nesterov = rule.beta1, rule.rest1, rule.decay, rule.rate, rule.nesterov
    penalty, is_penalized = rule.penalty, rule.penalty != np.float32(0)
    for j in range(np.uint64(count)):
        gradient = g[j] + penalty * p[j] if is_penalized else g[j]
        momentum = beta1 * m[j] + rest1 * gradient
        m[j] = momentum
        move = gradient + beta1 * momentum if nesterov else momentum
        p[j] = p[j] * decay - rate * move


@jit()
def _move_lion(p, g, m, count, rule):
    beta1, rest1, beta2, rest2 = rule.beta1, rule.rest1, rule.beta2, rule.rest2
    decay, rate, one, zero = rule.decay, rule.rate, np.float32(1), np.float32(0)
    penalty, is_penalized = rule.penalty, rule.penalty != np.float32(0)
    for j in range(np.uint64(count)):
        gradient = g[j] + penalty * p[j] if is_penalized else g[j]
        mixed = beta1 * m[j] + rest1 * gradient
        m[j] = beta2 * m[j] + rest2 * gradient
        sign = mixed if mixed != mixed else zero  # a gradient that is NaN must not leave the parameter as it was
        sign = one if mixed > zero else sign
        sign = -one if mixed < zero else sign
        p[j] = p[j] * decay - rate * sign


@jit()
def _decode(state, start, count, codes, buffer):
    """Return the state: codebook[code] * scale in the buffer, or its values as they lie."""
    if state.bits == NO_STATE:
        return buffer
    if state.bits == EXACT_BITS:
        return state.values[start : start + count]
    packed = state.bits < 8
    if packed:
        unpack_codes(state.codes, start * state.bits // 8, count, state.bits, codes)
    found = codes if packed else state.codes[start : start + count]
    block, b, i = state.block_size, start // state.block_size, np.int64(0)
    while i < count:
        stop = min((b + 1) * block - start, count)
        _look_up_scaled(found, i, stop, state.codebook, state.scales[b], buffer)
        i, b = stop, b + 1
    return buffer


@jit()
def _look_up_scaled(codes, first, stop, codebook, scale, values):
    for j in range(np.uint64(first), np.uint64(stop)):
        values[j] = codebook[codes[j]] * scale


@jit()
def _write_peaks(buffer, start, count, state):
    """Write the scales of a chunk's blocks, all of which it holds whole."""
    if not 0 < state.bits < EXACT_BITS:
        return
    block = state.block_size
    for b in range((count + block - 1) // block):
        state.scales[start // block + b] = _find_peak(buffer, b * block, min(count, (b + 1) * block))


@jit()
def _find_peak(buffer, start, stop):
    """Return the largest magnitude, NaN if there is one: as integers, since they vectorise."""
    peak = np.int32(0)
    for j in range(np.uint64(start), np.uint64(stop)):
        peak = max(peak, np.int32(np.float32(buffer[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
    return np.int32(peak).view(np.float32)


@jit()
def _encode(buffer, start, count, state, scales, codes):
    """Write the codes of the values in the buffer, which is changed."""
    if not 0 < state.bits < EXACT_BITS:  # a state of values has been changed in place
        return
    block, b, i = state.block_size, start // state.block_size, np.int64(0)
    while i < count:
        stop = min((b + 1) * block - start, count)
        _divide(buffer, i, stop, scales[b])
        i, b = stop, b + 1
    find_codes(buffer, count, state.first, state.thresholds, state.compares, codes)
    if state.seed != NOT_RANDOM:
        round_up_at_random(buffer, count, state.codebook, state.levels, mix(np.uint64(state.seed)), start, codes)
    for j in range(np.uint64(count), np.uint64((count + 7) // 8 * 8)):
        codes[j] = np.uint8(0)
    pack_codes(codes, count, state.bits, state.codes, start * state.bits // 8)


@jit()
def _divide(buffer, first, stop, scale):
    """Divide values by their block's scale. Where that is 0, all of them are."""
    if scale == np.float32(0):
        buffer[first:stop] = np.float32(0)
        return
    for j in range(np.uint64(first), np.uint64(stop)):
        buffer[j] = buffer[j] / scale


def _find_scales(words: Any, gradients: Any, kind: int, momentum: State, variance: State, rule: Rule) -> Any:
    """Return the new scales of both states. A chunk may hold parts of blocks: see _join_peaks."""
    chunks = -(-words.size // CHUNK)
    parts = [np.zeros(chunks + state.scales.size, np.float32) for state in (momentum, variance)]
    _find_parts(words, gradients, kind, momentum, variance, rule, *parts)
    pairs = zip(parts, (momentum, variance), strict=True)
    return [_join_peaks(part, state.scales.size, state.block_size) for part, state in pairs]


@jit(parallel=True)
def _find_parts(words, gradients, kind, momentum, variance, rule, momentum_parts, variance_parts):
    n = np.int64(words.size)
    for c in prange((n + CHUNK - 1) // CHUNK):
        _find_chunk_parts(
            words, gradients, kind, momentum, variance, rule, c, min(CHUNK, n - c * CHUNK), momentum_parts,
            variance_parts,
        )  # fmt: skip


@jit()
def _find_chunk_parts(words, gradients, kind, momentum, variance, rule, c, count, momentum_parts, variance_parts):
    buffers, start = np.empty((4, CHUNK), np.float32), c * CHUNK
    load(words, kind, start, count, buffers[0])  # copies: nothing may change yet
    load(gradients, kind, start, count, buffers[1])
    codes = np.empty(CHUNK, np.uint8)
    for i, state in ((2, momentum), (3, variance)):
        values = _decode(state, start, count, codes, buffers[i])
        load(values, 0, 0, count, buffers[i])
    _move(buffers[0], buffers[1], buffers[2], buffers[3], count, rule)
    _write_parts(buffers[2], c, count, momentum, momentum_parts)
    _write_parts(buffers[3], c, count, variance, variance_parts)


@jit()
def _write_parts(buffer, c, count, state, parts):
    """Write the peak of each block's part in chunk c. Chunk and block number grow together, so c + b is free."""
    if not 0 < state.bits < EXACT_BITS:
        return
    block, start = state.block_size, c * CHUNK
    for b in range(start // block, (start + count + block - 1) // block):
        first, stop = max(b * block, start) - start, min((b + 1) * block, start + count) - start
        parts[c + b] = _find_peak(buffer, first, stop)


@jit()
def _join_peaks(parts, blocks, block_size):
    """Return the peak of each block: the largest of its parts."""
    peaks = np.zeros(blocks, np.float32)
    chunks = parts.size - blocks
    for b in range(blocks):
        first, last = b * block_size // CHUNK, min(chunks, ((b + 1) * block_size + CHUNK - 1) // CHUNK)
        peaks[b] = _find_peak(parts, first + b, last + b)
    return peaks
