"""Data types as values: a k-bit data type is a sorted table of at most 2^k numbers, its codebook.

Quantization stores the index of the nearest table value for each weight. The data types int, float, dynamic exponent,
quantile and NormalFloat differ only in how the table is made. Every table is a read-only, strictly increasing float32
array.

Two sources have short names here. "paper" is Dettmers & Zettlemoyer, The case for 4-bit precision (ICML 2023), Appendix
A. "QLoRA" is Dettmers et al. 2023. bitsandbytes' codebook makers of November 2022 are the public code closest to the
paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

Codebook = Float32[np.ndarray, " values"]
ADAPTIVE: Final = ("quantile", "learned")  # made for each tensor and stored with it
UNSIGNED: Final = ("int", "dynamic", "table")  # have a table for values that are never below 0
FLOAT_BIASES: Final = ("ieee", "bnb", "paper")
MIN_BITS: Final = 2
MAX_BITS: Final = 8
# The paper's exponent widths for its main results: 3-bit E2M0, then three exponent bits up to 8-bit E3M4 (Appendix A).
PAPER_EXPONENT_BITS: Final = {2: 1, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 3}
# The three float conventions differ only in how far the subnormals lie below the place gradual underflow puts them, in
# powers of two: ieee = OCP/IEEE minifloat, bnb = create_fp8_map today, paper = Appendix A, which the FP4 kernel uses.
_SUBNORMAL_SHIFT: Final = {"ieee": 0, "bnb": 2, "paper": 4}

# NF4 as published (QLoRA, Appendix E). The formula reproduces it only to 1.1e-7, and users compare bit by bit.
_NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def int_codebook(bits: int, *, signed: bool = True, zero: bool = True) -> Codebook:
    """Symmetric integers i / (2^(k-1) - 1), |i| <= 2^(k-1) - 1: 2^k - 1 levels (paper, Appendix A).

    Unsigned ones are i / (2^k - 1), or without 0 (i + 1) / 2^k (Li et al. 2023, "Memory efficient optimizers with 4-bit
    states"), for i = 0 .. 2^k - 1.
    """
    if signed:
        return as_codebook(grid_values("int", bits))
    return as_codebook(unsigned_grid_values(bits, zero=zero))


def float_codebook(bits: int, exponent_bits: int, float_bias: str = "ieee") -> Codebook:
    """Minifloat: sign, E exponent and M = k - 1 - E mantissa bits, subnormals, no NaN or Inf, scaled to maximum 1.

    A normal number is (1 + m/2^M) 2^e with e = 1 .. 2^E - 1. A subnormal (e = 0) is m/2^M 2^(1 - shift), where shift is
    0 for "ieee", 2 for "bnb" and 4 for "paper". Both zeros are one value, so there are 2^k - 1. Without mantissa bits
    there are no subnormals and the conventions agree (paper's 3-bit E2M0 and 4-bit E3M0).
    """
    check_exponent_bits(bits, exponent_bits)
    return as_codebook(grid_values("float", bits, exponent_bits, float_bias))


def grid_values(
    data_type: str, bits: int, exponent_bits: int | None = None, float_bias: str = "ieee"
) -> NDArray[np.float64]:
    """Return the sorted values of int or float in float64, which their codebooks round to float32."""
    values: NDArray[np.float64]
    if data_type == "int":
        top = 2 ** (bits - 1) - 1
        values = np.arange(-top, top + 1) / top
        return values
    exponent_bits = PAPER_EXPONENT_BITS[bits] if exponent_bits is None else exponent_bits
    mantissas = 2 ** (bits - 1 - exponent_bits)
    fractions = np.arange(mantissas) / mantissas
    normals = (1 + fractions) * 2.0 ** np.arange(1, 2**exponent_bits)[:, None]
    subnormals = fractions * 2.0 ** (1 - _SUBNORMAL_SHIFT[float_bias])
    magnitudes = np.concatenate([subnormals, normals.ravel()]) / normals.max()
    values = np.unique(np.concatenate([-magnitudes, magnitudes]))
    return values


def unsigned_grid_values(bits: int, *, zero: bool) -> NDArray[np.float64]:
    """Return the sorted values of unsigned int in float64, see int_codebook."""
    values: NDArray[np.float64] = np.arange(2**bits) / (2**bits - 1) if zero else np.arange(1, 2**bits + 1) / 2**bits
    return values


def dynamic_codebook(bits: int, *, signed: bool = True, zero: bool = True) -> Codebook:
    """Dynamic exponent: sign, leading zeros = decimal exponent, indicator one, linear fraction (paper, Appendix A).

    For i = 0 .. k-2 the values are +-10^(i-(k-2)) times the midpoints of 2^i equal bins of [0.1, 1]. The table also has
    0 and +1. The most negative value is above -1 (-0.8875 at 4 bits), so a negative block maximum is clipped, as in the
    original. The original computes in float32, and so is this: each edge is rounded once (torch.linspace with fused
    multiply-adds), then its midpoint, then its product.

    Unsigned, the sign's bit is one more bit of the fraction: 2^(i+1) bins, and no value below 0 (Dettmers et al. 2022,
    "8-bit Optimizers via Block-wise Quantization", for Adam's second moment). It may also lack the 0.
    """
    values = [np.array([0, 1] if zero else [1], np.float32)]
    start, one = np.float32(0.1), np.float32(1)
    for i in range(bits - 1):
        bins = 2**i if signed else 2 ** (i + 1)
        number, step = np.arange(bins + 1), np.float64((one - start) / np.float32(bins))
        is_lower = number < (bins + 1) // 2  # the upper half is counted down from the end
        edges = np.where(is_lower, start + step * number, one - step * (bins - number)).astype(np.float32)
        magnitudes = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - (bits - 2)))
        values += [magnitudes, -magnitudes] if signed else [magnitudes]
    return as_codebook(np.concatenate(values))


def nf_codebook(bits: int) -> Codebook:
    """k-bit NormalFloat: quantiles of N(0, 1) and 0, with 2^(k-1) - 1 values below and 2^(k-1) above (QLoRA, eq. 4).

    Each side is evenly spaced in probability between 1/2 and off(k) = 1 - (1/(2(2^k - 1)) + 1/(2 2^k)) / 2, the rule
    that gives the published NF4 offset 929/960 at k = 4. The table for k = 4 itself is the published one.
    """
    if bits == 4:
        return as_codebook(np.array(_NF4))
    levels = 2**bits
    offset = 1 - (1 / (2 * (levels - 1)) + 1 / (2 * levels)) / 2
    positive = _normal_quantiles(np.linspace(offset, 0.5, levels // 2 + 1)[:-1])
    negative = -_normal_quantiles(np.linspace(offset, 0.5, levels // 2)[:-1])
    values = np.concatenate([negative, [0.0], positive])
    return as_codebook(values / np.abs(values).max())


def table_codebook(bits: int, table: Sequence[float], *, signed: bool = True, zero: bool = True) -> Codebook:
    """A user's own values, sorted: 2 to 2^k distinct ones, within [-1, 1], or [0, 1] if unsigned."""
    values, least = np.array(table, np.float64), -1 if signed else 0
    if not np.isfinite(values).all() or values.max(initial=0) > 1 or values.min(initial=0) < least:
        raise ValueError(f"table={list(table)} has values outside [{least}, 1]")
    codebook = as_codebook(values)
    if not zero and 0 in codebook:
        raise ValueError(f"table={list(table)} has a 0, which zero=false leaves out")
    if not 2 <= codebook.size <= 2**bits:
        raise ValueError(f"table has {codebook.size} distinct values; bits={bits} allows 2..{2**bits}")
    return codebook


def decision_thresholds(
    codebook: Codebook | NDArray[np.float64], rounding: str = "nearest"
) -> Float32[np.ndarray, " thresholds"]:
    """Return the len(codebook) - 1 float32 thresholds t_j such that code(v) = number of j with v >= t_j.

    With rounding=nearest, t_j is the midpoint of neighbours j and j+1, computed in float64 and rounded to float32. A
    tie goes away from zero, so that a symmetric table treats x and -x alike: a threshold below 0 is passed only by
    v > midpoint, which for float32 v is v >= the next float32 above it. With nearest_even, a tie goes to the neighbour
    at an even place, counted from 0 (the value nearest to it, if the table lacks 0): for int and float the even number
    and the even mantissa. With truncate, values go towards v = 0, so t_j is the neighbour farther from zero (the
    midpoint if zero lies between). With floor, t_j = codebook[j + 1], from where stochastic rounding goes up.
    """
    wide = codebook.astype(np.float64)
    below, above = wide[:-1], wide[1:]
    midpoints = ((below + above) / 2).astype(np.float32)
    match rounding:
        case "nearest":
            thresholds, exclusive = midpoints, midpoints < 0
        case "nearest_even":
            places = np.arange(1, len(wide)) - np.abs(wide).argmin()
            thresholds, exclusive = midpoints, places % 2 == 1
        case "truncate":
            exclusive = above <= 0
            thresholds = np.where(below >= 0, above, np.where(exclusive, below, midpoints)).astype(np.float32)
            exclusive |= (thresholds < 0) & (below < 0) & (above > 0)
        case _:
            return above.astype(np.float32)
    return np.where(exclusive, np.nextafter(thresholds, np.float32(np.inf)), thresholds)


def check_bits(bits: int) -> None:
    """Raise ValueError unless 2 <= bits <= 8."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits} is not in {MIN_BITS}..{MAX_BITS}")


def check_exponent_bits(bits: int, exponent_bits: int) -> None:
    """Raise ValueError unless a sign bit and this exponent fit into the given bits."""
    if not 1 <= exponent_bits <= bits - 1:
        raise ValueError(f"exponent_bits={exponent_bits} does not fit bits={bits}: allowed are 1..{bits - 1}")


def natural_peak(data_type: str, bits: int, exponent_bits: int | None = None) -> float:
    """Return the largest value, in [1, 2), of the grid that a power-of-two scale leaves exact.

    A codebook divided by its maximum hides that ints and floats lie on powers of two: E2M1 is 0, 0.5, 1, 1.5, ... 6,
    with peak 6 / 4 = 1.5. Block formats with a shared exponent (MX, BFP) are these grids. 1 for tables without one.
    """
    if data_type == "int":
        return 2 - 2.0 ** (2 - bits)
    if data_type == "float":
        exponent_bits = PAPER_EXPONENT_BITS[bits] if exponent_bits is None else exponent_bits
        return 2 - 2.0 ** -(bits - 1 - exponent_bits)
    return 1.0


def largest_exponent(data_type: str, bits: int, exponent_bits: int | None = None) -> int:
    """Return the exponent of the largest number of an OCP element format: 2 for E2M1, whose largest is 1.5 2^2."""
    if data_type != "float":
        return 0
    exponent_bits = PAPER_EXPONENT_BITS[bits] if exponent_bits is None else exponent_bits
    return int(2 ** (exponent_bits - 1))


def data_type_label(
    data_type: str, bits: int, exponent_bits: int | None = None, *, signed: bool = True, zero: bool = True
) -> str:
    """Return the short name used in tables and plots, such as int4, nf3, float4-e3m0, udynamic8 or uint4-nonzero."""
    if not signed:
        return f"u{data_type}{bits}{'' if zero else '-nonzero'}"
    if data_type != "float":
        return f"{data_type}{bits}"
    exponent_bits = PAPER_EXPONENT_BITS[bits] if exponent_bits is None else exponent_bits
    return f"float{bits}-e{exponent_bits}m{bits - 1 - exponent_bits}"


def _normal_quantiles(probabilities: NDArray[Any]) -> NDArray[Any]:
    """Quantiles of N(0, 1), to 1e-15: Wichura's algorithm AS 241, as the standard library has it."""
    return np.array([NormalDist().inv_cdf(p) for p in probabilities.tolist()])


def as_codebook(values: NDArray[Any]) -> Codebook:
    """Sort, drop duplicates (the two zeros) and freeze."""
    codebook = np.unique(values.astype(np.float32)) + np.float32(0)  # -0.0 + 0 = 0.0
    codebook.flags.writeable = False
    return codebook
