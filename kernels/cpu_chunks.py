"""What the CPU kernels do to one chunk of a tensor, in buffers that stay in the L1 cache.

Loops run over unsigned indices: numba then adds no test for negative ones, and LLVM vectorises the loop.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numba import njit, types
from numba.extending import intrinsic, overload

# Elements of a chunk: enough to hide the scheduling of a task, few enough for the L1 cache. A multiple of 8, so that
# the packed codes of a chunk are whole bytes.
CHUNK = 4096

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2

Thresholds = Float32[np.ndarray, " thresholds"]

# Unsigned constants, as numba makes a float of an unsigned and a signed integer together. The masks keep the lower half
# of each 16, 32 and 64 bits.
_1, _8, _16, _32 = (np.uint64(i) for i in (1, 8, 16, 32))
_BYTES, _HALVES, _LOWER = (np.uint64(i) for i in (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF))


def jit(parallel: bool = False, nogil: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile, keep on disk, and let x / 0 be IEEE's (an exception would keep loops from being vectorised)."""

    def decorate(function: Callable[..., Any]) -> Any:
        kernel: Any = njit(function, parallel=parallel, nogil=nogil, cache=True, error_model="numpy")
        # What is on disk holds the code of the functions called, too, which numba looks for in the kernel's file alone.
        kernel._cache._cache_file._source_stamp = _hash_sources()
        return kernel

    return decorate


@functools.cache
def _hash_sources() -> str:
    """Return a hash of all files with CPU kernels."""
    digest = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("cpu*.py"), Path(__file__).with_name("simd.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class SearchTable(NamedTuple):
    """Thresholds prepared for the search: see kbit.kernels.cpu."""

    first: UInt8[np.ndarray, " 65536"]  # by upper half-word: thresholds at or below the least value that begins with it
    thresholds: Thresholds  # padded with NaN to 257, so that the comparison after the last one fails, of +inf too
    compares: int  # the most thresholds that lie inside one cell, at least 1


@functools.lru_cache(maxsize=64)
def make_search_table(thresholds_bytes: bytes) -> SearchTable:
    """Count, for each cell, the thresholds at or below its least value and inside it (bytes, to be hashable)."""
    thresholds = np.frombuffer(thresholds_bytes, np.float32)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    ends = upper.view(np.float32), (upper | 0xFFFF).view(np.float32)
    lowest, highest = np.fmin(*ends), np.fmax(*ends)  # a negative cell begins at its largest magnitude
    first = np.searchsorted(thresholds, lowest, side="right")
    compares = (np.searchsorted(thresholds, highest, side="right") - first).max()
    padded = np.full(257, np.nan, np.float32)
    padded[: thresholds.size] = thresholds
    return SearchTable(first.astype(np.uint8), padded, max(1, int(compares)))


def pad_codebook(codebook: Float32[np.ndarray, " values"]) -> Float32[np.ndarray, " 256"]:
    padded = np.full(256, codebook[-1], np.float32)
    padded[: codebook.size] = codebook
    return padded


def typed_words(x: Any) -> tuple[Any, int]:
    """Return an array of values as float32, or as uint16 bits, with the kind of number they are."""
    if x.dtype == np.float32:
        return x, FLOAT32
    if x.dtype == np.float16:
        return x.view(np.uint16), FLOAT16
    return x, BFLOAT16


def load(words: Any, kind: int, start: int, count: int, buffer: Any) -> None:
    """Convert `count` values from `start` on to float32 in the buffer. _load_any compiles it per type."""
    raise NotImplementedError


@overload(load, inline="never")
def _load_any(words, kind, start, count, buffer):
    if isinstance(words.dtype, types.Float):

        def load_float32(words, kind, start, count, buffer):
            for i in range(np.uint64(count)):
                buffer[i] = words[np.uint64(start) + i]

        return load_float32

    def load_16_bits(words, kind, start, count, buffer):
        if kind == BFLOAT16:
            for i in range(np.uint64(count)):
                buffer[i] = _from_bfloat16(words[np.uint64(start) + i])
            return
        for i in range(np.uint64(count)):
            buffer[i] = _from_float16(words[np.uint64(start) + i])

    return load_16_bits


@jit()
def _from_bfloat16(word):
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@jit()
def _from_float16(word):
    """Shift exponent and fraction into float32's place. Then 2^112 corrects the bias, for subnormals too."""
    magnitude = np.uint32(np.uint32(word & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
    magnitude = magnitude if magnitude < np.float32(65536) else np.float32(np.inf)  # exponent 31: Inf and NaN
    return -magnitude if word & np.uint32(0x8000) else magnitude


def store(values: Any, count: int, words: Any, kind: int, start: int) -> None:
    """Round float32 values to the type of words. _store_any compiles it per type."""
    raise NotImplementedError


@overload(store, inline="never")
def _store_any(values, count, words, kind, start):
    if isinstance(words.dtype, types.Float):

        def store_float32(values, count, words, kind, start):
            for i in range(np.uint64(count)):
                words[np.uint64(start) + i] = values[i]

        return store_float32

    def store_16_bits(values, count, words, kind, start):
        if kind == BFLOAT16:
            for i in range(np.uint64(count)):
                word = np.float32(values[i]).view(np.uint32)
                odd = np.uint32((word >> np.uint32(16)) & np.uint32(1))
                rounded = np.uint32(word + np.uint32(0x7FFF) + odd)  # to nearest, ties to even
                words[np.uint64(start) + i] = np.uint16(np.uint32(rounded >> np.uint32(16)))
            return
        for i in range(np.uint64(count)):
            words[np.uint64(start) + i] = _to_float16(values[i])

    return store_16_bits


@jit()
def _to_float16(value):
    """Return the bits of the nearest float16, ties to even, infinite beyond its range."""
    word = np.float32(value).view(np.uint32)
    sign = np.uint32((word >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(word & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    # 112: difference of the biases. Where the subtraction wraps around, the subnormal branch is taken.
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13))
    # below 2^-14 a float16 is a multiple of 2^-24, which is the spacing of float32 from 0.5 to 1
    small = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(small.view(np.uint32) - np.uint32(0x3F000000))
    if magnitude < np.uint32(113 << 23):
        return np.uint16(sign | subnormal)
    return np.uint16(sign | min(normal, np.uint32(0x7C00)))


@jit()
def extremes(integers, kind, start, count):
    """Return the least and the largest of `count` values as float32. The values are given by their bits, signed.

    Integers that order as floats do (NaN outside +-Inf) are compared, since integers vectorise.
    """
    if kind == FLOAT32:
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(np.uint64(start), np.uint64(start + count)):
            word = np.int32(integers[i])
            ordered = np.int32(word ^ np.int32(np.int32(word >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            low, high = min(low, ordered), max(high, ordered)
        return _from_ordered(low, 0x7FFFFFFF, kind), _from_ordered(high, 0x7FFFFFFF, kind)
    least, most = np.int16(0x7FFF), np.int16(-0x8000)
    for i in range(np.uint64(start), np.uint64(start + count)):
        half = np.int16(integers[i])
        place = np.int16(half ^ np.int16(np.int16(half >> np.int16(15)) & np.int16(0x7FFF)))
        least, most = min(least, place), max(most, place)
    return _from_ordered(least, 0x7FFF, kind), _from_ordered(most, 0x7FFF, kind)


@jit()
def _from_ordered(ordered, magnitude, kind):
    word = np.uint32(np.int32(ordered ^ magnitude if ordered < 0 else ordered))
    if kind == FLOAT32:
        return np.uint32(word).view(np.float32)
    return _from_bfloat16(word) if kind == BFLOAT16 else _from_float16(word)


@jit()
def block_start(b, row, block_size):
    """Return the first element of block b."""
    per_row = (row + block_size - 1) // block_size
    return (b // per_row) * row + (b % per_row) * block_size


@jit()
def first_block(start, row, block_size):
    """Return the block of element `start`, where its row ends, and where the block ends."""
    r = start // row
    in_row = (start - r * row) // block_size
    row_end = (r + 1) * row
    return (
        r * ((row + block_size - 1) // block_size) + in_row,
        row_end,
        min(row_end, r * row + (in_row + 1) * block_size),
    )


@jit()
def next_block(b, row_end, block_end, row, block_size):
    """Return what first_block gives for the element after the block. A division would slow short blocks down."""
    if block_end == row_end:
        row_end += row
    return b + 1, row_end, min(row_end, block_end + block_size)


@jit()
def normalize(buffer, start, end, scales, offsets, row, block_size):
    """Replace the buffer's values by v = (x - offset) / scale, 0 where the scale is 0."""
    b, row_end, block_end = first_block(start, row, block_size)
    i = start
    while i < end:
        scale, offset, stop = scales[b], offsets[b], min(block_end, end)
        if scale == np.float32(0):
            buffer[i - start : stop - start] = np.float32(0)
        else:
            for j in range(np.uint64(i - start), np.uint64(stop - start)):
                buffer[j] = (buffer[j] - offset) / scale
        i = stop
        b, row_end, block_end = next_block(b, row_end, block_end, row, block_size)


@jit()
def denormalize(buffer, start, end, scales, offsets, row, block_size):
    """Replace the buffer's codebook values by value * scale + offset."""
    b, row_end, block_end = first_block(start, row, block_size)
    i = start
    while i < end:
        scale, offset, stop = scales[b], offsets[b], min(block_end, end)
        for j in range(np.uint64(i - start), np.uint64(stop - start)):
            buffer[j] = buffer[j] * scale + offset
        i = stop
        b, row_end, block_end = next_block(b, row_end, block_end, row, block_size)


@jit()
def look_up(codes, count, table, values):
    """Fill values with table[code]."""
    for j in range(np.uint64(count)):
        values[j] = table[codes[j]]


@jit()
def round_values(buffer, count, first, thresholds, codebook):
    """Replace normalised values by their codebook values: find_codes and look_up in one, where compares is 1."""
    for j in range(np.uint64(count)):
        v = buffer[j]
        code = first[np.uint32(np.float32(v).view(np.uint32) >> np.uint32(16))]
        buffer[j] = codebook[np.uint8(code + np.uint8(v >= thresholds[code]))]


@jit()
def find_codes(buffer, count, first, thresholds, compares, codes):
    """Codes of normalised values: what the table knows from the upper half of v, then comparisons. See kernels.cpu."""
    halves = buffer.view(np.uint16)  # read from memory, where a register would have to be moved
    for j in range(np.uint64(count)):
        code = first[halves[_1 + j + j]]
        codes[j] = code + np.uint8(buffer[j] >= thresholds[code])
    for _ in range(1, compares):
        for j in range(np.uint64(count)):
            codes[j] += np.uint8(buffer[j] >= thresholds[codes[j]])


@jit()
def round_up_at_random(buffer, count, codebook, levels, key, start, codes):
    """Stochastic rounding: from the value below, up by one with the probability that makes it unbiased."""
    for j in range(np.uint64(count)):
        code = np.int64(codes[j])
        if code + 1 < levels:
            share = (buffer[j] - codebook[code]) / (codebook[code + 1] - codebook[code])
            bits = mix((np.uint64(start) + j) * np.uint64(0x9E3779B97F4A7C15) + key) >> np.uint64(40)
            codes[j] = code + (share > np.float32(bits) * np.float32(2.0**-24))


@jit()
def mix(z):
    """The finalizer of splitmix64. See kbit.numerics.reference.uniform."""
    z = np.uint64(z)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit()
def swap_bytes(word):
    """Reverse the bytes of a 64-bit word (LLVM makes one instruction of it)."""
    word = (word & _BYTES) << _8 | ((word >> _8) & _BYTES)
    word = (word & _HALVES) << _16 | ((word >> _16) & _HALVES)
    return word << _32 | word >> _32


@jit()
def copy_bytes(source, source_start, target, target_start, count):
    """Copy bytes (numba's own slice assignment goes byte by byte, through a copy)."""
    for i in range(np.uint64(count)):
        target[np.uint64(target_start) + i] = source[np.uint64(source_start) + i]


@intrinsic
def _write_word(typing, array, place, word):
    """Write a 64-bit word to array[place] and the bytes after it, wherever that is."""

    def generate(context, builder, signature, arguments):
        array, place, word = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        builder.store(word, builder.bitcast(builder.gep(data, [place]), word.type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@jit()
def pack_codes(codes, count, bits, packed, position):
    """Write `count` codes, `bits` each, from byte `position` on. The codes after them in their group of 8 must be 0.

    Eight codes are one (little-endian) 64-bit word. It is closed up in three steps to 8 * bits bits, the first byte the
    highest. Then each group is written over the end of the one before, whose last bytes mean nothing. codes is changed.
    """
    if bits == 8:
        copy_bytes(codes, 0, packed, position, count)
        return
    if bits == 4:  # what follows does the same, in four times the time
        pairs = codes.view(np.uint16)
        for i in range(np.uint64(count + 1) // np.uint64(2)):
            packed[np.uint64(position) + i] = np.uint8(pairs[i] << np.uint16(4) | pairs[i] >> np.uint16(8))
        return
    k, width = np.uint64(bits), np.uint64(8 * bits)
    groups, stream = codes.view(np.uint64), np.empty(CHUNK, np.uint8)
    number = np.uint64(count + 7) // _8
    for g in range(number):  # a loop of its own, which vectorises
        word = groups[g]
        word = (word & _BYTES) << k | ((word >> _8) & _BYTES)
        word = (word & _HALVES) << (k + k) | ((word >> _16) & _HALVES)
        word = (word & _LOWER) << (width >> _1) | word >> _32
        groups[g] = swap_bytes(word << (np.uint64(64) - width))
    for g in range(number):
        _write_word(stream, g * k, groups[g])
    copy_bytes(stream, 0, packed, position, (count * bits + 7) // 8)


@jit()
def unpack_codes(packed, position, count, bits, codes):
    """Undo pack_codes. It may write up to 7 codes more than `count`. Codes beyond the end of `packed` are any."""
    if bits == 8:
        copy_bytes(packed, position, codes, 0, min(count, packed.size - position))
        return
    k, width = np.uint64(bits), np.uint64(8 * bits)
    singles = ((_1 << k) - _1) * np.uint64(0x0001000100010001)
    pairs = ((_1 << (k + k)) - _1) * np.uint64(0x0000000100000001)
    fours, eights = (_1 << (width >> _1)) - _1, (_1 << width) - _1
    groups, stream = codes.view(np.uint64), np.empty(CHUNK // 8 + 1, np.uint64)
    size = min((count * bits + 7) // 8, packed.size - position)
    copy_bytes(packed, position, stream.view(np.uint8), 0, size)
    held, left, w = swap_bytes(stream[0]), np.uint64(64), np.uint64(0)
    for g in range(np.uint64(count + 7) // _8):
        if width <= left:
            left -= width
            word = held >> left
        else:
            over = width - left
            w += _1
            word = held << over
            held = swap_bytes(stream[w])
            left = np.uint64(64) - over
            word |= held >> left
        word &= eights
        word = word >> (width >> _1) | (word & fours) << _32
        word = ((word >> (k + k)) & pairs) | (word & pairs) << _16
        groups[g] = ((word >> k) & singles) | (word & singles) << _8
