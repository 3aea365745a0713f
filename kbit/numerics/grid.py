"""The grid of a tensor: its blocks with their scales and offsets, and the codebook, chosen from the values.

A tensor is quantized on its own device (kbit.numerics.backend). The CPU and a GPU give the same bits, with two
exceptions. A GPU estimates a quantile codebook of float32 values (kbit.numerics.quantiles). And a mean (spec.centering)
may lie within float64's rounding of the middle between two float16 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from numpy.typing import NDArray

from kbit.kernels.cpu_select import order_statistics
from kbit.numerics import fitted_codebooks
from kbit.numerics.backend import Backend, torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE, Codebook, largest_exponent
from kbit.numerics.quantiles import estimate_ranks
from kbit.numerics.scale_formats import Scales, Stored
from kbit.numerics.spec import QuantSpec

Elements = TypeVar("Elements", NDArray[np.int64], torch.Tensor)
Values = Float[torch.Tensor, " n"]  # contiguous float32, float16 or bfloat16
_SUMMED: Final = 2**20  # values of a sum in float64 at a time: torch makes a float64 copy of them


@dataclass(frozen=True, eq=False)
class QuantizationGrid:
    """Everything that decides a tensor's codes.

    Attributes:
        spec: the quantizer.
        row: elements of a row, which is the whole tensor if layout=flat.
        block_size: elements of a block, at most a row.
        scales: the scale of each block as it is used, which is the decoded stored_scales.
        offsets: the offset of each block as it is used, the tensor's mean included.
        stored_scales: the arrays that the format of scales stores, by name.
        stored_offsets: the arrays that the format of offsets stores. Only minmax has any.
        center: the tensor's mean, float16 [1], which centering subtracts. It is empty without centering.
        codebook: the sorted table of values.
        thresholds: numbers where one code ends and the next begins (codebooks.decision_thresholds).
        seed: seed of stochastic rounding. None rounds by the thresholds.
    """

    spec: QuantSpec
    row: int
    block_size: int
    scales: Scales
    offsets: Scales
    stored_scales: Stored
    stored_offsets: Stored
    center: NDArray[np.float16]
    codebook: Codebook
    thresholds: Float32[np.ndarray, " thresholds"]
    seed: int | None

    def list_arguments(self, values: Values, backend: Backend) -> tuple[Any, ...]:
        """Return the arguments of the kernel that quantizes these values, see kbit.numerics.reference.quantize."""
        scales, offsets = backend.put(self.scales), backend.put(self.offsets)
        blocks = (self.row, self.block_size, self.seed, self.spec.bits)
        return (backend.view(values), scales, offsets, self.codebook, self.thresholds, *blocks)


def make_grid(values: Values, shape: torch.Size, spec: QuantSpec, backend: Backend) -> QuantizationGrid:
    """Choose and round the scales and offsets, and make the codebook."""
    row, block_size = spec.find_block_shape(shape)
    low, high = _find_extremes(values, row, block_size, backend)
    if not spec.signed and (low < 0).any():
        raise ValueError(
            f"{int((values < 0).sum())} of {values.numel()} values are below 0, which signed=false has not"
        )
    center = np.empty(0, np.float16)
    if spec.centering:
        center = _round_center(_mean(values))
        low, high = low - center.astype(np.float32), high - center.astype(np.float32)
    codebook = None if spec.data_type in ADAPTIVE else spec.make_codebook()
    bounds = (np.float32(-1), np.float32(1)) if codebook is None else (codebook[0], codebook[-1])
    stored_scales = spec.scale_type.encode(_choose_scales(low, high, bounds, spec))
    scales = spec.decode_scales(stored_scales)
    stored_offsets: Stored = {}
    if spec.normalization == "minmax":
        stored_offsets = spec.offset_type.encode_offsets(low - bounds[0] * scales)
    offsets = spec.decode_offsets(stored_offsets, center, scales)
    if codebook is None:
        codebook = spec.make_codebook(_adaptive_sample(values, scales, offsets, (row, block_size), spec, backend))
    _check_reach(codebook, scales, offsets, values.dtype, spec)
    return QuantizationGrid(
        spec, row, block_size, scales, offsets, stored_scales, stored_offsets, center, codebook,
        spec.make_thresholds(codebook), spec.seed if spec.rounding == "stochastic" else None,
    )  # fmt: skip


def find_blocks(elements: Elements, row: int, block_size: int) -> Elements:
    """Return the block of each element, given by its place in the flat tensor."""
    return elements // row * -(-row // block_size) + elements % row // block_size


def find_quantiles(
    values: Values, positions: Float64[np.ndarray, " count"], backend: Backend
) -> Float64[np.ndarray, " count"]:
    """Return the quantiles at these positions in [0, 1], interpolated linearly between two ranks as np.quantile does.

    They rest on exact order statistics on the CPU, and for float16 and bfloat16. A GPU estimates those of float32
    (kbit.numerics.quantiles).

    Args:
        values: finite float16, bfloat16 or float32 values.
        positions: the share of the values that lies below each quantile.
        backend: where the values are.
    """
    places = positions * (values.numel() - 1)
    ranks = np.concatenate([np.floor(places), np.ceil(places)]).astype(np.int64)
    at_ranks = estimate_ranks(values, ranks) if backend.is_gpu else order_statistics(backend.view(values), ranks)
    below, above = np.split(at_ranks.astype(np.float64), 2)
    quantiles: Float64[np.ndarray, " count"] = below + (above - below) * (places - np.floor(places))
    return quantiles


def _find_extremes(values: Values, row: int, block_size: int, backend: Backend) -> tuple[Scales, Scales]:
    """Return the least and the largest value of each block.

    Raises:
        ValueError: values that are NaN or Inf, with their number.
    """
    with torch_threads_kept():
        extremes = backend.kernels.block_extremes(backend.view(values), row, block_size)
    low, high = map(backend.get, extremes)
    if not (np.isfinite(low.min()) and np.isfinite(high.max())):  # NaN orders outside of +-Inf, and passes through both
        raise ValueError(f"{int((~values.isfinite()).sum())} of {values.numel()} values are NaN or Inf")
    return low, high


def _check_reach(codebook: Codebook, scales: Scales, offsets: Scales, dtype: torch.dtype, spec: QuantSpec) -> None:
    """Raise ValueError if a finite tensor could become infinite: a scale was rounded up beyond what its dtype holds."""
    peak, most = np.float64(_largest(codebook)), np.float64(torch.finfo(dtype).max)
    if _largest(scales) * peak + _largest(offsets) <= most:  # a bound: the two may be of different blocks
        return
    reach = float((np.abs(scales).astype(np.float64) * peak + np.abs(offsets)).max())
    if not reach <= most:  # so that NaN is refused, too
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"scale_format={spec.scale_format} rounds a block's largest magnitude to {reach:.6g}, beyond {name} "
            f"(largest {most:g}): use scale_format=fp32, or values of a wider type"
        )


def _largest(values: NDArray[np.float32]) -> np.float32:
    """Return the largest magnitude, without a copy."""
    largest: np.float32 = np.maximum(values.max(), -values.min())
    return largest


def _choose_scales(low: Scales, high: Scales, bounds: tuple[np.float32, np.float32], spec: QuantSpec) -> Scales:
    """Return the scale of each block before it is rounded to its format."""
    if spec.normalization == "minmax":
        with np.errstate(over="ignore"):  # an infinite scale is refused when it is encoded
            return np.asarray((high - low) / (bounds[1] - bounds[0]), np.float32)
    if spec.normalization == "signed_absmax":
        return np.asarray(np.where(high >= -low, high, low), np.float32)
    largest = np.asarray(np.maximum(high, -low), np.float32)
    on_grid = spec.data_type in ("int", "float")
    scales = spec.scale_type.choose(largest, on_grid=on_grid)
    if spec.rounding == "nearest_even" and spec.scale_type.holds_only_powers and on_grid:
        # OCP's scale is smaller by the elements' largest exponent, and 2^-127 at least
        exponent = largest_exponent(spec.data_type, spec.bits, spec.exponent_bits) - 127
        scales = np.where(largest > 0, np.maximum(scales, np.float32(2.0**exponent)), scales)
    return scales


def _adaptive_sample(
    values: Values, scales: Scales, offsets: Scales, block_shape: tuple[int, int], spec: QuantSpec, backend: Backend
) -> NDArray[Any]:
    """Return what an adaptive codebook is fitted to, on the CPU.

    A quantile codebook needs 2^k + 2 numbers with the quantiles of the tensor, less its offsets, at i / (2^k + 1). They
    are exact on the CPU and estimated on a GPU. Scales with a sign turn values over, so that with them the quantiles
    are those of the normalised values. A learned codebook needs a sample of the normalised values
    (fitted_codebooks.sample_indices), which is the same on each device.
    """
    if spec.data_type == "quantile":
        has_signs = spec.normalization == "signed_absmax"
        if spec.centering or spec.normalization == "minmax" or has_signs:
            values = _normalize(values, scales if has_signs else np.ones_like(scales), offsets, block_shape)
        with torch_threads_kept():
            edges = find_quantiles(values, fitted_codebooks.quantile_positions(spec.bits), backend)
        return np.concatenate([edges[:1], edges, edges[-1:]])
    row, block_size = block_shape
    at = fitted_codebooks.sample_indices(values.numel(), spec.seed)
    blocks = find_blocks(at, row, block_size)
    shifted = values[torch.from_numpy(at).to(values.device)].float().cpu().numpy() - offsets[blocks]
    normalized: NDArray[np.float32] = np.zeros_like(shifted)
    np.divide(shifted, scales[blocks], out=normalized, where=scales[blocks] != 0)
    return normalized


def _normalize(values: Values, scales: Scales, offsets: Scales, block_shape: tuple[int, int]) -> Values:
    """Return (x - offset_b) / scale_b in float32, 0 where the scale is 0, in memory of its own."""
    row, block_size = block_shape
    rows = values.float().view(-1, row)

    def spread(of_blocks: Scales) -> torch.Tensor:
        of_rows = torch.from_numpy(of_blocks).to(values.device).view(rows.shape[0], -1)
        return of_rows.repeat_interleave(block_size, dim=1)[:, :row]

    divisors = spread(scales)
    return torch.where(divisors != 0, (rows - spread(offsets)) / divisors, 0).view(-1)


def _round_center(mean: float) -> NDArray[np.float16]:
    """Return a tensor's mean as it is stored."""
    if abs(mean) > float(np.finfo(np.float16).max):
        raise ValueError(f"centering stores the tensor's mean as float16: {mean:.6g} is beyond its 65504")
    return np.array([mean], np.float16)


def _mean(values: Values) -> float:
    """Return the mean, added up in float64 without a copy of the tensor."""
    return sum(float(chunk.sum(dtype=torch.float64)) for chunk in torch.split(values, _SUMMED)) / values.numel()
