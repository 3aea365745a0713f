"""A quantized tensor as bytes that go to another process: its codes, then its scales and offsets.

The receiver knows the shape, the dtype and the quantizer, so the bytes hold neither these nor the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kbit.layers.run_time.transient import check_transient, explain_refusal
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.quantizer import quantize
from kbit.numerics.spec import QuantSpec

Bytes = UInt8[Tensor, " bytes"]
_CENTER: dict[str, tuple[type[np.generic], int]] = {"center": (np.float16, 1)}


def check_sent(role: str, spec: QuantSpec | None, *, is_gradient: bool = False) -> QuantSpec | None:
    """Return the quantizer of values that are sent, or None of 16 bits, which are sent as float32.

    Raises:
        ValueError: see check_transient.
    """
    if spec is None or spec.is_baseline:
        return None
    check_transient(role, spec, is_gradient=is_gradient)
    return spec


def encode(values: Float[Tensor, "*shape"], spec: QuantSpec | None, where: str) -> Bytes:
    """Return a tensor as the bytes of its quantized form, or of its float32 values without a quantizer, on the CPU.

    Raises:
        FloatingPointError: a value is NaN or Inf. The message says where.
        ValueError: a block is beyond the scales' range.
    """
    values = values.detach().float().cpu()
    if spec is None:
        return values.contiguous().view(-1).view(torch.uint8)
    try:
        q = quantize(values, spec)
    except ValueError as error:
        raise explain_refusal(values, where, error) from error
    center = {"center": q.center} if spec.centering else {}
    parts = [q.codes, *(_in_order(group) for group in (q.scales, q.offsets, center))]
    return torch.cat(parts)


def decode(data: Bytes, shape: tuple[int, ...], spec: QuantSpec | None) -> Float[Tensor, "*shape"]:
    """Return the float32 tensor that encode made these bytes of."""
    if spec is None:
        return data.clone().view(torch.float32).view(shape)
    count, blocks = math.ceil(math.prod(shape) * spec.bits / 8), spec.count_blocks(shape)
    codes, data = data[:count], data[count:]
    scales, data = _take(data, spec.scale_type.list_arrays(blocks))
    has_offsets = spec.normalization == "minmax"
    offsets, data = _take(data, spec.offset_type.list_arrays(blocks) if has_offsets else {})
    center, _ = _take(data, _CENTER if spec.centering else {})
    q = QuantizedTensor(
        codes, scales, offsets, center.get("center", torch.empty(0, dtype=torch.float16)),
        torch.tensor(spec.make_codebook()), shape, torch.float32, spec,
    )  # fmt: skip
    return q.dequantize()


def count_sent_bytes(shape: tuple[int, ...], spec: QuantSpec | None) -> int:
    """Return the number of bytes that encode makes of a tensor of this shape."""
    if spec is None:
        return 4 * math.prod(shape)
    codes = math.ceil(math.prod(shape) * spec.bits / 8)
    return codes + math.ceil((spec.count_bits(shape) - spec.bits * math.prod(shape)) / 8)


def _in_order(arrays: Mapping[str, Tensor]) -> Bytes:
    parts = [arrays[name].contiguous().view(-1).view(torch.uint8) for name in sorted(arrays)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _take(data: Bytes, arrays: Mapping[str, tuple[type[np.generic], int]]) -> tuple[dict[str, Tensor], Bytes]:
    """Return the arrays that lie in order of their names at the start of the bytes, and the rest of the bytes."""
    found = {}
    for name in sorted(arrays):
        kind, length = arrays[name]
        size = np.dtype(kind).itemsize * length
        found[name] = torch.from_numpy(data[:size].numpy().copy().view(kind))
        data = data[size:]
    return found, data
