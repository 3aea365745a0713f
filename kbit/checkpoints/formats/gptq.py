"""GPTQ's layout, which AutoGPTQ, GPTQModel and vLLM load: integers with a float16 scale and a zero for each group.

qweight   int32 [in bits / 32, out], packed along the inputs
qzeros    int32 [groups, out bits / 32], the zeros minus 1
scales    float16 [groups, out]
g_idx     int32 [in], the group of each input

weight[o, i] = (q[i, o] - zero[g, o]) scales[g, o],  g = g_idx[i]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kbit.checkpoints.formats.integers import (
    GRID_ADVICE,
    WORD_BITS,
    Integers,
    as_integers,
    check_order,
    from_integers,
    pack_words,
    read_scales,
    require_bits,
    unpack_words,
)
from kbit.checkpoints.formats.plain import NotExactError, require_same
from kbit.numerics.quantized_tensor import QuantizedTensor

NAME: Final = "gptq"
BITS: Final = (2, 3, 4, 8)  # those that its tools have kernels for


def write(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors that GPTQ's tools store for a quantized matrix, by what follows the layer's name.

    Raises:
        NotExactError: see as_integers. Or the bits or the shape are none that the layout has.
    """
    require_bits(tensor, NAME, BITS)
    integers = as_integers(tensor, NAME, GRID_ADVICE)
    out, inputs = integers.levels.shape
    if out * integers.bits % WORD_BITS or inputs * integers.bits % WORD_BITS:
        raise NotExactError(
            f"{NAME} packs whole words of 32 bits: a matrix [{out}, {inputs}] of {integers.bits}-bit integers does not "
            "fill them; leave it at 16 bits by quant.exclude"
        )
    half = 2 ** (integers.bits - 1)
    zeros = np.full((integers.scales.shape[1], out), half - 1)  # minus 1, as the first GPTQ kernels stored it
    parts = {
        "qweight": torch.from_numpy(pack_words(integers.levels + half, integers.bits).T.copy()),
        "qzeros": torch.from_numpy(pack_words(zeros, integers.bits)),
        "scales": torch.from_numpy(integers.scales.T.copy()),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // integers.block,
    }
    require_same(tensor, read(parts, integers.bits, tensor.dtype), NAME)
    return parts


def read(
    parts: Mapping[str, Tensor], bits: int, dtype: torch.dtype, *, zeros_minus_one: bool = True
) -> QuantizedTensor:
    """Return the quantized matrix of GPTQ's tensors.

    Args:
        parts: qweight, qzeros, scales, and g_idx if there is one.
        bits: bits of an integer.
        dtype: the dtype of the decoded weights.
        zeros_minus_one: whether stored zeros are one less than the zeros (checkpoint_format=gptq, not gptq_v2).

    Raises:
        ValueError: a part has not the shape that the others ask for, or inputs of one group do not lie together, or a
            scale is no float16 number.
    """
    if missing := {"qweight", "qzeros", "scales"} - parts.keys():
        raise ValueError(f"a GPTQ matrix lacks {', '.join(sorted(missing))}")
    scales = read_scales(parts["scales"], "scales").t().contiguous().numpy()
    (out, groups), inputs = scales.shape, parts["qweight"].shape[0] * WORD_BITS // bits
    if inputs % groups:
        raise ValueError(f"{groups} groups of scales do not divide {inputs} inputs")
    check_order(parts.get("g_idx"), "g_idx", inputs, groups)
    levels = unpack_words(parts["qweight"].t().contiguous(), bits, inputs)
    zeros = unpack_words(parts["qzeros"], bits, out).T + int(zeros_minus_one)
    half = 2 ** (bits - 1)
    if levels.shape[0] != out or zeros.shape[1] != groups:
        raise ValueError(
            f"qweight has {levels.shape[0]} outputs and qzeros {zeros.shape[1]} groups, not {out}, {groups}"
        )
    return from_integers(Integers(bits, levels - np.int16(half), scales), dtype, zeros - half)
