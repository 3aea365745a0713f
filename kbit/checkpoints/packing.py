"""Packed layers in a model: put in place, found, counted, hashed, and made plain again."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kbit.checkpoints.config import KbitConfig
from kbit.layers.packed_weight import PackedLayout, PackedWeight
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from kbit.methods.config import QuantConfig
from kbit.methods.report import QuantizationReport, TensorReport, plan_quantization
from kbit.models.parameters import (
    as_matrix,
    distinct_parameters,
    hash_tensors,
    hash_weights,
    is_experts,
    label_matrix,
    owner_of,
    split_matrices,
)
from kbit.models.transformers_private import forget_conversions, use_eager_experts
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.version import find_version

# Other classes are not trusted to compute what the packed layer does: a router derived from nn.Linear returns choices.
_LAYERS: Final = (nn.Linear, Conv1D, nn.Embedding)
_LIKE_LINEAR: Final = ("FalconLinear",)  # x W^T + bias. A bias, which no published model has, is added after rounding


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
        check_use(model, name)
        owner = owner_of(model, name)
        is_known = type(owner) in _LAYERS or type(owner).__name__ in _LIKE_LINEAR
        is_layer = name.endswith(".weight") and is_known
        if not is_layer and not (is_experts(owner) and owner.get_parameter(name.rpartition(".")[2]).ndim == 3):
            raise ValueError(
                f"{name} of {type(owner).__name__} cannot be packed: packed are weights of Linear, Conv1D, Embedding "
                "and fused experts. Leave it out by quant.exclude, or quantize the model without packing it"
            )


def check_use(model: nn.Module, name: str) -> None:
    """Raise ValueError if a model's code computes with the weight of a layer itself, or with its dtype.

    A packed layer's weight is bytes. Mamba casts states to the dtype of its head's, and multiplies by its dt_proj's.
    """
    path, _, layer = name.removesuffix(".weight").rpartition(".")
    parent = type(model.get_submodule(path))
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):  # made at run time: its layers refuse inputs of bytes
        return
    weight = rf"\bself\.{re.escape(layer)}\.weight"
    if re.search(rf"{weight}(\.dtype\b| @)|@ {weight}\b", source):
        raise ValueError(
            f"{name} cannot be packed: {parent.__name__}.forward computes with this weight itself, which is bytes: "
            "leave it out by quant.exclude"
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
        yield label_matrix(name, number if matrix.ndim < parameter.ndim else None), matrix


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
        parameter = owner.get_parameter(attribute)
        transposed = as_matrix(parameter, owner).stride(-1) != 1
        delattr(owner, attribute)
        experts = QuantizedExperts(layouts, is_transposed=transposed, dtype=parameter.dtype, device="meta")
        owner.add_module(attribute, experts)
        return
    layer: PackedWeight
    if isinstance(owner, nn.Embedding):
        layer = QuantizedEmbedding(layouts[0], owner.padding_idx, dtype=owner.weight.dtype, device="meta")
    else:
        bias: Any = owner.bias
        layer = QuantizedLinear(layouts[0], bias, is_conv1d=isinstance(owner, Conv1D), device="meta")
    model.set_submodule(path, layer.train(owner.training))


def put_codes(model: nn.Module, names: Sequence[str], codes: Sequence[QuantizedTensor]) -> None:
    """Put packed layers with these codes in the place of a weight's layers.

    Args:
        model: the model.
        names: the weight's names. A tied one has several.
        codes: the codes of the weight, or of each expert.
    """
    first = find_first(model, names)
    place_layer(model, names, [PackedLayout.of(made) for made in codes])
    placed = model.get_submodule(first if len(codes) > 1 or first.endswith("]") else first.removesuffix(".weight"))
    if isinstance(placed, QuantizedExperts):
        placed.put(codes)
    elif isinstance(placed, PackedWeight):
        placed.put(codes[0])
    tie_heads(model, names)


def find_first(model: nn.Module, names: Sequence[str]) -> str:
    """Return the name under which a tied weight is stored: that of the embedding, or the first."""
    return min(names, key=lambda name: not isinstance(owner_of(model, name), nn.Embedding | QuantizedEmbedding))


def group_tied(model: Any, weights: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return the names of each of these weights by the one that is stored. Before loading, ties are only names."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    groups = {}
    for name in (name for names in weights for name in names):
        source = tied.get(name, name)
        groups[source] = [source, *(target for target, found in tied.items() if found == source)]
    return groups


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


def attach(model: Any, quantizer: Any) -> None:
    """Tell transformers how a model with packed layers is quantized, so that it is saved and loaded as such.

    Args:
        model: the model.
        quantizer: transformers' HfQuantizer, whose configuration is replaced by one of this model alone.

    Raises:
        ValueError: a packed weight was quantized in another way or dtype than the others.
    """
    asked: KbitConfig = quantizer.quantization_config
    layouts = {_label(name, module): module.layout for name, module in list_packed(model).items()}
    made_by = asked.made_by or {"kbit": find_version(), "model": str(model.config.name_or_path)}
    config = KbitConfig.of(asked.quant, made_by=made_by)
    config.note_layouts(layouts)
    for label, layout in layouts.items():
        same_seed = dataclasses.replace(layout, spec=dataclasses.replace(layout.spec, seed=config.quant.seed))
        if same_seed != config.find_layout(label, layout.shape, layout.dtype):
            raise ValueError(
                f"{label} is packed as {same_seed}, and {config.weight_dtype} with {config.fields} is asked"
            )
    quantizer.quantization_config = model.config.quantization_config = config
    model.hf_quantizer, model.quantization_method, model.is_quantized = quantizer, config.quant_method, True
    use_eager_experts(model.config)
    forget_conversions(model)
    report = report_packed(model, config.quant)
    if (before := getattr(model, "kbit_quantized", None)) is not None:
        report = dataclasses.replace(report, notes=before[1].notes, weight_rmse=before[1].weight_rmse)
    model.kbit_quantized = (config.quant, report)


def _label(name: str, module: PackedWeight) -> str:
    """Return the label of a packed weight: its parameter's name, or NAME[3] for the module NAME.3 of an expert."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        return f"{name}.weight"
    path, _, number = name.rpartition(".")
    return label_matrix(path, int(number))


def report_packed(model: nn.Module, quant: QuantConfig) -> QuantizationReport:
    """Return the report of a model with packed layers, counted from what they hold."""
    tensors = []
    for tensor in plan_quantization(model, quant).tensors:
        name = tensor.name.split(" = ")[0]
        owner = owner_of(model, name)
        if isinstance(owner, PackedWeight) and name.endswith(".weight"):
            tensor = _report_weight(tensor, owner)
        tensors.append(tensor)
    return QuantizationReport(quant.spec, tuple(tensors))


def _report_weight(tensor: TensorReport, weight: PackedWeight) -> TensorReport:
    in_block = not isinstance(weight, QuantizedEmbedding) and any(part.isdigit() for part in tensor.name.split("."))
    bits = weight.quantized.count_bits()
    return TensorReport(tensor.name, weight.layout.shape, in_block, quantized=True, reason="", bits=bits)


def count_stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and saved buffers in memory. Tied ones count once."""
    tensors = {(tensor.data_ptr(), tensor.nbytes): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def find_packed_report(model: nn.Module) -> QuantizationReport | None:
    """Return the report of a model with packed layers, or None of another model."""
    done: tuple[QuantConfig, QuantizationReport] | None = getattr(model, "kbit_quantized", None)
    return done[1] if done is not None and list_packed(model) else None


def compute_exactly(model: Any) -> None:
    """Let a packed model compute what the plain model with dequantized weights computes, to the last bit.

    Its layers take the path of tiles. Its head, if that is packed, becomes a plain one, as measures use its matrix.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.fused_rows = 0
    head = model.get_output_embeddings()
    if isinstance(head, QuantizedLinear):
        plain = _make_plain(head, nn.Parameter(restore_matrix(head).to(model.dtype), requires_grad=False))
        name = next(name for name, module in model.named_modules() if module is head)
        model.set_submodule(name, plain)


def round_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters that are not packed to a dtype, in place, and let packed embeddings give values of it.

    Buffers, such as rotary frequencies, stay.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding | QuantizedExperts):
            module.like = module.like.to(dtype)


def check_complete(model: Any) -> None:
    """Raise ValueError if a packed layer has no tensors, or tensors of another size than its shape asks for."""
    for name, module in list_packed(model).items():
        if module.weight.is_meta:
            raise ValueError(f"the checkpoint has no codes for {name}: its config.json and its weights disagree")
        columns, inputs = module.quantized.outlier_columns, module.layout.shape[-1]  # checks types and lengths
        if columns is not None and not 0 <= int(columns.min()) <= int(columns.max()) < inputs:
            raise ValueError(
                f"{name} keeps the columns {columns.tolist()} of {inputs} inputs at 16 bits: its codes are damaged"
            )


def hash_values(model: nn.Module) -> str:
    """Return the hash of a model's weights, packed ones as the values that they stand for: see hash_weights.

    Beside adapters, fused experts are hashed as their codes.
    """
    packed = list_packed(model)
    if not packed or not isinstance(model, PreTrainedModel):
        return hash_weights(model)
    has_adapters = any(".base_layer." in name for name, _ in model.named_parameters())
    return hash_tensors(_list_own_values(model) if has_adapters else _list_values(model))


def _list_own_values(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the parameters that a packed model has itself, those of packed layers as their values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for names, parameter in distinct_parameters(model):
        path, _, attribute = names[0].rpartition(".")
        owner = modules[path]
        yield names, restore_matrix(owner) if isinstance(owner, PackedWeight) and attribute == "weight" else parameter


def _list_values(model: PreTrainedModel) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the parameters of a packed model as the plain one has them, in its order."""
    config = type(model.config).from_dict(model.config.to_dict())
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    modules = dict(model.named_modules(remove_duplicate=False))
    for names, _ in distinct_parameters(plain):
        path, _, attribute = names[0].rpartition(".")
        experts, owner = modules.get(names[0]), modules[path]
        if isinstance(experts, QuantizedExperts):
            yield names, torch.stack([experts.restore(number) for number in range(len(experts))])
        elif isinstance(owner, PackedWeight) and attribute == "weight":
            yield names, restore_matrix(owner)
        else:
            yield names, owner.get_parameter(attribute)


def restore_matrix(weight: PackedWeight) -> Tensor:
    """Return a packed weight's values as its layer had them: [in, out] of a Conv1D."""
    values = weight.dequantize()
    return values.t().contiguous() if isinstance(weight, QuantizedLinear) and weight.is_conv1d else values


def restore_layers(model: Any, dtype: torch.dtype | None = None) -> None:
    """Put plain layers with dequantized weights in the place of packed ones.

    Args:
        model: the model.
        dtype: the dtype of the weights. None is the one that was quantized.
    """
    made: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedExperts):
            values = torch.stack([module.restore(number) for number in range(len(module))])
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            delattr(owner, attribute)
            owner.register_parameter(attribute, nn.Parameter(values.to(dtype or values.dtype), requires_grad=False))
        elif isinstance(module, QuantizedLinear | QuantizedEmbedding):
            key = id(module.weight)
            if key not in made:
                values = restore_matrix(module)
                made[key] = nn.Parameter(values.to(dtype or values.dtype), requires_grad=False)
            model.set_submodule(name, _make_plain(module, made[key]))
    model.tie_weights()


def _make_plain(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    layer: Any
    if isinstance(module, QuantizedEmbedding):
        layer = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
    elif module.is_conv1d:
        with torch.device("meta"):
            layer = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        layer.bias = module.bias
    else:
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.bias = module.bias
    layer.weight = weight
    return layer.train(module.training)  # type: ignore[no-any-return]


def list_codes(model: nn.Module) -> Mapping[str, QuantizedTensor]:
    """Return every packed weight of a model as a quantized tensor, by its label: NAME, or NAME[3] for an expert."""
    return {_label(name, module): module.quantized for name, module in list_packed(model).items()}
