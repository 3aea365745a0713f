"""Put packed layers in the place of a model's layers, with the codes that a method returned for their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.packed_weight import PackedWeight
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from kbit.models.parameters import as_matrix, distinct_parameters, is_experts, owner_of
from kbit.numerics.quantized_tensor import QuantizedTensor

WeightCodes = QuantizedTensor | Sequence[QuantizedTensor]


def use_codes(model: nn.Module, codes: Mapping[str, WeightCodes]) -> None:
    """Replace layers by packed ones, in place. Nothing is quantized here.

    Args:
        model: the model, whose weights may be on the meta device. Its other tensors stay.
        codes: what stands for the weights, by a name of each parameter, as `quantize_model(..., keep_codes=True)`
            returns them. Those of fused experts are a list of the experts' codes, in order.

    Raises:
        ValueError: a name that the model has not, or a layer for which there is no packed one.
    """
    names_of = {name: names for names, _ in distinct_parameters(model) for name in names}
    if missing := [name for name in codes if name not in names_of]:
        raise ValueError(f"the model has no parameter {missing[0]}, of which there are codes")
    for name, parts in codes.items():
        first: PackedWeight | None = None
        for tied in sorted(names_of[name], key=lambda n: not isinstance(owner_of(model, n), nn.Embedding)):
            first = _replace(model, tied, parts, first)


def _replace(model: nn.Module, name: str, parts: WeightCodes, first: PackedWeight | None) -> PackedWeight | None:
    """Replace one layer. A tied one shares the tensors of the first that was replaced."""
    owner, (path, _, attribute) = owner_of(model, name), name.rpartition(".")
    if is_experts(owner) and not isinstance(parts, QuantizedTensor):
        transposed = as_matrix(owner.get_parameter(attribute), owner).stride(-1) != 1
        delattr(owner, attribute)
        owner.add_module(attribute, QuantizedExperts.from_codes(parts, is_transposed=transposed))
        return None
    if attribute != "weight" or not isinstance(parts, QuantizedTensor):
        raise ValueError(f"{name} of {type(owner).__name__} cannot be packed: it is no layer's weight")
    layer: Any
    if isinstance(owner, nn.Linear | Conv1D):
        layer = (
            first.make_head(owner.bias)
            if isinstance(first, QuantizedEmbedding)
            else QuantizedLinear.from_codes(parts, owner)
        )
    elif type(owner) is nn.Embedding:
        layer = QuantizedEmbedding.from_codes(parts, owner)
    else:
        raise ValueError(f"{name} of {type(owner).__name__} cannot be packed: packed are Linear, Conv1D and Embedding")
    model.set_submodule(path, layer)
    return first or layer
