"""What the fused kernels take for a quantized matrix: its stored arrays, and how its scales are decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kbit.kernels import cpu_linear
from kbit.kernels.cpu_chunks import BFLOAT16, FLOAT16, FLOAT32
from kbit.kernels.cpu_linear import ABSENT, CODED, Blocks, Constants, Matrix
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.scale_formats import DoubleScales, Float8Scales, PowerScales, ScaleFormat
from kbit.numerics.spec import QuantSpec

_KINDS: Final = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
_DOUBLE_ZERO: Final = 126  # kbit.numerics.scale_formats: the code that stands for 0 where the block's float32 says so

Stored = Mapping[str, NDArray[Any]]


def can_fuse(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether the fused kernels take such a matrix: rows and blocks are multiples of 16."""
    return len(shape) == 2 and math.prod(shape) > 0 and find_chunk(spec, shape) > 0


def find_chunk(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Return how many codes the kernels take at once, or 0."""
    _, block_size = spec.find_block_shape(shape)
    return cpu_linear.find_chunk(shape[-1], block_size)


def make_matrix(q: QuantizedTensor) -> Matrix:
    """Return a quantized matrix, for which can_fuse is true, as the fused kernels take it, in the same memory."""
    spec, (rows, columns) = q.spec, q.shape
    row, block_size = spec.find_block_shape(q.shape)
    codebook = np.full(256, q.codebook[-1].item(), np.float32)
    codebook[: len(q.codebook)] = q.codebook.numpy()
    least = -math.inf if spec.normalization == "signed_absmax" else 0.0
    scales = _describe(spec.scale_type, {name: t.numpy() for name, t in q.scales.items()})._replace(least=least)
    offsets = Constants(ABSENT, np.empty(0, np.uint8))
    if q.offsets:
        offsets = _describe(spec.offset_type, {name: t.numpy() for name, t in q.offsets.items()})
    offsets = offsets._replace(added=float(q.center[0]) if len(q.center) else 0.0)
    per_row = math.ceil(columns / block_size) if row == columns else 0
    return Matrix(q.codes.numpy(), spec.bits, codebook, scales, offsets, rows, Blocks(columns, per_row, block_size))


def _describe(scale_format: ScaleFormat, stored: Stored) -> Constants:
    """Return how the kernels decode what a format stores. A format that they do not know is decoded here."""
    if scale_format.name in _KINDS:
        return Constants(_KINDS[scale_format.name], _as_bytes(stored["scales"]))
    if isinstance(scale_format, PowerScales | Float8Scales):
        return Constants(CODED, stored["scales"], values=_list_values(scale_format, stored))
    if isinstance(scale_format, DoubleScales):
        one = {"second_scales": np.ones(1, np.float32), "mean": np.zeros(1, np.float32)}
        values, mean = _list_values(scale_format, one), float(stored["mean"][0])
        second = stored["second_scales"]
        return Constants(CODED, stored["scales"], values=values, second=second, mean=mean, zero=_DOUBLE_ZERO)
    return Constants(FLOAT32, _as_bytes(scale_format.decode(stored)))


def _list_values(scale_format: ScaleFormat, others: Stored) -> NDArray[np.float32]:
    """Return what each byte of `scales` stands for. A byte that is no number in the format stands for 0."""
    codes = np.arange(256, dtype=np.uint8)
    if isinstance(scale_format, Float8Scales):
        codes[[0x7F, 0xFF]] = 0
    elif isinstance(scale_format, PowerScales):
        codes[0xFF] = 0
    values: NDArray[np.float32] = scale_format.decode({**others, "scales": codes})
    return values


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)
