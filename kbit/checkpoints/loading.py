"""Packed models: quantized while transformers loads them, packed in memory, saved, and loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kbit.checkpoints.config import Baseline, find_rounded
from kbit.checkpoints.config import KbitConfig as KbitConfig
from kbit.checkpoints.foreign import load_foreign, note_report, report_gguf
from kbit.checkpoints.packing import attach, round_rest
from kbit.checkpoints.quantizer import KbitQuantizer, pack_weights
from kbit.methods.config import QuantConfig
from kbit.methods.report import QuantizationReport
from kbit.models import loading
from kbit.models.checkpoint_files import QuantizedError, check_configuration, read_json
from kbit.models.loading import LoadedModel, Source, check_device, find_source, identify_files, read_tokenizer
from kbit.models.parameters import check_finite
from kbit.models.size import find_packed, is_of_other_tool
from kbit.numerics.scale_formats import name_dtype
from kbit.numerics.spec import QuantSpec
from kbit.silence import silence_libraries

_FOREIGN_OPTIONS: Final = ("dtype", "device", "revision", "tokenizer")


def pack_model(
    model: PreTrainedModel, quant: QuantSpec, tokenizer: PreTrainedTokenizerBase | None = None
) -> QuantizationReport:
    """Quantize a model in place and let it compute with the codes: its linear layers become packed ones.

    It then computes what quantize_model's fake-quantized weights compute, in the memory of its codes and scales. It is
    saved by model.save_pretrained, loaded by transformers' from_pretrained (after `import kbit; kbit.KbitConfig`) or
    kbit.load_model, and made plain again by model.dequantize().

    Args:
        model: a Hugging Face causal language model.
        quant: the quantizer, see quantize_model. A QuantConfig says the method and the tensors, too.
        tokenizer: the model's tokenizer, for methods with calibration data.

    Raises:
        ValueError: the model is quantized already, the quantizer makes no codes (16 bits, int8 methods), a weight's
            layer has no packed twin, or see quantize_model.
    """
    report, _ = pack_weights(model, quant, tokenizer)
    attach(model, KbitQuantizer(KbitConfig.of(QuantConfig.of(quant)), pre_quantized=True))
    return report


def pack_loaded(loaded: LoadedModel, quant: QuantSpec) -> tuple[QuantizationReport, str]:
    """Pack a loaded model, and round everything else to the checkpoint's 16 bits. Return the report and the hash.

    The weights that are not packed are 16-bit values already, so that nothing changes but their memory. The hash is
    that of the values that the model computes with, see pack_weights.
    """
    dtype = getattr(torch, loaded.checkpoint_dtype)
    report, weights_hash = pack_weights(loaded.model, quant, loaded.tokenizer, dtype)
    round_rest(loaded.model, dtype)
    attach(loaded.model, KbitQuantizer(KbitConfig.of(QuantConfig.of(quant)), pre_quantized=True))
    return report, weights_hash


def load_model(name: str, *, packed_as: QuantConfig | None = None, **options: Any) -> LoadedModel:
    """Load a model by short name, local folder or hub id. See kbit.models.loading.load_model.

    It may be plain, packed by kbit, or quantized by bitsandbytes (4 bits), GPTQ, compressed-tensors (pack-quantized) or
    GGUF. Tensors that are not quantized are cast to the dtype. Codes are decoded as they were quantized, and cast then.

    Args:
        name: the model's name.
        packed_as: a quantizer by which the weights of a plain model are packed while it is loaded, tensor by tensor. As
            always they are first rounded to 16 bits. None loads the model as it is.
        options: the arguments of kbit.models.loading.load_model.

    Raises:
        ValueError, OSError: see kbit.models.loading.load_model. Or a packed checkpoint is damaged, or its config.json
            and its weights disagree. Or an option is not possible for packed models.
    """
    if packed_as is not None:
        return load_as_packed(name, packed_as, **options)
    revision = options.get("revision")
    if find_packed(name, revision) is None and not is_of_other_tool(name, revision):
        try:
            return _count_gguf(loading.load_model(name, **options), name, options)
        except QuantizedError:  # the hub's config.json is here by now
            if find_packed(name, revision) is None and not is_of_other_tool(name, revision):
                raise
    if find_packed(name, revision) is not None:
        return load_packed(name, **options)
    others = {key: value for key, value in options.items() if key not in _FOREIGN_OPTIONS}
    _refuse_options(others, f"{name} was quantized by another tool, and is loaded as it is")
    return load_foreign(name, **{key: options[key] for key in _FOREIGN_OPTIONS if key in options})


def _count_gguf(loaded: LoadedModel, name: str, options: Mapping[str, Any]) -> LoadedModel:
    """Return a loaded model with the count of its bits noted, if it was read from a quantized GGUF file."""
    if loaded.checkpoint_quantization:
        source = find_source(name, options.get("revision"), options.get("gguf_file"))
        assert source.gguf is not None  # as plain safetensors have no quantization
        note_report(loaded.model, report_gguf(source.gguf))
    return loaded


def load_packed(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    tokenizer: str | None = None,
    **others: Any,
) -> LoadedModel:
    """Load a packed checkpoint. See load_model.

    Raises:
        ValueError: an option that packed checkpoints do not have, or see load_model.
        OSError: the checkpoint is damaged or lacks tensors.
    """
    _refuse_options(others, f"{name} is a packed checkpoint, which has none")
    check_device(device)
    silence_libraries()
    source = find_source(name, revision)
    try:
        model, unknown = _read(source, dtype=getattr(torch, dtype), device_map=device)
    except RuntimeError as error:  # sizes that disagree
        raise OSError(f"packed model {name!r} cannot be loaded: {error}") from error
    if unknown:
        raise OSError(
            f"packed model {name!r} has {len(unknown)} tensors that its config.json has no place for, such "
            f"as {unknown[0]}"
        )
    folder = find_packed(name, revision)
    assert folder is not None  # as it was just loaded from there
    return LoadedModel(
        model,
        read_tokenizer(source, tokenizer, model),
        find_stored_dtype(folder),
        identify_files(source),
        f"kbit {model.config.quantization_config.quant.label()}",
    )


def load_as_packed(
    name: str,
    quant: QuantConfig,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    tokenizer: str | None = None,
    **others: Any,
) -> LoadedModel:
    """Load a plain model and pack its weights while they are read. See load_model.

    Raises:
        ValueError, OSError: see load_model.
    """
    _refuse_options(others, "packed=true reads plain safetensors on one device")
    check_device(device)
    silence_libraries()
    source = find_source(name, revision)
    if source.gguf is not None:
        raise ValueError(f"model.name={name} is a GGUF file: packed=true reads plain safetensors")
    config = AutoConfig.from_pretrained(source.location, **source.options)
    check_configuration(config.to_dict(), source.where)
    asked = KbitConfig.of(quant)
    asked.baseline = Baseline(getattr(torch, dtype), lambda model: read_tokenizer(source, tokenizer, model))
    model, _ = _read(source, dtype="auto", device_map=device, quantization_config=asked)
    check_finite(model)
    rounded = name_dtype(find_rounded(model.config.dtype))
    return LoadedModel(model, read_tokenizer(source, tokenizer, model), rounded, identify_files(source))


def _refuse_options(others: Mapping[str, Any], reason: str) -> None:
    """Raise ValueError for an option that is set, as packed models have only those that load_packed names."""
    for option, value in others.items():
        if value not in (None, 1):
            key = "ray.gpus_per_worker" if option == "gpus" else f"model.{option}"
            raise ValueError(f"{key}={value}: {reason}")


def _read(source: Source, **options: Any) -> tuple[Any, list[str]]:
    """Return the model that transformers reads, in evaluation mode, and the names of tensors it has no place for.

    Raises:
        OSError: a file is damaged or not there, or lacks tensors. The message names the model.
        RuntimeError: sizes disagree.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location, use_safetensors=True, output_loading_info=True, **source.options, **options
        )
    except OSError as error:
        raise OSError(f"model {source.name!r} cannot be loaded from {source.where}: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise OSError(f"model {source.name!r} at {source.where} lacks {len(missing)} tensors, such as {missing[0]}")
    return model.eval(), sorted(info["unexpected_keys"])


def find_stored_dtype(folder: Path) -> str:
    """Return the dtype of the tensors of a packed checkpoint that are not packed."""
    return str(read_json(folder / "config.json").get("dtype", "float16"))
