"""Device code of kbit.kernels.cuda: what one thread computes by itself.

Primitives state each hardware operation and what it means in NumPy, which is what numba's simulator runs. Everything
else is written once, in them. Functions without annotations are compiled: numba infers their types.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import numba_cuda  # noqa: F401 (it takes the place of the older numba.cuda that numba still ships)
except ImportError as error:
    raise ImportError(
        "quantizing on a GPU needs numba-cuda: pip install 'kbit[cuda]', or '.[cuda]' in a clone"
    ) from error
from numba import config, cuda
from numba.cuda import libdevice

from kbit.kernels.cpu_states import ADAM, EXACT_BITS, LION, NO_STATE

SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])  # numba reads NUMBA_ENABLE_CUDASIM when it is imported

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
CODED, ABSENT, DOUBLED = 3, 4, 5  # kinds of stored constants: a byte each, none, a byte times a factor
SECOND_BLOCK = 256  # DOUBLED constants that share a factor
MOST_THREADS = 1024  # of a thread block, by the hardware

_NAN = np.float32(np.nan)
INFINITE = np.float32(np.inf)
_NAN_WORD = np.uint64(0xFFFFFFFFFFFFFFFF)  # NaN in each of the formats
ALL_BITS = np.uint32(0xFFFFFFFF)
_SIGN_BIT = np.uint32(0x80000000)
MAGNITUDE = np.uint32(0x7FFFFFFF)


# ---- primitives: the hardware's operations, and their meaning in NumPy ----


def compile_device(function: Any) -> Any:
    """Compile the function for the device. Simulated kernels call it as it is, which is much faster."""
    return function if SIMULATED else cuda.jit(device=True)(function)


def primitive(in_numpy: Any) -> Any:
    """Compile the function for the device. The simulator gets in_numpy instead."""
    return (lambda function: in_numpy) if SIMULATED else compile_device


@primitive(lambda a, b: np.float32(a) + np.float32(b))
def add(a, b):
    return libdevice.fadd_rn(a, b)


@primitive(lambda a, b: np.float32(a) - np.float32(b))
def subtract(a, b):
    return libdevice.fsub_rn(a, b)


@primitive(lambda a, b: np.float32(a) * np.float32(b))
def multiply(a, b):
    return libdevice.fmul_rn(a, b)


@primitive(lambda a, b: np.float32(a) / np.float32(b))
def divide(a, b):
    return libdevice.fdiv_rn(a, b)


@primitive(lambda a: np.sqrt(np.float32(a)))
def square_root(a):
    return libdevice.fsqrt_rn(a)


@primitive(lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)))
def multiply_add(a, b, c):
    return libdevice.fmaf_rn(a, b, c)


@primitive(lambda bits: np.uint32(bits).view(np.float32))
def as_float(bits):
    return libdevice.int_as_float(np.int32(bits))


@primitive(lambda value: np.float32(value).view(np.uint32))
def as_bits(value):
    return np.uint32(libdevice.float_as_int(value))


@primitive(lambda half: np.float32(np.uint16(half).view(np.float16)))
def _half_to_float(half):
    return libdevice.half2float(np.int16(half))


@primitive(lambda value: np.float32(value).astype(np.float16).view(np.uint16))
def _float_to_half(value):
    return np.uint16(libdevice.float2half_rn(value))


# ---- device functions: one word, one value ----


@compile_device
def get_value(word, lane, kind):
    """Value number `lane` of a word, as float32."""
    if kind == FLOAT32:
        return as_float(np.uint32((word >> np.uint64(32 * lane)) & np.uint64(0xFFFFFFFF)))
    half = np.uint32((word >> np.uint64(16 * lane)) & np.uint64(0xFFFF))
    if kind == FLOAT16:
        return _half_to_float(half)
    return as_float(np.uint32(half << np.uint32(16)))


@compile_device
def to_bits(value, kind):
    """Bits of a float32 rounded to the kind, to nearest, ties to even."""
    if kind == FLOAT32:
        return np.uint64(as_bits(value))
    if kind == FLOAT16:
        return np.uint64(_float_to_half(value))
    bits = as_bits(value)
    return np.uint64(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compile_device
def find_code(v, table, steps):
    """Return the number of thresholds <= v, where table[j] is threshold j - 1."""
    code = np.uint32(0)
    for step in range(steps):
        probe = np.uint32(code | np.uint32(1 << (steps - 1 - step)))
        code = probe if v >= table[probe] else code
    return code


@compile_device
def round_up_at_random(v, code, table, steps, top, key, index):
    """Stochastic rounding: from the value below, up by one with the probability that makes it unbiased."""
    below = table[np.uint32((1 << steps) + code)]
    above = table[np.uint32((1 << steps) + min(np.int64(code) + 1, top))]
    share = divide(subtract(v, below), subtract(above, below))
    bits = _mix(np.uint64(index) * np.uint64(0x9E3779B97F4A7C15) + key) >> np.uint64(40)
    uniform = multiply(np.float32(np.uint32(bits)), np.float32(2.0**-24))
    return np.uint32(code + 1) if above > below and share > uniform else code


def mix_seed(z):
    """The finalizer of splitmix64. See kbit.numerics.reference.uniform."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_mix = compile_device(mix_seed)


@compile_device
def encode_word(word, scale, offset, table, kind, lanes, steps, stochastic, top, key, index):
    """Codes of a word's values, 8 bits each. The word's first value is number index * lanes of the array."""
    codes = np.uint64(0)
    for lane in range(lanes):
        v = divide(subtract(get_value(word, lane, kind), offset), scale)
        v = v if scale != np.float32(0) else np.float32(0)
        code = find_code(v, table, steps)
        if stochastic:
            code = round_up_at_random(v, code, table, steps, top, key, index * lanes + lane)
        codes |= np.uint64(code) << np.uint64(8 * lane)
    return codes


@compile_device
def decode_word(codes, scale, offset, table, kind, lanes, steps):
    """Return the word of values that the codes stand for, NaN where the scale is."""
    word = np.uint64(0)
    for lane in range(lanes):
        code = (codes >> np.uint64(8 * lane)) & np.uint64((1 << steps) - 1)
        value = add(multiply(table[np.uint32((1 << steps) + np.uint32(code))], scale), offset)
        word |= to_bits(value, kind) << np.uint64((32 if kind == FLOAT32 else 16) * lane)
    return word if scale == scale else _NAN_WORD


@compile_device
def get_constant(stored, b, kind, values, second, mean, zero, least):
    """Return the scale or the offset of block b, as kbit.kernels.cpu_linear.Constants describes them."""
    if kind == ABSENT:
        constant = np.float32(0)
    elif kind <= BFLOAT16:
        constant = get_value(np.uint64(stored[b]), 0, kind)
    else:
        constant = values[256 + np.int64(stored[b])]  # kbit.kernels.cuda_arrays.place_table
        if kind == DOUBLED:
            factor = as_bits(second[b // SECOND_BLOCK])
            magnitude = as_float(np.uint32(factor & np.uint32(0x7FFFFFFF)))
            is_zero = stored[b] == zero and factor >= _SIGN_BIT
            constant = np.float32(0) if is_zero else add(multiply(constant, magnitude), mean)
    return max(constant, least)


@compile_device
def word_peak(word, kind, lanes):
    """The largest magnitude in a word, as bits of its kind without the sign, which order as the numbers do."""
    peak = np.uint32(0)
    for lane in range(lanes):
        if kind == FLOAT32:
            magnitude = np.uint32((word >> np.uint64(32 * lane)) & np.uint64(0x7FFFFFFF))
        else:
            magnitude = np.uint32((word >> np.uint64(16 * lane)) & np.uint64(0x7FFF))
        peak = max(peak, magnitude)
    return peak


@compile_device
def to_ordered(value):
    """An unsigned integer that orders as the floats do, NaN outside +-Inf."""
    bits = as_bits(value)
    return np.uint32(bits ^ (ALL_BITS if bits >= _SIGN_BIT else _SIGN_BIT))


@compile_device
def from_ordered(ordered):
    return as_float(np.uint32(ordered ^ (_SIGN_BIT if ordered >= _SIGN_BIT else ALL_BITS)))


@compile_device
def round_scale(peak, scale_kind, smallest, largest):
    """Round a block's maximum to the scale's format: never to 0 unless it is 0, NaN beyond the range."""
    scale = get_value(to_bits(peak, scale_kind), 0, scale_kind)
    if scale == np.float32(0) and peak > np.float32(0):
        scale = smallest
    return scale if peak <= largest else _NAN


# ---- device functions: optimizers' states, see kbit.kernels.cpu_states ----


@compile_device
def move(p, g, m, v, rule, rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty, nesterov):
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
def read_state(values, scales, table, i, block, bits, steps):
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
def write_state(values, state, peaks, table, start, n, block, bits, steps, top, key, is_random):
    """Write eight values of a state: as they are, or as codes in units of their blocks' peaks."""
    stream = np.uint64(0)
    for j in range(8):
        i, code = start + j, np.uint32(0)
        if i < n and bits == EXACT_BITS:
            values[i] = state[j]
        elif i < n and bits != NO_STATE:
            scale = as_float(peaks[i // block])
            v = divide(state[j], scale) if scale != np.float32(0) else np.float32(0)
            code = find_code(v, table, steps)
            if is_random:
                code = round_up_at_random(v, code, table, steps, top, key, i)
        stream = (stream << np.uint64(bits)) | np.uint64(code)
    if 0 < bits < EXACT_BITS:
        for j in range(bits):
            byte = start // 8 * bits + j
            if byte < values.size:
                values[byte] = (stream >> np.uint64(8 * (bits - 1 - j))) & np.uint64(0xFF)
