"""Products of a few inputs with a matrix of packed codes, on NVIDIA GPUs: the twin of kbit.kernels.cpu_linear.

A warp takes a row of the matrix. Its threads read 8 codes each, neighbours next to each other, decode them in
registers and multiply them by all inputs of the batch. The warp's sums are added by shuffles. Constants of blocks stay
as they are stored. Sums are in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kbit.kernels.cpu_linear import ABSENT, BATCHES, CODED, Constants, Matrix
from kbit.kernels.cuda_arrays import (
    DeviceArray,
    as_numba,
    count_steps,
    count_values,
    device_of,
    launch,
    new_array,
    place_table,
    require_device,
    thread_count,
)
from kbit.kernels.cuda_device import BFLOAT16, DOUBLED, FLOAT16, FLOAT32
from kbit.kernels.cuda_kernels import make_multiply

_WORDS = {FLOAT32: np.uint32, FLOAT16: np.uint16, BFLOAT16: np.uint16, CODED: np.uint8, ABSENT: np.uint8}


def multiply(x: DeviceArray, matrix: Matrix) -> DeviceArray:
    """Return x W^T, float32 [batch * out], for float32 [batch * in].

    The arrays of the matrix are on the device, but for its codebook and for what coded constants stand for. Only scales
    may be coded.

    Raises:
        ValueError: another batch than those of BATCHES.
    """
    require_device()
    columns, size, scales, offsets = matrix.blocks.columns, count_values(x), matrix.scales, matrix.offsets
    if size // columns not in BATCHES or size % columns:
        raise ValueError(f"{size / columns:g} inputs at once are none of {', '.join(map(str, BATCHES))}")
    batch, n = size // columns, matrix.rows * columns
    with device_of(x, matrix.codes, scales.stored, offsets.stored):
        view = as_numba(x)
        out, codebook = new_array(x, batch * matrix.rows, "float32"), matrix.codebook[: 2**matrix.bits]
        group = min(32, thread_count())
        kinds = DOUBLED if count_values(scales.second) else scales.kind, offsets.kind
        kernel = make_multiply(matrix.bits, count_steps(codebook), batch, group, *kinds)
        launch(
            kernel, matrix.rows * group, as_numba(matrix.codes), place_table(codebook), _as_words(scales),
            _as_words(offsets), _place_values(scales), as_numba(scales.second) if kinds[0] == DOUBLED else view,
            np.float32(scales.mean), scales.zero, np.float32(scales.least), np.float32(offsets.added), view, n,
            *_find_rows(matrix, n), as_numba(out),
        )  # fmt: skip
    return out


def _as_words(constants: Constants) -> Any:
    return as_numba(constants.stored, _WORDS[constants.kind])


def _place_values(constants: Constants) -> Any:
    """Return what bytes stand for on the device, behind 256 places that are not used (place_table)."""
    values = constants.values if constants.kind == CODED else np.zeros(256, np.float32)
    return place_table(np.ascontiguousarray(values, np.float32))


def _find_rows(matrix: Matrix, n: int) -> tuple[int, int, int, int]:
    """Return the codes after which blocks begin anew, the columns, and a block's size and its log2 (or -1)."""
    columns, block = matrix.blocks.columns, matrix.blocks.block_size
    row = columns if matrix.blocks.per_row and columns % block else n
    is_power = row == n and block & (block - 1) == 0
    return row, columns, block, block.bit_length() - 1 if is_power else -1
