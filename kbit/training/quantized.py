"""The gradients of a step in which products have quantized operands, or replicas exchange quantized gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from kbit.training.config import TrainConfig
from kbit.training.exchange.replicas import Exchange, SimulatedExchange
from kbit.training.loop import Batch, compute_gradients
from kbit.training.products.fast import Fast, count_periods, make_roles
from kbit.training.products.linear import IN_DECODER_LAYERS, Policy, QuantizedProducts, Roles, quantize_products


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
        if config.quantizes_products:
            self.products = quantize_products(model, make_policy(config), include=config.include or IN_DECODER_LAYERS)
        if config.replicas > 1:
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            exchange = Exchange(config.exchange, config.replicas, config.exchange_form, config.error_feedback)
            self.exchange = SimulatedExchange(trained, exchange)

    def compute(self, model: Any, batch: Batch, autocast: torch.dtype | None) -> float:
        """Give the parameters the gradients of a batch, and return the loss, infinite if a value was not finite."""
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

    def _find_fast(self) -> Fast | None:
        policy = None if self.products is None else self.products.policy
        return policy if isinstance(policy, Fast) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.products is not None:
            self.products.restore()


def make_policy(config: TrainConfig) -> Policy:
    """Return what chooses the quantizers of operands: FAST's rule, or the roles' own."""
    fast = config.fast
    if fast.adapt:
        return Fast(fast.alpha, fast.beta, make_roles(fast.low), make_roles(fast.high))
    return Roles(config.weights, config.activations, config.gradients)
