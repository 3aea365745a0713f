"""Quantize tensors: the public functions on torch tensors and NumPy arrays, and what they check at the door.

A tensor is quantized on its own device, on the CPU or on a GPU on torch's current stream (kbit.numerics.grid says where
the two may differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.numerics.backend import Backend, choose_backend, torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE, Codebook
from kbit.numerics.data_types import make_codebook
from kbit.numerics.grid import Values, make_grid
from kbit.numerics.quantized_tensor import QuantizedTensor, combine, find_computed_dtype
from kbit.numerics.spec import QuantSpec

ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[Any], torch.Tensor)


def quantize(x: torch.Tensor | NDArray[Any], spec: QuantSpec) -> QuantizedTensor:
    """Quantize a tensor of any shape and of dtype float16, bfloat16, float32 or float64.

    A strided view gives what its contiguous copy gives, and x is not changed. Float64 is rounded to float32 first. The
    work is done on x's device, where the result stays.

    Raises:
        TypeError: x is neither a tensor nor an array.
        ValueError: spec is the 16-bit baseline. Or x is empty, holds NaN or Inf (with the count), is a meta or sparse
            tensor, is not floating point, or has a block maximum beyond scale_format's range, or one that rounding the
            scale lifts beyond x's own dtype. Or its device is no CPU or CUDA GPU.
        ImportError: x is on a GPU and numba-cuda (the extra kbit[cuda]) is not installed.
    """
    tensor = _as_tensor(x)
    values = _flatten(tensor, spec)
    backend = choose_backend(values.device)
    grid = make_grid(values, tensor.shape, spec, backend)
    with torch_threads_kept():
        codes = backend.kernels.quantize(*grid.list_arguments(values, backend))
    return combine(codes, grid, tensor.shape, tensor.dtype, backend)


def dequantize(q: QuantizedTensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Return what the codes stand for, computed in float32 and cast to the original dtype and shape.

    Args:
        q: the quantized tensor, from quantize, quantize_model or QuantizedTensor.load.
        device: the device that computes and holds the result (cpu, cuda or cuda:N). None is the device of q. See
            quantize for the errors.
    """
    return q.dequantize(device)


def fake_quantize(x: ArrayOrTensor, spec: QuantSpec) -> ArrayOrTensor:
    """Return dequantize(quantize(x, spec)) without storing codes: what the model computes with after quantization.

    The result has the kind, dtype, shape and device of x, and no gradient goes through it. See quantize for the
    conditions.
    """
    tensor = _as_tensor(x)
    values = _flatten(tensor, spec)
    result = choose_backend(tensor.device).allocate(tensor.shape, values.dtype)
    _fake_quantize_into(result, values, spec)
    if isinstance(x, np.ndarray):
        return result.numpy().astype(x.dtype, copy=False)
    return result.to(x.dtype)


def fake_quantize_(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Replace x by fake_quantize(x, spec) and return it.

    A contiguous x on the CPU needs no memory of its size. No gradient goes through the change, so x may be a parameter.
    A backward pass that still needs the values before is refused by autograd.
    """
    # on a GPU the fused kernel is worth a copy: it must not be in place, as it may refuse a block half-way
    if x.is_contiguous() and x.dtype == find_computed_dtype(x.dtype) and x.device.type == "cpu":
        _fake_quantize_into(x.detach(), _flatten(x, spec), spec)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
    else:
        x.detach().copy_(fake_quantize(x, spec))
    return x


def codebook(
    data_type: str,
    bits: int,
    *,
    exponent_bits: int | None = None,
    float_bias: str = "ieee",
    block_size: int | None = None,
    table: Sequence[float] | None = None,
    tensor: torch.Tensor | NDArray[Any] | None = None,
    seed: int = 0,
    signed: bool = True,
    zero: bool = True,
) -> Codebook:
    """Return the codebook of a data type: sorted float32 values within [-1, 1], which is public as kbit.codebook.

    Args:
        data_type: int, float, dynamic, quantile, nf, af, learned, table, or a registered one.
        bits: bits of a code, 2..8.
        exponent_bits: exponent bits of float, 1..bits-1. None is the paper's choice (PAPER_EXPONENT_BITS).
        float_bias: where the subnormals of float lie: ieee, bnb or paper. See make_codebook.
        block_size: the block size that the code of af is optimal for, and that the tensor of a learned one is
            normalised with. None makes the whole tensor one block.
        table: the user's values, for data type table.
        tensor: the tensor that a quantile or learned codebook is fitted to. It is normalised here, as quantize does, so
            that the codebook is that of quantize(tensor, QuantSpec(bits, data_type, block_size)).
        seed: seed of the sample that k-means sees, for learned.
        signed, zero: whether there are values below 0, and whether 0 is one. See QuantSpec.

    Raises:
        TypeError, ValueError: as make_codebook and quantize.
    """
    if data_type in ADAPTIVE and tensor is not None:
        spec = QuantSpec(bits=bits, data_type=data_type, block_size=block_size, seed=seed, signed=signed, zero=zero)
        values = _flatten(_as_tensor(tensor), spec)
        return make_grid(values, torch.Size(tensor.shape), spec, choose_backend(values.device)).codebook
    return make_codebook(
        data_type, bits, exponent_bits=exponent_bits, float_bias=float_bias, block_size=block_size, table=table,
        tensor=tensor, seed=seed, signed=signed, zero=zero,
    )  # fmt: skip


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
        and (dtype != torch.float16 or spec.scale_type.holds_float16)  # others may be rounded up beyond float16
        and spec.rounding != "stochastic"
        and spec.data_type not in ADAPTIVE
        and not spec.centering
    )


def _fake_quantize_fused(values: Values, spec: QuantSpec, backend: Backend, result: torch.Tensor) -> bool:
    """Fill result, not in place. Return False if a block holds NaN, Inf or a maximum beyond the scale's format."""
    codebook, refused = spec.make_codebook(), backend.put(np.zeros(1, np.uint8))
    backend.kernels.fake_quantize_absmax(
        backend.view(values), codebook, spec.make_thresholds(codebook),
        *spec.find_block_shape(result.shape), spec.scale_format, backend.view(result.view(-1)), refused,
    )  # fmt: skip
    return not backend.get(refused)[0]


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
    return values.to(find_computed_dtype(x.dtype))
