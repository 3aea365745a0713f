"""The optimizer of a training, by its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbit.optim.optimizers import SGD, Adam, AdamW, Lion
from kbit.optim.states import States
from kbit.training.config import TrainConfig


def group_parameters(
    model: nn.Module, weight_decay: float, exact: frozenset[Any] = frozenset()
) -> list[dict[str, Any]]:
    """Return the trained parameters as groups for an optimizer: matrices with weight decay, vectors without.

    Args:
        model: the model.
        weight_decay: decay of matrices.
        exact: parameters whose states have 32 bits. They are groups of their own, after the others.
    """
    groups = []
    for is_exact in (False, True) if exact else (False,):
        trained = [p for p in model.parameters() if p.requires_grad and (p in exact) == is_exact]
        options = {"state": "32bit"} if is_exact else {}
        groups.append({"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay} | options)
        groups.append({"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0} | options)
    return groups


def make_optimizer(config: TrainConfig, model: Any) -> torch.optim.Optimizer:
    """Return the optimizer over a model's trained parameters: torch's own, unless a state has less than 32 bits.

    Raises:
        ValueError: a quantizer that cannot hold its state.
    """
    states = States(config.find_state("momentum"), config.find_state("variance"))
    if states == States() and config.optimizer != "lion":
        return _make_exact(config, group_parameters(model, config.weight_decay))
    has_exact = config.stable_embedding or config.embedding_states == "32"
    embeddings = model.get_input_embeddings().parameters() if has_exact else ()
    groups = group_parameters(model, config.weight_decay, frozenset(embeddings))
    options: dict[str, Any] = {"lr": config.lr, "state": states, "min_size": config.min_size}
    betas = (config.beta1, config.beta2)
    match config.optimizer:
        case "sgd":
            return SGD(groups, momentum=config.beta1, **options)
        case "lion":
            return Lion(groups, betas=betas, **options)
        case "adam":
            return Adam(groups, betas=betas, eps=config.eps, **options)
        case _:
            return AdamW(groups, betas=betas, eps=config.eps, **options)


def _make_exact(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def count_state_bits(optimizer: torch.optim.Optimizer) -> int:
    """Return the bits of all state tensors, without the step counts."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim)
