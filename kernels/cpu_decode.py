"""What codes stand for, on vectors: the fast half of dequantization, for codes that permutations look up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from kbit.kernels import simd
from kbit.kernels.cpu_chunks import first_block, jit, next_block


def is_fast(bits: int, row: int, block_size: int) -> bool:
    """Whether decode_vectors takes such codes: few bits, and rows and blocks of whole vectors on every CPU."""
    return 2 <= bits <= simd.find_isa().permuted_bits and row % 16 == 0 and block_size % 16 == 0


@jit()
def decode_vectors(packed, start, end, bits, grid, buffer):
    """Fill the buffer with codebook[code] * scale + offset of codes start .. end - 1.

    It reads simd.OVERREAD bytes after the first code of the last vector.
    """
    if bits == 2:
        fill(packed, start, end, grid, buffer, 2)
    elif bits == 3:
        fill(packed, start, end, grid, buffer, 3)
    elif bits == 4:
        fill(packed, start, end, grid, buffer, 4)
    elif bits == 5:
        fill(packed, start, end, grid, buffer, 5)
    elif bits == 6:
        fill(packed, start, end, grid, buffer, 6)
    else:
        fill(packed, start, end, grid, buffer, 7)


def fill(*arguments: Any) -> None:
    """Fill the buffer. _fill_of compiles it per number of bits."""
    raise NotImplementedError


@overload(fill, inline="never", prefer_literal=True)
def _fill_of(packed, start, end, grid, buffer, bits):
    k, lanes = bits.literal_value, simd.find_isa().lanes
    if k > simd.find_isa().permuted_bits:
        return lambda packed, start, end, grid, buffer, bits: None  # is_fast says that nobody calls it
    step, vector_bytes = np.uint64(lanes), np.uint64(lanes * k // 8)

    def fill_blocks(packed, start, end, grid, buffer, bits):
        table = simd.load_table(grid.codebook, k)
        b, row_end, block_end = first_block(start, grid.row, grid.block_size)
        i, place, j = start, np.uint64(start * k // 8), np.uint64(0)
        while i < end:
            stop = min(block_end, end)
            scale, offset = simd.splat(grid.scales[b]), simd.splat(grid.offsets[b])
            for _ in range(np.uint64(stop - i) // step):
                values = simd.look_up(table, simd.load_codes(packed, place, k), k)
                simd.store(buffer, j, simd.add(simd.multiply(values, scale), offset))
                place, j = place + vector_bytes, j + step
            i = stop
            b, row_end, block_end = next_block(b, row_end, block_end, grid.row, grid.block_size)

    return fill_blocks
