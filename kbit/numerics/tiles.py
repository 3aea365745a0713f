"""Rows of a quantized matrix, dequantized a few at a time: the bits of QuantizedTensor.dequantize in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from kbit.numerics.backend import DeviceArray, choose_backend, torch_threads_kept
from kbit.numerics.quantized_tensor import QuantizedTensor, find_computed_dtype

# On a CPU 64 rows were measured to be 15-30% slower, and more than 256 leave the cache. On a GPU each tile costs
# several launches, which take longer than their work on a few rows, so that one tile is most matrices (not measured).
TILE_ROWS: Final = {"cpu": 256, "cuda": 8192}
# MKL takes groups of rows together, and the rest by other code, with other last digits. So tiles begin at multiples of
# this, and a shorter rest joins the last tile.
_ALIGNED_ROWS: Final = 32


class Tiles:
    """A quantized matrix [rows, columns] that is dequantized in parts.

    A part begins at a row whose first code begins a byte and a block, so at a multiple of `step`.
    """

    def __init__(self, q: QuantizedTensor) -> None:
        if len(q.shape) != 2:
            raise ValueError(f"a quantized tensor of shape {q.shape} is no matrix: dequantize it as a whole")
        self.q = q
        self.rows, self.columns = q.shape
        row, block_size = q.spec.find_block_shape(q.shape)
        self._is_one_block = row == block_size and row != self.columns
        self._is_by_row = row == self.columns or self.columns % block_size == 0  # no block is of two rows
        self._block_size = min(block_size, self.columns) if self._is_by_row else block_size
        rows_of_blocks = (
            1 if self._is_by_row or self._is_one_block else block_size // math.gcd(block_size, self.columns)
        )
        self.step = math.lcm(8 // math.gcd(8, self.columns * q.spec.bits), rows_of_blocks)
        self._backend = choose_backend(q.codes.device)
        self._codebook = q.codebook.cpu().numpy()
        self._constants = [self._backend.put(constants) for constants in q.decode_constants()]

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
        """Yield all rows in order: which they are, and their values in the original dtype."""
        aligned = math.lcm(self.step, _ALIGNED_ROWS)
        height = max(1, TILE_ROWS[self.q.codes.device.type] // aligned) * aligned
        first = 0
        while first < self.rows:
            last = self.rows if first + height + _ALIGNED_ROWS > self.rows else first + height
            yield slice(first, last), self.decode(first, last)
            first = last

    def decode(self, first: int, last: int) -> Float[Tensor, "rows columns"]:
        """Return the values of rows first .. last - 1. The first one is a multiple of `step`."""
        bits = self.q.spec.bits
        codes = self.q.codes[first * self.columns * bits // 8 : math.ceil(last * self.columns * bits / 8)]
        constants = [self._take_blocks(of_blocks, first, last) for of_blocks in self._constants]
        return self._decode(codes, constants, last - first, slice(first, last))

    def gather(self, rows: Int64[Tensor, " n"]) -> Float[Tensor, "n columns"]:
        """Return the values of these rows."""
        if self.step == 1 and self._is_by_row:
            places = self._backend.view(rows)
            constants = [of_blocks.reshape(self.rows, -1)[places].reshape(-1) for of_blocks in self._constants]
            return self._decode(self.q.codes.view(self.rows, -1)[rows].view(-1), constants, len(rows), rows)
        groups, places = torch.unique(rows // self.step, return_inverse=True)
        found = [self.decode(g * self.step, min(self.rows, (g + 1) * self.step)) for g in groups.tolist()]
        starts = torch.arange(len(found), device=rows.device) * self.step
        values = torch.cat(found) if found else torch.empty(0, self.columns, dtype=self.q.dtype, device=rows.device)
        return values[starts[places] + rows % self.step]

    def _decode(
        self, codes: UInt8[Tensor, " bytes"], constants: list[DeviceArray], count: int, rows: slice | Tensor
    ) -> Float[Tensor, "rows columns"]:
        dtype = torch.float32 if self.q.input_scales is not None else find_computed_dtype(self.q.dtype)
        values = self._backend.allocate((count, self.columns), dtype)
        row = self.columns if self._is_by_row else count * self.columns
        with torch_threads_kept():
            self._backend.kernels.dequantize(
                self._backend.view(codes), *constants, self._codebook, row, min(self._block_size, row),
                self._backend.view(values.view(-1)), self.q.spec.bits,
            )  # fmt: skip
        return self.q.finish_rows(values, rows)

    def _take_blocks(self, constants: DeviceArray, first: int, last: int) -> DeviceArray:
        """Return the constants of the blocks of these rows."""
        if self._is_one_block:
            return constants
        if self._is_by_row:
            per_row = math.ceil(self.columns / self._block_size)
            return constants[first * per_row : last * per_row]
        start = first * self.columns // self._block_size
        return constants[start : math.ceil(last * self.columns / self._block_size)]
