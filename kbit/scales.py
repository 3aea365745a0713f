"""Block scales: what each format stores, what it decodes to, and how many bits it takes.

Rounding a scale is decoding what was stored, so that the scale used to quantize is the one that a reader of the file
gets. All functions work on one float32 per block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray

from kbit.datatypes import decision_thresholds, dynamic_codebook

Scales = Float32[np.ndarray, " blocks"]
Stored = dict[str, NDArray[Any]]

SCALE_FORMATS: Final = ("fp16", "fp32", "bf16", "e8m0", "fp8", "dq8")

# Smallest positive value of each floating-point format: a scale below it is stored as it, never as 0.
_SMALLEST: Final = {"fp16": 2.0**-24, "bf16": 2.0**-133, "fp32": 2.0**-149, "fp8": 2.0**-9}
_LARGEST: Final = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": 3.4028234663852886e38}
_FP8_MAX: Final = 448.0  # the largest E4M3 number
_DQ_BLOCK: Final = 256  # scales per block of the second quantization (QLoRA, section 3)
_E8M0_BIAS: Final = 127


def encode_scales(scales: Scales, scale_format: str) -> Stored:
    """Return the arrays that the format stores for these scales.

    fp16, bf16, fp32: a number each. e8m0: the exponent of a power of two (the scales must be powers of two or 0; 0 is
    stored as the smallest). fp8: E4M3 numbers and one float32 for the tensor, max |scale| / 448 (NVFP4). dq8: 8-bit
    dynamic codes in blocks of 256 with a float32 each, after subtracting the mean, one float32 (QLoRA).

    Raises:
        ValueError: a scale beyond the format's range.
    """
    if scale_format in _LARGEST and (largest := float(np.abs(scales).max())) > _LARGEST[scale_format]:
        raise ValueError(
            f"a block scale of {largest:.6g} is beyond scale_format={scale_format} (largest "
            f"{_LARGEST[scale_format]:g}): use scale_format=bf16 or fp32"
        )
    match scale_format:
        case "fp16":
            return {"scales": _keep_nonzero(scales, scales.astype(np.float16), scale_format).astype(np.float16)}
        case "bf16":
            rounded = _keep_nonzero(scales, _cast(scales, torch.bfloat16), scale_format)
            return {"scales": (rounded.view(np.uint32) >> 16).astype(np.uint16)}
        case "fp32":
            return {"scales": scales}
        case "e8m0":
            exponents = np.frexp(scales)[1] - 1  # 0 gives -1: such a block's codes are all 0 whatever the scale
            return {"scales": (np.clip(exponents, -127, 127) + _E8M0_BIAS).astype(np.uint8)}
        case "fp8":
            tensor_scale = np.float32(np.abs(scales).max() / _FP8_MAX) or np.float32(1)
            relative = _keep_nonzero(scales, _cast(scales / tensor_scale, torch.float8_e4m3fn), scale_format)
            codes = torch.from_numpy(relative).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            return {"scales": codes, "tensor_scale": np.array([tensor_scale], np.float32)}
        case _:
            return _encode_double(scales)


def decode_scales(stored: Mapping[str, NDArray[Any]], scale_format: str) -> Scales:
    """Return the scales that the stored arrays stand for."""
    codes = stored["scales"]
    match scale_format:
        case "fp16" | "fp32":
            return codes.astype(np.float32)
        case "bf16":
            return (codes.astype(np.uint32) << 16).view(np.float32)
        case "e8m0":
            return np.ldexp(np.float32(1), codes.astype(np.int32) - _E8M0_BIAS).astype(np.float32)
        case "fp8":
            relative = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
            return np.asarray(relative * stored["tensor_scale"][0], np.float32)
        case _:
            second = np.repeat(stored["second_scales"], _DQ_BLOCK)[: codes.size]
            return np.asarray(dynamic_codebook(8)[codes] * second + stored["mean"][0], np.float32)


def count_scale_bits(blocks: int, scale_format: str) -> int:
    """Return the bits that encode_scales' arrays take."""
    match scale_format:
        case "fp16" | "bf16":
            return 16 * blocks
        case "fp32":
            return 32 * blocks
        case "e8m0":
            return 8 * blocks
        case "fp8":
            return 8 * blocks + 32
        case _:
            return 8 * blocks + 32 * math.ceil(blocks / _DQ_BLOCK) + 32


def _encode_double(scales: Scales) -> Stored:
    """Quantize the scales themselves: subtract their mean, 8-bit dynamic exponent in blocks of 256."""
    mean = np.float32(scales.mean(dtype=np.float64))
    centred = np.zeros(math.ceil(scales.size / _DQ_BLOCK) * _DQ_BLOCK, np.float32)
    centred[: scales.size] = scales - mean
    blocks = centred.reshape(-1, _DQ_BLOCK)
    second = np.abs(blocks).max(axis=1)
    v = np.divide(blocks, second[:, None], out=np.zeros_like(blocks), where=second[:, None] > 0)
    codes = np.searchsorted(decision_thresholds(dynamic_codebook(8)), v.ravel(), side="right").astype(np.uint8)
    return {"scales": codes[: scales.size], "second_scales": second, "mean": np.array([mean], np.float32)}


def _cast(values: NDArray[np.float32], dtype: torch.dtype) -> Scales:
    """Round to a torch dtype, to nearest, ties to even, and back."""
    rounded: NDArray[np.float32] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype).float().numpy()
    return rounded


def _keep_nonzero(scales: Scales, rounded: NDArray[Any], scale_format: str) -> Scales:
    """Replace a nonzero scale that rounded to 0 by the format's smallest number of its sign."""
    smallest = np.copysign(np.float32(_SMALLEST[scale_format]), scales)
    return np.where((rounded == 0) & (scales != 0), smallest, rounded.astype(np.float32))
