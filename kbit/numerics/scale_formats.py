"""Block scales: what each format stores, what it decodes to, and how many bits it takes.

Rounding a scale is decoding what was stored, so that the scale used to quantize is the one that a reader of the file
gets. All functions work on one float32 per block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from kbit.numerics.codebooks import decision_thresholds, dynamic_codebook

Scales = Float32[np.ndarray, " blocks"]


Stored = dict[str, NDArray[Any]]


SCALE_FORMATS: Final = ("fp16", "fp32", "bf16", "e8m0", "fp8", "dq8")


_LARGEST: Final = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": 3.4028234663852886e38}


_FP8_MAX: Final = 448.0  # the largest E4M3 number


_DQ_BLOCK: Final = 256  # scales per block of the second quantization (QLoRA, section 3)


_E8M0_BIAS: Final = 127


def encode_scales(scales: Scales, scale_format: str, what: str = "block scale") -> Stored:
    """Return the arrays that the format stores for these scales, or for offsets, if `what` says so.

    fp16, bf16, fp32: a number each. e8m0: the exponent of a power of two (the scales must be powers of two or 0; 0 is
    stored as the smallest). fp8: E4M3 numbers and one float32 for the tensor, max |scale| / 448 (NVFP4). dq8: 8-bit
    dynamic codes in blocks of 256 with a float32 each, after subtracting the mean, one float32 (QLoRA). A scale that is
    not 0 never becomes 0, an offset may. With dq8 a scale above 0 is not stored as one below, which would mean 0
    (decode_block_scales in kbit.numerics.quantizer): it takes the next code above that stands for more than 0.

    Raises:
        ValueError: a scale beyond the format's range.
    """
    check_scale_range(float(np.abs(scales).max()), scale_format, what)
    nonzero = scales if what == "block scale" else np.zeros_like(scales)
    match scale_format:
        case "fp16":
            return {"scales": _keep_nonzero(scales.astype(np.float16).view(np.uint16), nonzero).view(np.float16)}
        case "bf16":
            words = scales.view(np.uint32)
            halves = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
            return {"scales": _keep_nonzero(halves, nonzero)}
        case "fp32":
            return {"scales": scales}
        case "e8m0":
            exponents = np.where(scales > 0, np.frexp(scales)[1] - 1, -_E8M0_BIAS)
            return {"scales": (np.clip(exponents, -127, 127) + _E8M0_BIAS).astype(np.uint8)}
        case "fp8":
            tensor_scale = np.float32(np.abs(scales).max() / _FP8_MAX) or np.float32(1)
            codes = _encode_e4m3(np.asarray(scales / tensor_scale, np.float32))
            return {"scales": codes, "tensor_scale": np.array([tensor_scale], np.float32)}
        case _:
            return _encode_double(scales)


def largest_scale(scale_format: str) -> float:
    """Return the largest scale or offset that encode_scales takes."""
    return _LARGEST.get(scale_format, _LARGEST["fp32"])


def round_to_power(scales: Scales) -> Scales:
    """Return for each scale > 0 the nearest power of two that e8m0 has; the larger of two as near; 0 stays 0."""
    fractions, exponents = np.frexp(scales)  # scale = fraction 2^exponent, 1/2 <= fraction < 1
    powers = np.ldexp(np.float32(1), np.clip(exponents - (fractions < 0.75), -_E8M0_BIAS, _E8M0_BIAS))
    return np.where(scales > 0, powers, np.float32(0)).astype(np.float32)


def check_scale_range(largest: float, scale_format: str, what: str = "block scale") -> None:
    """Raise ValueError if a scale or offset of this magnitude is beyond the format's range."""
    most = largest_scale(scale_format)
    if not largest <= most:  # so that NaN is refused, too
        wider = [name for name in ("bf16", "fp32") if largest <= _LARGEST[name]]
        advice = f": use scale_format={' or '.join(wider)}" if wider else ""
        raise ValueError(f"a {what} of {largest:.6g} is beyond {scale_format} (largest {most:g}){advice}")


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
            magnitudes = np.asarray(_e4m3_values()[codes & 0x7F] * stored["tensor_scale"][0], np.float32)
            return np.where(codes & 0x80, -magnitudes, magnitudes)
        case _:
            second = np.repeat(stored["second_scales"], _DQ_BLOCK)[: codes.size]
            return np.asarray(dynamic_codebook(8)[codes] * second + stored["mean"][0], np.float32)


def stored_layout(blocks: int, scale_format: str) -> dict[str, tuple[type[np.generic], int]]:
    """Return the type and length of each array that encode_scales returns."""
    match scale_format:
        case "fp16":
            return {"scales": (np.float16, blocks)}
        case "bf16":
            return {"scales": (np.uint16, blocks)}
        case "fp32":
            return {"scales": (np.float32, blocks)}
        case "e8m0":
            return {"scales": (np.uint8, blocks)}
        case "fp8":
            return {"scales": (np.uint8, blocks), "tensor_scale": (np.float32, 1)}
        case _:
            second = math.ceil(blocks / _DQ_BLOCK)
            return {"scales": (np.uint8, blocks), "second_scales": (np.float32, second), "mean": (np.float32, 1)}


def count_scale_bits(blocks: int, scale_format: str) -> int:
    """Return the bits that encode_scales' arrays take."""
    return sum(8 * np.dtype(kind).itemsize * size for kind, size in stored_layout(blocks, scale_format).values())


def check_stored(stored: Mapping[str, NDArray[Any]], blocks: int, scale_format: str, what: str) -> None:
    """Raise ValueError if the arrays are not what encode_scales returns for so many blocks."""
    expected = {name: (np.dtype(kind), (size,)) for name, (kind, size) in stored_layout(blocks, scale_format).items()}
    found = {name: (array.dtype, array.shape) for name, array in stored.items()}
    if found != expected:
        raise ValueError(f"{what} in {scale_format} of {blocks} blocks are {_list(found)}, not {_list(expected)}")


def _list(layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {kind}{list(shape)}" for name, (kind, shape) in layout.items()) or "missing"


def _keep_nonzero(words: NDArray[np.uint16], scales: Scales) -> NDArray[np.uint16]:
    """Make the smallest number of its sign, bit pattern 1, of what rounding made 0 though the scale is not."""
    return np.where((words & 0x7FFF == 0) & (scales != 0), words | 1, words)


def _encode_double(scales: Scales) -> Stored:
    """Quantize the scales themselves: subtract their mean, 8-bit dynamic exponent in blocks of 256."""
    mean = np.float32(scales.mean(dtype=np.float64))
    centred = np.zeros(math.ceil(scales.size / _DQ_BLOCK) * _DQ_BLOCK, np.float32)
    centred[: scales.size] = scales - mean
    blocks = centred.reshape(-1, _DQ_BLOCK)
    second = np.abs(blocks).max(axis=1)
    v = np.divide(blocks, second[:, None], out=np.zeros_like(blocks), where=second[:, None] > 0)
    codes = np.searchsorted(decision_thresholds(dynamic_codebook(8)), v.ravel(), side="right").astype(np.uint8)
    stored = {"scales": codes[: scales.size], "second_scales": second, "mean": np.array([mean], np.float32)}
    return _raise_lost(stored, scales)


def _raise_lost(stored: Stored, scales: Scales) -> Stored:
    """Return double-quantized scales of which none is lost: the mean added to a rounded difference may be 0 or less."""
    codes, top = stored["scales"].copy(), np.iinfo(np.uint8).max  # whose value is 1: the largest scale itself
    while True:
        decoded = decode_scales(stored | {"scales": codes}, "dq8")
        lost = (scales > 0) & (decoded <= 0) & (codes < top)
        if not lost.any():
            break
        codes[lost] += 1
    # beside scales of the other sign a scale may still be exactly 0: to a neighbour with it
    zero = (scales != 0) & (decoded == 0)
    codes[zero] = np.where(codes[zero] < top, codes[zero] + 1, top - 1)
    return stored | {"scales": codes}


@functools.cache
def _e4m3_values() -> Scales:
    """The 127 finite values >= 0 of OCP's E4M3 by code: bias 7, subnormals, no infinity, code 127 is NaN."""
    codes = np.arange(127)
    exponents, fractions = codes >> 3, (codes & 7) / 8
    values = np.where(exponents == 0, fractions * 2.0**-6, (1 + fractions) * 2.0 ** (exponents - 7.0))
    return values.astype(np.float32)


def _encode_e4m3(values: Scales) -> NDArray[np.uint8]:
    """Round to E4M3: to nearest, ties to the even code, beyond 448 to 448, a nonzero value never to 0."""
    table = _e4m3_values().astype(np.float64)
    midpoints = (table[:-1] + table[1:]) / 2
    magnitudes = np.abs(values).astype(np.float64)
    codes = np.searchsorted(midpoints, magnitudes, side="left")  # of a tie the lower code
    is_tie = np.append(midpoints, np.inf)[codes] == magnitudes
    codes = np.maximum(codes + (is_tie & (codes % 2 == 1)), magnitudes > 0)
    signs = np.where(values < 0, np.uint8(0x80), np.uint8(0))
    return np.asarray(codes.astype(np.uint8) | signs)
