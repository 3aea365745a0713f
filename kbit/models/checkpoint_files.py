"""What a folder of model files holds, by its configuration and the headers of its weight files, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from kbit.models.catalog import locate_model

# Dtypes of safetensors that hold weights as they are. Anything else is a code that something else has to explain.
PLAIN_DTYPES: Final = ("F16", "BF16", "F32", "F64")

PACKED_METHOD: Final = "kbit"  # quant_method of a checkpoint whose weights kbit has packed

# quant_method of the checkpoints of other tools whose weights kbit reads.
READABLE: Final = ("bitsandbytes", "gptq", "compressed-tensors")

_ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")

# What checkpoints hold beside their weights: buffers of attention masks and positions that code computes today, towers
# for images and sound, and heads that predict further tokens (mtp).
_HARMLESS: Final = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|position_ids|rotary_emb\.\w+|rotary_pos_emb\.\w+)$"
    r"|(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|mtp)\."
)


def is_harmless(name: str) -> bool:
    """Whether a tensor that a model does not take is no part of its weights."""
    return _HARMLESS.search(name) is not None


def find_gguf(folder: Path, asked: str | None) -> Path | None:
    """Return the GGUF file that a model is read from: the one asked for, or the only one of a folder without others.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: it has several, and none was asked for.
    """
    if asked is not None:
        if not (folder / asked).is_file():
            raise FileNotFoundError(f"model.gguf_file: no file at {(folder / asked).resolve()}")
        return folder / asked
    if any(folder.glob("*.safetensors")):
        return None
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".gguf")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has several GGUF files ({names}): choose one by model.gguf_file=NAME")
    return found[0] if found else None


class QuantizedError(ValueError):
    """A checkpoint's configuration says that its weights are quantized."""


def check_model(name: str, revision: str | None = None, gguf_file: str | None = None) -> Path | None:
    """Look whether a model can be had and is plain, as far as its files here tell, and return its GGUF file if any.

    Raises:
        ValueError: the name is unknown, a local folder was asked for a revision, or see check_folder and find_gguf.
        FileNotFoundError: see check_folder and find_gguf.
    """
    folder = Path(locate_model(name))
    if not folder.is_dir():
        if gguf_file is not None:
            raise ValueError(f"model.gguf_file={gguf_file}: {name} is no folder here; download it first")
        return None
    if revision is not None:
        raise ValueError(f"model.revision={revision}: {name} is a local folder, which has no revisions")
    gguf = find_gguf(folder, gguf_file)
    check_folder(folder, is_gguf=gguf is not None)
    return gguf


def check_folder(folder: Path, *, is_gguf: bool = False) -> None:
    """Look whether a folder holds a model whose weights are plain numbers, before any of them is read.

    Args:
        folder: the folder of a model's files.
        is_gguf: whether the model is read from a GGUF file in it.

    Raises:
        FileNotFoundError: it has no configuration or no weights.
        ValueError: it is an adapter's folder, or its weights are quantized. The message says by what.
    """
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which changes a model: model.name={base} "
            f"model.adapter={folder}"
        )
    if is_gguf:
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no folder of a model")
    is_packed = is_packed_by_kbit(folder) or is_readable(read_json(folder / "config.json"))
    if not is_packed:
        check_configuration(read_json(folder / "config.json"), str(folder))
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} has no weights as model*.safetensors, the only format that is loaded")
    for name, dtype in (pair for path in weights for pair in _list_dtypes(path) if not is_packed):
        if dtype not in PLAIN_DTYPES and not is_harmless(name):
            raise ValueError(
                f"{folder}: the tensor {name} is stored as {dtype}, not as one of {', '.join(PLAIN_DTYPES)}: it holds "
                "codes of a quantized checkpoint, to which scales belong; measure the model that it was made of"
            )


def is_packed_by_kbit(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that `kbit pack` or kbit.pack_model made."""
    if not (folder / "config.json").is_file():
        return False
    return _find_quantization(read_json(folder / "config.json")).get("quant_method") == PACKED_METHOD


def _find_quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a model's configuration says of how its weights are quantized. It is empty if they are plain."""
    for part in (config, config.get("text_config") or {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return found if isinstance(found, dict) else {"quant_method": found}
    return {}


def is_readable(config: Mapping[str, Any]) -> bool:
    """Whether kbit reads the weights of a checkpoint that another tool quantized, by its configuration."""
    return bool(_find_quantization(config)) and not _why_unreadable(_find_quantization(config))


def _why_unreadable(found: Mapping[str, Any]) -> str:
    method, form = found.get("quant_method"), found.get("format")
    if method == "bitsandbytes" and not found.get("load_in_4bit"):
        return "of bitsandbytes only the 4-bit types are read"
    if method == "compressed-tensors" and form != "pack-quantized":
        return f"of compressed-tensors only pack-quantized is read, not {form}"
    return "" if method in READABLE else f"of other tools {', '.join(READABLE)} and GGUF are read"


def describe_quantization(config: Mapping[str, Any]) -> str:
    """Return how another tool quantized a checkpoint, by its configuration: "gptq 4 bits group_size=128"."""
    found = _find_quantization(config)
    method = str(found.get("quant_method"))
    if method == "bitsandbytes":
        double = " double" if found.get("bnb_4bit_use_double_quant") else ""
        return f"{method} {found.get('bnb_4bit_quant_type', 'fp4')}{double}"
    groups = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    weights = groups[0] if groups else {"num_bits": found.get("bits"), "group_size": found.get("group_size")}
    return f"{method} {weights.get('num_bits')} bits group_size={weights.get('group_size')}"


def has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer's folder has a chat template. A folder without the tokenizer's configuration may have one."""
    if not (folder / "tokenizer_config.json").is_file() or (folder / "chat_template.jinja").is_file():
        return True
    return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))


def check_configuration(config: dict[str, Any], where: str) -> None:
    """Raise QuantizedError if a model's configuration says that its weights are quantized."""
    found = _find_quantization(config)
    if not found:
        return
    method = found.get("quant_method", "unnamed")
    if method == PACKED_METHOD:
        raise QuantizedError(f"{where} is packed by kbit: `kbit run` and kbit.load_model take it, this does not")
    if is_readable(config):
        raise QuantizedError(
            f"{where} is a quantized checkpoint (quantization_config: {method}): `kbit run ... quant.bits=16` and "
            "kbit.load_model take it as it is, this does not"
        )
    raise QuantizedError(
        f"{where} is a quantized checkpoint (quantization_config: {method}), whose weights are no 16-bit baseline, and "
        f"{_why_unreadable(found)}: measure the model that it was made of"
    )


def check_adapter(name: str) -> Path | None:
    """Return the folder of a local adapter, or None for one of the hub.

    Raises:
        FileNotFoundError: the name is neither, or the folder lacks a file.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model.adapter={name!r} is neither a folder here nor a hub id 'organisation/name'")
        return None
    for file in _ADAPTER_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"model.adapter: no file at {(folder / file).resolve()}")
    return folder


def locate_adapter(name: str) -> Path:
    """Return the folder of an adapter: the user's own, or the hub's in the local cache, into which it is downloaded.

    Raises:
        FileNotFoundError: there is no such adapter, or it lacks a file.
    """
    folder = check_adapter(name)
    if folder is None:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_ADAPTER_FILES)))
        except Exception as error:  # offline, unknown, gated: the hub's client has an error for each
            raise FileNotFoundError(f"model.adapter={name!r} cannot be had from the hub: {error}") from error
    return folder


def _list_dtypes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and dtype of each tensor of a safetensors file, of which only the header is read."""
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, str(file.get_slice(name).get_dtype())
    except (OSError, SafetensorError) as error:
        raise OSError(f"model {str(path.parent)!r} cannot be loaded: {path.name} is damaged: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file of a checkpoint holds, whatever mark its editor began it with.

    Raises:
        ValueError: the file is no JSON, or holds no object. The message has its path.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content
