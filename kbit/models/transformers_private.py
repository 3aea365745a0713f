"""All of transformers' private parts that kbit needs, so that a new version of transformers breaks this file only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

_GGUF_PLAIN: Final = {0, 1, 28, 30}  # GGML's numbers of F32, F16, F64 and BF16


def describe_gguf(path: Path) -> str:
    """Return the kinds of blocks that a GGUF file's weights are in: "gguf Q4_0 Q6_K". Plain numbers give ""."""
    from transformers.integrations.gguf.dequant import GGML_NAME
    from transformers.integrations.gguf.reader import GgufHeader

    kinds = set(GgufHeader.from_file(str(path)).ggml_types.values()) - _GGUF_PLAIN
    quantized = sorted(GGML_NAME.get(kind, f"type {kind}") for kind in kinds)
    return f"gguf {' '.join(quantized)}" if quantized else ""


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        name: GGUF's own name.
        shape: its shape, inputs last.
        bytes: the bytes that it takes in the file.
        is_quantized: whether it is stored as blocks of codes, and not as plain numbers.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    is_quantized: bool


def list_gguf_tensors(path: Path) -> list[GgufTensor]:
    """Return the tensors of a GGUF file. Only its header is read."""
    from transformers.integrations.gguf.reader import GgufHeader

    found = GgufHeader.from_file(str(path)).tensors
    return [GgufTensor(t.name, tuple(t.shape), t.nbytes, t.ggml_type not in _GGUF_PLAIN) for t in found]


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


def let_configurations_meet(configuration: type) -> None:
    """Let from_pretrained hand over a quantization_config to that of a checkpoint that is quantized already.

    transformers then sets each of the first one's get_loading_attributes on the second one. It ignores the
    configurations of other classes, with a warning.
    """
    from transformers.quantizers import auto

    module: Any = auto
    module.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, configuration)


def forget_conversions(model: Any) -> None:
    """Let transformers save a model's tensors under the names that they have now."""
    model._weight_conversions = []
