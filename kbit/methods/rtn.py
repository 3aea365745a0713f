"""Round to nearest: each value becomes the nearest that its block can represent. No data, no order, no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.weight import Weight
from kbit.quantconfig import QuantConfig
from kbit.quantizer import fake_quantize


def round_to_nearest(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Replace each weight by fake_quantize(weight)."""
    for weight in weights:
        with weight.kept_at_zero() as values:
            quantized = fake_quantize(values, weight.spec)
        weight.put(quantized)
    return {}
