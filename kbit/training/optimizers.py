"""The optimizer of a training, by its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbit.training.config import STATES, TrainConfig


def group_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters as groups for an optimizer: matrices with weight decay, vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer over a model's trained parameters.

    Raises:
        ValueError: the configuration asks for an optimizer or for states that there are none of.
    """
    for role in STATES:
        if config.quantizes(role):
            raise ValueError(f"train.{role}.bits={getattr(config, role).bits}: states have 32 bits so far (16: none)")
    if config.stable_embedding or config.optimizer == "lion":
        what = "train.stable_embedding=true" if config.stable_embedding else "train.optimizer=lion"
        raise ValueError(f"{what} is not there yet")
    groups = group_parameters(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def count_state_bits(optimizer: torch.optim.Optimizer) -> int:
    """Return the bits of all state tensors, without the step counts."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim)
