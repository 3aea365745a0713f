"""The values at some ranks of a tensor, on its own device, from a histogram: in parallel, without a sort.

kbit.numerics.grid finds quantiles with them on a GPU. On the CPU it takes exact order statistics
(kbit.kernels.cpu_select). The histogram counts bits. The bits of a float, negative ones complemented, order as the
numbers do. Their upper bits are a cell of the histogram. The cell in which the count passes a rank holds the value of
that rank.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

# Low bits of a float32 that a cell does not tell apart: sign, exponent and 13 of 23 fraction bits are left, 2^22 cells.
_SHIFT: Final = 10
RELATIVE_ERROR: Final = 2.0**-13  # share of a float32 value: the spacing that 13 fraction bits leave
_CHUNK: Final = 2**24  # values counted at a time: 64 MB of cell numbers, whatever the size of the tensor


def estimate_ranks(values: Float[Tensor, " n"], ranks: Int64[np.ndarray, " r"]) -> Float64[np.ndarray, " r"]:
    """Return the values at these ranks (0 .. n - 1) of the sorted values, on any device.

    float16 and bfloat16: exact. float32: each rounded towards zero by less than RELATIVE_ERROR of itself (below the
    normal range, 2^-126, by less than 2^-139), so that a quantile between a and b is off by less than RELATIVE_ERROR
    max(|a|, |b|). Zeros stay zero.
    """
    passed = torch.cumsum(_count_cells(values), 0)
    cells = torch.searchsorted(passed, torch.from_numpy(ranks).to(values.device), right=True)
    estimates: Float64[np.ndarray, " r"] = _cell_values(cells, values.dtype).cpu().numpy()
    return estimates


def _count_cells(values: Float[Tensor, " n"]) -> Int64[Tensor, " cells"]:
    """Return how many values lie in each cell, from the most negative to the largest."""
    bits, shift = (32, _SHIFT) if values.dtype == torch.float32 else (16, 0)
    words = values.view(torch.int32 if bits == 32 else torch.int16)
    cells = 2 ** (bits - shift)
    counts = torch.zeros(cells, dtype=torch.int64, device=values.device)
    for chunk in torch.split(words, _CHUNK):
        ordered = torch.where(chunk < 0, chunk ^ (2 ** (bits - 1) - 1), chunk) >> shift
        counts += torch.bincount(ordered.int() + cells // 2, minlength=cells)
    return counts


def _cell_values(cells: Int64[Tensor, " *n"], dtype: torch.dtype) -> Float64[Tensor, " *n"]:
    """Return the value of each cell that is nearest to zero."""
    bits, shift = (32, _SHIFT) if dtype == torch.float32 else (16, 0)
    ordered = (cells - 2 ** (bits - shift - 1)) << shift
    words = torch.where(ordered < 0, (ordered | (2**shift - 1)) ^ (2 ** (bits - 1) - 1), ordered)
    return words.to(torch.int32 if bits == 32 else torch.int16).view(dtype).double()
