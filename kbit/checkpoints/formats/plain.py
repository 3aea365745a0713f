"""What every exported format asks of a quantized tensor, and how a written tensor is proven equal to it."""

from __future__ import annotations

import dataclasses

import torch

from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.quantized_tensor import QuantizedTensor


class NotExactError(ValueError):
    """A format cannot hold a quantized tensor bit for bit. The message says why, and what quantizer it does hold."""


def require_plain(tensor: QuantizedTensor, form: str, advice: str) -> None:
    """Raise NotExactError if a tensor has parts that no format of other tools has a place for.

    Args:
        tensor: what is to be written.
        form: the format's name for messages.
        advice: the quantizer that the format holds, such as "use quant=nf4".
    """
    reason = ""
    if len(tensor.shape) != 2:
        reason = f"holds matrices, not a tensor of shape {list(tensor.shape)}"
    elif tensor.input_scales is not None:
        reason = "has no place for the scale of each input that method=awq stores: use quant.method=gptq, mse or rtn"
    elif tensor.outlier_values is not None:
        reason = "has no place for columns at 16 bits: use quant.outlier_fraction=0"
    elif tensor.spec.centering:
        reason = "has no place for the mean that centering subtracts: use quant.centering=false"
    elif tensor.spec.data_type in ADAPTIVE:
        reason = f"has one table for all tensors, and data_type={tensor.spec.data_type} makes one for each: {advice}"
    if reason:
        raise NotExactError(f"{form} {reason}")


def find_row_block(tensor: QuantizedTensor, form: str) -> int:
    """Return the block size of a matrix of which each row has a whole number of blocks.

    Raises:
        NotExactError: a block goes on in the next row, or is shorter than the others.
    """
    inputs = tensor.shape[-1]
    row, block = tensor.spec.find_block_shape(tensor.shape)
    if inputs % block:
        where = "goes on in the next row" if row != inputs else "is shorter than the others"
        raise NotExactError(
            f"{form} has a whole number of blocks in each row: with {inputs} inputs and quant.block_size={block} a "
            f"block {where}. Use a block size that divides {inputs}"
        )
    return block


def require_same(tensor: QuantizedTensor, written: QuantizedTensor, form: str) -> None:
    """Raise NotExactError unless what was written decodes to the tensor's own values, compared in float32."""
    values, found = (dataclasses.replace(part, dtype=torch.float32).dequantize() for part in (tensor, written))
    if count := int((values != found).sum()):
        raise NotExactError(
            f"{form} would change {count} of {values.numel()} values: it computes them in another way than "
            f"{tensor.spec.label()} with scale_format={tensor.spec.scale_format}"
        )
