"""A model on several GPUs: which of its decoder layers go where.

This was never run on several GPUs. The arithmetic, and the hooks that move hidden states, are tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kbit.models.transformers_private import list_whole_modules


def spread_model(model: Any, gpus: int) -> None:
    """Move a model to the first GPUs, whole decoder layers to each. Hooks of accelerate move hidden states along.

    All but the decoder layers (embeddings, last norm, head) lies on the first GPU, where tokens go in and logits come
    out.

    Raises:
        ValueError: transformers does not say what the model's decoder layers are.
    """
    from accelerate import dispatch_model

    dispatch_model(model, make_device_map(model, gpus))


def make_device_map(model: Any, gpus: int) -> dict[str, int]:
    """Return the GPU of each decoder layer and of every other module with tensors of its own, as accelerate takes it.

    accelerate.infer_auto_device_map is no substitute. It puts the head on the last GPU, while the scorer multiplies
    hidden states by the head on the first.

    Raises:
        ValueError: see spread_model.
    """
    kinds = list_whole_modules(model)
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no known blocks to spread over {gpus} GPUs")
    sizes = [_count_bytes(layer) for layer in layers.values()]
    devices = place_layers(sizes, _count_bytes(model) - sum(sizes), gpus)
    device_map = dict(zip(layers, devices, strict=True))
    for name, module in model.named_modules():
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        if not inside and [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            device_map[name] = 0
    return device_map


def place_layers(sizes: Sequence[int], beside: int, gpus: int) -> list[int]:
    """Return the GPU of each decoder layer, in order: a run of layers each, and the fullest GPU as empty as possible.

    Args:
        sizes: the size of each decoder layer in bytes.
        beside: the bytes that the first GPU holds beside its layers.
        gpus: the number of GPUs.
    """
    low, high = max([beside, *sizes]), beside + sum(sizes)
    while low < high:  # looks for the least capacity at which filling GPU after GPU is enough
        middle = (low + high) // 2
        if _fill(sizes, beside, middle)[-1] < gpus:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, beside, low)


def _fill(sizes: Sequence[int], beside: int, capacity: int) -> list[int]:
    """Return the GPU of each decoder layer if each GPU takes layers up to its capacity."""
    gpu, used, devices = 0, beside, []
    for size in sizes:
        if used + size > capacity:
            gpu, used = gpu + 1, 0
        used += size
        devices.append(gpu)
    return devices


def _count_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's tensors. Tied ones count once."""
    tensors: dict[int, torch.Tensor] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())
