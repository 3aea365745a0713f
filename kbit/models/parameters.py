"""A model's parameters: each once, as matrices, checked and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def hash_weights(model: nn.Module) -> str:
    """Return one hash of every parameter's name, dtype and bytes. Two equal hashes mean two equal models."""
    digest = hashlib.blake2b(digest_size=16)
    for names, parameter in distinct_parameters(model):
        digest.update(f"{names} {parameter.dtype} {tuple(parameter.shape)}".encode())
        data = parameter.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
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


def as_matrix(parameter: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """Return a view of a parameter as it is quantized and counted: [..., out, in], or a vector.

    Matrices of GPT-2's Conv1D are transposed, and so are fused experts [experts, in, out] of modules that say so
    (GPT-OSS). Vectors, the experts' stacked biases and embeddings (blocked along the hidden dimension) are returned as
    they are stored.
    """
    least = 2 if isinstance(owner, Conv1D) else 3
    transposed = isinstance(owner, Conv1D) or bool(getattr(owner, "is_transposed", False))
    return parameter.transpose(-1, -2) if transposed and parameter.ndim >= least else parameter
