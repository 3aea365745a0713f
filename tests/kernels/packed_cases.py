"""A program that tests the kernels that work on vectors on one kind of CPU: python packed_cases.py NAME.

NAME is what numba compiles for (NUMBA_CPU_NAME), so it is set before numba is imported. For avx512-emulated, the
AVX-512 instructions are replaced by what Intel's manual says that they do, and LLVM splits the vectors for a CPU
without them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import numpy as np

NAMES = {"generic": "x86-64", "avx2": "haswell", "avx512-emulated": "haswell", "avx512": None}
# Each takes seconds to compile. What check_dequantize decodes on vectors is not repeated for each number of bits.
BITS = {"generic": range(2, 9), "avx2": (3, 5, 6, 7, 8), "avx512-emulated": (3, 5, 8), "avx512": range(2, 9)}
KIND = sys.argv[1]
if (name := NAMES[KIND]) is not None:
    os.environ |= {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
if "emulated" in KIND:  # numba keeps kernels by the CPU's name, which is that of avx2
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()

from llvmlite import ir  # noqa: E402

from kbit.kernels import cpu, simd  # noqa: E402
from kbit.kernels.cpu_chunks import CHUNK, FLOAT16, FLOAT32  # noqa: E402
from kbit.kernels.cpu_linear import ABSENT, BATCHES, Blocks, Constants, Matrix, multiply  # noqa: E402
from kbit.numerics import reference  # noqa: E402

Array = np.ndarray[Any, Any]


def emulate_avx512() -> None:
    """Let the kernels be compiled for AVX-512, with its instructions lane by lane."""
    simd.find_isa = lambda: simd.AVX512  # type: ignore[assignment]
    compiled = simd.call_target

    def call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Any) -> ir.Value:
        if "avx512" not in name:
            return compiled(builder, name, result, arguments)
        i32 = ir.IntType(32)

        def take(vector: ir.Value, lane: ir.Value) -> ir.Value:
            return builder.extract_element(vector, lane)

        def number(value: int) -> ir.Constant:
            return ir.Constant(i32, value)

        found = ir.Constant(result, ir.Undefined)
        for lane in range(result.count):
            if "pshuf.b" in name:  # byte b & 15 of the same 16 bytes, 0 where bit 7 of b is set
                codes, places = arguments
                place = builder.zext(take(places, number(lane)), i32)
                inside = builder.add(builder.and_(place, number(15)), number(lane // 16 * 16))
                is_zero = builder.icmp_unsigned(">=", place, number(128))
                value = builder.select(is_zero, ir.Constant(ir.IntType(8), 0), take(codes, inside))
            elif "permvar" in name:  # lane i of the table, i the low 4 bits
                table, places = arguments
                value = take(table, builder.and_(take(places, number(lane)), number(15)))
            else:  # vpermi2var: the low 4 bits choose the lane, bit 4 the table
                low, places, high = arguments
                place = take(places, number(lane))
                inside, bit = builder.and_(place, number(15)), builder.and_(place, number(16))
                is_low = builder.icmp_unsigned("==", bit, number(0))
                value = builder.select(is_low, take(low, inside), take(high, inside))
            found = builder.insert_element(found, value, number(lane))
        return found

    simd.call_target = call


def check(
    bits: int, batch: int, rows: int, blocks: Blocks, *, is_offset: bool, sixteen: bool, is_even: bool = False
) -> None:
    """Compare the kernel with the NumPy twin's dequantized matrix, multiplied in float64.

    The values of an even table are as far apart, and are computed instead of looked up.
    """
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, rows * blocks.columns).astype(np.uint8)
    codebook = np.full(256, 1, np.float32)
    codebook[: 2**bits] = np.linspace(-0.75, 1, 2**bits) if is_even else np.sort(rng.uniform(-1, 1, 2**bits))
    row = blocks.columns if blocks.per_row else codes.size
    size = min(row, blocks.block_size)
    count = codes.size // row * -(-row // size)
    scales, offsets = (rng.uniform(0.5, 2, count).astype(np.float16 if sixteen else np.float32) for _ in range(2))
    kind = FLOAT16 if sixteen else FLOAT32
    absent = Constants(ABSENT, np.empty(0, np.uint8))
    matrix = Matrix(
        reference.pack(codes, bits), bits, codebook, Constants(kind, scales.view(np.uint8)),
        Constants(kind, offsets.view(np.uint8)) if is_offset else absent, rows, blocks,
        1.75 / (2**bits - 1) if is_even else 0.0,
    )  # fmt: skip
    numbers = scales.astype(np.float32), (offsets if is_offset else 0 * offsets).astype(np.float32)
    w = reference.dequantize(codes, *numbers, codebook, row, size).reshape(rows, -1).astype(np.float64)
    x = rng.standard_normal((batch, blocks.columns)).astype(np.float32)
    y, expected = multiply(x, matrix), x.astype(np.float64) @ w.T
    error = np.abs(y - expected).max() / np.linalg.norm(w, axis=1).max()  # the deviation of y
    assert error < 2e-6, (KIND, bits, batch, rows, blocks, error)


def check_dequantize(bits: int) -> None:
    """Compare cpu.dequantize with its NumPy twin, bit for bit: rows of whole and short blocks, and blocks across rows.

    The last chunk is decoded code by code, the ones before it on vectors.
    """
    rng = np.random.default_rng(bits)
    codebook = np.sort(rng.uniform(-1, 1, 2**bits)).astype(np.float32)
    for rows, columns, block_size in ((80, 208, 64), (1, 2 * CHUNK + 272, 48), (1, 3 * CHUNK, 3 * CHUNK)):
        codes = rng.integers(0, 2**bits, rows * columns).astype(np.uint8)
        assert codes.size > 2 * CHUNK
        scales, offsets = (rng.uniform(0.5, 2, rows * -(-columns // block_size)).astype(np.float32) for _ in range(2))
        expected = reference.dequantize(codes, scales, offsets, codebook, columns, block_size)
        packed, out = reference.pack(codes, bits), np.empty(codes.size, np.float32)
        found = cpu.dequantize(packed, scales, offsets, codebook, columns, block_size, out, bits)
        wrong = int((found != expected).sum())
        assert wrong == 0, (KIND, bits, rows, columns, block_size, wrong)


def check_quantize(bits: int) -> None:
    """Compare codes that are found on vectors, and the values that they stand for, with the NumPy twin's.

    The last block of a row is short, and blocks go on over the ends of chunks.
    """
    rng = np.random.default_rng(bits)
    codebook = np.sort(rng.uniform(-1, 1, 2**bits - 1)).astype(np.float32)
    thresholds = ((codebook[:-1] + codebook[1:]) / 2).astype(np.float32)
    for rows, columns, block_size in ((10, 1040, 64), (1, 2 * CHUNK + 272, 48), (3, 50, 16)):
        x = rng.choice([*thresholds, *rng.uniform(-1, 1, 50)], rows * columns).astype(np.float32)
        scales, offsets = (rng.choice([0, 1, 0.5], rows * -(-columns // block_size)).astype(np.float32) for _ in "so")
        arguments = (x, scales, offsets, codebook, thresholds, columns, block_size)
        found = cpu.quantize(*arguments, None, bits)
        np.testing.assert_array_equal(found, reference.pack(reference.quantize(*arguments), bits))
        values = cpu.fake_quantize(*arguments, None, np.empty_like(x))
        np.testing.assert_array_equal(values, reference.fake_quantize(*arguments))


def main() -> None:
    if KIND == "avx512-emulated":
        emulate_avx512()
    assert simd.find_isa().name == KIND.removesuffix("-emulated"), simd.find_isa()
    for bits in range(2, 9):
        check_dequantize(bits)
    for bits in (2, 3, 4, 5):
        check_quantize(bits)
    check(6, 1, 5, Blocks(128, 0, 64), is_offset=True, sixteen=True, is_even=True)
    for bits in BITS[KIND]:
        # one chunk length a width, so that each is compiled once: 64, and 16 with blocks across the ends of rows
        check(bits, 1, 7, Blocks(192, 0, 64), is_offset=False, sixteen=True)
        check(bits, 1, 1, Blocks(64, 0, 64), is_offset=True, sixteen=True)
        check(bits, 1, 3, Blocks(320, 3, 128), is_offset=True, sixteen=False)  # a row's last block is short
        check(bits, 1, 5, Blocks(448, 0, 256), is_offset=True, sixteen=True)  # blocks of two rows
        check(bits, 1, 5, Blocks(128, 0, 640), is_offset=True, sixteen=True)  # one block
    assert BATCHES[-1] == 8
    for batch in (7, 9):
        check(3, batch, 5, Blocks(192, 0, 64), is_offset=True, sixteen=True)
    check(3, 1, 37, Blocks(48, 0, 16), is_offset=True, sixteen=True)
    print("equal")


main()
