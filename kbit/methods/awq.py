"""AWQ: input channels with large activations are scaled up before rounding and down after it (Lin et al., MLSys 2024).

    Q = round(W diag(s)) diag(s)^-1,    s_j = a_j^alpha,    alpha = 0, 0.05, ..., 0.95 for the least || W X - Q X ||

a_j is the root mean square of input j, which the Hessian's diagonal has. The paper takes its mean magnitude, and
folds 1/s into the layer before. Here each matrix keeps its own s, 16 bits for each input, which total_bits counts. The
paper's search for a clipping factor is method=mse here, and not part of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from kbit.methods.calibration import calibrate, describe_calibration, draw_windows
from kbit.methods.weight import Codes, Job, Weight
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.quantizer import fake_quantize, quantize

ALPHAS: Final = tuple(i / 20 for i in range(20))  # the paper's grid


def scale_by_activations(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Yield each weight with its codes, block by block, on the activations that the quantized blocks before it give.

    Raises:
        ValueError: see kbit.methods.calibration. The model is then quantized in part.
    """
    windows = draw_windows(job.model, job.quant, job.tokenizer)
    chosen: dict[str, list[float]] = {}
    for weight, hessians in calibrate(job.model, job.weights, job.quant, windows):
        codes, chosen[weight.name] = quantize_scaled(weight, hessians)
        yield weight, codes
    job.notes.update(describe_calibration(windows, job.weights) | {"alpha": chosen})


def quantize_scaled(weight: Weight, hessians: Float[Tensor, "experts in in"]) -> tuple[QuantizedTensor, list[float]]:
    """Return one weight's codes with the best exponent (for fused experts: with each one's best), and the exponents."""
    stacked = weight.copy_matrix().view(len(hessians), -1, weight.values.shape[-1])
    shape = stacked.shape if weight.values.ndim > 2 else stacked.shape[1:]
    errors = []
    for alpha in ALPHAS:
        scales = _find_usable_scales(stacked, hessians, torch.full((len(hessians),), alpha), weight)
        rounded = fake_quantize((stacked * scales).view(shape), weight.spec).view(stacked.shape) / scales
        errors.append(_layer_errors(stacked, rounded, hessians))
    best = torch.tensor(ALPHAS)[torch.stack(errors).argmin(dim=0).cpu()]
    scales = _find_usable_scales(stacked, hessians, best, weight)
    codes = dataclasses.replace(
        quantize((stacked * scales).view(shape), weight.spec),
        shape=tuple(weight.values.shape),
        dtype=weight.values.dtype,
        input_scales=scales.half().view(*weight.values.shape[:-2], weight.values.shape[-1]),
    )
    return codes, [round(alpha, 2) for alpha in best.tolist()]


def find_channel_scales(
    hessians: Float[Tensor, "experts in in"], alphas: Float[Tensor, " experts"]
) -> Float[Tensor, "experts 1 in"]:
    """Return s of each input, divided by sqrt(max s min s) as in the published code, rounded to float16."""
    sizes = (hessians.diagonal(dim1=1, dim2=2) / 2).sqrt()  # H = 2/n sum x x^T
    scales = sizes.clamp(min=1e-4).pow(alphas[:, None].to(sizes.device))
    scales = scales / (scales.amax(dim=1, keepdim=True) * scales.amin(dim=1, keepdim=True)).sqrt()
    return scales.half().float()[:, None]


def _find_usable_scales(
    stacked: Float[Tensor, "experts out in"],
    hessians: Float[Tensor, "experts in in"],
    alphas: Float[Tensor, " experts"],
    weight: Weight,
) -> Float[Tensor, "experts 1 in"]:
    """Return the channel scales, and 1 for an expert whose W diag(s) leaves the range of the format of scales."""
    scales = find_channel_scales(hessians, alphas)
    fits = (stacked * scales).abs().amax(dim=(1, 2), keepdim=True) <= weight.spec.largest_weight
    return torch.where(fits, scales, 1.0)


def _layer_errors(
    stacked: Float[Tensor, "experts out in"],
    quantized: Float[Tensor, "experts out in"],
    hessians: Float[Tensor, "experts in in"],
) -> Float[Tensor, " experts"]:
    """Return || W X - Q X ||^2 of each expert, up to a factor."""
    lost = quantized - stacked
    return (lost @ hessians * lost).sum(dim=(1, 2))
