"""Codebooks fitted to a distribution or to a tensor: quantile, abnormal float, learned.

Those of a tensor are stored with it and counted at 16 bits a value, so their values are rounded to float16.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

_GRID: Final = 20_001  # points of [-1, 1] on which the distribution is tabulated: spacing 1e-4, interpolated
_TOLERANCE: Final = 1e-8  # largest move of a value in the last round: below float32's spacing near 1
_MAX_ROUNDS: Final = 20_000
_FEW: Final = 1024  # distinct values, of which the best groups are found in a second
_WEIGHT_OF_ZERO: Final = 2**40  # a count with which the mean of its group stays at 0
_LEARNED_SAMPLE: Final = 2**18  # values that k-means sees: its centres move by less than float16 rounding beyond that


def quantile_values(bits: int, tensor: NDArray[Any]) -> NDArray[np.float64]:
    """Quantile quantization: midpoints of the tensor's empirical quantiles, plus 0 (paper, Appendix A, eq. 6).

    q_i = (Q(i/(2^k + 1)) + Q((i+1)/(2^k + 1))) / 2 for i = 1 .. 2^k - 1, divided by max |q|. Q is exact (a sort).
    Duplicates merge. A tensor whose quantiles are all 0 (all but a tail of it is 0) gets {-1, 0, 1}.
    """
    edges = np.quantile(tensor.astype(np.float64, copy=False), quantile_positions(bits))
    midpoints = (edges[:-1] + edges[1:]) / 2
    largest = np.abs(midpoints).max()
    if largest == 0:
        return np.array([-1.0, 0.0, 1.0])
    return _as_float16(np.append(midpoints / largest, 0.0))


def quantile_positions(bits: int) -> NDArray[np.float64]:
    """Return i / (2^k + 1), i = 1 .. 2^k: the quantiles that quantile_values rests on."""
    positions: NDArray[np.float64] = np.arange(1, 2**bits + 1) / (2**bits + 1)
    return positions


@functools.lru_cache(maxsize=32)
def af_values(bits: int, block_size: int) -> NDArray[np.float64]:
    """Abnormal float: the code of least expected absolute error for normal values in blocks of this size.

    X = w / max |w| over a block of B values w ~ N(0, 1). With probability 1/B it is +-1. Otherwise, given the maximum
    m, it is N(0, 1/m^2) cut to [-1, 1]. The code contains -1, 0 and 1. Every other value is the median of X between the
    midpoints to its neighbours, iterated to a fixed point (after Yoshida, arXiv 2306.06965). As there, 2^(k-1) - 1
    values lie below 0 and 2^(k-1) above. (The published AF4 for B = 64 differs around 0, at a 3.4% larger expected
    error: it is the preset af4_published.) In blocks of one value X is -1 or 1, and so the code is -1, 0 and 1 alone,
    whatever the bits.
    """
    grid = np.linspace(-1, 1, _GRID)
    cumulative = _normalized_cdf(grid, block_size)
    code = np.concatenate([np.linspace(-1, 0, 2 ** (bits - 1)), np.linspace(0, 1, 2 ** (bits - 1) + 1)[1:]])
    free = (code != 0) & (np.abs(code) != 1)
    for _ in range(_MAX_ROUNDS):
        borders = np.interp((code[:-1] + code[1:]) / 2, grid, cumulative)
        medians = np.interp((borders[:-1] + borders[1:]) / 2, cumulative, grid)
        moved = np.where(free[1:-1], medians, code[1:-1])
        if np.abs(moved - code[1:-1]).max(initial=0) < _TOLERANCE:
            break
        code[1:-1] = moved
    return code


def learned_values(bits: int, values: Float32[np.ndarray, " n"], seed: int) -> NDArray[np.float64]:
    """K-means of a tensor's normalised values (Lloyd's algorithm in one dimension), with 0 kept as a value.

    The algorithm starts from the values' quantiles, on a seeded sample (sample_indices). One centre stays on 0, so that
    zero blocks are exact: the one nearest 0. Where quantiles coincide, as they do if most values are 0, the others
    start from those of the distinct values beside 0. If these are few, it starts from the best groups of them: centres
    cannot move past values that lie far apart, and the error was up to 13 times that of evenly spaced values.
    """
    ordered = np.sort(values[sample_indices(values.size, seed)].astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = np.unique(np.quantile(ordered, (np.arange(2**bits) + 0.5) / 2**bits))
    distinct, counts = np.unique(ordered[ordered != 0], return_counts=True)
    if len(distinct) < min(8 * 2**bits, _FEW):
        centres = _group(np.append(distinct, 0.0), np.append(counts, _WEIGHT_OF_ZERO), 2**bits)
    elif len(centres) < 2**bits:
        centres = np.union1d(np.quantile(distinct, (np.arange(2**bits - 1) + 0.5) / (2**bits - 1)), 0.0)
    zero = np.abs(centres).argmin()
    centres[zero] = 0.0
    for _ in range(_MAX_ROUNDS):
        borders = np.searchsorted(ordered, (centres[:-1] + centres[1:]) / 2)
        edges = np.concatenate([[0], borders, [ordered.size]])
        counts = np.diff(edges)
        means = np.divide(np.diff(sums[edges]), counts, out=centres.copy(), where=counts > 0)
        means[zero] = 0.0
        if np.abs(means - centres).max() < _TOLERANCE:
            break
        centres = means
    return _as_float16(np.clip(centres, -1, 1))


def _group(distinct: NDArray[np.float64], counts: NDArray[np.int64], wanted: int) -> NDArray[np.float64]:
    """Return the means of the neighbours' groups, at most so many, whose squared error is least of all groupings.

    Dynamic programming: the best groups of the first j values are the best of the first i and one of the others.
    """
    order = distinct.argsort()
    distinct, counts = distinct[order], counts[order]
    if len(distinct) <= wanted:
        return distinct
    count, total, square = (
        np.concatenate([[0.0], np.cumsum(counts * distinct**power)]) for power in (0, 1, 2)
    )  # of the first i values
    first, last = np.tril_indices(len(count), -1)[::-1]
    error = np.full((len(count), len(count)), np.inf)  # of values first .. last - 1 in one group, by [last, first]
    error[last, first] = square[last] - square[first] - (total[last] - total[first]) ** 2 / (count[last] - count[first])
    least, starts = error[:, 0], []
    for _ in range(wanted - 1):
        sums = error + least
        starts.append(sums.argmin(axis=1))
        least = sums.min(axis=1)
    edges = [len(distinct)]
    for start in reversed(starts):
        edges.append(int(start[edges[-1]]))
    edges = sorted({0, *edges})
    means: NDArray[np.float64] = np.diff(total[edges]) / np.diff(count[edges])
    return means


def sample_indices(n: int, seed: int) -> NDArray[np.int64]:
    """Return which of n values k-means sees: all, or 2^18 drawn with replacement (a permutation would cost more)."""
    if n <= _LEARNED_SAMPLE:
        return np.arange(n)
    return np.random.default_rng(seed).integers(0, n, _LEARNED_SAMPLE)


def _normalized_cdf(grid: NDArray[np.float64], block_size: int) -> NDArray[np.float64]:
    """P(X <= x) for a value of a block of B normal values divided by the block's largest magnitude.

    The cut normal is averaged over the distribution of the maximum m of B - 1 other magnitudes and the value itself.
    Then the atoms of 1/(2B) at -1 and +1 are added.
    """
    from scipy.special import ndtr  # slow to import, and only this data type needs it

    m = np.linspace(1e-4, 8, 4001)
    below = 2 * ndtr(m) - 1
    cdf_of_maximum = below**block_size
    weights = np.diff(cdf_of_maximum)
    centre = (m[:-1] + m[1:]) / 2
    inside = 2 * ndtr(centre) - 1
    cdf = np.zeros_like(grid)
    for weight, maximum, mass in zip(weights, centre, inside, strict=True):
        if weight > 1e-12:
            cdf += weight * (ndtr(grid * maximum) - ndtr(-maximum)) / mass
    smooth: NDArray[np.float64] = cdf / weights.sum()
    return 1 / (2 * block_size) + (1 - 1 / block_size) * smooth


def _as_float16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.unique(values.astype(np.float16)).astype(np.float64)
