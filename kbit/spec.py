"""QuantSpec: the whole description of a quantizer, and what it costs in bits."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from kbit import datatypes
from kbit.datatypes import Codebook, check_bits, check_choice, check_exponent_bits

BASELINE_BITS: Final = 16  # the unquantized 16-bit model: the paper's reference point on every curve
SCALE_BITS: Final = {"fp16": 16, "bf16": 16, "fp32": 32}
CODEBOOK_VALUE_BITS: Final = 16  # a per-tensor codebook is stored as float16


@dataclass(frozen=True)
class QuantSpec:
    """Block-wise quantization to k bits: x ~ codebook[code] * scale, one scale per block.

    The tensor is flattened in row-major order and cut into blocks of block_size elements (the last may be short);
    scale = max |x| of the block, rounded to scale_format; code = nearest codebook value to x / scale.

    Attributes:
        bits: 2..8, or 16 for the unquantized baseline.
        data_type: int, float, dynamic, quantile or nf.
        exponent_bits: float only, 1..bits-1; None is the paper's choice (3 bits: 2; 4..8 bits: 3).
        float_bias: float only; ieee, bnb or paper: where the subnormals lie.
        block_size: elements per block, >= 1; None is the whole tensor.
        scale_format: fp16 (as the paper counts them), bf16 or fp32.

    Raises:
        ValueError: a value outside its allowed set, named with what is allowed.
    """

    bits: int = 4
    data_type: str = "float"
    exponent_bits: int | None = None
    float_bias: str = "ieee"
    block_size: int | None = 64
    scale_format: str = "fp16"

    def __post_init__(self) -> None:
        check_choice("data_type", self.data_type, datatypes.DATA_TYPES)
        check_choice("float_bias", self.float_bias, datatypes.FLOAT_BIASES)
        check_choice("scale_format", self.scale_format, tuple(SCALE_BITS))
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} is not >= 1 (null is the whole tensor)")
        if self.bits == BASELINE_BITS:
            return
        try:
            check_bits(self.bits)
        except ValueError as error:
            raise ValueError(f"{error}, nor {BASELINE_BITS} (the unquantized baseline)") from None
        if self.data_type == "float" and self.exponent_bits is not None:
            check_exponent_bits(self.bits, self.exponent_bits)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unquantized 16-bit model."""
        return self.bits == BASELINE_BITS

    def canonical(self) -> QuantSpec:
        """Return the same quantizer with every field that has no effect at its default.

        Two specs describe the same quantizer if and only if their canonical forms are equal, so a grid of overrides
        collapses to its distinct experiments: exponent_bits mean nothing to an int, and nothing does at 16 bits.
        """
        if self.is_baseline:
            return QuantSpec(bits=BASELINE_BITS)
        if self.data_type != "float":
            return dataclasses.replace(self, exponent_bits=None, float_bias="ieee")
        exponent_bits = self.exponent_bits or datatypes.PAPER_EXPONENT_BITS[self.bits]
        has_mantissa = exponent_bits < self.bits - 1  # without one there are no subnormals for float_bias to place
        return dataclasses.replace(
            self, exponent_bits=exponent_bits, float_bias=self.float_bias if has_mantissa else "ieee"
        )

    def make_codebook(self, tensor: NDArray[Any]) -> Codebook:
        """Return this spec's codebook; the tensor (any shape) matters to data types that adapt to it."""
        return datatypes.make_codebook(
            self.data_type,
            self.bits,
            exponent_bits=self.exponent_bits,
            float_bias=self.float_bias,
            tensor=tensor,
        )

    def count_bits(self, elements: int) -> int:
        """Return the bits that a tensor of this many elements takes: codes, block scales and its own codebook."""
        if self.is_baseline or elements == 0:
            return BASELINE_BITS * elements
        blocks = math.ceil(elements / self.block_size) if self.block_size else 1
        codebook = 2**self.bits * CODEBOOK_VALUE_BITS if self.data_type == "quantile" else 0
        return self.bits * elements + SCALE_BITS[self.scale_format] * blocks + codebook

    def label(self) -> str:
        """Return the short name used in tables and plots, such as nf4 or float4-e3m0; 16-bit for the baseline."""
        if self.is_baseline:
            return "16-bit"
        return datatypes.data_type_label(self.data_type, self.bits, self.exponent_bits)
