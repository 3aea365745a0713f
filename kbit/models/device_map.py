"""A model on several GPUs: which of its blocks go where.

Never run on a GPU: the arithmetic is tested, and the hooks that move hidden states, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def spread_model(model: Any, gpus: int) -> None:
    """Move a model to the first GPUs, whole blocks to each; hidden states follow, by hooks of accelerate.

    All but the blocks (embeddings, last norm, head) lies on the first, where tokens go in and logits come out.

    Raises:
        ValueError: transformers does not say what the model's blocks are.
    """
    from accelerate import dispatch_model

    dispatch_model(model, make_device_map(model, gpus))


def make_device_map(model: Any, gpus: int) -> dict[str, int]:
    """Return the GPU of each block and of every other module that has tensors of its own, as accelerate takes it.

    Raises:
        ValueError: see spread_model.
    """
    kinds = set(model._no_split_modules or ())
    blocks = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no known blocks to spread over {gpus} GPUs")
    sizes = [_count_bytes(block) for block in blocks.values()]
    devices = place_blocks(sizes, _count_bytes(model) - sum(sizes), gpus)
    device_map = dict(zip(blocks, devices, strict=True))
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if not inside and (module._parameters or module._buffers):
            device_map[name] = 0
    return device_map


def place_blocks(sizes: Sequence[int], beside: int, gpus: int) -> list[int]:
    """Return the GPU of each block, in order: runs of blocks, so that the fullest GPU has as little as possible.

    Args:
        sizes: of the blocks, in bytes; beside: what the first GPU holds beside its blocks.
        gpus: how many there are.
    """
    low, high = max([beside, *sizes]), beside + sum(sizes)
    while low < high:  # the least capacity at which filling GPU after GPU is enough
        middle = (low + high) // 2
        if _fill(sizes, beside, middle)[-1] < gpus:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, beside, low)


def _fill(sizes: Sequence[int], beside: int, capacity: int) -> list[int]:
    """Return the GPU of each block if each takes blocks up to its capacity."""
    gpu, used, devices = 0, beside, []
    for size in sizes:
        if used + size > capacity:
            gpu, used = gpu + 1, 0
        used += size
        devices.append(gpu)
    return devices


def _count_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's tensors, tied ones once."""
    tensors: dict[int, torch.Tensor] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())
