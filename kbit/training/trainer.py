"""One training, from its configuration to the trained model and what is known of how it went."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kbit.models.inference import in_training_mode
from kbit.models.parameters import count_embedded
from kbit.optim.stable_embedding import make_embedding_stable
from kbit.training.batches import TrainingText
from kbit.training.checkpoint import read_checkpoint, write_checkpoint
from kbit.training.config import TrainConfig
from kbit.training.exchange.pipeline import PipelineCut, cut_pipeline, find_stage_ends
from kbit.training.exchange.replicas import Exchange, SimulatedExchange
from kbit.training.loop import Batch, Recipe, State, compute_gradients, take_steps
from kbit.training.optimizers import count_state_bits, make_optimizer
from kbit.training.products.fast import Fast, count_periods, make_roles
from kbit.training.products.linear import IN_DECODER_LAYERS, Policy, QuantizedProducts, Roles, quantize_products
from kbit.training.rounding import rounded_weights

_DIVERGED: Final = 3  # times the loss of a uniform guess, ln V, which a random model has
_SPIKE, _BEFORE = 1.1, 20  # a spike is a tenth above the largest of the 20 losses before it


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes:
        losses: the loss before each step, in nats a token. A diverged training has those up to the last step.
        diverged: whether a loss was not finite or more than three times that of a uniform guess, or the gradients were
            not finite, or a weight was beyond what rounds it. The training ended there.
        tokens: number of tokens trained on.
        trainable: number of trained parameters.
        state_bits: bits of the optimizer's states.
        numbers: what else was counted, by metric, such as passes_per_mac.
        curves: what else has a value for each part of the training, by metric.
    """

    losses: tuple[float, ...]
    diverged: bool
    tokens: int
    trainable: int
    state_bits: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)

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


class QuantizedGradients:
    """Computes the gradients of each step as a configuration says. A context manager that leaves the model as it was.

    Args:
        config: the training.
        model: the model, whose trained parameters require gradients.

    Raises:
        ValueError: products cannot have the configuration's quantizers, see quantize_products.
    """

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        self.config, self.step = config, 0
        self.products: QuantizedProducts | None = None
        self.exchange: SimulatedExchange | None = None
        self.cuts: list[PipelineCut] = []
        self.tokens = 0
        if config.replicas > 1:
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            exchange = Exchange(config.exchange, config.replicas, config.exchange_form, config.error_feedback)
            self.exchange = SimulatedExchange(trained, exchange)
        ends = find_stage_ends(model, config.stages) if config.sends_between_stages else []
        if config.quantizes_products:  # from here on nothing may fail, as nothing would restore the model
            self.products = quantize_products(model, make_policy(config), include=config.include or IN_DECODER_LAYERS)
        self.cuts = [cut_pipeline(model, end, config.stage_activations, config.stage_gradients) for end in ends]

    def compute(self, model: Any, batch: Batch, autocast: torch.dtype | None) -> float:
        """Give the parameters the gradients of a batch, and return the loss, infinite if a value was not finite."""
        self.tokens += batch[:, 1:].numel()
        try:
            losses = [self._compute_replica(number, model, batch, autocast) for number in range(self.config.replicas)]
            if self.exchange is not None:
                self.exchange.average()
        except FloatingPointError:  # the training has diverged
            model.zero_grad()
            return math.inf
        self.step += 1
        return math.fsum(losses) / len(losses)

    def _compute_replica(self, number: int, model: Any, batch: Batch, autocast: torch.dtype | None) -> float:
        if self.products is not None:
            self.products.begin_step(self.step, self.config.steps, number)
        loss = compute_gradients(model, batch[number :: self.config.replicas], autocast)
        if self.exchange is not None:
            self.exchange.collect(number)
        return loss

    @property
    def numbers(self) -> dict[str, float]:
        """What the training has cost so far, by metric."""
        numbers = {}
        if self.products is not None:
            numbers["passes_per_mac"] = self.products.counter.passes_per_mac
        if self.exchange is not None:
            numbers["exchanged_bytes_per_param"] = self.exchange.sent_per_param
        if self.cuts and self.tokens:
            numbers["stage_bytes_per_token"] = sum(cut.sent for cut in self.cuts) / self.tokens
        return numbers

    @property
    def curves(self) -> dict[str, list[float]]:
        """FAST's share of high precision in each twentieth of the training, layer by layer: high_share/ROLE.

        There is none of a training that ended before its last twentieth.
        """
        fast, steps = self._find_fast(), self.config.steps
        curves: dict[str, list[float]] = {}
        if fast is not None and self.products is not None:
            for (role, _, _), share in fast.find_high_shares().items():
                curves.setdefault(f"high_share/{role}", []).append(share)
            complete = len(self.products.layers) * count_periods(steps)
            curves = {metric: shares for metric, shares in curves.items() if len(shares) == complete}
        return curves

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with the same numbers, as plain values and tensors."""
        state: dict[str, Any] = {"step": self.step}
        if self.products is not None:
            state["work"] = [self.products.counter.macs, self.products.counter.passes]
        if (fast := self._find_fast()) is not None:
            state["choices"] = [[*place, count, fast.high_uses[place]] for place, count in fast.uses.items()]
        if self.exchange is not None:
            state["exchange"] = self.exchange.state_dict()
        if self.cuts:
            state |= {"cuts": [cut.state_dict() for cut in self.cuts], "tokens": self.tokens}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict returned."""
        self.step = state["step"]
        if self.products is not None:
            self.products.counter.macs, self.products.counter.passes = state["work"]
        if (fast := self._find_fast()) is not None:
            for role, layer, period, count, high in state["choices"]:
                fast.uses[role, layer, period], fast.high_uses[role, layer, period] = count, high
        if self.exchange is not None:
            self.exchange.load_state_dict(state["exchange"])
        if self.cuts:
            self.tokens = state["tokens"]
            for cut, saved in zip(self.cuts, state["cuts"], strict=True):
                cut.load_state_dict(saved)

    def _find_fast(self) -> Fast | None:
        policy = None if self.products is None else self.products.policy
        return policy if isinstance(policy, Fast) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for cut in self.cuts:
            cut.remove()
        if self.products is not None:
            self.products.restore()


def make_policy(config: TrainConfig) -> Policy:
    """Return what chooses the quantizers of operands: FAST's rule, or the roles' own."""
    fast = config.fast
    if fast.adapt:
        return Fast(fast.alpha, fast.beta, make_roles(fast.low), make_roles(fast.high))
    return Roles(config.weights, config.activations, config.gradients)


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
    context = text.held.shape[1]
    autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
    recipe = Recipe(
        config.steps, config.lr, config.batch_size, context, config.seed, config.warm_up, config.last_lr, config.clip,
        autocast,
    )  # fmt: skip
    limit = _DIVERGED * math.log(count_embedded(model))
    aware = rounded_weights(model, config.weights, rounded) if config.is_aware else contextlib.nullcontext()
    with aware, in_training_mode(model), QuantizedGradients(config, model) as quantized:
        state = State(model, make_optimizer(config, model))
        losses = [] if checkpoint is None else _restore(checkpoint, state, quantized, content or {})
        for loss in take_steps(state, text.stream, recipe, until=config.steps, gradients=quantized.compute):
            losses.append(loss)
            if not loss <= limit:  # nor is NaN
                break
            if checkpoint is not None and state.step % config.checkpoint_every == 0:
                _save(checkpoint, state, quantized, losses, content or {})
        diverged = bool(losses) and not losses[-1] <= limit
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        tokens = state.step * config.batch_size * context
        bits = count_state_bits(state.optimizer)
        return Trained(tuple(losses), diverged, tokens, trainable, bits, quantized.numbers, quantized.curves)


def _list_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save(
    path: Path, state: State, quantized: QuantizedGradients, losses: list[float], content: Mapping[str, Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in _list_trained(state.model).items()}
    values = {"weights": weights, "optimizer": state.optimizer.state_dict(), "step": state.step, "losses": losses}
    values["quantized"] = quantized.state_dict()
    write_checkpoint(path, values, content)


def _restore(path: Path, state: State, quantized: QuantizedGradients, content: Mapping[str, Any]) -> list[float]:
    """Set the training to that of a checkpoint, if there is one, and return the losses so far."""
    saved = read_checkpoint(path, content)
    if saved is None:
        return []
    with torch.no_grad():
        for name, parameter in _list_trained(state.model).items():
            parameter.copy_(saved["weights"][name])
    state.optimizer.load_state_dict(saved["optimizer"])
    quantized.load_state_dict(saved["quantized"])
    state.step = saved["step"]
    losses: list[float] = saved["losses"]
    return losses
