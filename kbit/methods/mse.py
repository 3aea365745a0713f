"""Scales by search: of many clipping factors, each block takes the one with the least squared error. No data.

The usual scale maps a block's largest magnitude to the codebook's end. A smaller one clips that value and rounds all
others more finely; which is better depends on the block, the data type and the bits. Of powers of two (e8m0) the
factors are those that there are; there a larger scale may be better, too, as the usual one clips (MX, BFP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.blocks import BlockGrid
from kbit.methods.weight import Weight
from kbit.quantconfig import QuantConfig
from kbit.scales import Scales

FACTORS: Final = np.arange(40, 121, 2, dtype=np.float32) / 100  # 2 bits want about 0.6; dynamic types some above 1
POWERS: Final = np.array([0.25, 0.5, 1, 2], np.float32)  # for e8m0: its neighbours


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
