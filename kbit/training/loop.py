"""The loop of every training: draw a batch, set the learning rate, make one optimizer step.

A step depends on the weights, the optimizer's states, the seed and the step's number alone. So a training that goes on
from a checkpoint ends at the weights of an undisturbed one, bit for bit on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Int64

from kbit.training.batches import Tokens, draw_batch
from kbit.training.config import MAX_STEPS

WARM_UP: Final = 0.05  # of the steps
LAST_LR: Final = 0.1  # of the peak

Batch = Int64[torch.Tensor, "batch context"]


@dataclass(frozen=True)
class Recipe:
    """What decides every step beside the weights and the optimizer.

    Attributes:
        steps: number of steps of the whole training, which the learning rate follows.
        lr: the highest learning rate.
        batch_size: windows in a batch.
        context: tokens of a window.
        seed: seed of the batches and of dropout.
        warm_up: share of the steps in which the learning rate rises.
        last_lr: share of lr at which it ends.
        clip: largest norm of the gradients. None does not limit it.
        autocast: the dtype of products. None is the weights' own.
    """

    steps: int
    lr: float
    batch_size: int
    context: int
    seed: int = 0
    warm_up: float = WARM_UP
    last_lr: float = LAST_LR
    clip: float | None = 1.0
    autocast: torch.dtype | None = torch.bfloat16


@dataclass
class State:
    """A training in progress.

    Attributes:
        model: the model, in training mode.
        optimizer: over its trained parameters.
        step: number of steps done.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0


def schedule_lr(step: int, steps: int, peak: float, warm_up: float = WARM_UP, last: float = LAST_LR) -> float:
    """Return the learning rate of a step (0, 1, ..., steps - 1): linear warm-up, then cosine to `last` of the peak."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - 1 - rising)
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))


def compute_gradients(model: Any, batch: Batch, autocast: torch.dtype | None) -> float:
    """Add the gradients of a batch's loss to those of the parameters, and return the loss in nats a token."""
    with torch.autocast(batch.device.type, autocast, enabled=autocast is not None):
        logits = model(batch[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


Gradients = Callable[[Any, Batch, torch.dtype | None], float]  # what compute_gradients is


def take_step(state: State, batch: Batch, recipe: Recipe, gradients: Gradients = compute_gradients) -> float:
    """Make one optimizer step and return the loss before it, in nats a token.

    Where the gradients are not finite the weights stay as they are, and the loss that is returned is infinite.
    """
    lr = schedule_lr(state.step, recipe.steps, recipe.lr, recipe.warm_up, recipe.last_lr)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    loss = gradients(state.model, batch, recipe.autocast)
    limit = math.inf if recipe.clip is None else recipe.clip  # with infinity the gradients stay as they are
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    if bool(norm.isfinite()):
        state.optimizer.step()
    else:
        loss = math.inf
    state.optimizer.zero_grad()
    state.step += 1
    return loss


def take_steps(
    state: State, stream: Tokens, recipe: Recipe, *, until: int, gradients: Gradients = compute_gradients
) -> Iterator[float]:
    """Make the steps that are left up to the number `until`, and yield each step's loss.

    Args:
        state: the training, which changes at each step.
        stream: the text.
        recipe: what decides each step.
        until: number of steps that are done at the end.
        gradients: function that computes the gradients of a batch.
    """
    device = next(state.model.parameters()).device
    while state.step < until:
        batch = draw_batch(
            stream, state.step, seed=recipe.seed, batch_size=recipe.batch_size, context=recipe.context
        ).to(device)
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(recipe.seed * MAX_STEPS + state.step)  # of dropout
            loss = take_step(state, batch, recipe, gradients)
        yield loss
