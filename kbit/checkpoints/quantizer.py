"""The quantizer that transformers calls while it loads a model with a KbitConfig, or a packed checkpoint.

A model is quantized tensor by tensor as its weights are read, so that no more than the packed model and the tensor at
hand are in memory. Methods that see a text, or choose outliers by other weights, need the whole model first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer

from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.packing import attach, pack_weights, restore_layers
from kbit.checkpoints.skeleton import (
    find_first,
    label_matrices,
    list_packed,
    list_quantized,
    place_layer,
    plan_packing,
    tie_heads,
)
from kbit.layers.packed_weight import PackedLayout, PackedWeight
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import METHOD_FUNCTIONS, make_weight
from kbit.methods.report import describe_low_coverage
from kbit.methods.weight import Job
from kbit.models.checkpoint_files import PACKED_METHOD
from kbit.models.parameters import owner_of, split_matrices
from kbit.models.transformers_private import use_eager_experts
from kbit.numerics.quantized_tensor import QuantizedTensor

FINGERPRINT: Final = "kbit"  # in the metadata of weight files


@register_quantizer(PACKED_METHOD)
class KbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes and packs weights as they are loaded, or makes place for those of a packed checkpoint."""

    requires_calibration = False
    quantization_config: KbitConfig

    def __init__(self, quantization_config: KbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.names: dict[str, list[str]] = {}  # of each weight to pack, by the first
        self.loaded_whole = not self.pre_quantized and needs_whole_model(quantization_config.quant)

    def update_attn_implementation(self, config: Any) -> Any:
        """Let the model multiply experts one by one."""
        use_eager_experts(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        model.tie_weights()
        plan = plan_packing(model, config.quant)
        if not self.pre_quantized and plan.coverage < config.quant.min_coverage:
            raise ValueError(describe_low_coverage(plan, config.quant.min_coverage))
        self.names = {find_first(model, names): names for names in list_quantized(plan)}
        if not self.pre_quantized:
            return
        check_fingerprint(config, checkpoint_files or ())
        for name, names in self.names.items():
            labels = list(label_matrices(model, name))
            place_layer(model, names, [config.find_layout(label, tuple(m.shape), m.dtype) for label, m in labels])

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is to be quantized, and was not yet."""
        if self.pre_quantized or self.loaded_whole or param_name not in self.names:
            return False
        path, _, attribute = param_name.rpartition(".")
        owner = model.get_submodule(path)
        return not isinstance(owner, PackedWeight) and isinstance(getattr(owner, attribute), nn.Parameter)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes a tensor of the checkpoint."""
        return QuantizeOnLoad(self)

    def pack_tensor(self, model: Any, name: str, values: Tensor) -> dict[str, Tensor]:
        """Quantize a tensor, put a packed layer in its place, and return that layer's tensors by their full names."""
        quant, owner = self.quantization_config.quant, owner_of(model, name)
        codes = [
            quantize_alone(model, name, matrix, quant, number if matrix.ndim < values.ndim else None)
            for number, matrix in enumerate(split_matrices(values, owner))
        ]
        place_layer(model, self.names[name], [PackedLayout.of(made) for made in codes])
        tensors: dict[str, Tensor] = {}
        for number, made in enumerate(codes):
            prefix = f"{name}.{number}" if len(self.names[name]) == 1 and values.ndim > 2 else name.rpartition(".")[0]
            filled = PackedWeight(PackedLayout.of(made), "meta").put(made)
            tensors |= {f"{prefix}.{part}": tensor.detach() for part, tensor in filled.state_dict().items()}
        return tensors

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.loaded_whole:
            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
            pack_weights(model, self.quantization_config.quant, tokenizer)
        else:
            check_complete(model)
            for names in self.names.values():
                tie_heads(model, names)
        attach(model, self)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the model's tensors, those of tied layers once, and what the weight files say of themselves."""
        once = list_packed(model)
        tied = [name for name, m in model.named_modules() if isinstance(m, PackedWeight) and name not in once]
        left_out = tuple(f"{name}." for name in tied)
        kept = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".bias")}
        state = model.state_dict().items()
        tensors = {name: t for name, t in state if name in kept or not (left_out and name.startswith(left_out))}
        return tensors, {FINGERPRINT: self.quantization_config.fingerprint}

    def is_serializable(self) -> bool:
        """Whether save_pretrained can save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: gradients flow through packed layers to their inputs."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        restore_layers(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """Quantizes the tensors of a checkpoint that were just read."""

    def __init__(self, quantizer: KbitQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the tensors of packed layers in place of the weights that were read."""
        tensors: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensors |= self.quantizer.pack_tensor(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return tensors


def needs_whole_model(quant: QuantConfig) -> bool:
    """Whether a weight's codes depend on other weights or on a text, so that weights cannot be packed one by one."""
    return quant.traits.needs_text or quant.keeps_outliers


def quantize_alone(model: Any, name: str, values: Tensor, quant: QuantConfig, expert: int | None) -> QuantizedTensor:
    """Return the codes of one weight by a method that looks at no other weight."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"NaN or Inf in weight {name}")
    weight = make_weight(name, values, quant.spec, expert)
    ((_, codes),) = METHOD_FUNCTIONS[quant.method](Job(model, [weight], quant, None))
    if not isinstance(codes, QuantizedTensor):
        raise ValueError(f"quant.method={quant.method} makes {type(codes).__name__}, which has no packed layer")
    return codes


def check_fingerprint(config: KbitConfig, files: Sequence[str]) -> None:
    """Raise ValueError if weight files say that they were packed in another way than config.json does."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(FINGERPRINT)
        if found != config.fingerprint:
            raise ValueError(
                f"{path} was packed in another way ({found}) than config.json says ({config.fingerprint}: "
                f"{config.fields}): one of the two files is another checkpoint's, or was changed"
            )


def check_complete(model: Any) -> None:
    """Raise ValueError if a packed layer has no tensors, or tensors of another size than its shape asks for."""
    for name, module in list_packed(model).items():
        if module.weight.is_meta:
            raise ValueError(f"the checkpoint has no codes for {name}: its config.json and its weights disagree")
        module.quantized  # noqa: B018 (checks each tensor's type and length)
