"""All of transformers' private parts that kbit needs, so that a new version of transformers breaks this file only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_GGUF_PLAIN: Final = {0, 1, 28, 30}  # GGML's numbers of F32, F16, F64 and BF16


def describe_gguf(path: Path) -> str:
    """Return the kinds of blocks that a GGUF file's weights are in: "gguf Q4_0 Q6_K". Plain numbers give ""."""
    from transformers.integrations.gguf.dequant import GGML_NAME
    from transformers.integrations.gguf.reader import GgufHeader

    kinds = set(GgufHeader.from_file(str(path)).ggml_types.values()) - _GGUF_PLAIN
    quantized = sorted(GGML_NAME.get(kind, f"type {kind}") for kind in kinds)
    return f"gguf {' '.join(quantized)}" if quantized else ""


def list_whole_modules(model: Any) -> set[str]:
    """Return the names of the module classes that must stay on one device: the model's decoder layers."""
    return set(model._no_split_modules or ())


@contextmanager
def experts_one_by_one(model: Any) -> Iterator[None]:
    """Let transformers multiply each fused expert by itself, so that its inputs are seen. By default it groups them."""
    config = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if config is None or before is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


def use_eager_experts(config: Any) -> None:
    """Let transformers multiply each fused expert by itself, from now on: packed experts are dequantized one by one."""
    config._experts_implementation = "eager"


def forget_conversions(model: Any) -> None:
    """Let transformers save a model's tensors under the names that they have now."""
    model._weight_conversions = []
