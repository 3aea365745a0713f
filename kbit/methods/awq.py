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
    for weight, hessian in calibrate(job.model, job.weights, job.quant, windows):
        codes, alpha = quantize_scaled(weight, hessian)
        chosen.setdefault(weight.name, []).append(alpha)  # fused experts have one each
        yield weight, codes
    job.notes.update(describe_calibration(windows, job.weights) | {"alpha": chosen})


def quantize_scaled(weight: Weight, hessian: Float[Tensor, "in in"]) -> tuple[QuantizedTensor, float]:
    """Return one weight's codes with the best exponent, and the exponent."""
    matrix = weight.copy_matrix()
    least, best = float("inf"), ALPHAS[0]
    for alpha in ALPHAS:
        scales = _find_usable_scales(matrix, hessian, alpha, weight)
        error = _layer_error(matrix, fake_quantize(matrix * scales, weight.spec) / scales, hessian)
        if error < least:
            least, best = error, alpha
    scales = _find_usable_scales(matrix, hessian, best, weight)
    codes = dataclasses.replace(
        quantize(matrix * scales, weight.spec),
        shape=tuple(weight.values.shape),
        dtype=weight.values.dtype,
        input_scales=scales.half().expand(*weight.values.shape[:-2], -1).contiguous(),
    )
    return codes, round(best, 2)


def find_channel_scales(hessian: Float[Tensor, "in in"], alpha: float) -> Float[Tensor, " in"]:
    """Return s of each input, divided by sqrt(max s min s) as in the published code, rounded to float16."""
    sizes = (hessian.diagonal() / 2).sqrt()  # H = 2/n sum x x^T
    scales = sizes.clamp(min=1e-4).pow(alpha)
    return (scales / (scales.max() * scales.min()).sqrt()).half().float()


def _find_usable_scales(
    matrix: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], alpha: float, weight: Weight
) -> Float[Tensor, " in"]:
    """Return the channel scales, or 1 for all if W diag(s) leaves the range of the format of scales."""
    scales = find_channel_scales(hessian, alpha)
    fits = bool((matrix * scales).abs().max() <= weight.spec.largest_weight)
    return scales if fits else torch.ones_like(scales)


def _layer_error(
    matrix: Float[Tensor, "out in"], quantized: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> float:
    """Return || W X - Q X ||^2, up to a factor."""
    lost = quantized - matrix
    return float((lost @ hessian * lost).sum())
