"""Half-quadratic scales and offsets, without data: after HQQ (Badri & Shaji, Half-Quadratic Quantization, 2023).

The error of a block, sum |x - (z s + o)|^p with p < 1, weighs a few large errors less than squares do. With e for
the errors that are accepted, it is minimised by turns, with z = codebook[code]:

    e    = shrink(x - (z s + o)),      shrink(r) = sign(r) max(0, |r| - |r|^(p - 1) / beta)
    s, o = least squares of x - e - (z s + o);   z = nearest codebook values;   beta = kappa beta

HQQ moves the offset alone, and only for ints. Here scale and offset move, for any codebook. The offset moves only where
the quantizer has one, with normalization=minmax. Errors are measured in units of the block's scale. A fit moves a scale
too little to reach the next power of two, so scale_format=e8m0 is nearly always rounded to nearest. The power of least
|error|^p instead clips so much that models get worse (FINDINGS.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kbit.methods.block_scales import BlockScales
from kbit.methods.weight import Codes, Job, Weight
from kbit.numerics.grid import QuantizationGrid

P: Final = 0.7  # as in HQQ's code, like the three below
BETA: Final = 10.0
KAPPA: Final = 1.01
ROUNDS: Final = 20
Blocks = Float[Tensor, "blocks size"]
PerBlock = Float[Tensor, "blocks 1"]


def fit_half_quadratic(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Yield each weight with codes for half-quadratic scales and offsets."""
    for weight in job.weights:
        matrix = weight.copy_matrix()
        blocks = BlockScales(matrix, weight.spec)
        fitted = find_half_quadratic_scales(matrix, blocks)
        yield weight, blocks.encode(matrix, fitted, weight.values.shape, weight.values.dtype)


def find_half_quadratic_scales(matrix: Float[Tensor, "rows in"], blocks: BlockScales) -> QuantizationGrid:
    """Return the fitted scales and offsets, or the usual ones where those have the smaller sum of |error|^p.

    Each block is compared by itself. With formats in which scales depend on each other (fp8, dq8), all blocks are
    compared together.
    """
    x, valid = blocks.split(matrix), blocks.split(torch.ones_like(matrix)) > 0
    scales, offsets = (
        torch.tensor(array, device=matrix.device)[:, None] for array in (blocks.usual.scales, blocks.usual.offsets)
    )
    unit = scales.abs()
    has_offset, beta = blocks.spec.normalization == "minmax", BETA
    for _ in range(ROUNDS):
        z = blocks.look_up(blocks.find_codes(x, scales, offsets))
        target = x - shrink((x - (z * scales + offsets)) / unit.clamp(min=1e-30), beta) * unit
        scales, offsets = fit_line(z, target, valid, scales, offsets, has_offset=has_offset)
        beta *= KAPPA
    fitted = [np.ascontiguousarray(part[:, 0].cpu().numpy()) for part in (scales, offsets)]
    return _choose_better(matrix, blocks, blocks.store(*fitted))


def _choose_better(matrix: Float[Tensor, "rows in"], blocks: BlockScales, fitted: QuantizationGrid) -> QuantizationGrid:
    """Return the fitted scales and offsets, or the usual ones where they are better."""
    errors, least = (blocks.measure_errors(matrix, grid, power=P) for grid in (fitted, blocks.usual))
    if blocks.spec.scale_type.has_own_scales:
        return blocks.mix(errors < least, fitted, blocks.usual)
    return fitted if errors.sum() < least.sum() else blocks.usual


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
    """Return for each block the s and o of least sum (target - z s - o)^2. Without offset, o stays as it is.

    A block keeps its s and o where the result is no scale of the same sign: all z are alike, or do not follow it.
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
