"""Products of a few inputs with a matrix of packed codes, on the CPU: codes are decoded in registers on the way.

    y[m, r] = sum over blocks b of row r:  scale_b sum_i codebook[code_i] x[m, i]  +  offset_b sum_i x[m, i]

A chunk of 16, 32 or 64 codes lies in one block. Sums are in float32, lane by lane. A kernel is compiled for each number
of bits, batch and length of a chunk. Constants of blocks stay as they are stored and are decoded a row at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kbit.kernels import simd
from kbit.kernels.cpu_chunks import BFLOAT16, FLOAT16, FLOAT32, copy_bytes, jit

CODED, ABSENT = 3, 4  # kinds of stored constants beside those of cpu_chunks
BATCHES: Final = (1, 2, 4, 8)  # inputs that a kernel takes at once
SECOND_BLOCK: Final = 256  # coded constants that share one of `second`
_TASK: Final = 2**20  # codes that are worth a thread: a fifth of a millisecond
_LOOKED_UP: Final = 4  # codes of more bits are cheaper to compute with than to look up, where the codebook is linear
_NOTHING: Final = np.empty(0, np.float32)


class Constants(NamedTuple):
    """The scales or the offsets of all blocks, as they are stored.

    Attributes:
        kind: FLOAT32, FLOAT16 or BFLOAT16 for numbers, CODED for a byte each, ABSENT for 0 each.
        stored: their bytes.
        least: smaller ones are this.
        added: is added to each afterwards.
        values: what each byte stands for, if CODED.
        second: a factor for each SECOND_BLOCK coded constants, or empty. Where it has a minus sign, `zero` means 0.
        mean: is added to values times second.
        zero: the byte that may mean 0.
    """

    kind: int
    stored: UInt8[np.ndarray, " bytes"]
    least: float = -math.inf
    added: float = 0.0
    values: Float32[np.ndarray, " 256"] = _NOTHING
    second: Float32[np.ndarray, " blocks"] = _NOTHING
    mean: float = 0.0
    zero: int = 0


class Blocks(NamedTuple):
    """How blocks lie in a matrix.

    Attributes:
        columns: codes of a row.
        per_row: blocks of a row. 0 means that blocks run on over the ends of rows.
        block_size: codes of a block.
    """

    columns: int
    per_row: int
    block_size: int


class Matrix(NamedTuple):
    """A matrix of codes in natural order, row after row, and what they mean.

    Attributes:
        codes: the packed codes (kbit.numerics.reference.pack).
        bits: bits of a code, 2..8.
        codebook: the values, padded to 256.
        scales: the scales of the blocks.
        offsets: the offsets of the blocks.
        rows: how many rows there are.
        blocks: how long they are, and where their blocks begin.
        step: the difference of neighbours in the codebook, if all are as far apart, or 0.
    """

    codes: UInt8[np.ndarray, " bytes"]
    bits: int
    codebook: Float32[np.ndarray, " 256"]
    scales: Constants
    offsets: Constants
    rows: int
    blocks: Blocks
    step: float = 0.0


def find_chunk(columns: int, block_size: int) -> int:
    """Return how many codes a chunk has, or 0 if the kernels do not take such rows and blocks."""
    chunk = math.gcd(columns, block_size, 64)
    return chunk if chunk % 16 == 0 else 0


def multiply(x: Float32[np.ndarray, "batch in"], matrix: Matrix, threads: int = 1) -> Float32[np.ndarray, "batch out"]:
    """Return x W^T, computed on so many threads.

    See find_chunk for what W may be. Of more inputs than the largest of BATCHES, as many are taken after one another.
    """
    out = np.empty((len(x), matrix.rows), np.float32)
    for start in range(0, len(x), BATCHES[-1]):
        part = x[start : start + BATCHES[-1]]
        batch = next(size for size in BATCHES if size >= len(part))
        if batch == len(part):
            _multiply_batch(np.ascontiguousarray(part), matrix, out[start : start + batch], threads)
        else:
            padded = np.zeros((batch, x.shape[1]), np.float32)
            padded[: len(part)] = part
            results = np.empty((batch, matrix.rows), np.float32)
            _multiply_batch(padded, matrix, results, threads)
            out[start:] = results[: len(part)]
    return out


def _multiply_batch(
    x: Float32[np.ndarray, "batch in"], matrix: Matrix, out: Float32[np.ndarray, "batch out"], threads: int
) -> None:
    chunk = find_chunk(matrix.blocks.columns, matrix.blocks.block_size)
    is_linear = matrix.step != 0 and matrix.bits > _LOOKED_UP
    if simd.find_isa() == simd.AVX2 and matrix.bits in (5, 6) and not is_linear:
        chunk = 16  # in a longer one, the registers do not hold the table: 1.3 times slower
    has_offsets = matrix.offsets.kind != ABSENT or matrix.offsets.added != 0
    sums = x.reshape(-1, chunk).sum(1) if has_offsets else _NOTHING
    run = functools.partial(_make_kernel(matrix.bits, len(x), chunk, int(is_linear)), matrix, x.reshape(-1), sums, out)
    tasks = min(threads, matrix.rows * matrix.blocks.columns // _TASK)
    if tasks < 2:
        run(0, matrix.rows)
    else:
        ends = [matrix.rows * i // tasks for i in range(tasks + 1)]
        for done in [_start_threads(threads).submit(run, *part) for part in itertools.pairwise(ends)]:
            done.result()


@functools.cache
def _start_threads(count: int) -> ThreadPoolExecutor:
    """Return threads for the kernels, which run without Python's lock. OpenMP's would double the time to compile."""
    return ThreadPoolExecutor(count, "kbit")


os.register_at_fork(after_in_child=_start_threads.cache_clear)  # a forked process has none of them


@functools.cache
def _make_kernel(bits: int, batch: int, chunk: int, linear: int) -> Callable[..., None]:
    @jit(nogil=True)
    def multiply_part(matrix, x, sums, out, first, last):
        codes, row_bytes = matrix.codes, matrix.blocks.columns * bits // 8
        # A vector's codes are read with the bytes after them, so the last rows are copied to where such bytes are.
        safe = max(first, min(last, (codes.size - simd.OVERREAD) // row_bytes))
        start = np.int64(0)  # no literal, which would be a type of its own
        multiply_rows(codes, start, matrix, x, sums, out, first, safe, bits, batch, chunk, linear)
        start, size = safe * row_bytes, (last - safe) * row_bytes
        rest = np.empty(size + simd.OVERREAD, np.uint8)
        copy_bytes(codes, start, rest, 0, size)
        multiply_rows(rest, start, matrix, x, sums, out, safe, last, bits, batch, chunk, linear)

    kernel: Callable[..., None] = multiply_part
    return kernel


@intrinsic(prefer_literal=True)
def zeros(typing, count):
    """Return a tuple of so many vectors of zeros."""
    result = types.UniTuple(simd.Vector("float"), count.literal_value)

    def generate(context, builder, signature, arguments):
        return context.make_tuple(builder, result, [simd.every(simd.F32, 0.0)] * result.count)

    return result(count), generate


@intrinsic
def multiply_add(typing, values, x, place, stride, sums):
    """Return sums[m] + values x[place + m stride ...] for each m, rounded once."""

    def generate(context, builder, signature, arguments):
        values, x, place, stride, sums = arguments
        found = []
        for total in cgutils.unpack_tuple(builder, sums):
            inputs = simd.load_at(
                builder, simd.point(context, builder, signature.args[1], x, place, simd.vector_of(simd.F32)), 4
            )
            found.append(simd.add_product(builder, values, inputs, total))
            place = builder.add(place, stride)
        return context.make_tuple(builder, signature.return_type, found)

    return sums(values, x, types.uint64, types.uint64, sums), generate


@intrinsic
def scale_add(typing, values, scale, sums):
    """Return sums[m] + values[m] scale for each m, rounded once."""

    def generate(context, builder, signature, arguments):
        scale = simd.splat_value(builder, arguments[1])
        pairs = zip(*(cgutils.unpack_tuple(builder, arguments[i]) for i in (0, 2)), strict=True)
        found = [simd.add_product(builder, value, scale, total) for value, total in pairs]
        return context.make_tuple(builder, signature.return_type, found)

    return sums(values, types.float32, sums), generate


@intrinsic
def add_lanes(typing, vectors):
    """Return the sum of the lanes of each vector of a tuple."""
    result = types.UniTuple(types.float32, vectors.count)

    def generate(context, builder, signature, arguments):
        sums = [_add_lanes(builder, vector) for vector in cgutils.unpack_tuple(builder, arguments[0])]
        return context.make_tuple(builder, result, sums)

    return result(vectors), generate


def _add_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    while (half := vector.type.count // 2) >= 1:
        lower, upper = (simd.shuffle(builder, vector, range(start, start + half)) for start in (0, half))
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, ir.Constant(simd.I32, 0))


@intrinsic
def load_line(typing, codebook, step, bits):
    """Return what compute takes for a codebook of evenly spaced values: the first one and their distance."""
    result = types.UniTuple(simd.Vector("float"), 2)

    def generate(context, builder, signature, arguments):
        first = builder.load(context.make_array(signature.args[0])(context, builder, arguments[0]).data)
        return context.make_tuple(
            builder, result, [simd.splat_value(builder, first), simd.splat_value(builder, arguments[1])]
        )

    return result(codebook, types.float32, bits), generate


@intrinsic(prefer_literal=True)
def compute(typing, line, codes, bits):
    """Return first + step code, rounded once: look_up for a codebook of evenly spaced values."""
    most = 2**bits.literal_value - 1

    def generate(context, builder, signature, arguments):
        first, step = cgutils.unpack_tuple(builder, arguments[0])
        numbers = builder.sitofp(builder.and_(arguments[1], simd.every(simd.I32, most)), first.type)
        return simd.add_product(builder, numbers, step, first)

    return simd.Vector("float")(line, codes, bits), generate


def multiply_rows(*arguments: Any) -> None:
    """Fill out[:, first:last]. _multiply_rows_of compiles it per bits, batch and chunk."""
    raise NotImplementedError


@overload(multiply_rows, inline="never", prefer_literal=True)
def _multiply_rows_of(codes, start, matrix, x, sums, out, first, last, bits, batch, chunk, linear):
    k, m, codes_of_chunk = bits.literal_value, batch.literal_value, chunk.literal_value
    vectors, lanes = codes_of_chunk // simd.find_isa().lanes, simd.find_isa().lanes
    load, find = (load_line, compute) if linear.literal_value else (simd.load_table, simd.look_up)
    vector_bytes, lanes_of_x = np.uint64(lanes * k // 8), np.uint64(lanes)

    def fill_rows(codes, start, matrix, x, sums, out, first, last, bits, batch, chunk, linear):
        columns, block_size = matrix.blocks.columns, matrix.blocks.block_size
        table = load(matrix.codebook, np.float32(matrix.step), k)
        constants = np.empty(columns // codes_of_chunk + 2, np.float32)
        stride = np.uint64(columns)
        for r in range(first, last):
            block, left, count = find_blocks(r, matrix.blocks)
            decode_constants(matrix.scales, block, count, constants)
            place = np.uint64(r * columns * k // 8 - start)
            totals = zeros(m)
            column, b, until = np.uint64(0), np.uint64(0), left
            for _ in range(columns // codes_of_chunk):
                if m == 1:
                    part = zeros(m)
                    for _ in range(vectors):
                        values = find(table, simd.load_codes(codes, place, k), k)
                        part = multiply_add(values, x, column, stride, part)
                        place, column = place + vector_bytes, column + lanes_of_x
                    totals = scale_add(part, constants[b], totals)
                else:
                    scale = simd.splat(constants[b])
                    for _ in range(vectors):
                        values = simd.multiply(find(table, simd.load_codes(codes, place, k), k), scale)
                        totals = multiply_add(values, x, column, stride, totals)
                        place, column = place + vector_bytes, column + lanes_of_x
                until -= codes_of_chunk
                if until == 0:
                    b, until = b + np.uint64(1), block_size
            found = add_lanes(totals)
            for i in range(m):
                out[i, r] = found[i]
            if sums.size:
                decode_constants(matrix.offsets, block, count, constants)
                add_offsets(constants, sums, left, block_size, codes_of_chunk, out, r)

    return fill_rows


@jit()
def find_blocks(r, blocks):
    """Return the first block of row r, how many codes of it are in the row, and how many blocks are."""
    columns, block_size = blocks.columns, blocks.block_size
    if blocks.per_row:
        return r * blocks.per_row, block_size, blocks.per_row
    block = r * columns // block_size
    count = ((r + 1) * columns - 1) // block_size - block + 1
    return block, (block + 1) * block_size - r * columns, count


@jit()
def add_offsets(constants, sums, left, block_size, chunk, out, r):
    """Add offset_b sum x of each block to the row's results."""
    chunks = sums.size // out.shape[0]
    for i in range(out.shape[0]):
        total, b, until = np.float32(0), np.uint64(0), left
        for c in range(chunks):
            total += constants[b] * sums[i * chunks + c]
            until -= chunk
            if until == 0:
                b, until = b + np.uint64(1), block_size
        out[i, r] += total


@intrinsic(prefer_literal=True)
def read_word(typing, stored, place, bits):
    """Return word number `place`, of so many bits, of an array of bytes, as uint32."""

    def generate(context, builder, signature, arguments):
        kind = ir.IntType(bits.literal_value)
        first = builder.mul(arguments[1], ir.Constant(ir.IntType(64), bits.literal_value // 8))
        word = simd.load_at(builder, simd.point(context, builder, signature.args[0], arguments[0], first, kind), 1)
        return builder.zext(word, simd.I32) if bits.literal_value < 32 else word

    return types.uint32(stored, types.uint64, bits), generate


@jit()
def decode_constants(constants, first, count, buffer):
    """Fill the buffer with `count` constants from block `first` on, as numbers."""
    kind, stored, n, start = constants.kind, constants.stored, np.uint64(count), np.uint64(first)
    if kind == FLOAT32:
        for i in range(n):
            buffer[i] = np.uint32(read_word(stored, start + i, 32)).view(np.float32)
    elif kind == FLOAT16:
        for i in range(n):  # as in cpu_chunks.load, for finite numbers
            word = np.uint32(read_word(stored, start + i, 16))
            magnitude = np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
            buffer[i] = -magnitude if word & np.uint32(0x8000) else magnitude
    elif kind == BFLOAT16:
        for i in range(n):
            buffer[i] = np.uint32(read_word(stored, start + i, 16) << np.uint32(16)).view(np.float32)
    elif kind == CODED:
        _decode_coded(constants, start, n, buffer)
    else:
        for i in range(n):
            buffer[i] = np.float32(0)
    least, added = np.float32(constants.least), np.float32(constants.added)
    for i in range(n):
        buffer[i] = max(buffer[i], least) + added


@jit()
def _decode_coded(constants, start, n, buffer):
    values, stored, second = constants.values, constants.stored, constants.second
    for i in range(n):
        code = stored[start + i]
        value = values[code]
        if second.size:
            factor = second[(start + i) // np.uint64(SECOND_BLOCK)]
            value = value * abs(factor) + np.float32(constants.mean)
            if code == constants.zero and np.float32(factor).view(np.uint32) >> np.uint32(31):
                value = np.float32(0)
        buffer[i] = value
