"""The quantizer in plain NumPy: the slow truth that every kernel is tested against, bit for bit.

The functions have the names and arguments of kbit.kernels.cpu and cpu_states. Values and arithmetic are float32 here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8, UInt64
from numpy.typing import NDArray

from kbit.kernels import cpu_states
from kbit.kernels.cpu_states import EXACT_BITS, NO_STATE, NOT_RANDOM, Rule, State
from kbit.numerics.codebooks import Codebook

Values = Float32[np.ndarray, " n"]
Codes = UInt8[np.ndarray, " n"]
Scales = Float32[np.ndarray, " blocks"]
Thresholds = Float32[np.ndarray, " thresholds"]


def block_extremes(x: Values, row: int, block_size: int) -> tuple[Scales, Scales]:
    """Return the least and the largest value of each block, NaN where a block holds NaN."""
    blocks = [x[block] for block in iterate_blocks(x.size, row, block_size)]
    low = np.array([block.min() for block in blocks], np.float32)
    high = np.array([block.max() for block in blocks], np.float32)
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
    """Return the code of each value: v = (x - offset_b) / scale_b (0 where the scale is 0), code = thresholds <= v.

    With a seed the rounding is stochastic: thresholds are the codebook's own values, so the code is the neighbour
    below, and goes up by one if u < (v - below) / (above - below), u uniform from the seed and the element's index.
    """
    codes = np.empty(x.size, np.uint8)
    for b, block in enumerate(iterate_blocks(x.size, row, block_size)):
        shifted = x[block] - offsets[b]
        v = shifted / scales[b] if scales[b] != 0 else np.zeros_like(shifted)
        codes[block] = (v[:, None] >= thresholds).sum(axis=1)
        if seed is not None:
            below = codes[block]
            above = np.minimum(below + 1, codebook.size - 1)
            gap = np.where(above > below, codebook[above] - codebook[below], np.float32(1))
            codes[block] += ((v - codebook[below]) / gap > uniform(seed, block.start, block.stop)) & (above > below)
    return codes


def dequantize(codes: Codes, scales: Scales, offsets: Scales, codebook: Codebook, row: int, block_size: int) -> Values:
    """Return codebook[code] * scale_b + offset_b."""
    values = np.empty(codes.size, np.float32)
    for b, block in enumerate(iterate_blocks(codes.size, row, block_size)):
        values[block] = codebook[codes[block]] * scales[b] + offsets[b]
    return values


def fake_quantize(
    x: Values,
    scales: Scales,
    offsets: Scales,
    codebook: Codebook,
    thresholds: Thresholds,
    row: int,
    block_size: int,
    seed: int | None = None,
) -> Values:
    """Return dequantize(quantize(x))."""
    codes = quantize(x, scales, offsets, codebook, thresholds, row, block_size, seed)
    return dequantize(codes, scales, offsets, codebook, row, block_size)


def pack(codes: Codes, bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Write the codes one after the other, bits each, most significant bit first: ceil(n bits / 8) bytes.

    At 4 bits the first code of a byte is its high half, as in bitsandbytes.
    """
    stream = np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(stream.ravel())


def unpack(packed: UInt8[np.ndarray, " bytes"], bits: int, n: int) -> Codes:
    """Return the n codes that pack wrote."""
    stream = np.unpackbits(packed)[: n * bits].reshape(n, bits)
    return np.packbits(np.pad(stream, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


def take_step(p: Values, g: Values, momentum: State, variance: State, rule: Rule) -> None:
    """Change the parameters p and their states by an optimizer's step with the gradient g: see Rule for the formulas.

    A state is decoded, computed and encoded again. The scale of a block is its new largest magnitude.
    """
    m, v = _decode_state(momentum, p.size), _decode_state(variance, p.size)
    if rule.penalty != 0:
        g = g + rule.penalty * p
    match rule.kind:
        case cpu_states.ADAM:
            m = rule.beta1 * m + rule.rest1 * g
            v = rule.beta2 * v + rule.rest2 * (g * g)
            move = m / (np.sqrt(v) * rule.root + rule.eps)
        case cpu_states.SGD:
            m = rule.beta1 * m + rule.rest1 * g
            move = g + rule.beta1 * m if rule.nesterov else m
        case _:
            move = np.sign(rule.beta1 * m + rule.rest1 * g)
            m = rule.beta2 * m + rule.rest2 * g
    p[:] = p * rule.decay - rule.rate * move
    _encode_state(momentum, m)
    _encode_state(variance, v)


def _decode_state(state: State, n: int) -> Values:
    if state.bits in (EXACT_BITS, NO_STATE):
        return state.values.copy() if state.bits == EXACT_BITS else np.zeros(n, np.float32)
    scales = np.repeat(state.scales, state.block_size)[:n]
    return np.asarray(state.codebook[unpack(state.codes, state.bits, n)] * scales, np.float32)


def _encode_state(state: State, values: Values) -> None:
    if state.bits == EXACT_BITS:
        state.values[:] = values
    elif state.bits != NO_STATE:
        blocks = (values.size, state.block_size)
        state.scales[:] = [np.abs(values[block]).max() for block in iterate_blocks(values.size, *blocks)]
        seed = None if state.seed == NOT_RANDOM else state.seed
        tables = (np.zeros_like(state.scales), state.codebook[: state.levels], state.thresholds)
        state.codes[:] = pack(quantize(values, state.scales, *tables, *blocks, seed), state.bits)


def iterate_blocks(n: int, row: int, block_size: int) -> Iterator[slice]:
    """Yield the blocks in order: each row of `row` elements is cut into blocks, the last of which may be short."""
    for start in range(0, n, row):
        for begin in range(start, start + row, block_size):
            yield slice(begin, min(begin + block_size, start + row))


def uniform(seed: int, start: int, stop: int) -> Float32[np.ndarray, " n"]:
    """Return numbers in [0, 1), multiples of 2^-24, that depend on the seed and each element's index alone.

    The finalizer of splitmix64 (Steele, Lea & Flood 2014) on index * golden ratio + mixed seed.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], np.uint64))
        counter = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(counter + key) >> np.uint64(40)
    uniforms: NDArray[np.float32] = bits.astype(np.float32) * np.float32(2.0**-24)
    return uniforms


def _mix(z: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
