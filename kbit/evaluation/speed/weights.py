"""A model's weights in memory: their bytes, how many of them a step reads, and which path each product takes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.int8_linear import Int8Linear, list_products
from kbit.layers.packed_weight import PackedWeight
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedLinear


def list_weights(model: nn.Module) -> list[Tensor]:
    """Return each tensor of the weights once: parameters, scales and constants, and what int8 products keep."""
    tensors = [parameter.detach() for parameter in model.parameters()]
    for module in model.modules():
        if isinstance(module, PackedWeight):
            tensors += module.buffers()
    for _, product in list_products(model):
        tensors += _list_codes(product) + ([] if product.wide is None else [product.wide])
    tensors += _list_outside(model)
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


def _list_codes(product: Int8Linear) -> list[Tensor]:
    """Return the codes of an int8 product's weight, and their constants."""
    values = (getattr(product.weight, field.name) for field in dataclasses.fields(product.weight))
    return [value for value in values if isinstance(value, Tensor)]


def _list_outside(model: nn.Module) -> list[Tensor]:
    """Return the constants of bitsandbytes' weights, which hang on the parameters and are no buffers.

    Constants that are quantized themselves have a state of their own, state2.
    """
    found = []
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:
            values = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
            found += [value for value in values if isinstance(value, Tensor)]
            state = getattr(state, "state2", None)
    return found


def count_held_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights in memory, tied ones once."""
    return sum(tensor.nbytes for tensor in list_weights(model))


def count_read_bytes(model: Any) -> int | None:
    """Return the bytes of the weights that a step reads, or None of a model with experts, where the tokens decide.

    An embedding that is not the head as well is left out: a step takes one row of it for each token. An int8 product
    reads its codes instead of the layer's parameter, and those columns of its 16-bit weight that it needed so far.
    """
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        return None
    if any(parameter.dim() > 2 for parameter in model.parameters()):  # fused experts
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    unread = [] if is_tied else list_weights(embedding)
    columns = 0
    for name, product in list_products(model):
        unread.append(model.get_submodule(name).weight)
        if product.wide is not None:
            unread.append(product.wide)
            columns += product.wide[:, 0].numel() * product.wide.element_size() * int(product.met.sum())
    left_out = {tensor.data_ptr() for tensor in unread}
    return columns + sum(tensor.nbytes for tensor in list_weights(model) if tensor.data_ptr() not in left_out)


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
