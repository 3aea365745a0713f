"""Quantize tensors: the public functions on torch tensors and NumPy arrays, and what they check at the door.

A tensor is quantized on its own device (kbit.numerics.backend): on the CPU, or on a GPU on torch's current stream. Both
give the same bits but for a quantile codebook of float32 values, which a GPU estimates (kbit.numerics.quantiles), and a
mean (spec.centering) that lies within float64's rounding of the middle between two float16 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.typing import NDArray

from kbit.numerics import fitted_codebooks
from kbit.numerics.backend import Backend, choose_backend, torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE, Codebook, decision_thresholds
from kbit.numerics.quantiles import find_quantiles
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.scale_formats import Scales, Stored, decode_scales, encode_scales
from kbit.numerics.spec import QuantSpec

ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[Any], torch.Tensor)


Elements = TypeVar("Elements", NDArray[np.int64], torch.Tensor)


Values = Float[torch.Tensor, " n"]  # contiguous float32, float16 or bfloat16


_SUMMED: Final = 2**20  # values of a sum in float64 at a time: torch makes a float64 copy of them


@dataclass(frozen=True, eq=False)
class Grid:
    """Everything that decides a tensor's codes: its blocks, and the scales and table used for them."""

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


def quantize(x: torch.Tensor | NDArray[Any], spec: QuantSpec) -> QuantizedTensor:
    """Quantize a tensor of any shape and of dtype float16, bfloat16, float32 or float64.

    A strided view gives what its contiguous copy gives, and x is not changed. Float64 is rounded to float32 first. The
    work is done on x's device; the result is on the CPU.

    Raises:
        TypeError: x is neither a tensor nor an array.
        ValueError: spec is the 16-bit baseline; x is empty, holds NaN or Inf (with the count), is a meta or sparse
            tensor, is not floating point, or has a block maximum beyond scale_format's range, or one that rounding the
            scale lifts beyond x's own dtype; its device is no CPU or CUDA GPU.
        ImportError: x is on a GPU and numba-cuda (the extra kbit[cuda]) is not installed.
    """
    tensor = _as_tensor(x)
    values = _flatten(tensor, spec)
    backend = choose_backend(values.device)
    grid = make_grid(values, tensor.shape, spec, backend)
    with torch_threads_kept():
        codes = backend.kernels.quantize(
            backend.view(values), backend.put(grid.scales), backend.put(grid.offsets), grid.codebook, grid.thresholds,
            grid.row, grid.block_size, grid.seed, spec.bits,
        )  # fmt: skip
        packed = backend.get(codes)
    shape = tuple(tensor.shape)
    return QuantizedTensor(
        packed, grid.stored_scales, grid.stored_offsets, grid.center, grid.codebook, shape, tensor.dtype, spec
    )


def dequantize(q: QuantizedTensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return codebook[code] * scale + offset, computed in float32 and cast to the original dtype and shape.

    Args:
        q: from quantize or QuantizedTensor.load.
        device: where to compute the result, which stays there: cpu, cuda or cuda:N. See quantize for the errors.
    """
    backend = choose_backend(torch.device(device))
    row, block_size = _block_shape(q.shape, q.spec)
    scales = decode_block_scales(q.scales, q.spec)
    offsets = _add_center(decode_scales(q.offsets, q.spec.offset_format) if q.offsets else None, q.center, scales)
    result = backend.allocate(q.shape, _computed_dtype(q.dtype))
    with torch_threads_kept():
        backend.kernels.dequantize(
            backend.put(q.codes), backend.put(scales), backend.put(offsets), q.codebook, row, block_size,
            backend.view(result.view(-1)), q.spec.bits,
        )  # fmt: skip
    return result.to(q.dtype)


def fake_quantize(x: ArrayOrTensor, spec: QuantSpec) -> ArrayOrTensor:
    """Return dequantize(quantize(x, spec)) without storing codes: what the model computes with after quantization.

    Same kind, dtype, shape and device as x; see quantize for the conditions.
    """
    tensor = _as_tensor(x)
    values = _flatten(tensor, spec)
    result = choose_backend(tensor.device).allocate(tensor.shape, values.dtype)
    _fake_quantize_into(result, values, spec)
    if isinstance(x, np.ndarray):
        return result.numpy().astype(x.dtype, copy=False)
    return result.to(x.dtype)


def fake_quantize_(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Replace x by fake_quantize(x, spec) and return it; a contiguous x on the CPU needs no memory of its size.

    Autograd does not see it, so that x may be a parameter.
    """
    # on a GPU the fused kernel is worth a copy: it must not be in place, as it may refuse a block half-way
    if x.is_contiguous() and x.dtype == _computed_dtype(x.dtype) and x.device.type == "cpu":
        _fake_quantize_into(x.detach(), _flatten(x, spec), spec)
    else:
        x.detach().copy_(fake_quantize(x, spec))
    return x


def _fake_quantize_into(result: torch.Tensor, values: Values, spec: QuantSpec) -> None:
    """Fill result, whose memory may be that of the values on the CPU."""
    backend = choose_backend(values.device)
    if _is_fused(spec, values.dtype, backend) and _fake_quantize_fused(values, spec, backend, result):
        return
    grid = make_grid(values, result.shape, spec, backend)
    with torch_threads_kept():
        backend.kernels.fake_quantize(
            backend.view(values), backend.put(grid.scales), backend.put(grid.offsets), grid.codebook,
            grid.thresholds, grid.row, grid.block_size, grid.seed, backend.view(result.view(-1)),
        )  # fmt: skip


def _is_fused(spec: QuantSpec, dtype: torch.dtype, backend: Backend) -> bool:
    """Whether one kernel finds the scales and quantizes: it reads and writes each weight once."""
    return (
        backend.is_gpu
        and spec.normalization == "absmax"
        and spec.scale_format in backend.kernels.FUSED_SCALE_FORMATS
        and (dtype != torch.float16 or spec.scale_format in ("fp16", "fp32"))  # others may be rounded up beyond float16
        and spec.rounding != "stochastic"
        and spec.data_type not in ADAPTIVE
        and not spec.centering
    )


def _fake_quantize_fused(values: Values, spec: QuantSpec, backend: Backend, result: torch.Tensor) -> bool:
    """Fill result, not in place; False if a block holds NaN or Inf or a maximum beyond the scale's format."""
    codebook, refused = spec.make_codebook(), backend.put(np.zeros(1, np.uint8))
    backend.kernels.fake_quantize_absmax(
        backend.view(values), codebook, decision_thresholds(codebook, spec.rounding),
        *_block_shape(result.shape, spec), spec.scale_format, backend.view(result.view(-1)), refused,
    )  # fmt: skip
    return not backend.get(refused)[0]


def make_grid(values: Values, shape: torch.Size, spec: QuantSpec, backend: Backend) -> Grid:
    """Choose and round the scales and offsets, and make the codebook."""
    row, block_size = _block_shape(shape, spec)
    with torch_threads_kept():
        extremes = backend.kernels.block_extremes(backend.view(values), row, block_size)
    low, high = map(backend.get, extremes)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"{int((~values.isfinite()).sum())} of {values.numel()} values are NaN or Inf")
    center = np.empty(0, np.float16)
    if spec.centering:
        center = _round_center(_mean(values))
        low, high = low - center.astype(np.float32), high - center.astype(np.float32)
    adaptive = spec.data_type in ADAPTIVE
    codebook = None if adaptive else spec.make_codebook()
    bounds = (np.float32(-1), np.float32(1)) if codebook is None else (codebook[0], codebook[-1])
    stored_scales = encode_scales(_choose_scales(low, high, bounds, spec), spec.scale_format)
    scales = decode_block_scales(stored_scales, spec)
    stored_offsets: Stored = {}
    if spec.normalization == "minmax":
        stored_offsets = encode_scales(low - bounds[0] * scales, spec.offset_format, "block offset")
    offsets = decode_scales(stored_offsets, spec.offset_format) if stored_offsets else None
    offsets = _add_center(offsets, center, scales)
    if codebook is None:
        codebook = spec.make_codebook(_adaptive_sample(values, scales, offsets, (row, block_size), spec, backend))
    _check_reach(codebook, scales, offsets, values.dtype, spec)
    stochastic = spec.rounding == "stochastic"
    thresholds = decision_thresholds(codebook, "floor" if stochastic else spec.rounding)
    seed = spec.seed if stochastic else None
    return Grid(row, block_size, scales, offsets, stored_scales, stored_offsets, center, codebook, thresholds, seed)


def _check_reach(codebook: Codebook, scales: Scales, offsets: Scales, dtype: torch.dtype, spec: QuantSpec) -> None:
    """Raise ValueError if a finite tensor could become infinite: a scale was rounded up beyond what its dtype holds."""
    peak, most = np.float64(_largest(codebook)), np.float64(torch.finfo(dtype).max)
    if _largest(scales) * peak + _largest(offsets) <= most:  # of different blocks: a bound
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
    if spec.scale_format != "e8m0":
        return largest
    # MX and BFP share the exponent of the largest number (floor). A table that does not lie on a grid of powers of two
    # would be clipped by up to a half: its scale is the next power of two above.
    fractions, exponents = np.frexp(largest)
    on_grid = spec.data_type in ("int", "float")
    exponents = np.where((fractions == 0.5) | on_grid, exponents - 1, exponents)
    powers = np.ldexp(np.float32(1), np.clip(exponents, -126, 127))
    return np.asarray(np.where(largest > 0, powers, np.float32(0)), np.float32)


def decode_block_scales(stored: Stored, spec: QuantSpec) -> Scales:
    """Return the scales; without a sign the double-quantized scale of a zero block that lands below zero is 0."""
    scales = decode_scales(stored, spec.scale_format)
    return scales if spec.normalization == "signed_absmax" else np.maximum(scales, np.float32(0))


def _add_center(offsets: Scales | None, center: NDArray[np.float16], scales: Scales) -> Scales:
    """Return the offset of each block: the block's own plus the tensor's mean."""
    total = np.zeros_like(scales) if offsets is None else offsets
    return total + center.astype(np.float32) if center.size else total


def _adaptive_sample(
    values: Values, scales: Scales, offsets: Scales, block_shape: tuple[int, int], spec: QuantSpec, backend: Backend
) -> NDArray[Any]:
    """Return what an adaptive codebook is fitted to, on the CPU.

    quantile: 2^k + 2 numbers with the quantiles of the tensor, less its offsets, at i / (2^k + 1); exact on the CPU and
    estimated on a GPU.
    learned: a sample of the normalised values (fitted_codebooks.sample_indices), the same on each device.
    """
    if spec.data_type == "quantile":
        if spec.centering or spec.normalization == "minmax":
            values = _subtract_offsets(values, offsets, block_shape)
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


def _subtract_offsets(values: Values, offsets: Scales, block_shape: tuple[int, int]) -> Values:
    """Return x - offset_b in float32, in memory of its own."""
    row, block_size = block_shape
    rows = values.float().view(-1, row)
    of_rows = torch.from_numpy(offsets).to(values.device).view(rows.shape[0], -1)
    per_value = of_rows.repeat_interleave(block_size, dim=1)[:, :row]
    return (rows - per_value).view(-1)


def _round_center(mean: float) -> NDArray[np.float16]:
    """Return a tensor's mean as it is stored."""
    if abs(mean) > float(np.finfo(np.float16).max):
        raise ValueError(f"centering stores the tensor's mean as float16: {mean:.6g} is beyond its 65504")
    return np.array([mean], np.float16)


def _mean(values: Values) -> float:
    """Return the mean, added up in float64 without a copy of the tensor."""
    return sum(float(chunk.sum(dtype=torch.float64)) for chunk in torch.split(values, _SUMMED)) / values.numel()


def _block_shape(shape: torch.Size | tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Return the elements of a row (the whole tensor if layout=flat) and of a block, which is at most a row."""
    elements = int(np.prod(shape))
    row = shape[-1] if spec.layout == "row" and len(shape) else elements
    return row, min(spec.block_size or row, row)


def find_blocks(elements: Elements, row: int, block_size: int) -> Elements:
    """Return the block of each element, given by its place in the flat tensor."""
    return elements // row * -(-row // block_size) + elements % row // block_size


def _as_tensor(x: torch.Tensor | NDArray[Any]) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise TypeError(f"a {type(x).__name__} is neither a torch tensor nor a NumPy array")
    # torch refuses negative strides, and warns of read-only arrays though nothing here writes to them
    return torch.from_numpy(np.array(x, order="C", copy=True))


def _flatten(x: torch.Tensor, spec: QuantSpec) -> Values:
    """Return x flat and contiguous, in its own dtype (float64 as float32) and on its own device, checked."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"a {type(spec).__name__} is no QuantSpec")
    if spec.is_baseline:
        raise ValueError(f"bits={spec.bits} is the unquantized baseline: there is nothing to quantize")
    if x.is_meta:
        raise ValueError("a meta tensor holds no values: load the weights before quantizing")
    if not x.is_floating_point():
        raise ValueError(f"dtype {x.dtype} is not a floating-point type")
    if x.layout != torch.strided:
        raise ValueError(f"a tensor of layout {x.layout} is not dense: quantize x.to_dense()")
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no elements to quantize")
    values = x.detach().contiguous().view(-1)
    if x.dtype == torch.float64 and bool((values.isfinite() & (values.abs() > torch.finfo(torch.float32).max)).any()):
        raise ValueError("a float64 tensor is rounded to float32, and holds values beyond 3.40282e+38")
    return values.to(_computed_dtype(x.dtype))


def _computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the kernels read and write for a tensor of this dtype."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
