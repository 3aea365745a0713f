"""AWQ: input channels with large activations are scaled up before rounding and down after it (Lin et al., MLSys 2024).

    Q = round(W diag(s)) diag(s)^-1,    s_j = a_j^alpha,    alpha = 0, 0.05, ..., 0.95 for the least || W X - Q X ||

a_j is the root mean square of input j (the paper: its mean magnitude), which the Hessian's diagonal has. The paper
folds 1/s into the layer before; here each matrix keeps its own s: 16 bits for each input, which total_bits counts. The
paper's search for a clipping factor is method=mse here, and not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.calibration import calibrate, describe_calibration, draw_windows
from kbit.methods.config import QuantConfig
from kbit.methods.weight import Weight
from kbit.numerics.quantizer import fake_quantize

ALPHAS: Final = tuple(i / 20 for i in range(20))  # the paper's grid


def scale_by_activations(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Quantize block by block, each on the activations that the quantized blocks before it give.

    Raises:
        ValueError: see kbit.methods.calibration; the model is then quantized in part.
    """
    windows = draw_windows(model, quant, tokenizer)
    chosen: dict[str, list[float]] = {}
    for weight, hessians in calibrate(model, weights, quant, windows):
        chosen[weight.name] = quantize_scaled(weight, hessians)
    return describe_calibration(windows, weights) | {"alpha": chosen}


def quantize_scaled(weight: Weight, hessians: Float[Tensor, "experts in in"]) -> list[float]:
    """Quantize one weight with the best exponent (of fused experts: of each), put it, and return the exponents."""
    stacked = weight.take_matrix().view(len(hessians), -1, weight.values.shape[-1])
    errors = []
    for alpha in ALPHAS:
        scales = find_channel_scales(hessians, torch.full((len(hessians),), alpha))
        errors.append(_layer_errors(stacked, _round_scaled(stacked, scales, weight), hessians))
    best = torch.tensor(ALPHAS)[torch.stack(errors).argmin(dim=0).cpu()]
    scales = find_channel_scales(hessians, best)
    weight.put(_round_scaled(stacked, scales, weight).view(weight.values.shape))
    return [round(alpha, 2) for alpha in best.tolist()]


def find_channel_scales(
    hessians: Float[Tensor, "experts in in"], alphas: Float[Tensor, " experts"]
) -> Float[Tensor, "experts 1 in"]:
    """Return s of each input, divided by sqrt(max s min s) as in the published code, rounded to float16."""
    sizes = (hessians.diagonal(dim1=1, dim2=2) / 2).sqrt()  # H = 2/n sum x x^T
    scales = sizes.clamp(min=1e-4).pow(alphas[:, None].to(sizes.device))
    scales = scales / (scales.amax(dim=1, keepdim=True) * scales.amin(dim=1, keepdim=True)).sqrt()
    return scales.half().float()[:, None]


def _round_scaled(
    stacked: Float[Tensor, "experts out in"], scales: Float[Tensor, "experts 1 in"], weight: Weight
) -> Float[Tensor, "experts out in"]:
    """Return round(W diag(s)) diag(s)^-1; an expert whose W diag(s) leaves the format of scales is rounded as it is."""
    shape = stacked.shape if weight.values.ndim > 2 else stacked.shape[1:]
    fits = (stacked * scales).abs().amax(dim=(1, 2), keepdim=True) <= weight.spec.largest_weight
    scales = torch.where(fits, scales, 1.0)
    return fake_quantize((stacked * scales).view(shape), weight.spec).view(stacked.shape) / scales


def _layer_errors(
    stacked: Float[Tensor, "experts out in"],
    quantized: Float[Tensor, "experts out in"],
    hessians: Float[Tensor, "experts in in"],
) -> Float[Tensor, " experts"]:
    """Return || W X - Q X ||^2 of each expert, up to a factor."""
    lost = quantized - stacked
    return (lost @ hessians * lost).sum(dim=(1, 2))
