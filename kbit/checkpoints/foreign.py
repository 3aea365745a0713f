"""Checkpoints that other tools quantized: their weights as QuantizedTensors, and their models as what they are.

A model gets the values that the codes stand for, in the dtype that its tool decodes to. Its report has the bits that
the codes and scales take. Its other tensors are rounded to 16 bits, as those of every model are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kbit.checkpoints.config import find_rounded
from kbit.checkpoints.formats import bitsandbytes, compressed_tensors, gguf, gptq
from kbit.checkpoints.packing import find_packed_report
from kbit.methods.config import QuantConfig
from kbit.methods.report import QuantizationReport, TensorReport, plan_quantization
from kbit.models.checkpoint_files import describe_quantization, read_json
from kbit.models.loading import LoadedModel, check_device, find_source, identify_files, read_tokenizer
from kbit.models.parameters import check_finite, owner_of
from kbit.models.size import find_cached_folder
from kbit.models.transformers_private import GgufTensor, list_gguf_tensors
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.scale_formats import name_dtype
from kbit.numerics.spec import BASELINE_BITS
from kbit.silence import silence_libraries

_MARKS: Final = {  # the part that each packed weight has, and what stands before the parts' names
    "bitsandbytes": (".weight.quant_map", ".weight."),
    "gptq": (".qweight", "."),
    "compressed-tensors": (".weight_packed", "."),
}
# What follows the name of a packed layer, or of its weight, in its parts' names.
_PARTS: Final = frozenset(
    {"weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map"}
    | {f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
    | {"qweight", "qzeros", "scales", "g_idx"}
    | {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
)
_BASELINE: Final = QuantConfig(bits=BASELINE_BITS)
_GGUF_PLAIN: Final = ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64")


def read_quantized(path: str | Path, dtype: torch.dtype | None = None) -> dict[str, QuantizedTensor]:
    """Return each quantized weight of a checkpoint of bitsandbytes, GPTQ, compressed-tensors or GGUF, by its name.

    Args:
        path: a folder with config.json and safetensors files, or a GGUF file, whose names are GGUF's own.
        dtype: the dtype of the decoded weights. None is the checkpoint's, and float32 of a GGUF file.

    Raises:
        ValueError: the checkpoint is not quantized by one of these, a weight's parts do not fit together, or what
            they hold is no QuantizedTensor (inputs in another order, other kinds of GGUF's blocks).
        FileNotFoundError: there is no such file.
        ImportError: a GGUF file without the package gguf.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return dict(_read_gguf(path, dtype or torch.float32))
    config = read_json(path / "config.json")
    found: dict[str, Any] = config.get("quantization_config") or config.get("compression_config") or {}
    method = str(found.get("quant_method"))
    if method not in _MARKS:
        raise ValueError(f"{path}: quantization_config: {method} is none of {', '.join(_MARKS)}")
    kind = dtype or getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float16"))
    mark, separator = _MARKS[method]
    weights = {}
    for name, parts in _group_parts(path, mark, separator):
        try:
            weights[f"{name}.weight"] = _read_weight(method, parts, found, kind)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {name} is no {method} weight: {error}") from error
    if not weights:
        raise ValueError(f"{path} has no weights packed by {method}")
    return weights


def _read_weight(
    method: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> QuantizedTensor:
    if method == "bitsandbytes":
        return bitsandbytes.read(parts)
    if method == "gptq":
        minus_one = config.get("checkpoint_format", "gptq") != "gptq_v2"
        return gptq.read(parts, int(config["bits"]), dtype, zeros_minus_one=minus_one)
    groups = [group["weights"] for group in config["config_groups"].values()]
    if len({int(group["num_bits"]) for group in groups}) != 1 or config.get("format") != "pack-quantized":
        raise ValueError("only pack-quantized checkpoints with one number of bits are read")
    return compressed_tensors.read(parts, int(groups[0]["num_bits"]), dtype)


def _group_parts(folder: Path, mark: str, separator: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name and the parts of each packed layer."""
    files: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))}
    where = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for marked in sorted(name for name in where if name.endswith(mark)):
        layer = marked.removesuffix(mark)
        prefix = f"{layer}{separator}"
        parts = {name.removeprefix(prefix): name for name in where if name.startswith(prefix)}
        if separator != ".":
            parts[""] = prefix.removesuffix(".")
        if missing := [name for name in parts.values() if name not in where]:
            raise ValueError(f"{folder} has no tensor {missing[0]}")
        yield layer, {part: files[where[name]].get_tensor(name) for part, name in parts.items()}


def _read_gguf(path: Path, dtype: torch.dtype) -> Iterator[tuple[str, QuantizedTensor]]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("a GGUF file needs the package gguf: pip install 'kbit[gguf]'") from error
    kinds = {kind.number: kind for kind in gguf.KINDS.values()}
    for tensor in GGUFReader(path).tensors:
        kind = kinds.get(int(tensor.tensor_type))
        if kind is None and tensor.tensor_type.name not in _GGUF_PLAIN:
            raise ValueError(
                f"{path}: {tensor.name} has blocks of {tensor.tensor_type.name}; only {', '.join(gguf.KINDS)} are read"
            )
        if kind is not None:
            rows = tensor.data.reshape(-1, tensor.data.shape[-1])
            yield str(tensor.name), gguf.read(rows, kind, dtype)


def load_foreign(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    tokenizer: str | None = None,
) -> LoadedModel:
    """Load a checkpoint of bitsandbytes, GPTQ or compressed-tensors. See kbit.checkpoints.loading.load_model.

    Raises:
        ValueError: its weights cannot be read (kbit.read_quantized), or are not those of the model.
        OSError: files are missing or damaged.
    """
    check_device(device)
    silence_libraries()
    source = find_source(name, revision)
    folder = _find_folder(source.location, revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stored = config.dtype or torch.float16
    weights = read_quantized(folder)
    description = describe_quantization(read_json(folder / "config.json"))
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    _fill(model, weights, _read_plain(folder, weights, find_rounded(stored)), str(folder))
    check_finite(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    note_report(model, _report(model, weights))
    model.to(device=device).eval()
    rounded = name_dtype(find_rounded(stored))
    return LoadedModel(model, read_tokenizer(source, tokenizer, model), rounded, identify_files(source), description)


def _find_folder(location: str, revision: str | None) -> Path:
    """Return the folder of a checkpoint, into which one of the hub is downloaded."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(location, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except Exception as error:  # offline, unknown, gated: the hub's client has an error for each
        raise OSError(f"model {location!r} cannot be had from the hub: {error}") from error
    folder = find_cached_folder(location, revision)
    assert folder is not None  # as it was just downloaded
    return folder


def _read_plain(folder: Path, weights: Mapping[str, QuantizedTensor], rounded: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that are no part of a quantized weight, rounded to 16 bits."""
    layers = {name.removesuffix(".weight") for name in weights}
    plain = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                layer = name if name in layers else name.rpartition(".weight.")[0] or name.rpartition(".")[0]
                if layer in layers and name.removeprefix(f"{layer}.").removeprefix("weight.") in _PARTS:
                    continue
                tensor = file.get_tensor(name)
                plain[name] = tensor.to(rounded) if tensor.is_floating_point() else tensor
    return plain


def _fill(model: nn.Module, weights: Mapping[str, QuantizedTensor], plain: Mapping[str, Tensor], where: str) -> None:
    """Write the tensors of a checkpoint into a model. Raise ValueError if they are not those of the model."""
    state: dict[str, Tensor] = dict(plain)
    for name, weight in weights.items():
        values = weight.dequantize()
        known = name.rpartition(".")[0] in dict(model.named_modules())
        state[name] = values.t() if known and isinstance(owner_of(model, name), Conv1D) else values
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that disagree
        raise ValueError(f"{where}: {error}") from error
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    if missing := sorted(set(found.missing_keys) - tied):
        raise ValueError(f"{where} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}")
    if unknown := sorted(found.unexpected_keys):
        raise ValueError(
            f"{where} has {len(unknown)} tensors that {type(model).__name__} does not take, such as {unknown[0]}"
        )


def _report(model: nn.Module, weights: Mapping[str, QuantizedTensor]) -> QuantizationReport:
    """Return the count of bits of a model, each weight with what its codes and scales take."""
    plan = plan_quantization(model, _BASELINE)
    tensors = []
    for tensor in plan.tensors:
        found = next((weights[name] for name in tensor.name.split(" = ") if name in weights), None)
        bits, reason = (tensor.bits, "not quantized") if found is None else (found.count_bits(), "")
        tensors.append(dataclasses.replace(tensor, quantized=found is not None, reason=reason, bits=bits))
    return QuantizationReport(_BASELINE.spec, tuple(tensors))


def report_gguf(path: Path) -> QuantizationReport:
    """Return the count of bits of a GGUF file by its header: what its blocks take, and 16 bits for other numbers."""
    return QuantizationReport(_BASELINE.spec, tuple(map(_report_gguf_tensor, list_gguf_tensors(path))))


def _report_gguf_tensor(tensor: GgufTensor) -> TensorReport:
    elements = torch.Size(tensor.shape).numel()
    bits = 8 * tensor.bytes if tensor.is_quantized else BASELINE_BITS * elements
    in_block = tensor.name.startswith("blk.") and len(tensor.shape) > 1
    reason = "" if tensor.is_quantized else "plain numbers in the file"
    return TensorReport(tensor.name, tensor.shape, in_block, tensor.is_quantized, reason, bits)


def note_report(model: Any, report: QuantizationReport) -> None:
    """Keep with a model how many bits its checkpoint takes."""
    model.kbit_checkpoint = report


def find_stored_report(model: nn.Module) -> QuantizationReport | None:
    """Return the count of bits of a model that was quantized before it was loaded, by kbit or by another tool."""
    found: QuantizationReport | None = getattr(model, "kbit_checkpoint", None)
    return found or find_packed_report(model)
