"""GPTQ: column by column, and each column's rounding error is made up for by the columns that are still to come.

For a matrix W [out, in] with inputs X [in, tokens], the quantized matrix Q should minimise

    || W X - Q X ||^2 = tr (W - Q) H (W - Q)^T / 2,    H = 2 X X^T

With H^-1 = U^T U, U upper triangular, the published algorithm (Frantar et al., ICLR 2023, arXiv 2210.17323) goes
through the columns j = 0, 1, ...:

    q_j = round(w_j),   e = (w_j - q_j) / U_jj,   w_k = w_k - e U_jk  for each k > j

It delays the updates of later columns, since many at once are one matrix product. Here the columns are halved again and
again instead of cut into blocks of 128: the same sums, and fewer passes over the matrix. The scale of a block is chosen
when its first column's turn comes, from the weights as they are then, if the block is a part of one row and its scale
shares nothing with the tensor's others; otherwise scales are those of the original weights, as with static_groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kbit.methods.block_scales import BlockGrid, ChooseScales, find_best_scales
from kbit.methods.calibration import calibrate, describe_calibration, draw_windows
from kbit.methods.config import GptqConfig, QuantConfig
from kbit.methods.weight import Weight

LEAF: Final = 128  # columns that are updated one by one; the published block of lazy updates


_RAISES: Final = 3  # times that a damping which was too little is raised tenfold


@dataclass(frozen=True)
class LayerNotes:
    """What happened to one matrix: columns whose input was always zero, and the damping that was needed."""

    dead: int
    damping: float


def quantize_by_gptq(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Quantize block by block, each on the activations that the quantized blocks before it give.

    Raises:
        ValueError: see kbit.methods.calibration and factor_inverse; the model is then quantized in part.
    """
    notes: dict[str, LayerNotes] = {}
    windows = draw_windows(model, quant, tokenizer)
    for weight, hessians in calibrate(model, weights, quant, windows):
        notes[weight.name] = quantize_weight(weight, hessians, quant.gptq)
    raised = {name: of.damping for name, of in notes.items() if of.damping > quant.gptq.damping}
    dead = {name: of.dead for name, of in notes.items() if of.dead}
    return describe_calibration(windows, weights) | {"dead_columns": dead, "raised_damping": raised}


def quantize_weight(weight: Weight, hessians: Float[Tensor, "experts in in"], options: GptqConfig) -> LayerNotes:
    """Quantize one weight, which fused experts share with a Hessian each, and put it.

    Raises:
        ValueError: see factor_inverse; the message names the weight.
    """
    matrix = weight.take_matrix()
    rows = len(matrix) // len(hessians)
    parts = [slice(i * rows, (i + 1) * rows) for i in range(len(hessians))]
    dead = hessians.diagonal(dim1=1, dim2=2) == 0
    for part, columns in zip(parts, dead, strict=True):
        matrix[part, columns] = 0
    grid = BlockGrid(matrix, weight.spec)
    choose = find_best_scales if options.search_scales else None
    if choose:
        grid.use(*choose(matrix, grid))
    damping = [options.damping]
    for part, hessian in zip(parts, hessians, strict=True):
        order = order_columns(hessian, weight.kept, act_order=options.act_order)
        if not len(order):  # all its input dimensions stay at 16 bits
            continue
        try:
            factor, used = factor_inverse(hessian[order][:, order], options.damping)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}") from None
        refit = grid.can_refit and not options.static_groups
        matrix[part, order] = round_columns(matrix[part, order], factor, grid, part, order, refit=refit, choose=choose)
        damping.append(used)
    weight.put(matrix.view(weight.values.shape))
    return LayerNotes(int(dead.sum()), max(damping))


def order_columns(
    hessian: Float[Tensor, "in in"], kept: Int64[Tensor, " kept"], *, act_order: bool
) -> Int64[Tensor, " columns"]:
    """Return the columns to quantize, in their order, or by falling diagonal (ties in their order)."""
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return order[~torch.isin(order, kept.to(order.device))]


def factor_inverse(hessian: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"], float]:
    """Return the upper triangular U with U^T U = (H + damping mean(diag H))^-1, and the damping that was needed.

    With the order of rows and columns turned round, H = L L^T gives H = R R^T with R upper triangular, and U = R^-1:
    half the work of inverting H and factoring the inverse, and more exact. Computed in float64. A column that is dead
    (H_jj = 0) gets H_jj = 1, as in the published code.

    Raises:
        ValueError: H holds NaN or Inf, or is singular even with a thousand times the damping.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("its inputs hold NaN or Inf")
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal().clone()
    alive = torch.where(diagonal == 0, 1.0, diagonal)
    for factor in (10.0**i for i in range(_RAISES + 1)):
        damped.diagonal().copy_(alive + factor * damping * alive.mean())
        turned, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return _invert_upper(turned.flip(0, 1)).to(hessian.dtype), factor * damping
    raise ValueError(
        f"the Hessian of its {len(hessian)} inputs is singular, with damping={damping:g} and up to {factor:g} times "
        "that: raise quant.gptq.damping or calibrate on more text"
    )


def round_columns(
    matrix: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    grid: BlockGrid,
    rows: slice,
    order: Int64[Tensor, " columns"],
    *,
    refit: bool,
    choose: ChooseScales | None = None,
    leaf: int = LEAF,
) -> Float[Tensor, "rows columns"]:
    """Return the quantized columns.

    Args:
        matrix: the weights, columns in the order in which they are rounded.
        factor: U of the same order, see factor_inverse.
        grid: the blocks; refit changes its scales.
        rows, order: where in the grid the rows and columns are.
        refit: choose a block's scales when its turn comes; by `choose`, or the usual ones.
        leaf: most columns that are updated one by one.
    """
    left = matrix.T.contiguous()  # a column is then contiguous
    errors = torch.empty_like(left)

    def finish_block(start: int, stop: int) -> None:
        if refit:
            _refit_block(grid, rows, order[start:stop], left[start:stop], choose)
        _halve([*range(start, stop, leaf), stop], finish_leaf, left, errors, factor)

    def finish_leaf(start: int, stop: int) -> None:
        scales, offsets = grid.at(rows, order[start:stop])
        for j in range(start, stop):
            rounded = grid.round(left[j], scales[j - start], offsets[j - start])
            errors[j] = (left[j] - rounded) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j]
            left[j] = rounded

    bounds = [0, len(order)]
    if refit:
        blocks = order // grid.grid.block_size
        bounds[1:1] = (torch.nonzero(blocks[1:] != blocks[:-1]).flatten() + 1).tolist()
    _halve(bounds, finish_block, left, errors, factor)
    return left.T


def _refit_block(
    grid: BlockGrid,
    rows: slice,
    columns: Int64[Tensor, " columns"],
    values: Float[Tensor, "columns rows"],
    choose: ChooseScales | None,
) -> None:
    """Choose the scales of the block that has these columns from the values they have now; kept columns of it are 0."""
    size = grid.grid.block_size
    block = int(columns[0]) // size
    first = block * size
    whole = values.new_zeros(values.shape[1], min(size, grid.inputs - first))
    whole[:, columns - first] = values.T
    grid.refit(rows, block, whole, choose)


def _halve(
    bounds: Sequence[int],
    finish: Callable[[int, int], None],
    left: Float[Tensor, "columns rows"],
    errors: Float[Tensor, "columns rows"],
    factor: Float[Tensor, "columns columns"],
) -> None:
    """Finish the pieces between the bounds one after the other, each updated by the errors of those before it."""
    if len(bounds) == 2:
        return finish(*bounds)
    middle = len(bounds) // 2
    start, cut, stop = bounds[0], bounds[middle], bounds[-1]
    _halve(bounds[: middle + 1], finish, left, errors, factor)
    left[cut:stop] -= factor[start:cut, cut:stop].T @ errors[start:cut]
    return _halve(bounds[middle:], finish, left, errors, factor)


def _invert_upper(r: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the inverse of an upper triangular matrix by halves: [[A, B], [0, D]]^-1 = [[A', -A' B D'], [0, D']]."""
    n = len(r)
    if n <= LEAF:
        inverse: Tensor = torch.linalg.solve_triangular(r, torch.eye(n, dtype=r.dtype, device=r.device), upper=True)
        return inverse
    half = n // 2
    inverse = torch.zeros_like(r)
    inverse[:half, :half], inverse[half:, half:] = _invert_upper(r[:half, :half]), _invert_upper(r[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ r[:half, half:] @ inverse[half:, half:]
    return inverse
