"""Write packed checkpoints for other tools. A value that a format cannot hold exactly is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kbit.checkpoints.formats import bitsandbytes, compressed_tensors, gguf, gptq
from kbit.checkpoints.formats.plain import NotExactError
from kbit.checkpoints.gguf_file import write_gguf
from kbit.checkpoints.loading import load_packed
from kbit.checkpoints.packing import list_codes, list_packed
from kbit.layers.quantized_linear import QuantizedLinear
from kbit.models.checkpoint_files import is_packed_by_kbit
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.scale_formats import name_dtype

_SHOWN: Final = 3  # reasons that are named


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model, by their modules' names.

    Attributes:
        packed: each packed layer's weight.
        plain: those that are not packed.
    """

    packed: Mapping[str, QuantizedTensor]
    plain: Sequence[str]


@dataclass(frozen=True)
class TensorFormat:
    """A format of safetensors files.

    Attributes:
        name: the format's name on the command line.
        write: a function that returns the tensors of one weight, by what follows `prefix`.
        prefix: what stands before the tensors' own names: "weight" of a layer, or nothing.
        scales: the tensor that must have the dtype of the model's other tensors, or None.
        holds_conv1d: whether GPT-2's layers can be packed.
        describe: a function that returns the quantization_config for config.json.
    """

    name: str
    write: Callable[[QuantizedTensor], dict[str, Tensor]]
    prefix: str
    scales: str | None
    holds_conv1d: bool
    describe: Callable[[Layers], dict[str, Any]]


def _describe_bitsandbytes(layers: Layers) -> dict[str, Any]:
    spec = next(iter(layers.packed.values())).spec
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4" if spec.data_type == "nf" else "fp4",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_use_double_quant": spec.scale_format == "dq8",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(layers.plain),  # None would be the head, which is packed here
    }


def _find_one_block(layers: Layers, form: str) -> int:
    """Return the block size of all packed layers.

    Raises:
        NotExactError: they have several, as a block is no longer than a row.
    """
    sizes = {tensor.spec.find_block_shape(tensor.shape)[1]: name for name, tensor in layers.packed.items()}
    if len(sizes) > 1:
        found = ", ".join(f"{size} ({name})" for size, name in sizes.items())
        raise NotExactError(
            f"{form} has one group_size for all layers, and their blocks have {found} weights: use a quant.block_size "
            "that divides the inputs of every layer"
        )
    return next(iter(sizes))


def _describe_compressed(layers: Layers) -> dict[str, Any]:
    tensor, block = next(iter(layers.packed.values())), _find_one_block(layers, compressed_tensors.NAME)
    weights = {
        "num_bits": tensor.spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": block,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(layers.plain),
        "config_groups": {"group_0": group},
    }


def _describe_gptq(layers: Layers) -> dict[str, Any]:
    tensor = next(iter(layers.packed.values()))
    return {
        "quant_method": "gptq",
        "bits": tensor.spec.bits,
        "group_size": _find_one_block(layers, gptq.NAME),
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "dynamic": {f"-:^{name}$".replace(".", r"\."): {} for name in layers.plain} or None,
    }


TENSOR_FORMATS: Final = {
    form.name: form
    for form in (
        TensorFormat(bitsandbytes.NAME, bitsandbytes.write, "weight", None, True, _describe_bitsandbytes),
        TensorFormat(
            compressed_tensors.NAME, compressed_tensors.write, "", "weight_scale", False, _describe_compressed
        ),
        TensorFormat(gptq.NAME, gptq.write, "", "scales", False, _describe_gptq),
    )
}
FORMATS: Final = (*TENSOR_FORMATS, gguf.NAME)


def export_checkpoint(folder: str | Path, form: str, out: str | Path) -> str:
    """Write a packed checkpoint in the format of another tool, with its tokenizer, and return what was written.

    Args:
        folder: the folder of a packed checkpoint.
        form: bitsandbytes, compressed-tensors, gptq or gguf.
        out: a new folder.

    Raises:
        NotExactError: the format does not hold a packed weight exactly. Nothing is written.
        ValueError: the folder holds no packed checkpoint, or out exists already.
        ImportError: gguf without the package gguf.
    """
    folder, out = Path(folder), Path(out)
    if not is_packed_by_kbit(folder):
        raise ValueError(f"{folder} holds no packed checkpoint of kbit: `kbit pack` makes one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already: name a new folder")
    dtype = str(json.loads((folder / "config.json").read_text()).get("dtype") or "float16")
    loaded = load_packed(str(folder), dtype=dtype)
    if form == gguf.NAME:
        written = write_gguf(loaded.model, loaded.tokenizer, out)
    else:
        written = _write_tensors(loaded.model, TENSOR_FORMATS[form], out)
    loaded.tokenizer.save_pretrained(out)
    generation = loaded.model.generation_config
    if form != gguf.NAME and generation is not None:  # a GGUF file has the tokens that begin and end a text
        generation.save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".gguf"))
    return f"{out}: {written}, {size:,} bytes of weight files; its codes and scales stand for the same values"


def _write_tensors(model: PreTrainedModel, form: TensorFormat, out: Path) -> str:
    layers = _list_layers(model, form)
    tensors = _copy_plain(model)
    rest = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float16)
    refused = []
    for name, weight in layers.packed.items():
        try:
            parts = form.write(weight)
            if form.scales is not None:
                parts[form.scales] = _fit_scales(parts[form.scales], rest, form.name)
        except NotExactError as error:
            refused.append(f"{name}: {error}")
            continue
        prefix = f"{name}.{form.prefix}".removesuffix(".")
        tensors |= {f"{prefix}.{part}".removesuffix("."): t.contiguous() for part, t in parts.items()}
    if refused:
        more = f" (and {len(refused) - _SHOWN} more)" if len(refused) > _SHOWN else ""
        raise NotExactError("; ".join(refused[:_SHOWN]) + more)
    config = model.config.to_dict() | {"quantization_config": form.describe(layers), "dtype": name_dtype(rest)}
    config["architectures"] = [type(model).__name__]
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return f"{form.name}, {len(layers.packed)} packed layers"


def _fit_scales(scales: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return float16 scales in the dtype of the model's other tensors, to which tools cast them."""
    fitted = scales.to(dtype)
    if not torch.equal(fitted.float(), scales.float()):
        raise NotExactError(
            f"{name} has its scales in the model's dtype, and they are no {name_dtype(dtype)} numbers: use "
            f"quant.scale_format={'bf16' if dtype == torch.bfloat16 else 'fp16'}"
        )
    return fitted


def _list_layers(model: PreTrainedModel, form: TensorFormat) -> Layers:
    """Return the linear layers of a model.

    Raises:
        NotExactError: a packed weight is none of a linear layer that the format knows.
    """
    modules = dict(model.named_modules())
    packed = {}
    for label, tensor in list_codes(model).items():
        name = label.removesuffix(".weight")
        module = modules.get(name)
        if not isinstance(module, QuantizedLinear) or (module.is_conv1d and not form.holds_conv1d):
            kind = "a Conv1D" if isinstance(module, QuantizedLinear) else "an embedding or a fused expert"
            raise NotExactError(f"{form.name} packs nn.Linear alone, and {label} is the weight of {kind}")
        packed[name] = tensor
    plain = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    return Layers(packed, plain)


def _copy_plain(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that are not packed, tied ones once."""
    packed = {f"{name}.{part}" for name, module in list_packed(model).items() for part in module.layout.list_tensors()}
    tied = set(model.all_tied_weights_keys)
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in packed and name not in tied}
