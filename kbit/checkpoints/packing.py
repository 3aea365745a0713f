"""Pack a model: its weights become codes, and its layers compute with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from kbit.checkpoints.config import KbitConfig, check_packable
from kbit.checkpoints.skeleton import list_packed, plan_packing
from kbit.layers.pack import use_codes
from kbit.layers.packed_weight import PackedWeight
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model, refuse_quantized
from kbit.methods.report import QuantizationReport, TensorReport, plan_quantization
from kbit.methods.weight import ExpertCodes
from kbit.models.parameters import distinct_parameters, hash_tensors, hash_weights, owner_of
from kbit.models.transformers_private import forget_conversions, use_eager_experts
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.spec import QuantSpec


def pack_weights(
    model: nn.Module, quant: QuantSpec, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[QuantizationReport, str]:
    """Quantize a model and put packed layers in the place of its own. Return the report and the values' hash.

    The hash is that of the same model with dequantized weights, as results of experiments have it.

    Raises:
        ValueError: see pack_model.
    """
    config = QuantConfig.of(quant)
    check_packable(config)
    refuse_quantized(model)
    plan_packing(model, config)
    report = quantize_model(model, config, tokenizer, keep_codes=True)
    weights_hash = hash_weights(model)
    codes: dict[str, Any] = {}
    for name, made in report.codes.items():
        codes[name] = list(made.experts) if isinstance(made, ExpertCodes) else made
    use_codes(model, codes)
    report = dataclasses.replace(report, codes={})
    model.kbit_quantized = (config, report)  # type: ignore[assignment]
    return report, weights_hash


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
    made_by = asked.made_by or {"kbit": version("kbit"), "model": str(model.config.name_or_path)}
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
    model.kbit_quantized = (config.quant, report_packed(model, config.quant))


def _label(name: str, module: PackedWeight) -> str:
    """Return the label of a packed weight: its parameter's name, or NAME[3] for the module NAME.3 of an expert."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        return f"{name}.weight"
    path, _, number = name.rpartition(".")
    return f"{path}[{number}]"


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


def find_packed_report(model: nn.Module) -> QuantizationReport | None:
    """Return the report of a model with packed layers, or None of another model."""
    done: tuple[QuantConfig, QuantizationReport] | None = getattr(model, "kbit_quantized", None)
    return done[1] if done is not None and list_packed(model) else None


def round_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters that are not packed to a dtype, in place. Buffers, such as rotary frequencies, stay."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def hash_values(model: nn.Module) -> str:
    """Return the hash of a model's weights, packed ones as the values that they stand for: see hash_weights."""
    packed = list_packed(model)
    if not packed or not isinstance(model, PreTrainedModel):
        return hash_weights(model)
    return hash_tensors(_list_values(model))


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
            yield names, torch.stack([experts[number] for number in range(len(experts))])
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
            values = torch.stack([module[number] for number in range(len(module))])
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
            layer = Conv1D(module.out_features, module.in_features)
        layer.bias = module.bias
    else:
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.bias = module.bias
    layer.weight = weight
    return layer.train(module.training)  # type: ignore[no-any-return]


def list_codes(model: nn.Module) -> Mapping[str, QuantizedTensor]:
    """Return every packed weight of a model as a quantized tensor, by its label: NAME, or NAME[3] for an expert."""
    return {_label(name, module): module.quantized for name, module in list_packed(model).items()}
