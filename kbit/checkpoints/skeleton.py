"""Put empty packed layers in the place of a model's layers, to be filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.packed_weight import PackedLayout, PackedWeight
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from kbit.methods.config import QuantConfig
from kbit.methods.report import QuantizationReport, plan_quantization
from kbit.models.parameters import as_matrix, is_experts, owner_of, split_matrices


def plan_packing(model: nn.Module, quant: QuantConfig) -> QuantizationReport:
    """Return the plan of a quantization, of which every weight can be packed.

    Raises:
        ValueError: a weight that would be quantized has no packed layer, or see plan_quantization.
    """
    plan = plan_quantization(model, quant)
    for tensor in plan.tensors:
        if tensor.quantized:
            check_layer(model, tensor.name)
    return plan


def check_layer(model: nn.Module, tied_names: str) -> None:
    """Raise ValueError if no packed layer takes the place of the layers of a weight, by its names in the report."""
    names = tied_names.split(" = ")
    if len(names) > 1 and type(owner_of(model, find_first(model, names))) is not nn.Embedding:
        raise ValueError(f"{tied_names} are tied and no embedding is among them: they cannot be packed as one")
    for name in names:
        owner = owner_of(model, name)
        is_layer = name.endswith(".weight") and (isinstance(owner, nn.Linear | Conv1D) or type(owner) is nn.Embedding)
        if not is_layer and not (is_experts(owner) and owner.get_parameter(name.rpartition(".")[2]).ndim == 3):
            raise ValueError(
                f"{name} of {type(owner).__name__} cannot be packed: packed are weights of Linear, Conv1D, Embedding "
                "and fused experts. Leave it out by quant.exclude, or quantize the model without packing it"
            )


def list_quantized(plan: QuantizationReport) -> list[list[str]]:
    """Return the names of each weight that a plan quantizes: several if it is tied."""
    return [tensor.name.split(" = ") for tensor in plan.tensors if tensor.quantized]


def label_matrices(model: nn.Module, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the label and the values of what is quantized by itself: a weight, or each expert of a fused one."""
    owner = owner_of(model, name)
    parameter = owner.get_parameter(name.rpartition(".")[2])
    matrices = split_matrices(parameter, owner)
    for number, matrix in enumerate(matrices):
        yield (f"{name}[{number}]" if matrix.ndim < parameter.ndim else name), matrix


def place_layer(model: nn.Module, names: Sequence[str], layouts: Sequence[PackedLayout]) -> None:
    """Replace the layer of one weight by a packed one on the meta device. The heads of an embedding are left.

    Args:
        model: the model.
        names: the weight's names. An embedding that is tied to a head has several.
        layouts: the layout of the weight, or of each expert.
    """
    name = find_first(model, names)
    owner, (path, _, attribute) = owner_of(model, name), name.rpartition(".")
    if is_experts(owner):
        transposed = as_matrix(owner.get_parameter(attribute), owner).stride(-1) != 1
        delattr(owner, attribute)
        owner.add_module(attribute, QuantizedExperts(layouts, is_transposed=transposed, device="meta"))
        return
    layer: PackedWeight
    if isinstance(owner, nn.Embedding):
        layer = QuantizedEmbedding(layouts[0], owner.padding_idx, device="meta")
    else:
        bias: Any = owner.bias
        layer = QuantizedLinear(layouts[0], bias, is_conv1d=isinstance(owner, Conv1D), device="meta")
    model.set_submodule(path, layer.train(owner.training))


def find_first(model: nn.Module, names: Sequence[str]) -> str:
    """Return the name under which a tied weight is stored: that of the embedding, or the first."""
    return min(names, key=lambda name: not isinstance(owner_of(model, name), nn.Embedding | QuantizedEmbedding))


def tie_heads(model: nn.Module, names: Sequence[str]) -> None:
    """Let the heads that are tied to a packed embedding share its tensors."""
    first = find_first(model, names)
    embedding = owner_of(model, first)
    for name in names:
        if name != first and isinstance(embedding, QuantizedEmbedding):
            bias: Any = getattr(owner_of(model, name), "bias", None)
            model.set_submodule(name.rpartition(".")[0], embedding.make_head(bias))


def list_packed(model: nn.Module) -> dict[str, PackedWeight]:
    """Return every packed weight of a model by its module's name. One that is tied is there under its first name."""
    found: dict[int, tuple[str, PackedWeight]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            found.setdefault(id(module.weight), (name, module))
    return dict(found.values())
