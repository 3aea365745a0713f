"""Read the quantized weights of checkpoints that other tools made, as QuantizedTensors of the same values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from kbit.checkpoints.formats import bitsandbytes, compressed_tensors, gguf, gptq
from kbit.models.checkpoint_files import read_json
from kbit.numerics.quantized_tensor import QuantizedTensor

_MARKS: Final = {  # the part that each packed weight has, and what stands before the parts' names
    "bitsandbytes": (".weight.quant_map", ".weight."),
    "gptq": (".qweight", "."),
    "compressed-tensors": (".weight_packed", "."),
}
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
