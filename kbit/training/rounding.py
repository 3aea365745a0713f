"""Quantization-aware training: layers compute with rounded weights, whose gradients go to the weights unchanged.

forward    y = x Q(W)^T
backward   dx = dy Q(W),  dW = dy^T x      (the straight-through estimator, Bengio et al. 2013)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from kbit.models.parameters import owner_of, split_matrices
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec


class _StraightThrough(torch.autograd.Function):
    """Returns rounded values, and passes the gradient on as if nothing had been rounded."""

    @staticmethod
    def forward(_context: Any, weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        return rounding.round(weight)

    @staticmethod
    def backward(_context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class Rounding(nn.Module):
    """What a layer's weight goes through before it is used.

    Args:
        spec: the quantizer.
        owner: the layer, which says how its weight is laid out.
    """

    def __init__(self, spec: QuantSpec, owner: nn.Module) -> None:
        super().__init__()
        self._spec = spec
        self._owner = [owner]  # in a list, as a layer is no part of its own weight

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the values that quantize_model would write into the weight.

        Raises:
            FloatingPointError: the training has brought the weight to values that the quantizer cannot represent.
        """
        try:
            return self._quantize(weight)
        except ValueError as error:
            raise FloatingPointError(f"a trained weight cannot be rounded: {error}") from error

    def check(self, weight: torch.Tensor) -> None:
        """Raise ValueError if the quantizer cannot represent an untrained weight."""
        self._quantize(weight)

    def _quantize(self, weight: torch.Tensor) -> torch.Tensor:
        rounded = weight.detach().clone()
        for matrix in split_matrices(rounded, self._owner[0]):
            matrix.copy_(fake_quantize(matrix, self._spec))
        return rounded

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rounded weight, through which gradients go straight."""
        rounded: torch.Tensor = _StraightThrough.apply(weight, self)  # type: ignore[no-untyped-call]
        return rounded


@contextmanager
def rounded_weights(model: nn.Module, spec: QuantSpec, names: Iterable[str]) -> Iterator[None]:
    """Let layers compute with rounded weights within the block. The weights themselves stay what an optimizer changes.

    Args:
        model: the model.
        spec: the quantizer.
        names: names of the parameters that are rounded.

    Raises:
        ValueError: the rounding draws random numbers, which would be the same ones at each step. Or the quantizer
            cannot represent a weight as it is now.
    """
    if spec.rounding == "stochastic":
        raise ValueError("train.weights.rounding=stochastic would round with the same random numbers at each step")
    placed: list[tuple[nn.Module, str, list[str]]] = []
    try:
        for name in names:
            owner, attribute = owner_of(model, name), name.rpartition(".")[2]
            order = [own for own, _ in owner.named_parameters(recurse=False)]
            rounding = Rounding(spec, owner)
            rounding.check(owner.get_parameter(attribute))
            parametrize.register_parametrization(owner, attribute, rounding, unsafe=True)
            placed.append((owner, attribute, order))
        yield
    finally:
        for owner, attribute, order in reversed(placed):
            parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
            _put_in_order(owner, order)


def _put_in_order(owner: nn.Module, names: Iterable[str]) -> None:
    """Give a module its parameters in this order again, which a model's hash and an optimizer's groups follow."""
    for name in names:
        parameter = owner.get_parameter(name)
        delattr(owner, name)
        owner.register_parameter(name, parameter)
