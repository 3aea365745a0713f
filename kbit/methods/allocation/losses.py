"""What each unit of a model loses with each choice of quantizer: three objectives of quant.allocation.

    kl       mean over tokens of sum_v p16(v) (log p16(v) - log p(v)), with one unit quantized and the rest at 16 bits
    fisher   1/2 sum_i F_i (w'_i - w_i)^2,   F_i = mean over tokens of (d log p(y) / d w_i)^2, y drawn from p16
    error    sum_i (w'_i - w_i)^2

fisher is the second order of kl, with F for its Hessian, of which the diagonal alone is kept. One backward pass for
each window is enough: with y drawn from the model itself the gradients of a window's tokens are uncorrelated, so that
the square of their sum has the mean of the sum of their squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from kbit.data.windows import Windows
from kbit.methods.weight import Codes, Weight
from kbit.models.parameters import owner_of, split_matrices

Losses = Float64[np.ndarray, "units choices"]


@dataclass(frozen=True)
class Candidate:
    """One choice for all units.

    Attributes:
        units: the weights of each unit. There are none where the choice leaves a unit at 16 bits.
        quantize: makes the codes of some weights by the choice.
    """

    units: Sequence[Sequence[Weight]]
    quantize: Callable[[Sequence[Weight]], Iterator[tuple[Weight, Codes]]]

    def round_unit(self, unit: int) -> Iterator[tuple[Weight, Tensor]]:
        """Yield each weight of a unit with the values that its codes stand for, in the weight's dtype."""
        for weight, codes in self.quantize(self.units[unit]):
            yield weight, weight.turn_back(codes.dequantize()).to(weight.values.dtype)

    @contextmanager
    def replaced(self, unit: int) -> Iterator[None]:
        """Quantize a unit within the block."""
        before = [(weight, weight.values.clone()) for weight in self.units[unit]]
        try:
            for weight, values in self.round_unit(unit):
                weight.values.copy_(values)
            yield
        finally:
            for weight, values in before:
                weight.values.copy_(values)


def measure_errors(candidates: Sequence[Candidate]) -> Losses:
    """Return each unit's squared error with each choice."""
    return np.array([[_sum_errors(candidate, unit) for candidate in candidates] for unit in _list_units(candidates)])


def _sum_errors(candidate: Candidate, unit: int) -> float:
    pairs = candidate.round_unit(unit)
    return sum((weight.sum_squares(values.float() - weight.values.float()) for weight, values in pairs), start=0.0)


@torch.no_grad()
def measure_divergences(model: Any, candidates: Sequence[Candidate], windows: Windows, at_once: int) -> Losses:
    """Return the divergence from the 16-bit model with each unit quantized alone, in nats per token.

    Args:
        model: a causal language model.
        candidates: the choices.
        windows: the text.
        at_once: tokens of a forward pass, of which all logits are kept.
    """
    totals = np.zeros((len(candidates[0].units), len(candidates)))
    for tokens in torch.split(windows.tokens, max(1, at_once // windows.tokens.shape[1])):
        logits = _predict(model, tokens)
        chances = logits.softmax(-1)
        own = _sum_surprises(chances, logits)
        del logits  # which are as large as the next ones
        for unit in _list_units(candidates):
            for choice, candidate in enumerate(candidates):
                if candidate.units[unit]:
                    with candidate.replaced(unit):
                        totals[unit, choice] += _sum_surprises(chances, _predict(model, tokens)) - own
    return np.maximum(totals, 0) / windows.tokens.numel()  # rounding makes less than 0 of nearly equal models


def _predict(model: Any, tokens: Tensor) -> Float[Tensor, "tokens vocabulary"]:
    """Return the logits of the next token at each token."""
    logits: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return logits.float().flatten(0, 1)


def _sum_surprises(chances: Float[Tensor, "tokens vocabulary"], logits: Float[Tensor, "tokens vocabulary"]) -> float:
    """Return -sum p log q over tokens and vocabulary, where q is what the logits say."""
    return float((logits.logsumexp(-1) - (chances * logits).sum(-1)).sum(dtype=torch.float64))


def weigh_errors(model: Any, candidates: Sequence[Candidate], windows: Windows, seed: int) -> Losses:
    """Return half the squared error of each unit with each choice, weighted by the diagonal of Fisher's information."""
    weights = [weight for candidate in candidates for unit in candidate.units for weight in unit]
    information = measure_information(model, list(dict.fromkeys(weight.name for weight in weights)), windows, seed)

    def weigh(candidate: Candidate, unit: int) -> float:
        total = 0.0
        for weight, values in candidate.round_unit(unit):
            parts = split_matrices(information[weight.name], owner_of(model, weight.name))
            error = (values.float() - weight.values.float()).square_().mul_(parts[weight.expert or 0])
            total += float(error.sum(dtype=torch.float64)) / 2
        return total

    return np.array([[weigh(candidate, unit) for candidate in candidates] for unit in _list_units(candidates)])


def measure_information(model: Any, names: Sequence[str], windows: Windows, seed: int) -> dict[str, Tensor]:
    """Return the diagonal of Fisher's information of these parameters, per token, in float32.

    It is 0 of a parameter that no window reaches, such as an expert that is never chosen.

    Args:
        model: a causal language model.
        names: its parameters.
        windows: the text. Of its tokens only the contexts count.
        seed: the seed of the tokens that are drawn from the model.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [model.get_parameter(name) for name in names]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    with _differentiable(model, parameters), torch.enable_grad():
        for tokens in windows.tokens:
            log_p = _predict(model, tokens[None]).log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            surprise = -log_p.gather(1, drawn).sum()
            if not surprise.requires_grad:  # the window reaches none of the parameters
                continue
            gradients = torch.autograd.grad(surprise, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float())
    return {name: total / windows.tokens.numel() for name, total in zip(names, sums, strict=True)}


@contextmanager
def _differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters alone require gradients within the block."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        yield
    finally:
        for parameter, trains in wanted.items():
            parameter.requires_grad_(trains)


def _list_units(candidates: Sequence[Candidate]) -> range:
    return range(len(candidates[0].units))
