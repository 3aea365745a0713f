"""What the fused kernels take for a quantized matrix: its stored arrays, and how its scales are decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kbit.kernels import cpu_linear
from kbit.kernels.cpu_chunks import BFLOAT16, FLOAT16, FLOAT32
from kbit.kernels.cpu_linear import ABSENT, CODED, Blocks, Constants, Matrix
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.scale_formats import DQ_ZERO, DoubleScales, ScaleFormat
from kbit.numerics.spec import QuantSpec

_KINDS: Final = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}


def can_fuse(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether the fused kernels take such a matrix: rows and blocks are multiples of 16."""
    return len(shape) == 2 and math.prod(shape) > 0 and find_chunk(spec, shape) > 0


def find_chunk(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Return how many codes the kernels take at once, or 0."""
    _, block_size = spec.find_block_shape(shape)
    return cpu_linear.find_chunk(shape[-1], block_size)


def make_matrix(q: QuantizedTensor) -> Matrix:
    """Return a matrix for which can_fuse is true as the kernels of its device take it, in the same memory."""
    spec, (rows, columns) = q.spec, q.shape
    row, block_size = spec.find_block_shape(q.shape)
    codebook = np.full(256, q.codebook[-1].item(), np.float32)
    codebook[: len(q.codebook)] = q.codebook.cpu().numpy()
    least = -math.inf if spec.normalization == "signed_absmax" else 0.0
    scales = _describe(spec.scale_type, q.scales)._replace(least=least)
    offsets = _describe(spec.offset_type, q.offsets) if q.offsets else Constants(ABSENT, _view(q.codes[:0]))
    offsets = offsets._replace(added=float(q.center[0]) if len(q.center) else 0.0)
    per_row = math.ceil(columns / block_size) if row == columns else 0
    blocks, step = Blocks(columns, per_row, block_size), _find_step(codebook[: len(q.codebook)])
    return Matrix(_view(q.codes), spec.bits, codebook, scales, offsets, rows, blocks, step)


def _describe(scale_format: ScaleFormat, stored: Mapping[str, Tensor]) -> Constants:
    """Return how the kernels decode what a format stores. A format that they do not know is decoded here."""
    codes = stored.get("scales", torch.empty(0))
    if scale_format.name in _KINDS:
        return Constants(_KINDS[scale_format.name], _view(codes.view(torch.uint8)))
    others = {name: tensor.cpu().numpy() for name, tensor in stored.items() if name != "scales"}
    if (values := scale_format.list_values(others)) is not None:
        constants = Constants(CODED, _view(codes), values=values)
        if isinstance(scale_format, DoubleScales):
            second, mean = _view(stored["second_scales"]), float(others["mean"][0])
            return constants._replace(second=second, mean=mean, zero=DQ_ZERO)
        return constants
    numbers = scale_format.decode({name: tensor.cpu().numpy() for name, tensor in stored.items()})
    return Constants(FLOAT32, _view(torch.from_numpy(numbers).to(codes.device).view(torch.uint8)))


def _find_step(codebook: NDArray[np.float32]) -> float:
    """Return the distance of neighbours in a codebook whose values are as far apart to within rounding, else 0."""
    values = codebook.astype(np.float64)
    step = (values[-1] - values[0]) / max(1, len(values) - 1)
    line = values[0] + step * np.arange(len(values))
    return float(step) if np.abs(values - line).max() <= 2.0**-24 * np.abs(values).max() else 0.0


def _view(tensor: Tensor) -> Any:
    """Return a tensor as its device's kernels take it."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
