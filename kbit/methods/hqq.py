"""Half-quadratic scales and offsets, without data: after HQQ (Badri & Shaji, Half-Quadratic Quantization, 2023).

The error of a block, sum |x - (z s + o)|^p with p < 1, weighs a few large errors less than squares do. With e for
the errors that are let be, it is minimised by turns, z = codebook[code]:

    e    = shrink(x - (z s + o)),      shrink(r) = sign(r) max(0, |r| - |r|^(p - 1) / beta)
    s, o = least squares of x - e - (z s + o);   z = nearest codebook values;   beta = kappa beta

HQQ moves the offset alone, of ints. Here scale and offset move (the offset only where the quantizer has one, with
normalization=minmax), for any codebook, and errors are measured in units of the block's scale. Of powers of two
(scale_format=e8m0) a fit moves a scale too little to reach the next: that is nearly always rounding to nearest. The
power of least |error|^p instead clips so much that models get worse (FINDINGS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.block_scales import BlockGrid
from kbit.methods.config import QuantConfig
from kbit.methods.weight import Weight
from kbit.numerics.scale_formats import Scales

P: Final = 0.7  # as in HQQ's code, like the three below


BETA: Final = 10.0


KAPPA: Final = 1.01


ROUNDS: Final = 20


Blocks = Float[Tensor, "blocks size"]


PerBlock = Float[Tensor, "blocks 1"]


def fit_half_quadratic(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Quantize each weight with half-quadratic scales and offsets."""
    for weight in weights:
        matrix = weight.take_matrix()
        weight.put(quantize_half_quadratic(matrix, BlockGrid(matrix, weight.spec)).view(weight.values.shape))
    return {}


def quantize_half_quadratic(matrix: Float[Tensor, "rows in"], grid: BlockGrid) -> Float[Tensor, "rows in"]:
    """Return the matrix quantized with fitted scales, or the usual ones where they have the smaller sum of |error|^p.

    In each block, or in all together with formats in which scales depend on each other (fp8, dq8).
    """
    x, valid = grid.split(matrix), grid.split(torch.ones_like(matrix)) > 0
    unit = torch.tensor(grid.grid.scales, device=matrix.device)[:, None].abs()
    scales, offsets = (
        torch.tensor(array, device=matrix.device)[:, None] for array in (grid.grid.scales, grid.grid.offsets)
    )
    has_offset, beta = grid.spec.normalization == "minmax", BETA
    for _ in range(ROUNDS):
        z = grid.look_up(x, scales, offsets)
        target = x - shrink((x - (z * scales + offsets)) / unit.clamp(min=1e-30), beta) * unit
        scales, offsets = fit_line(z, target, valid, scales, offsets, has_offset=has_offset)
        beta *= KAPPA
    fitted = [np.ascontiguousarray(part[:, 0].cpu().numpy()) for part in (scales, offsets)]
    return grid.quantize(matrix, *_choose_stored(matrix, grid, *fitted))


def _choose_stored(
    matrix: Float[Tensor, "rows in"], grid: BlockGrid, scales: Scales, offsets: Scales
) -> tuple[Scales, Scales]:
    """Return what is stored of the fitted scales and offsets, or the usual ones where they are better."""
    stored, usual = grid.encode(scales, offsets), (grid.grid.scales, grid.grid.offsets)
    errors, least = (grid.measure_errors(matrix, *which, power=P) for which in (stored, usual))
    better = errors < least if grid.has_own_scales else errors.sum() < least.sum()
    chosen_scales, chosen_offsets = (np.where(better, new, old) for new, old in zip(stored, usual, strict=True))
    return chosen_scales, chosen_offsets


def shrink(errors: Tensor, beta: float) -> Tensor:
    """Return sign(r) max(0, |r| - |r|^(p - 1) / beta): 0 for small errors, nearly r for large ones."""
    sizes = errors.abs()
    return errors.sign() * (sizes - sizes.clamp(min=1e-30).pow(P - 1) / beta).clamp(min=0)


def fit_line(
    z: Blocks,
    target: Blocks,
    valid: Bool[Tensor, "blocks size"],
    scales: PerBlock,
    offsets: PerBlock,
    *,
    has_offset: bool,
) -> tuple[PerBlock, PerBlock]:
    """Return for each block the s and o of least sum (target - z s - o)^2; s alone, with o as it is, without offset.

    A block keeps what it has where that is no scale of the same sign: z are all alike, or do not follow the target.
    """
    z, count = z * valid, valid.sum(dim=1, keepdim=True)
    mean_z = z.sum(dim=1, keepdim=True) / count if has_offset else torch.zeros_like(scales)
    mean_t = (target * valid).sum(dim=1, keepdim=True) / count if has_offset else offsets
    centred = (z - mean_z) * valid
    variance = centred.square().sum(dim=1, keepdim=True)
    fitted = (centred * (target - mean_t)).sum(dim=1, keepdim=True) / variance.clamp(min=1e-30)
    usable = (fitted * scales > 0) & (variance > 1e-6)
    new = torch.where(usable, fitted, scales)
    return new, torch.where(usable, mean_t - new * mean_z, offsets)
