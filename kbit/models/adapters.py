"""Merge a PEFT adapter into a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")


def locate_adapter(name: str) -> Path:
    """Return the folder of an adapter: the user's own, or the hub's in the local cache, into which it is downloaded.

    Raises:
        FileNotFoundError: there is no such adapter, or it lacks a file.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model.adapter={name!r} is neither a folder here nor a hub id 'organisation/name'")
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES)))
        except Exception as error:  # offline, unknown, gated: the hub's client has an error for each
            raise FileNotFoundError(f"model.adapter={name!r} cannot be had from the hub: {error}") from error
    for file in _FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"model.adapter: no file at {(folder / file).resolve()}")
    return folder


def merge_adapter(model: Any, name: str) -> Any:
    """Return a model with an adapter's changes added to its weights, in float32.

    W + scale B A for LoRA, with the scale and all variants as PEFT has them.

    Raises:
        ValueError: the adapter is of another model, or adds something that cannot be merged into weights.
        FileNotFoundError: see locate_adapter.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    folder = locate_adapter(name)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        adapted: Any = PeftModel(model.to(torch.float32), config)
        loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the adapter {name} does not fit the model: {error}") from error
    own = {key for key in loaded.missing_keys if config.peft_type.value.lower() in key.lower()}
    if wrong := sorted({*loaded.unexpected_keys, *own}):
        raise ValueError(f"the adapter {name} does not fit the model: {len(wrong)} tensors, such as {wrong[0]}")
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(f"the adapter {name} ({config.peft_type.value}) adds no weights that could be merged")
    return adapted.base_model.merge_and_unload()
