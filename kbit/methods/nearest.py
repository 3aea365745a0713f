"""Round to nearest, without data: each block with its usual scale, or with the scale of least squared error.

rtn   The usual scale maps a block's largest magnitude to the codebook's end.
mse   Of many scales, each block takes the one with the least squared error (kbit.methods.block_scales).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.block_scales import BlockGrid, find_best_scales
from kbit.methods.config import QuantConfig
from kbit.methods.weight import Weight
from kbit.numerics.quantizer import fake_quantize


def round_to_nearest(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Replace each weight by fake_quantize(weight)."""
    for weight in weights:
        with weight.kept_at_zero() as values:
            quantized = fake_quantize(values, weight.spec)
        weight.put(quantized)
    return {}


def search_scales(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Quantize each weight with the best scale of each block."""
    for weight in weights:
        matrix = weight.take_matrix()
        grid = BlockGrid(matrix, weight.spec)
        weight.put(grid.quantize(matrix, *find_best_scales(matrix, grid)).view(weight.values.shape))
    return {}
