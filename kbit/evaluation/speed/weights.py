"""A model's weights in memory: their bytes, how many of them a step reads, and which path each product takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.int8_linear import Int8Linear
from kbit.layers.packed_weight import PackedWeight
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedLinear


def list_weights(model: nn.Module) -> list[Tensor]:
    """Return each tensor of the weights once: parameters, and the scales and constants of packed ones."""
    found = {parameter.data_ptr(): parameter.detach() for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, PackedWeight):
            found |= {buffer.data_ptr(): buffer for buffer in module.buffers() if buffer.numel()}
    return list(found.values())


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights in memory, tied ones once."""
    return sum(tensor.nbytes for tensor in list_weights(model))


def count_read_bytes(model: Any) -> int | None:
    """Return the bytes of the weights that a step reads, or None of a model with experts, where the tokens decide.

    An embedding that is not the head as well is left out: a step takes one row of it for each token.
    """
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        return None
    if any(parameter.dim() > 2 for parameter in model.parameters()):  # fused experts
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    return count_bytes(model) - (0 if is_tied else count_bytes(embedding))


def find_packed_share(model: nn.Module) -> float:
    """Return the share of a model's parameters, tied ones counted once, that are packed in memory."""
    packed = {
        module.weight.data_ptr(): math.prod(module.layout.shape)
        for module in model.modules()
        if isinstance(module, PackedWeight)
    }
    plain = sum(p.numel() for p in model.parameters() if p.data_ptr() not in packed)
    count = sum(packed.values())
    return count / (count + plain)


def describe_path(model: nn.Module, rows: int, dtype: torch.dtype) -> str:
    """Return how many linear layers take which path for so many rows of inputs: "fused 24, plain 1".

    fused decodes the codes on the way, tile dequantizes a part of the weight at a time, int8 multiplies int8 codes, and
    plain multiplies by the weight as it is. A layer of another library has the name of its class.
    """
    paths = Counter(filter(None, (_find_path(module, rows, dtype) for module in model.modules())))
    return ", ".join(f"{path} {count}" for path, count in sorted(paths.items()))


def _find_path(module: nn.Module, rows: int, dtype: torch.dtype) -> str:
    if isinstance(module, QuantizedLinear):
        return module.choose_path(rows, dtype)
    if isinstance(module.forward, Int8Linear):
        return "int8"
    if type(module) in (nn.Linear, Conv1D):
        return "plain"
    return type(module).__name__ if isinstance(module, nn.Linear) else ""  # of another library


@contextmanager
def fastest_paths(model: nn.Module) -> Iterator[None]:
    """Let packed layers take the paths that they take outside of evaluations, in which their products are exact."""
    layers = {module: module.fused_rows for module in model.modules() if isinstance(module, QuantizedLinear)}
    for layer in layers:
        layer.fused_rows = None
    try:
        yield
    finally:
        for layer, fused_rows in layers.items():
            layer.fused_rows = fused_rows
