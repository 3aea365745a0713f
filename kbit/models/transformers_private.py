"""All of transformers' private parts that kbit needs, so that a new version of transformers breaks this file only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def find_commit(config: Any) -> str:
    """Return the commit of the hub that a configuration was loaded from."""
    return str(config._commit_hash)


def describe_gguf(path: Path) -> str:
    """Return the kinds of blocks that a GGUF file's weights are in: "gguf Q4_0 Q6_K". Plain numbers give ""."""
    from transformers.integrations.gguf.dequant import GGML_NAME
    from transformers.integrations.gguf.reader import GgufHeader

    kinds = {GGML_NAME.get(kind, str(kind)) for kind in GgufHeader.from_file(str(path)).ggml_types.values()}
    quantized = sorted(kinds - {"F32", "F16", "BF16"})
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
