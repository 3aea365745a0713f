"""A model's parameters: each once, as matrices, checked and hashed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The names by which transformers' get_encoder finds them, and those of what projects their states into the text's.
_TOWERS: Final = (
    *("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower"),
    *("audio_tower", "audio_encoder", "speech_encoder", "embed_vision", "embed_audio", "multi_modal_projector"),
)
OUTSIDE: Final = "outside the transformer blocks"
_TRANSPOSED_EXPERTS: Final = ("Llama4TextExperts",)  # classes that store [experts, in, out] and do not say so


def hash_weights(model: nn.Module) -> str:
    """Return one hash of every parameter's name, dtype and bytes. Two equal hashes mean two equal models."""
    return hash_tensors(distinct_parameters(model))


def hash_tensors(tensors: Iterable[tuple[list[str], torch.Tensor]]) -> str:
    """Return one hash of tensors, each with its names."""
    digest = hashlib.blake2b(digest_size=16)
    for names, tensor in tensors:
        digest.update(f"{names} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Raise ValueError, with the first such tensor and the counts, if a parameter holds NaN or Inf."""
    bad = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is a meta tensor: it holds no values; load the weights before quantizing")
        if count := int((~torch.isfinite(parameter.detach())).sum()):
            bad.append(f"{name} ({count} of {parameter.numel()} values)")
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise ValueError(f"NaN or Inf in weight {bad[0]}{more}")


def distinct_parameters(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Yield every parameter once, with all its names. Tied parameters are one."""
    names_of: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    for key, parameter in parameters.items():
        yield names_of[key], parameter


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def count_embedded(model: Any) -> int:
    """Return the number of tokens that a model's embedding has rows for. That of a packed one is no matrix."""
    embedding = model.get_input_embeddings()
    rows: int | None = getattr(embedding, "num_embeddings", None)
    return embedding.weight.shape[0] if rows is None else rows


def find_towers(model: nn.Module) -> list[str]:
    """Return the names of the modules of a multimodal model that read images or sounds, not text.

    They have one of transformers' names for them, or are models of their own with another kind of configuration.
    """
    config: Any = getattr(model, "config", None)
    own = {type(config), type(config.get_text_config(decoder=True))} if isinstance(config, PretrainedConfig) else set()
    return [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _TOWERS
        or (own and isinstance(module, PreTrainedModel) and type(module.config) not in own)
    ]


def why_outside(name: str, towers: Sequence[str]) -> str:
    """Return why a parameter is no part of the language model's transformer blocks, or an empty string if it is.

    A block is a numbered member of a list such as layers or h.
    """
    if any(name.startswith(f"{tower}.") for tower in towers):
        return "part of a vision or audio tower"
    if any(part.startswith("lora_") for part in name.split(".")):
        return "a LoRA matrix that was not merged"
    return "" if re.search(r"\.\d+\.", name) else OUTSIDE


def is_experts(owner: nn.Module) -> bool:
    """Whether a module holds the weights of several experts, stacked: [experts, out, in] and biases [experts, out].

    All such modules of transformers are called so (MixtralExperts, JetMoeParallelExperts), or say how their weights are
    stored.
    """
    return "Experts" in type(owner).__name__ or hasattr(owner, "is_transposed")


def as_matrix(parameter: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """Return a view of a parameter as it is counted: [..., out, in], or a vector.

    Matrices of GPT-2's Conv1D are transposed, and so are fused experts [experts, in, out] of modules that say so
    (GPT-OSS) or are known to (Llama 4). Vectors, the experts' stacked biases and embeddings (blocked along the hidden
    dimension) are returned as they are stored.
    """
    least = 2 if isinstance(owner, Conv1D) else 3
    says_so = bool(getattr(owner, "is_transposed", type(owner).__name__ in _TRANSPOSED_EXPERTS))
    transposed = isinstance(owner, Conv1D) or says_so
    return parameter.transpose(-1, -2) if transposed and parameter.ndim >= least else parameter


def label_matrix(name: str, expert: int | None) -> str:
    """Return the name of what is quantized by itself: the parameter's, or NAME[3] for its fourth expert."""
    return name if expert is None else f"{name}[{expert}]"


def split_matrices(parameter: torch.Tensor, owner: nn.Module) -> list[torch.Tensor]:
    """Return views of what is quantized by itself: the whole parameter, or each of fused experts' matrices or biases.

    So a model whose experts are stored in one parameter gets what it would get with a layer for each expert.
    """
    matrix = as_matrix(parameter, owner)
    return list(matrix.unbind(0)) if is_experts(owner) and matrix.ndim > 1 else [matrix]
