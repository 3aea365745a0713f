"""A matrix's blocks as the methods need them: scales that can be changed, any columns rounded by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from kbit.numerics.backend import choose_backend, torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.quantizer import Grid, decode_block_scales, find_blocks, make_grid
from kbit.numerics.scale_formats import Scales, decode_scales, encode_scales, largest_scale, round_to_power
from kbit.numerics.spec import QuantSpec

ChooseScales = Callable[[Tensor, "BlockGrid"], tuple[Scales, Scales]]  # of a matrix's blocks, as they are stored


_OWN_SCALES = ("fp16", "fp32", "bf16", "e8m0")  # fp8 and dq8 scales depend on constants of the whole tensor


class BlockGrid:
    """The blocks of a matrix [rows, in], their rounded scales and the codebook, at first as fake_quantize has them.

    Attributes:
        spec: the quantizer.
        grid: blocks, scales and table, see kbit.numerics.quantizer.
        inputs: columns of the matrix.
        blocks_per_row: of the grid's rows, which are the whole matrix if layout=flat.
    """

    def __init__(self, matrix: Float[Tensor, "rows in"], spec: QuantSpec) -> None:
        """Choose the scales of a matrix, and its codebook.

        Raises:
            ValueError: see kbit.quantize.
        """
        self.spec = spec
        self._backend = choose_backend(matrix.device)
        self.inputs = matrix.shape[1]
        self.grid: Grid = make_grid(matrix.float().contiguous().view(-1), matrix.shape, spec, self._backend)
        self.blocks_per_row = -(-self.grid.row // self.grid.block_size)
        self._codebook, self._thresholds, self._scales, self._offsets = (
            torch.tensor(array, dtype=matrix.dtype, device=matrix.device)
            for array in (self.grid.codebook, self.grid.thresholds, self.grid.scales, self.grid.offsets)
        )

    @property
    def has_own_scales(self) -> bool:
        """Whether a block's stored scale is independent of the other blocks'."""
        return self.spec.scale_format in _OWN_SCALES

    @property
    def can_refit(self) -> bool:
        """Whether a block's scale can be chosen anew by itself: the block is a part of one row and shares nothing."""
        within_rows = self.spec.layout == "row" or self.inputs % self.grid.block_size == 0
        return within_rows and self.has_own_scales and not self.spec.centering

    def refit(
        self, rows: slice, block: int, values: Float[Tensor, "rows width"], choose: ChooseScales | None = None
    ) -> None:
        """Choose the scales of these rows' block number `block` (within the row) anew, from the values it has now.

        Values that have moved beyond what the format of scales holds count as its largest.
        """
        values = values.clamp(-self.spec.largest_weight, self.spec.largest_weight)
        # the codebook stays; of an adaptive one it matters here only that it ends at -1 and 1 and lies on no grid
        data_type = "nf" if self.spec.data_type in ADAPTIVE else self.spec.data_type
        spec = dataclasses.replace(
            self.spec, data_type=data_type, layout="row", block_size=self.spec.block_size or values.shape[1]
        )
        fitted = BlockGrid(values, spec)
        fitted.grid = dataclasses.replace(fitted.grid, codebook=self.grid.codebook, thresholds=self.grid.thresholds)
        chosen = choose(values, fitted) if choose else (fitted.grid.scales, fitted.grid.offsets)
        per_row = -(-self.inputs // self.grid.block_size)
        for mine, new in zip((self._scales, self._offsets), chosen, strict=True):
            mine.view(-1, per_row)[rows, block] = torch.tensor(new, dtype=mine.dtype, device=mine.device)

    def use(self, scales: Scales, offsets: Scales) -> None:
        """Round with these scales and offsets of all blocks from now on."""
        for mine, new in ((self._scales, scales), (self._offsets, offsets)):
            mine.copy_(torch.tensor(new))

    def at(self, rows: slice, columns: Int64[Tensor, " n"]) -> tuple[Float[Tensor, "n rows"], Float[Tensor, "n rows"]]:
        """Return the scale and the offset of each element of some columns, transposed."""
        flat = torch.arange(rows.start, rows.stop, device=columns.device) * self.inputs + columns[:, None]
        blocks = find_blocks(flat, self.grid.row, self.grid.block_size)
        return self._scales[blocks], self._offsets[blocks]

    def look_up(self, values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return the codebook's value for each element, by the rule of kbit.numerics.reference.quantize."""
        v = torch.where(scales != 0, (values - offsets) / scales, 0)
        return self._codebook[torch.bucketize(v, self._thresholds, right=True)]

    def round(self, values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return the nearest value that each element's block can represent."""
        return self.look_up(values, scales, offsets) * scales + offsets

    def encode(self, scales: Scales, offsets: Scales) -> tuple[Scales, Scales]:
        """Return scales and offsets as their formats store them; without minmax there are no offsets but the mean's.

        A scale is rounded to nearest, of powers of two too, and beyond the format's range it is its largest.
        """
        scale_format, offset_format = self.spec.scale_format, self.spec.offset_format
        scales = _clip(scales, scale_format)
        scales = round_to_power(scales) if scale_format == "e8m0" else scales
        rounded = decode_block_scales(encode_scales(scales, scale_format), self.spec)
        if self.spec.normalization != "minmax":
            return rounded, self.grid.offsets
        center = self.grid.center.astype(np.float32).sum(dtype=np.float32)  # 0 without centering
        own = encode_scales(_clip(offsets - center, offset_format), offset_format, "block offset")
        return rounded, decode_scales(own, offset_format) + center

    def quantize(self, matrix: Float[Tensor, "rows in"], scales: Scales, offsets: Scales) -> Float[Tensor, "rows in"]:
        """Return the matrix rounded to nearest with these scales and offsets of its blocks, in float32."""
        result = self._backend.allocate(matrix.shape, torch.float32)
        grid = self.grid
        with torch_threads_kept():
            self._backend.kernels.fake_quantize(
                self._backend.view(matrix.float().contiguous().view(-1)), self._backend.put(scales),
                self._backend.put(offsets), grid.codebook, grid.thresholds, grid.row, grid.block_size, None,
                self._backend.view(result.view(-1)),
            )  # fmt: skip
        return result

    def measure_errors(
        self, matrix: Float[Tensor, "rows in"], scales: Scales, offsets: Scales, power: float = 2.0
    ) -> NDArray[np.float64]:
        """Return sum |error|^power of each block [blocks], if the matrix is quantized with these scales and offsets."""
        lost = self.split((self.quantize(matrix, scales, offsets) - matrix).abs().pow(power))
        errors: NDArray[np.float64] = lost.sum(dim=1, dtype=torch.float64).cpu().numpy()
        return errors

    def split(self, matrix: Float[Tensor, "rows in"]) -> Float[Tensor, "blocks size"]:
        """Return the blocks as rows, short ones filled up with zeros."""
        by_row = matrix.reshape(-1, self.grid.row)
        missing = self.blocks_per_row * self.grid.block_size - self.grid.row
        return F.pad(by_row, (0, missing)).view(-1, self.grid.block_size)


def _clip(values: Scales, value_format: str) -> Scales:
    """Return scales or offsets within the range of their format."""
    most = np.float32(largest_scale(value_format))
    clipped: Scales = np.clip(values, -most, most)
    return clipped


FACTORS: Final = np.arange(40, 121, 2, dtype=np.float32) / 100  # 2 bits want about 0.6; dynamic types some above 1


POWERS: Final = np.array([0.25, 0.5, 1, 2], np.float32)  # for e8m0: its neighbours


def find_best_scales(matrix: Float[Tensor, "rows in"], grid: BlockGrid) -> tuple[Scales, Scales]:
    """Return the scales and offsets of each block's best factor, or the usual ones if those are better together.

    The latter can only be with formats in which scales depend on each other (fp8, dq8).
    """
    usual = grid.grid.scales, grid.grid.offsets
    least = grid.measure_errors(matrix, *usual)
    error_of_usual, best = least.sum(), np.ones_like(usual[0])
    for factor in POWERS if grid.spec.scale_format == "e8m0" else FACTORS:
        errors = grid.measure_errors(matrix, *grid.encode(*_shrink(grid, np.full_like(best, factor))))
        best = np.where(errors < least, factor, best)
        least = np.minimum(errors, least)
    searched = grid.encode(*_shrink(grid, best))
    return searched if grid.measure_errors(matrix, *searched).sum() <= error_of_usual else usual


def _shrink(grid: BlockGrid, factors: Scales) -> tuple[Scales, Scales]:
    """Return the scales times the factors, and offsets that leave the middle of each block's range where it is."""
    codebook, most = grid.grid.codebook, np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        scales = np.clip(grid.grid.scales * factors, -most, most)
    return scales, grid.grid.offsets + (grid.grid.scales - scales) * ((codebook[0] + codebook[-1]) / 2)
