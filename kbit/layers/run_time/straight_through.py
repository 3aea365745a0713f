"""Rounding of what goes through a model, with gradients that pass as if nothing had been rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kbit.layers.run_time.transient import explain_refusal

Round = Callable[[Tensor], Tensor]


class _StraightThrough(torch.autograd.Function):
    """Returns rounded values, and passes the gradient on as if nothing had been rounded."""

    @staticmethod
    def forward(_context: Any, values: Tensor, round_values: Round) -> Tensor:
        return round_values(values)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def round_straight(values: Tensor, round_values: Round, where: str) -> Tensor:
    """Return what a function rounds values to. Gradients go straight through (Bengio et al. 2013).

    Args:
        values: the values. No values stay as they are.
        round_values: the function, which raises ValueError for values that it does not take.
        where: where the values are, for the message.

    Raises:
        FloatingPointError: a value is NaN or Inf.
        ValueError: a block is beyond the scales' range.
    """
    if not values.numel():
        return values
    with _refusals_explained(values, where):
        if not (torch.is_grad_enabled() and values.requires_grad):
            return round_values(values)
        rounded: Tensor = _StraightThrough.apply(values, round_values)  # type: ignore[no-untyped-call]
    return rounded


@contextmanager
def _refusals_explained(values: Tensor, where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise explain_refusal(values, where, error) from error
