"""How transformers quantizes a model with kbit while it loads it: tensor by tensor, or as a whole.

transformers calls KbitQuantizer while it loads a model with a KbitConfig, or a packed checkpoint. A model is quantized
tensor by tensor as its weights are read, so that no more than the packed model and the tensor at hand are in memory.
Methods that see a text, or choose outliers by other weights, need the whole model first.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from kbit.checkpoints.config import KbitConfig as KbitConfig
from kbit.checkpoints.config import find_rounded
from kbit.checkpoints.packing import (
    attach,
    check_complete,
    group_tied,
    label_matrices,
    list_packed,
    list_quantized,
    place_layer,
    plan_packing,
    put_codes,
    restore_layers,
    round_rest,
    tie_heads,
)
from kbit.layers.packed_weight import PackedLayout, PackedWeight
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import METHOD_FUNCTIONS, make_weight, quantize_model, refuse_quantized
from kbit.methods.report import QuantizationReport, describe_low_coverage
from kbit.methods.weight import ExpertCodes, Job, sum_squares
from kbit.models.checkpoint_files import PACKED_METHOD
from kbit.models.parameters import hash_weights, owner_of, split_matrices
from kbit.models.transformers_private import use_eager_experts
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.spec import QuantSpec

FINGERPRINT: Final = "kbit"  # in the metadata of weight files


@register_quantizer(PACKED_METHOD)
class KbitQuantizer(HfQuantizer):
    """Quantizes and packs weights as they are loaded, or makes place for those of a packed checkpoint."""

    requires_calibration = False
    quantization_config: KbitConfig

    def __init__(self, quantization_config: KbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.folder = ""  # of the checkpoint's files: the asked revision's of a hub id
        self.names: dict[str, list[str]] = {}  # of each weight to pack, by the first
        self.lost = self.norm = 0.0  # sums over the weights that were quantized while loading
        quantization_config.check_asked()
        self.loaded_whole = not self.pre_quantized and quantization_config.quant.needs_whole_model

    def update_attn_implementation(self, config: Any) -> Any:
        """Let the model multiply experts one by one."""
        use_eager_experts(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.folder = str(Path(checkpoint_files[0]).parent) if checkpoint_files else model.config.name_or_path
        plan = plan_packing(model, config.quant)
        if not self.pre_quantized and plan.coverage < config.quant.min_coverage:
            raise ValueError(describe_low_coverage(plan, config.quant.min_coverage))
        self.names = group_tied(model, list_quantized(plan))
        if not self.pre_quantized:
            return
        check_fingerprint(config, checkpoint_files or ())
        for name, names in self.names.items():
            labels = list(label_matrices(model, name))
            place_layer(model, names, [config.find_layout(label, tuple(m.shape), m.dtype) for label, m in labels])
        check_shapes(model, checkpoint_files or ())

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
        if (baseline := self.quantization_config.baseline) is not None:
            values = baseline.round(values, model.config.dtype)
        codes = [
            self._quantize(model, name, matrix, quant, number if matrix.ndim < values.ndim else None)
            for number, matrix in enumerate(split_matrices(values, owner))
        ]
        place_layer(model, self.names[name], [PackedLayout.of(made) for made in codes])
        tensors: dict[str, Tensor] = {}
        for number, made in enumerate(codes):
            prefix = f"{name}.{number}" if len(self.names[name]) == 1 and values.ndim > 2 else name.rpartition(".")[0]
            filled = PackedWeight(PackedLayout.of(made), "meta").put(made)
            tensors |= {f"{prefix}.{part}": tensor.detach() for part, tensor in filled.state_dict().items()}
        return tensors

    def _quantize(
        self, model: Any, name: str, values: Tensor, quant: QuantConfig, expert: int | None
    ) -> QuantizedTensor:
        """Return the codes of a weight, and add up its error."""
        codes = quantize_alone(model, name, values, quant, expert)
        self.norm += sum_squares(values)
        self.lost += sum_squares(codes.dequantize().float().sub_(values))
        return codes

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if (baseline := self.quantization_config.baseline) is not None:
            round_rest(model, find_rounded(model.config.dtype))
            round_rest(model, baseline.dtype)
        if self.loaded_whole:
            quant = self.quantization_config.quant
            pack_weights(model, quant, self._read_tokenizer(model) if quant.traits.needs_text else None)
        else:
            check_complete(model)
            for names in self.names.values():
                tie_heads(model, names)
        attach(model, self)
        if self.norm:
            config, report = model.kbit_quantized
            rmse = math.sqrt(self.lost / self.norm)
            model.kbit_quantized = (config, dataclasses.replace(report, weight_rmse=rmse))
        return model

    def _read_tokenizer(self, model: Any) -> PreTrainedTokenizerBase:
        if (baseline := self.quantization_config.baseline) is not None:
            tokenizer: PreTrainedTokenizerBase = baseline.read_tokenizer(model)
            return tokenizer
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return tokenizer

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

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make a model plain again, all of it in one dtype. None is the dtype in which the model computes now."""
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        restore_layers(model, kind)
        round_rest(model, kind)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model


class QuantizeOnLoad(ConversionOps):
    """Quantizes the tensors of a checkpoint that were just read."""

    def __init__(self, quantizer: KbitQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]  # transformers' own operations differ in the same way
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the tensors of packed layers in place of the weights that were read."""
        _release_freed_memory()
        tensors: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensors |= self.quantizer.pack_tensor(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return tensors


def _release_freed_memory() -> None:
    """Give the pages of freed tensors back to the system.

    glibc keeps those that lie below a tensor that stays, and codes stay. Without this the process grows to the size of
    the plain model.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def quantize_alone(model: Any, name: str, values: Tensor, quant: QuantConfig, expert: int | None) -> QuantizedTensor:
    """Return the codes of one weight by a method that looks at no other weight."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"NaN or Inf in weight {name}")
    weight = make_weight(name, values, quant.spec, expert)
    ((_, codes),) = METHOD_FUNCTIONS[quant.method](Job(model, [weight], quant, None))
    if not isinstance(codes, QuantizedTensor):
        raise ValueError(f"quant.method={quant.method} makes {type(codes).__name__}, which has no packed layer")
    return codes


def check_shapes(model: nn.Module, files: Sequence[str]) -> None:
    """Raise ValueError if a tensor of a packed checkpoint has not the shape and the kind that its config.json asks for.

    Only the headers of the weight files are read, before any tensor is.
    """
    tensors = model.state_dict().items()
    expected = {name: _describe(list(tensor.shape), is_bytes=tensor.dtype == torch.uint8) for name, tensor in tensors}
    for path in files:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            stored = {
                name: _describe(part.get_shape(), is_bytes=part.get_dtype() == "U8") for name, part in parts.items()
            }
        for name, found in stored.items():
            if name in expected and found != expected[name]:
                raise ValueError(
                    f"{path}: {name} is {found}, and config.json asks for {expected[name]}: the file is truncated or "
                    "another checkpoint's, or config.json was changed"
                )


def _describe(shape: Sequence[int], *, is_bytes: bool) -> str:
    return f"{'bytes' if is_bytes else 'numbers'} {list(shape)}"


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


def pack_weights(
    model: nn.Module,
    quant: QuantSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
    column_dtype: torch.dtype | None = None,
) -> tuple[QuantizationReport, str]:
    """Quantize a model and put packed layers in the place of its own. Return the report and the values' hash.

    The hash is that of the same model with dequantized weights, as results of experiments have it.

    Args:
        model, quant, tokenizer: see pack_model.
        column_dtype: the 16-bit dtype in which outlier columns are kept. None is the weights' own.

    Raises:
        ValueError: see pack_model.
    """
    config = QuantConfig.of(quant)
    config.check_packable()
    refuse_quantized(model)
    plan = plan_packing(model, config)
    report = quantize_model(model, config, tokenizer, keep_codes=True)
    weights_hash = hash_weights(model)
    for names in list_quantized(plan):
        made: Any = report.codes.pop(names[0])
        codes: list[Any] = list(made.experts) if isinstance(made, ExpertCodes) else [made]
        put_codes(model, names, [_round_columns(part, column_dtype) for part in codes])
    return report, weights_hash


def _round_columns(codes: QuantizedTensor, dtype: torch.dtype | None) -> QuantizedTensor:
    if dtype is None or codes.outlier_values is None:
        return codes
    return dataclasses.replace(codes, outlier_values=codes.outlier_values.to(dtype))
