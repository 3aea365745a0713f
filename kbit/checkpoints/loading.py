"""Packed models from outside: pack a model, load a packed checkpoint, save one with its tokenizer and model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kbit.checkpoints.card import write_card
from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.packing import attach, pack_weights, round_rest
from kbit.checkpoints.quantizer import KbitQuantizer
from kbit.methods.config import QuantConfig
from kbit.methods.report import QuantizationReport
from kbit.models import loading
from kbit.models.checkpoint_files import is_packed_by_kbit
from kbit.models.loading import LoadedModel, check_device, find_source, hash_folder, read_tokenizer
from kbit.numerics.scale_formats import name_dtype
from kbit.numerics.spec import QuantSpec
from kbit.silence import silence_libraries


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
    report, weights_hash = pack_weights(loaded.model, quant, loaded.tokenizer)
    dtype = getattr(torch, loaded.checkpoint_dtype)
    round_rest(loaded.model, dtype)
    attach(loaded.model, KbitQuantizer(KbitConfig.of(QuantConfig.of(quant)), pre_quantized=True))
    return report, weights_hash


def load_model(name: str, **options: Any) -> LoadedModel:
    """Load a model by short name, local folder or hub id, plain or packed by kbit. See kbit.models.loading.load_model.

    A packed checkpoint's other tensors are cast to the dtype. Its codes are decoded as they were packed.

    Raises:
        ValueError, OSError: see kbit.models.loading.load_model. Or a packed checkpoint is damaged, or its config.json
            and its weights disagree.
    """
    if not is_packed_by_kbit(Path(name)):
        return loading.load_model(name, **options)
    return load_packed(name, **options)


def load_packed(
    name: str, *, dtype: str = "float32", device: str = "cpu", tokenizer: str | None = None, **others: Any
) -> LoadedModel:
    """Load a folder that holds a packed checkpoint. See load_model.

    Raises:
        ValueError: an option that packed checkpoints do not have, or see load_model.
        OSError: the checkpoint is damaged or lacks tensors.
    """
    if wrong := [option for option, value in others.items() if value not in (None, 1)]:
        raise ValueError(f"model.{wrong[0]}={others[wrong[0]]}: {name} is a packed checkpoint, which has none")
    check_device(device)
    silence_libraries()
    source = find_source(name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=getattr(torch, dtype), device_map=device, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:  # sizes that disagree, damaged files
        raise OSError(f"packed model {name!r} cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise OSError(f"packed model {name!r} lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(info["unexpected_keys"]):
        raise OSError(
            f"packed model {name!r} has {len(unknown)} tensors that its config.json has no place for, such "
            f"as {unknown[0]}"
        )
    model.eval()
    config: KbitConfig = model.config.quantization_config
    return LoadedModel(
        model,
        read_tokenizer(source, tokenizer, model),
        find_stored_dtype(source.location),
        hash_folder(Path(source.location)),
        f"kbit {config.quant.label()}",
    )


def find_stored_dtype(folder: str) -> str:
    """Return the dtype of the tensors of a packed checkpoint that are not packed."""
    from kbit.models.checkpoint_files import read_json

    return str(read_json(Path(folder) / "config.json").get("dtype", name_dtype(torch.float16)))


def save_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    made_of: str = "",
    measured: str = "",
    **options: Any,
) -> None:
    """Save a packed model with its tokenizer and a model card: what it is, how it was made, what was measured.

    Args:
        model: a model that pack_model packed, or that was loaded packed.
        tokenizer: its tokenizer.
        folder: the folder to write.
        made_of: the name of the model that was packed, for the card. Empty is what transformers knows of it.
        measured: a section of the card, in Markdown, with what was measured.
        options: more arguments of save_pretrained, such as max_shard_size.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, KbitConfig):
        raise ValueError("the model is not packed: call kbit.pack_model first")
    config.made_by |= {"model": made_of} if made_of else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    write_card(Path(folder), config, model.kbit_quantized[1], measured)
