"""One training, from its configuration to the trained model and what is known of how it went."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kbit.models.parameters import count_embedded
from kbit.optim.stable_embedding import make_embedding_stable
from kbit.training.batches import TrainingText
from kbit.training.checkpoint import read_checkpoint, write_checkpoint
from kbit.training.config import TrainConfig
from kbit.training.loop import Recipe, State, take_steps
from kbit.training.optimizers import count_state_bits, make_optimizer
from kbit.training.rounding import rounded_weights

_DIVERGED: Final = 3  # times the loss of a uniform guess, ln V, which a random model has
_SPIKE, _BEFORE = 1.1, 20  # a spike is a tenth above the largest of the 20 losses before it


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes:
        losses: the loss before each step, in nats a token. A diverged training has those up to the last step.
        diverged: whether a loss was not finite or more than three times that of a uniform guess, or the gradients were
            not finite. The training ended there.
        tokens: number of tokens trained on.
        trainable: number of trained parameters.
        state_bits: bits of the optimizer's states.
        notes: what the training says of itself, as plain values.
    """

    losses: tuple[float, ...]
    diverged: bool
    tokens: int
    trainable: int
    state_bits: int
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spikes(self) -> int:
        """The number of losses that are a tenth above the largest of the 20 before them."""
        pairs = ((self.losses[i - _BEFORE : i], self.losses[i]) for i in range(_BEFORE, len(self.losses)))
        return sum(loss > _SPIKE * max(before) for before, loss in pairs)

    @property
    def last(self) -> tuple[float, ...]:
        """The losses of the last twentieth of the steps, at least one."""
        return self.losses[-max(1, len(self.losses) // 20) :]

    @property
    def curve(self) -> list[float]:
        """The mean loss of each fiftieth of the steps, or every loss of fewer than 50 steps."""
        count, parts = len(self.losses), min(50, len(self.losses))
        bounds = [count * part // parts for part in range(parts + 1)]
        return [math.fsum(self.losses[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]


def randomize(model: Any, seed: int, *, stable_embedding: bool = False) -> None:
    """Give a model the random weights that its class starts with, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        if stable_embedding:
            make_embedding_stable(fresh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fresh.get_parameter(name))


def train_model(
    model: Any,
    text: TrainingText,
    config: TrainConfig,
    *,
    rounded: Collection[str] = (),
    checkpoint: Path | None = None,
    content: Mapping[str, Any] | None = None,
) -> Trained:
    """Train a model in place. Those of its parameters are trained that require gradients.

    Args:
        model: a causal language model of float32 weights.
        text: the text.
        config: the training.
        rounded: names of the parameters that train.weights rounds.
        checkpoint: file to go on from, and to keep the training in. None keeps none.
        content: what a checkpoint must have been made for.

    Raises:
        ValueError: the configuration asks for what is not there, or the checkpoint is of another training.
    """
    refuse_missing(config)
    context = text.held.shape[1]
    autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
    recipe = Recipe(
        config.steps, config.lr, config.batch_size, context, config.seed, config.warm_up, config.last_lr, config.clip,
        autocast,
    )  # fmt: skip
    limit = _DIVERGED * math.log(count_embedded(model))
    aware = rounded_weights(model, config.weights, rounded) if config.is_aware else contextlib.nullcontext()
    with aware, in_training_mode(model):
        state = State(model, make_optimizer(config, model))
        losses = [] if checkpoint is None else _restore(checkpoint, state, content or {})
        for loss in take_steps(state, text.stream, recipe, until=config.steps):
            losses.append(loss)
            if not loss <= limit:  # nor is NaN
                break
            if checkpoint is not None and state.step % config.checkpoint_every == 0:
                _save(checkpoint, state, losses, content or {})
        diverged = bool(losses) and not losses[-1] <= limit
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        tokens = state.step * config.batch_size * context
        return Trained(tuple(losses), diverged, tokens, trainable, count_state_bits(state.optimizer))


def refuse_missing(config: TrainConfig) -> None:
    """Raise ValueError if a training asks for what the loop does not do, rather than leave it out without a word."""
    asked = [f"train.{role}.bits" for role in ("activations", "gradients") if config.quantizes(role)]
    asked += ["train.fast.adapt"] if config.fast.adapt else []
    asked += ["train.replicas"] if config.replicas > 1 else []
    if asked:
        raise ValueError(f"{', '.join(asked)}: trainings do not quantize this yet")


@contextlib.contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into training mode, and back as they were."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _list_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save(path: Path, state: State, losses: list[float], content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in _list_trained(state.model).items()}
    values = {"weights": weights, "optimizer": state.optimizer.state_dict(), "step": state.step, "losses": losses}
    write_checkpoint(path, values, content)


def _restore(path: Path, state: State, content: Mapping[str, Any]) -> list[float]:
    """Set the training to that of a checkpoint, if there is one, and return the losses so far."""
    saved = read_checkpoint(path, content)
    if saved is None:
        return []
    with torch.no_grad():
        for name, parameter in _list_trained(state.model).items():
            parameter.copy_(saved["weights"][name])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step = saved["step"]
    losses: list[float] = saved["losses"]
    return losses
