"""compressed-tensors' pack-quantized matrices, which vLLM loads: integers with a float16 scale for each group.

weight_packed       int32 [out, in bits / 32], the integers plus 2^(bits-1), packed along the inputs
weight_scale        [out, groups]
weight_shape        int64 [2]
weight_zero_point   int32 [out bits / 32, groups], of asymmetric matrices
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kbit.checkpoints.formats.integers import (
    GRID_ADVICE,
    Integers,
    as_integers,
    check_order,
    from_integers,
    pack_words,
    read_scales,
    require_bits,
    unpack_words,
)
from kbit.checkpoints.formats.plain import require_same
from kbit.numerics.quantized_tensor import QuantizedTensor

NAME: Final = "compressed-tensors"
BITS: Final = (4, 8)  # those of its pack-quantized layers in vLLM


def write(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors that compressed-tensors stores for a quantized matrix, by what follows the layer's name.

    Raises:
        NotExactError: see as_integers. Or the bits are none that the format has.
    """
    require_bits(tensor, NAME, BITS)
    integers = as_integers(tensor, NAME, GRID_ADVICE)
    half = 2 ** (integers.bits - 1)
    parts = {
        "weight_packed": torch.from_numpy(pack_words(integers.levels + half, integers.bits)),
        "weight_scale": torch.from_numpy(integers.scales),
        "weight_shape": torch.tensor(tensor.shape),
    }
    require_same(tensor, read(parts, integers.bits, tensor.dtype), NAME)
    return parts


def read(parts: Mapping[str, Tensor], bits: int, dtype: torch.dtype) -> QuantizedTensor:
    """Return the quantized matrix of compressed-tensors' parts.

    Args:
        parts: weight_packed, weight_scale, weight_shape, and weight_zero_point and weight_g_idx if there are any.
        bits: bits of an integer.
        dtype: the dtype of the decoded weights.

    Raises:
        ValueError: a part is missing or has not the shape that weight_shape asks for, a scale is no float16 number, or
            inputs of one group do not lie together.
    """
    if missing := {"weight_packed", "weight_scale", "weight_shape"} - parts.keys():
        raise ValueError(f"a compressed-tensors matrix lacks {', '.join(sorted(missing))}")
    out, inputs = (int(size) for size in parts["weight_shape"])
    scales = read_scales(parts["weight_scale"], "weight_scale")
    levels = unpack_words(parts["weight_packed"], bits, inputs)
    half = 2 ** (bits - 1)
    if levels.shape[0] != out or scales.ndim != 2 or scales.shape[0] != out or inputs % scales.shape[1]:
        raise ValueError(
            f"codes {list(levels.shape)} and scales {list(scales.shape)} are of no matrix [{out}, {inputs}]"
        )
    check_order(parts.get("weight_g_idx"), "weight_g_idx", inputs, scales.shape[1])
    zeros = None
    if (stored := parts.get("weight_zero_point")) is not None:
        zeros = unpack_words(stored.t().contiguous(), bits, out).T - half
    return from_integers(Integers(bits, levels - np.int16(half), scales.numpy()), dtype, zeros)
