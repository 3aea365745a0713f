"""A matrix's blocks as the methods need them: scales that can be changed, any columns rounded by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kbit.numerics.backend import choose_backend, torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.grid import QuantizationGrid, find_blocks, make_grid
from kbit.numerics.quantized_tensor import QuantizedTensor, combine
from kbit.numerics.scale_formats import Scales, Stored
from kbit.numerics.spec import QuantSpec

ChooseScales = Callable[[Tensor, "BlockScales"], QuantizationGrid]  # chooses all scales of a matrix


class BlockScales:
    """The blocks of a matrix [rows, in], their rounded scales and the codebook, at first as fake_quantize has them.

    Attributes:
        spec: the quantizer.
        usual: blocks, table, and the scales that map each block's largest magnitude to the table's end.
        rows, inputs: rows and columns of the matrix.
        blocks_per_row: blocks in each of the grid's rows. One row is the whole matrix if layout=flat.
    """

    def __init__(self, matrix: Float[Tensor, "rows in"], spec: QuantSpec) -> None:
        """Choose the scales of a matrix, and its codebook.

        Raises:
            ValueError: see kbit.quantize.
        """
        self.spec = spec
        self._backend = choose_backend(matrix.device)
        self.rows, self.inputs = matrix.shape
        self.usual = make_grid(_flatten(matrix), matrix.shape, spec, self._backend)
        self.blocks_per_row = -(-self.usual.row // self.usual.block_size)
        self._used, self._is_refitted = self.usual, False
        self._codebook, self._thresholds, self._scales, self._offsets = (
            torch.tensor(array, dtype=matrix.dtype, device=matrix.device)
            for array in (self.usual.codebook, self.usual.thresholds, self.usual.scales, self.usual.offsets)
        )

    @property
    def can_refit(self) -> bool:
        """Whether a block's scale can be chosen anew by itself: the block is a part of one row and shares nothing."""
        within_rows = self.spec.layout == "row" or self.inputs % self.usual.block_size == 0
        return within_rows and self.spec.scale_type.has_own_scales and not self.spec.centering

    def refit(self, block: int, values: Float[Tensor, "rows width"], choose: ChooseScales | None = None) -> None:
        """Choose the scales of all rows' block number `block` (within the row) anew, from the values it has now.

        Values that have moved beyond what the format of scales holds count as its largest.
        """
        values = values.clamp(-self.spec.largest_weight, self.spec.largest_weight)
        # The codebook stays. An adaptive one matters here only in that it ends at -1 and 1 and lies on no grid.
        data_type = "nf" if self.spec.data_type in ADAPTIVE else self.spec.data_type
        spec = dataclasses.replace(
            self.spec, data_type=data_type, layout="row", block_size=self.spec.block_size or values.shape[1]
        )
        fitted = BlockScales(values, spec)
        fitted.usual = dataclasses.replace(fitted.usual, codebook=self.usual.codebook, thresholds=self.usual.thresholds)
        chosen = choose(values, fitted) if choose else fitted.usual
        per_row = -(-self.inputs // self.usual.block_size)
        for mine, new in ((self._scales, chosen.scales), (self._offsets, chosen.offsets)):
            mine.view(-1, per_row)[:, block] = torch.tensor(new, dtype=mine.dtype, device=mine.device)
        self._is_refitted = True

    def use(self, grid: QuantizationGrid) -> None:
        """Round with the scales and offsets of this grid from now on."""
        self._used = grid
        for mine, new in ((self._scales, grid.scales), (self._offsets, grid.offsets)):
            mine.copy_(torch.tensor(new))

    def at(self, columns: Int64[Tensor, " n"]) -> tuple[Float[Tensor, "n rows"], Float[Tensor, "n rows"]]:
        """Return the scale and the offset of each element of some columns, transposed."""
        flat = torch.arange(self.rows, device=columns.device) * self.inputs + columns[:, None]
        blocks = find_blocks(flat, self.usual.row, self.usual.block_size)
        return self._scales[blocks], self._offsets[blocks]

    def find_codes(self, values: Tensor, scales: Tensor, offsets: Tensor) -> Int64[Tensor, "*shape"]:
        """Return each element's code, by the rule of kbit.numerics.reference.quantize."""
        v = torch.where(scales != 0, (values - offsets) / scales, 0)
        return torch.bucketize(v, self._thresholds, right=True)

    def look_up(self, codes: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the codebook's value for each code."""
        return self._codebook[codes]

    def store(self, scales: Scales, offsets: Scales) -> QuantizationGrid:
        """Return the grid with these scales and offsets as their formats store them.

        Without minmax there are no offsets but the mean's. A scale is rounded to nearest, to a power of two too, and
        beyond the format's range it is its largest.
        """
        spec, center = self.spec, self.usual.center
        stored = spec.scale_type.encode(spec.scale_type.round_to_nearest(spec.scale_type.clip(scales)))
        grid = dataclasses.replace(self.usual, scales=spec.decode_scales(stored), stored_scales=stored)
        if spec.normalization != "minmax":
            return grid
        own = spec.offset_type.clip(offsets - center.astype(np.float32).sum(dtype=np.float32))  # 0 without centering
        stored_offsets = spec.offset_type.encode_offsets(own)
        return dataclasses.replace(
            grid, offsets=spec.decode_offsets(stored_offsets, center, grid.scales), stored_offsets=stored_offsets
        )

    def mix(
        self, is_first: Bool[np.ndarray, " blocks"], first: QuantizationGrid, second: QuantizationGrid
    ) -> QuantizationGrid:
        """Return the grid with the first one's scales and offsets in some blocks, and the second one's in the others.

        The format's stored scales must be independent of each other (ScaleFormat.has_own_scales).
        """

        def pick(one: Stored, other: Stored) -> Stored:
            return {name: np.where(is_first, one[name], other[name]) for name in one}

        return dataclasses.replace(
            self.usual,
            scales=np.where(is_first, first.scales, second.scales),
            offsets=np.where(is_first, first.offsets, second.offsets),
            stored_scales=pick(first.stored_scales, second.stored_scales),
            stored_offsets=pick(first.stored_offsets, second.stored_offsets),
        )

    def round(self, matrix: Float[Tensor, "rows in"], grid: QuantizationGrid) -> Float[Tensor, "rows in"]:
        """Return the matrix rounded to nearest with the scales and offsets of a grid, in float32."""
        result = self._backend.allocate(matrix.shape, torch.float32)
        with torch_threads_kept():
            self._backend.kernels.fake_quantize(
                self._backend.view(_flatten(matrix)), self._backend.put(grid.scales), self._backend.put(grid.offsets),
                grid.codebook, grid.thresholds, grid.row, grid.block_size, None, self._backend.view(result.view(-1)),
            )  # fmt: skip
        return result

    def encode(
        self, matrix: Float[Tensor, "rows in"], grid: QuantizationGrid, shape: Sequence[int], dtype: torch.dtype
    ) -> QuantizedTensor:
        """Return the codes of a matrix that is rounded to nearest by a grid, as a tensor of this shape and dtype."""
        with torch_threads_kept():
            codes = self._backend.kernels.quantize(*grid.list_arguments(_flatten(matrix), self._backend))
        return combine(codes, grid, shape, dtype, self._backend)

    def assemble(self, codes: UInt8[Tensor, "rows in"], shape: Sequence[int], dtype: torch.dtype) -> QuantizedTensor:
        """Return the tensor with these codes, and with the scales that use and refit have set."""
        with torch_threads_kept():
            packed = self._backend.kernels.pack(self._backend.view(codes.contiguous().view(-1)), self.spec.bits)
        return combine(packed, self._find_used(), shape, dtype, self._backend)

    def measure_errors(
        self, matrix: Float[Tensor, "rows in"], grid: QuantizationGrid, power: float = 2.0
    ) -> NDArray[np.float64]:
        """Return sum |error|^power of each block [blocks], if the matrix is rounded by this grid."""
        lost = self.split((self.round(matrix, grid) - matrix).abs().pow(power))
        errors: NDArray[np.float64] = lost.sum(dim=1, dtype=torch.float64).cpu().numpy()
        return errors

    def split(self, matrix: Float[Tensor, "rows in"]) -> Float[Tensor, "blocks size"]:
        """Return the blocks as rows, short ones filled up with zeros."""
        by_row = matrix.reshape(-1, self.usual.row)
        missing = self.blocks_per_row * self.usual.block_size - self.usual.row
        return F.pad(by_row, (0, missing)).reshape(-1, self.usual.block_size)

    def _find_used(self) -> QuantizationGrid:
        """Return the grid that the elements were rounded by.

        Scales that were chosen anew are numbers of their format already: storing them changes nothing.
        """
        if not self._is_refitted:
            return self._used
        scales, offsets = (part.float().cpu().numpy() for part in (self._scales, self._offsets))
        stored_offsets = self.spec.offset_type.encode_offsets(offsets) if self.usual.stored_offsets else {}
        return dataclasses.replace(
            self.usual, scales=scales, offsets=offsets, stored_scales=self.spec.scale_type.encode(scales),
            stored_offsets=stored_offsets,
        )  # fmt: skip


def find_best_scales(matrix: Float[Tensor, "rows in"], blocks: BlockScales) -> QuantizationGrid:
    """Return the scales and offsets of each block's best factor, or the usual ones if those are better together.

    The latter can only be with formats in which scales depend on each other (fp8, dq8).
    """
    least = blocks.measure_errors(matrix, blocks.usual)
    error_of_usual, best = least.sum(), np.ones_like(blocks.usual.scales)
    for factor in blocks.spec.scale_type.factors:
        errors = blocks.measure_errors(matrix, blocks.store(*_shrink(blocks.usual, np.full_like(best, factor))))
        best = np.where(errors < least, factor, best)
        least = np.minimum(errors, least)
    searched = blocks.store(*_shrink(blocks.usual, best))
    return searched if blocks.measure_errors(matrix, searched).sum() <= error_of_usual else blocks.usual


def _shrink(grid: QuantizationGrid, factors: Scales) -> tuple[Scales, Scales]:
    """Return the scales times the factors, and offsets that leave the middle of each block's range where it is."""
    codebook, most = grid.codebook, np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        scales = np.clip(grid.scales * factors, -most, most)
    return scales, grid.offsets + (grid.scales - scales) * ((codebook[0] + codebook[-1]) / 2)


def _flatten(matrix: Float[Tensor, "rows in"]) -> Float[Tensor, " n"]:
    return matrix.float().contiguous().view(-1)
