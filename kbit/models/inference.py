"""A model in evaluation or training mode, and whether it is causal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import nn

from kbit.models.parameters import count_embedded

_PROBE: Final = 8  # tokens
# Shares of the largest logit. A later token changes the logits of bidirectional models by 3e-3 (random ones of two
# layers) and more. Causal models move by 2e-7, where experts are multiplied in other groups.
_TOLERANCE: Final = 1e-3
_ROUNDINGS: Final = 8  # of a 16-bit dtype, whose sums of other groups differ more


def in_evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put all modules into evaluation mode (no dropout), and those that trained back into training mode afterwards."""
    return _in_mode(model, training=False)


def in_training_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put all modules into training mode, and those that did not train back into evaluation mode afterwards."""
    return _in_mode(model, training=True)


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    others = [module for module in model.modules() if module.training != training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raise ValueError if later tokens change the logits of earlier ones, on a few tokens.

    The log-likelihoods of such a model are no log-likelihoods of a text: each token has seen what it predicts.
    """
    vocabulary = count_embedded(model)
    tokens = (torch.arange(_PROBE, device=model.device) % vocabulary).repeat(2, 1)
    half = _PROBE // 2
    tokens[1, half:] = (tokens[1, half:] + vocabulary // 2) % vocabulary
    with in_evaluation_mode(model):
        logits = model(tokens, use_cache=False).logits.float()
    changed = float((logits[0, :half] - logits[1, :half]).abs().max() / logits.abs().max())
    if changed > max(_TOLERANCE, _ROUNDINGS * torch.finfo(model.dtype).eps):
        raise ValueError(
            f"{type(model).__name__} is not causal: later tokens change the logits of earlier ones by {changed:.1%} of "
            "the largest, so that it gives no log-likelihoods of texts; use a causal model (or is_decoder=true in its "
            "config.json, if it was trained as a decoder)"
        )


def find_cache_name(forward: Callable[..., Any]) -> str:
    """Return what a forward function calls its cache of keys and values: another name before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
