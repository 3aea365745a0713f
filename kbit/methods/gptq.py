"""GPTQ: column by column, and each column's rounding error is made up for by the columns that are still to come.

For a matrix W [out, in] with inputs X [in, tokens], the quantized matrix Q should minimise

    || W X - Q X ||^2 = tr (W - Q) H (W - Q)^T / 2,    H = 2 X X^T

With H^-1 = U^T U, U upper triangular, the published algorithm (Frantar et al., ICLR 2023, arXiv 2210.17323) goes
through the columns j = 0, 1, ...:

    q_j = round(w_j),   e = (w_j - q_j) / U_jj,   w_k = w_k - e U_jk  for each k > j

It delays the updates of later columns, since many at once are one matrix product. Here the columns are halved again and
again instead of cut into blocks of 128, which gives the same sums with fewer passes over the matrix. The scale of a
block is chosen when its first column's turn comes, from the weights as they are then. This needs a block that is a part
of one row and a scale that shares nothing with the tensor's others. Otherwise scales are those of the original weights,
as with static_groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from kbit.methods.block_scales import BlockScales, ChooseScales, find_best_scales
from kbit.methods.calibration import calibrate, describe_calibration, draw_windows
from kbit.methods.options import GptqConfig
from kbit.methods.weight import Codes, Job, Weight
from kbit.numerics.quantized_tensor import QuantizedTensor

LEAF: Final = 128  # columns that are updated one by one, as many as the published block of lazy updates has
_RAISES: Final = 3  # how often a damping that was too little is raised tenfold


@dataclass(frozen=True)
class LayerNotes:
    """What happened to one matrix.

    Attributes:
        dead: number of columns whose input was always zero.
        damping: the damping that was needed.
    """

    dead: int
    damping: float


def quantize_by_gptq(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Yield each weight with its codes, block by block, on the activations that the quantized blocks before it give.

    Raises:
        ValueError: see kbit.methods.calibration and factor_inverse. The model is then quantized in part.
    """
    windows, options = draw_windows(job.model, job.quant, job.tokenizer), job.quant.gptq
    dead: Counter[str] = Counter()
    raised: dict[str, float] = {}
    for weight, hessian in calibrate(job.model, job.weights, job.quant, windows):
        codes, notes = quantize_weight(weight, hessian, options)
        if notes.dead:
            dead[weight.name] += notes.dead
        if notes.damping > options.damping:
            raised[weight.name] = max(notes.damping, raised.get(weight.name, 0.0))
        yield weight, codes
    job.notes.update(
        describe_calibration(windows, job.weights) | {"dead_columns": dict(dead), "raised_damping": raised}
    )


def quantize_weight(
    weight: Weight, hessian: Float[Tensor, "in in"], options: GptqConfig
) -> tuple[QuantizedTensor, LayerNotes]:
    """Return the codes of one weight.

    Raises:
        ValueError: see factor_inverse. The message names the weight.
    """
    matrix, dead = weight.copy_matrix(), hessian.diagonal() == 0
    matrix[:, dead] = 0
    blocks = BlockScales(matrix, weight.spec)
    choose = find_best_scales if options.search_scales else None
    if choose:
        blocks.use(choose(matrix, blocks))
    refit = blocks.can_refit and not options.static_groups
    codes, damping = torch.zeros(matrix.shape, dtype=torch.uint8, device=matrix.device), options.damping
    order = order_columns(hessian, weight.outlier_columns, act_order=options.act_order)
    if len(order):  # else all its input dimensions stay at 16 bits
        try:
            factor, damping = factor_inverse(hessian[order][:, order], options.damping)
        except ValueError as error:
            raise ValueError(f"{weight.label}: {error}") from None
        codes[:, order] = round_columns(matrix[:, order], factor, blocks, order, refit=refit, choose=choose)
    quantized = blocks.assemble(codes, weight.values.shape, weight.values.dtype)
    return quantized, LayerNotes(int(dead.sum()), damping)


def order_columns(
    hessian: Float[Tensor, "in in"], outliers: Int64[Tensor, " outliers"], *, act_order: bool
) -> Int64[Tensor, " columns"]:
    """Return the columns to quantize, in their order, or by falling diagonal (ties in their order)."""
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return order[~torch.isin(order, outliers.to(order.device))]


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
    blocks: BlockScales,
    order: Int64[Tensor, " columns"],
    *,
    refit: bool,
    choose: ChooseScales | None = None,
    leaf: int = LEAF,
) -> UInt8[Tensor, "rows columns"]:
    """Return the codes of the columns.

    Args:
        matrix: the weights, columns in the order in which they are rounded.
        factor: U of the same order, see factor_inverse.
        blocks: the scales, which refit changes.
        order: the places of the columns in the matrix that the blocks are of.
        refit: whether to choose a block's scales when its turn comes.
        choose: function that chooses them. None takes the usual ones.
        leaf: the most columns that are updated one by one.
    """
    left = matrix.T.contiguous()  # a column is then contiguous
    errors, codes = torch.empty_like(left), torch.empty(left.shape, dtype=torch.uint8, device=left.device)

    def finish_block(start: int, stop: int) -> None:
        if refit:
            _refit_block(blocks, order[start:stop], left[start:stop], choose)
        _halve([*range(start, stop, leaf), stop], finish_leaf, left, errors, factor)

    def finish_leaf(start: int, stop: int) -> None:
        scales, offsets = blocks.at(order[start:stop])
        for j in range(start, stop):
            found = blocks.find_codes(left[j], scales[j - start], offsets[j - start])
            rounded = blocks.look_up(found) * scales[j - start] + offsets[j - start]
            errors[j] = (left[j] - rounded) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j]
            codes[j] = found

    bounds = [0, len(order)]
    if refit:
        places = order // blocks.usual.block_size
        bounds[1:1] = (torch.nonzero(places[1:] != places[:-1]).flatten() + 1).tolist()
    _halve(bounds, finish_block, left, errors, factor)
    return codes.T


def _refit_block(
    blocks: BlockScales,
    columns: Int64[Tensor, " columns"],
    values: Float[Tensor, "columns rows"],
    choose: ChooseScales | None,
) -> None:
    """Choose the scales of the block with these columns from the values they have now. Its outlier columns are 0."""
    size = blocks.usual.block_size
    block = int(columns[0]) // size
    first = block * size
    whole = values.new_zeros(values.shape[1], min(size, blocks.inputs - first))
    whole[:, columns - first] = values.T
    blocks.refit(block, whole, choose)


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
