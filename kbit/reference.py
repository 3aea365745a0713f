"""The quantizer in plain NumPy: the slow truth that every kernel is tested against, bit for bit.

Same names and arguments as kbit.kernels.cpu. All arithmetic is float32, as design and docstrings state it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

from kbit.datatypes import Codebook

Values = Float32[np.ndarray, " n"]
Codes = UInt8[np.ndarray, " n"]
Scales = Float32[np.ndarray, " blocks"]
Thresholds = Float32[np.ndarray, " thresholds"]


def round_scale(scale: float, scale_format: str) -> np.float32:
    """Round a block's absmax to its storage format, to nearest, ties to even.

    A scale too small for its format becomes the format's smallest positive number, so that the error of the block
    stays below it; 0 (a block of zeros) stays 0.
    """
    match scale_format:
        case "fp16":
            rounded, smallest = np.float32(np.float16(scale)), np.float32(2.0**-24)
        case "bf16":
            rounded, smallest = _round_to_bfloat16(np.float32(scale)), np.float32(2.0**-133)
        case _:
            rounded, smallest = np.float32(scale), np.float32(2.0**-149)
    return smallest if scale > 0 and rounded == 0 else rounded


def quantize(x: Values, thresholds: Thresholds, block_size: int, scale_format: str) -> tuple[Codes, Scales]:
    """Return the code of each value and the scale of each block.

    scale_b = round(max |x_b|); v = x / scale_b in float32 (0 where the scale is 0); code = number of thresholds <= v.
    """
    codes = np.empty(x.size, np.uint8)
    scales = np.empty(-(-x.size // block_size), np.float32)
    for b, start in enumerate(range(0, x.size, block_size)):
        block = x[start : start + block_size]
        scales[b] = round_scale(float(np.abs(block).max()), scale_format)
        v = block / scales[b] if scales[b] > 0 else np.zeros_like(block)
        codes[start : start + block_size] = (v[:, None] >= thresholds).sum(axis=1)
    return codes, scales


def dequantize(codes: Codes, scales: Scales, codebook: Codebook, block_size: int) -> Values:
    """Return codebook[code] * scale_b in float32."""
    values: Values = codebook[codes] * np.repeat(scales, block_size)[: codes.size]
    return values


def fake_quantize(x: Values, codebook: Codebook, thresholds: Thresholds, block_size: int, scale_format: str) -> Values:
    """Return dequantize(quantize(x))."""
    codes, scales = quantize(x, thresholds, block_size, scale_format)
    return dequantize(codes, scales, codebook, block_size)


def _round_to_bfloat16(scale: np.float32) -> np.float32:
    """Round to 8 significant bits, ties to even: bfloat16 is the upper half of a float32."""
    word = int(scale.view(np.uint32))
    word += 0x7FFF + ((word >> 16) & 1)
    return np.uint32(word & 0xFFFF0000).view(np.float32)
