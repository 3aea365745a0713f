"""Scale formats: what each one stores for the scales of blocks, what that decodes to, and how many bits it takes.

Rounding a scale means to decode what was stored, so the scale that quantizes is the one that a reader of the file gets.
All methods work on one float32 per block. A new format is a subclass of ScaleFormat and one call of
register_scale_format.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from kbit.numerics.codebooks import decision_thresholds, dynamic_codebook

Scales = Float32[np.ndarray, " blocks"]
Stored = dict[str, NDArray[Any]]
_FLOAT16_LARGEST: Final = 65504.0
_FLOAT32_LARGEST: Final = 3.4028234663852886e38
_FP8_LARGEST: Final = 448.0  # the largest E4M3 number
_DQ_BLOCK: Final = 256  # scales per block of the second quantization (QLoRA, section 3)
DQ_ZERO: Final = 126  # the code of the dynamic type's last value below 0, -5.5e-7
_E8M0_BIAS: Final = 127
_E8M0_LEAST: Final = -126  # the smallest exponent of a scale that is not 0, as the code of -127 means 0
# Shares of the usual scale that a search tries. 2 bits want about 0.6, and dynamic types want some above 1.
FACTORS: Final = np.arange(40, 121, 2, dtype=np.float32) / 100


class ScaleFormat(ABC):
    """How the scales of a tensor's blocks are stored.

    Attributes:
        name: the format's name in QuantSpec.scale_format.
        largest: the largest magnitude that the format takes.
        has_own_scales: whether a block's stored scale is independent of the other blocks' scales.
        holds_offsets: whether minmax's offsets take the format, too. Otherwise they are stored as fp16.
        holds_float16: whether each float16 number is a number of the format, so that rounding never leaves float16.
        holds_only_powers: whether the numbers are powers of two, without sign and fraction.
        factors: numbers by which a search multiplies the usual scale.
    """

    name: str
    largest: float = _FLOAT32_LARGEST
    has_own_scales: bool = True
    holds_offsets: bool = False
    holds_float16: bool = False
    holds_only_powers: bool = False
    factors: Float32[np.ndarray, " factors"] = FACTORS

    @abstractmethod
    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        """Return the arrays for values within the format's range.

        Args:
            values: scales or offsets.
            lost: whether a value must not become 0 when it is rounded: it is a scale, and not 0.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        """Return the values that the stored arrays stand for."""

    @abstractmethod
    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        """Return the type and the length of each array that is stored for so many blocks."""

    def list_values(self, stored: Mapping[str, NDArray[Any]]) -> Scales | None:
        """Return what each byte of `scales` stands for beside these arrays, or None if a scale is not one byte.

        A byte that is no number of the format stands for 0.
        """
        return None

    def encode(self, scales: Scales) -> Stored:
        """Return the arrays that are stored for these scales. A scale that is not 0 never becomes 0.

        Raises:
            ValueError: a scale beyond the format's range.
        """
        self.check_range(float(np.abs(scales).max()))
        return self.store(scales, scales != 0)

    def encode_offsets(self, offsets: Scales) -> Stored:
        """Return the arrays that are stored for these offsets, which may become 0.

        Raises:
            ValueError: an offset beyond the format's range.
        """
        self.check_range(float(np.abs(offsets).max()), "block offset")
        return self.store(offsets, np.zeros(offsets.shape, np.bool_))

    def clip(self, values: Scales) -> Scales:
        """Return the scales or offsets within the format's range."""
        most = np.float32(self.largest)
        clipped: Scales = np.clip(values, -most, most)
        return clipped

    def choose(self, largest: Scales, *, on_grid: bool) -> Scales:
        """Return the scale for each block's largest magnitude, before it is stored.

        Args:
            largest: the largest magnitude of each block.
            on_grid: whether the data type's values lie on a grid of powers of two, as those of int and float do.
        """
        return largest

    def round_to_nearest(self, scales: Scales) -> Scales:
        """Return what `encode` takes for any scales. Only e8m0 needs them rounded first."""
        return scales

    def check_range(self, largest: float, what: str = "block scale") -> None:
        """Raise ValueError if a scale or an offset of this magnitude is beyond the format's range."""
        if not largest <= self.largest:  # so that NaN is refused, too
            formats = sorted(SCALE_FORMATS.values(), key=lambda scale_format: scale_format.largest)
            wider = [wide.name for wide in formats if wide.holds_offsets and largest <= wide.largest]
            advice = f": use scale_format={' or '.join(wider)}" if wider else ""
            raise ValueError(f"a {what} of {largest:.6g} is beyond {self.name} (largest {self.largest:g}){advice}")

    def check_arrays(self, stored: Mapping[str, Any], blocks: int, what: str) -> None:
        """Raise ValueError if the arrays or tensors are not what `encode` returns for so many blocks."""
        expected = {name: f"{np.dtype(kind)}[{size}]" for name, (kind, size) in self.list_arrays(blocks).items()}
        found = {name: f"{name_dtype(array.dtype)}{list(array.shape)}" for name, array in stored.items()}
        if found != expected:
            described = [", ".join(f"{name} {kind}" for name, kind in arrays.items()) for arrays in (found, expected)]
            raise ValueError(
                f"{what} in {self.name} of {blocks} blocks are {described[0] or 'missing'}, not {described[1]}"
            )

    def count_bits(self, blocks: int) -> int:
        """Return the bits of the arrays that are stored for so many blocks."""
        return sum(8 * np.dtype(kind).itemsize * size for kind, size in self.list_arrays(blocks).values())


def name_dtype(dtype: Any) -> str:
    """Return the name of a type of NumPy or torch, such as float16."""
    return str(dtype).removeprefix("torch.")


class Float16Scales(ScaleFormat):
    """A float16 number each, as the paper counts scales."""

    name = "fp16"
    largest = _FLOAT16_LARGEST
    holds_offsets = True
    holds_float16 = True

    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        return {"scales": _keep_nonzero(_convert(values, "float16").view(np.uint16), lost).view(np.float16)}

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        return _convert(stored["scales"], "float32")

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        return {"scales": (np.float16, blocks)}


class Float32Scales(ScaleFormat):
    """A float32 number each."""

    name = "fp32"
    holds_offsets = True
    holds_float16 = True

    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        return {"scales": values}

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        return stored["scales"].astype(np.float32)

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        return {"scales": (np.float32, blocks)}


class BFloat16Scales(ScaleFormat):
    """The bits of a bfloat16 number each."""

    name = "bf16"
    largest = 3.3895313892515355e38
    holds_offsets = True

    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        words = values.view(np.uint32)
        halves = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
        return {"scales": _keep_nonzero(halves, lost)}

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        return (stored["scales"].astype(np.uint32) << 16).view(np.float32)

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        return {"scales": (np.uint16, blocks)}


class PowerScales(ScaleFormat):
    """The exponent of a power of two each, as block formats with a shared exponent have it (MX, BFP).

    `encode` takes powers of two and 0, whose code 0 would be 2^-127 in OCP's format.
    """

    name = "e8m0"
    holds_only_powers = True
    factors = np.array([0.25, 0.5, 1, 2], np.float32)  # the neighbours of a power

    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        exponents = np.clip(np.frexp(values)[1] - 1, _E8M0_LEAST, _E8M0_BIAS)
        return {"scales": np.where(values > 0, exponents + _E8M0_BIAS, 0).astype(np.uint8)}

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        codes = stored["scales"].astype(np.int32)
        return np.where(codes > 0, np.ldexp(np.float32(1), codes - _E8M0_BIAS), 0).astype(np.float32)

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        return {"scales": (np.uint8, blocks)}

    def list_values(self, stored: Mapping[str, NDArray[Any]]) -> Scales | None:
        return _decode_bytes(self, stored, no_numbers=(0xFF,))

    def choose(self, largest: Scales, *, on_grid: bool) -> Scales:
        """Return the power at or below each largest magnitude, or at or above it for a table that is on no grid.

        MX and BFP share the exponent of the largest number. A table that does not lie on a grid of powers of two would
        be clipped by up to a half at that scale.
        """
        fractions, exponents = np.frexp(largest)
        exponents = np.where((fractions == 0.5) | on_grid, exponents - 1, exponents)
        powers = np.ldexp(np.float32(1), np.clip(exponents, _E8M0_LEAST, _E8M0_BIAS))
        return np.asarray(np.where(largest > 0, powers, np.float32(0)), np.float32)

    def round_to_nearest(self, scales: Scales) -> Scales:
        """Return for each scale > 0 the nearest power of two, or the larger of two as near. 0 stays 0."""
        fractions, exponents = np.frexp(scales)  # scale = fraction 2^exponent, 1/2 <= fraction < 1
        powers = np.ldexp(np.float32(1), np.clip(exponents - (fractions < 0.75), _E8M0_LEAST, _E8M0_BIAS))
        return np.where(scales > 0, powers, np.float32(0)).astype(np.float32)


class Float8Scales(ScaleFormat):
    """An E4M3 number each, and one float32 for the tensor, which is max |scale| / 448 (NVFP4)."""

    name = "fp8"
    has_own_scales = False

    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        tensor_scale = np.float32(np.abs(values).max() / _FP8_LARGEST) or np.float32(1)
        codes = _encode_e4m3(np.asarray(values / tensor_scale, np.float32))
        return {"scales": codes, "tensor_scale": np.array([tensor_scale], np.float32)}

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        codes = stored["scales"]
        magnitudes = np.asarray(_e4m3_values()[codes & 0x7F] * stored["tensor_scale"][0], np.float32)
        return np.where(codes & 0x80, -magnitudes, magnitudes)

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        return {"scales": (np.uint8, blocks), "tensor_scale": (np.float32, 1)}

    def list_values(self, stored: Mapping[str, NDArray[Any]]) -> Scales | None:
        return _decode_bytes(self, stored, no_numbers=(0x7F, 0xFF))


class DoubleScales(ScaleFormat):
    """Scales that are quantized themselves: 8-bit dynamic codes in blocks of 256, about their mean (QLoRA).

    Each block of scales has a float32, and so has the mean. A scale above 0 is never stored as one below 0, which would
    mean 0 (QuantSpec.decode_scales). It takes the next code above that stands for more than 0. In a block of which some
    scales are 0 the float32 has a minus sign. There the code just below the mean's (5.5e-7 of the largest difference
    away) stands for 0, and the mean's code is taken in its place.
    """

    name = "dq8"
    has_own_scales = False

    def store(self, values: Scales, lost: Bool[np.ndarray, " blocks"]) -> Stored:
        mean = np.float32(values.mean(dtype=np.float64))
        centred = np.zeros(math.ceil(values.size / _DQ_BLOCK) * _DQ_BLOCK, np.float32)
        centred[: values.size] = values - mean
        blocks = centred.reshape(-1, _DQ_BLOCK)
        second = np.abs(blocks).max(axis=1)
        v = np.divide(blocks, second[:, None], out=np.zeros_like(blocks), where=second[:, None] > 0)
        codes = np.searchsorted(decision_thresholds(dynamic_codebook(8)), v.ravel(), side="right").astype(np.uint8)
        codes = codes[: values.size]
        has_zeros = np.logical_or.reduceat(values == 0, np.arange(0, values.size, _DQ_BLOCK))
        is_taken = np.repeat(has_zeros, _DQ_BLOCK)[: values.size] & (codes == DQ_ZERO)
        codes = np.where(values == 0, np.uint8(DQ_ZERO), codes + is_taken)
        second = np.where(has_zeros, -second, second)
        stored = {"scales": codes, "second_scales": second, "mean": np.array([mean], np.float32)}
        return self._raise_lost(stored, values)

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        codes = stored["scales"]
        second = np.repeat(stored["second_scales"], _DQ_BLOCK)[: codes.size]
        values = np.asarray(dynamic_codebook(8)[codes] * np.abs(second) + stored["mean"][0], np.float32)
        return np.where(np.signbit(second) & (codes == DQ_ZERO), np.float32(0), values)

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        second = math.ceil(blocks / _DQ_BLOCK)
        return {"scales": (np.uint8, blocks), "second_scales": (np.float32, second), "mean": (np.float32, 1)}

    def list_values(self, stored: Mapping[str, NDArray[Any]]) -> Scales | None:
        """Return what each byte stands for in a block whose float32 is 1, before the mean is added."""
        return dynamic_codebook(8)

    def _raise_lost(self, stored: Stored, scales: Scales) -> Stored:
        """Return scales of which none is lost: the mean added to a rounded difference may be 0 or less."""
        codes, top = stored["scales"].copy(), np.iinfo(np.uint8).max  # the top code's value is 1: the largest scale
        while True:
            decoded = self.decode(stored | {"scales": codes})
            lost = (scales > 0) & (decoded <= 0) & (codes < top)
            if not lost.any():
                break
            codes[lost] += 1
        # beside scales of the other sign a scale may still be exactly 0: then it moves to a neighbour
        zero = (scales != 0) & (decoded == 0)
        codes[zero] = np.where(codes[zero] < top, codes[zero] + 1, top - 1)
        return stored | {"scales": codes}


def _decode_bytes(scale_format: ScaleFormat, stored: Mapping[str, NDArray[Any]], no_numbers: Sequence[int]) -> Scales:
    """Return what each of the 256 bytes stands for, 0 for those that are no numbers."""
    codes = np.arange(256, dtype=np.uint8)
    codes[list(no_numbers)] = 0
    return scale_format.decode({**stored, "scales": codes})


def _keep_nonzero(words: NDArray[np.uint16], lost: Bool[np.ndarray, " blocks"]) -> NDArray[np.uint16]:
    """Replace a 0 that must not be one by the smallest number of its sign, whose bit pattern is 1."""
    kept: NDArray[np.uint16] = words | ((words & 0x7FFF == 0) & lost)
    return kept


def _convert(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Do what astype does, by torch, between float16 and float32: NumPy takes 15 to 30 times as long."""
    import torch

    converted: NDArray[Any] = (
        torch.from_numpy(np.require(values, requirements=["C", "W"])).to(getattr(torch, dtype)).numpy()
    )
    return converted


@functools.cache
def _e4m3_values() -> Scales:
    """Return the 127 finite values >= 0 of OCP's E4M3 by code: bias 7, subnormals, no infinity, code 127 is NaN."""
    codes = np.arange(127)
    exponents, fractions = codes >> 3, (codes & 7) / 8
    values = np.where(exponents == 0, fractions * 2.0**-6, (1 + fractions) * 2.0 ** (exponents - 7.0))
    return values.astype(np.float32)


def _encode_e4m3(values: Scales) -> NDArray[np.uint8]:
    """Round to E4M3: to nearest, ties to the even code, beyond 448 to 448, a nonzero value never to 0."""
    table = _e4m3_values().astype(np.float64)
    midpoints = (table[:-1] + table[1:]) / 2
    magnitudes = np.abs(values).astype(np.float64)
    codes = np.searchsorted(midpoints, magnitudes, side="left")  # a tie gets the lower code here
    is_tie = np.append(midpoints, np.inf)[codes] == magnitudes
    codes = np.maximum(codes + (is_tie & (codes % 2 == 1)), magnitudes > 0)
    signs = np.where(values < 0, np.uint8(0x80), np.uint8(0))
    return np.asarray(codes.astype(np.uint8) | signs)


SCALE_FORMATS: Final[dict[str, ScaleFormat]] = {}


def register_scale_format(scale_format: ScaleFormat) -> None:
    """Make a format known under its name, for QuantSpec.scale_format.

    Raises:
        ValueError: another format has the name.
    """
    if scale_format.name in SCALE_FORMATS:
        raise ValueError(f"scale_format={scale_format.name} is registered already")
    SCALE_FORMATS[scale_format.name] = scale_format


for _format in (Float16Scales(), Float32Scales(), BFloat16Scales(), PowerScales(), Float8Scales(), DoubleScales()):
    register_scale_format(_format)
