"""Scales by search: of many clipping factors, each block takes the one with the least squared error. No data.

The usual scale maps a block's largest magnitude to the codebook's end. A smaller one clips that value and rounds all
others more finely; which is better depends on the block, the data type and the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.blocks import BlockGrid
from kbit.methods.weight import Weight
from kbit.quantconfig import QuantConfig
from kbit.scales import Scales

FACTORS: Final = np.arange(40, 121, 2, dtype=np.float32) / 100  # 2 bits want about 0.6; dynamic types some above 1


def search_scales(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Quantize each weight with the best scale of each block."""
    for weight in weights:
        matrix = weight.take_matrix()
        grid = BlockGrid(matrix, weight.spec)
        weight.put(grid.quantize(matrix, *find_best_scales(matrix, grid)).view(weight.values.shape))
    return {}


def find_best_scales(matrix: Float[Tensor, "rows in"], grid: BlockGrid) -> tuple[Scales, Scales]:
    """Return the scales and offsets of each block's best factor, or the usual ones if those are better together.

    The latter can only be with formats in which scales depend on each other (fp8, dq8).
    """
    usual = grid.grid.scales, grid.grid.offsets
    least = _block_errors(matrix, grid, *usual)
    error_of_usual, best = least.sum(), np.ones_like(usual[0])
    for factor in FACTORS:
        errors = _block_errors(matrix, grid, *grid.encode(*_shrink(grid, np.full_like(best, factor))))
        best = np.where(errors < least, factor, best)
        least = np.minimum(errors, least)
    searched = grid.encode(*_shrink(grid, best))
    return searched if _block_errors(matrix, grid, *searched).sum() <= error_of_usual else usual


def _shrink(grid: BlockGrid, factors: Scales) -> tuple[Scales, Scales]:
    """Return the scales times the factors, and offsets that leave the middle of each block's range where it is."""
    scales, codebook = grid.grid.scales * factors, grid.grid.codebook
    return scales, grid.grid.offsets + (grid.grid.scales - scales) * ((codebook[0] + codebook[-1]) / 2)


def _block_errors(
    matrix: Float[Tensor, "rows in"], grid: BlockGrid, scales: Scales, offsets: Scales
) -> NDArray[np.float64]:
    """Return the squared error of each block [blocks]."""
    lost = grid.split((grid.quantize(matrix, scales, offsets) - matrix).square())
    errors: NDArray[np.float64] = lost.sum(dim=1, dtype=torch.float64).cpu().numpy()
    return errors
