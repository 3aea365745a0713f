"""Merge a PEFT adapter into a model's weights."""

from __future__ import annotations

from typing import Any

import torch

from kbit.models.checkpoint_files import locate_adapter


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
        loaded: Any = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the adapter {name} does not fit the model: {error}") from error
    own = {key for key in loaded.missing_keys if config.peft_type.value.lower() in key.lower()}
    if wrong := sorted({*loaded.unexpected_keys, *own}):
        raise ValueError(f"the adapter {name} does not fit the model: {len(wrong)} tensors, such as {wrong[0]}")
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(f"the adapter {name} ({config.peft_type.value}) adds no weights that could be merged")
    return adapted.base_model.merge_and_unload()
