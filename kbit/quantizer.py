"""Quantize tensors: the public functions on torch tensors and NumPy arrays, and what they check at the door."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray

from kbit.datatypes import Codebook, decision_thresholds
from kbit.kernels import cpu
from kbit.spec import QuantSpec

ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[Any], torch.Tensor)

FP16_MAX = 65504.0  # the largest float16


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor: x ~ codebook[codes] * scales, per block of the flattened tensor.

    Attributes:
        codes: uint8 [n], an index into the codebook for each element in row-major order.
        scales: float32 [blocks], already rounded to spec.scale_format.
        codebook: float32 [values], sorted.
        shape: of the original tensor.
        dtype: of the original tensor; dequantize returns it.
        spec: how it was quantized.
    """

    codes: UInt8[np.ndarray, " n"]
    scales: Float32[np.ndarray, " blocks"]
    codebook: Codebook
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec


def quantize(x: torch.Tensor | NDArray[Any], spec: QuantSpec) -> QuantizedTensor:
    """Quantize a tensor of any shape and of dtype float16, bfloat16, float32 or float64.

    A strided view gives what its contiguous copy gives, and x is not changed. Float64 is rounded to float32 first.

    Raises:
        ValueError: spec is the 16-bit baseline; x is empty, holds NaN or Inf (with the count), is a meta tensor, is
            not floating point, or has a block maximum beyond scale_format's range.
    """
    tensor = _as_tensor(x)
    values = _flatten(tensor, spec)
    codebook = spec.make_codebook(values)
    thresholds = decision_thresholds(codebook)
    with torch_threads_kept():
        codes, scales = cpu.quantize(values, thresholds, _block_size(values, spec), spec.scale_format)
    return QuantizedTensor(codes, scales, codebook, tuple(tensor.shape), tensor.dtype, spec)


def dequantize(q: QuantizedTensor) -> torch.Tensor:
    """Return codebook[code] * scale, computed in float32 and cast to the original dtype, in the original shape."""
    block_size = q.spec.block_size or q.codes.size
    with torch_threads_kept():
        values = cpu.dequantize(q.codes, q.scales, q.codebook, block_size)
    return torch.from_numpy(values).to(q.dtype).reshape(q.shape)


def fake_quantize(x: ArrayOrTensor, spec: QuantSpec) -> ArrayOrTensor:
    """Return dequantize(quantize(x, spec)) without storing codes: what the model computes with after quantization.

    Same kind, dtype and shape as x; see quantize for the conditions.
    """
    tensor = _as_tensor(x)
    values = _flatten(tensor, spec)
    codebook = spec.make_codebook(values)
    thresholds = decision_thresholds(codebook)
    with torch_threads_kept():
        result = cpu.fake_quantize(values, codebook, thresholds, _block_size(values, spec), spec.scale_format)
    if isinstance(x, np.ndarray):
        return result.astype(x.dtype, copy=False).reshape(x.shape)
    return torch.from_numpy(result).to(device=x.device, dtype=x.dtype).reshape(x.shape)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Run numba kernels on as many threads as torch uses, and leave torch's number as it was.

    Both use the same OpenMP runtime, and numba sets its thread count there at each launch: without this a model would
    compute on other threads after its first quantization than before, and sums differ in the last digits.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def check_scale_range(largest: float, spec: QuantSpec) -> None:
    """Raise ValueError if a block whose max |x| is `largest` has a scale beyond scale_format's range."""
    if spec.scale_format == "fp16" and largest > FP16_MAX:
        raise ValueError(
            f"max |x| = {largest:.6g} is beyond scale_format=fp16 (largest {FP16_MAX:g}): use scale_format=bf16 or fp32"
        )


def _as_tensor(x: torch.Tensor | NDArray[Any]) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    # torch refuses negative strides, and warns of read-only arrays though nothing here writes to them
    return torch.from_numpy(np.array(x, order="C", copy=True))


def _flatten(x: torch.Tensor, spec: QuantSpec) -> Float32[np.ndarray, " n"]:
    """Return x as a flat, contiguous float32 array on the CPU, checked."""
    if spec.is_baseline:
        raise ValueError(f"bits={spec.bits} is the unquantized baseline: there is nothing to quantize")
    if x.is_meta:
        raise ValueError("a meta tensor holds no values: load the weights before quantizing")
    if not x.is_floating_point():
        raise ValueError(f"dtype {x.dtype} is not a floating-point type")
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no elements to quantize")
    values = x.detach().to("cpu", torch.float32).contiguous().view(-1).numpy()
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"{values.size - int(finite.sum())} of {values.size} values are NaN or Inf")
    check_scale_range(float(np.abs(values).max()), spec)
    return values


def _block_size(values: Float32[np.ndarray, " n"], spec: QuantSpec) -> int:
    """Elements per block; a block size beyond the tensor is the whole tensor."""
    return min(spec.block_size or values.size, values.size)
