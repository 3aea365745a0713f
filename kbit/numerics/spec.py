"""QuantSpec: the whole description of a quantizer, and what it costs in bits."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from kbit.checks import check_choice, non_defaults, tabulate_html
from kbit.data.presets import list_presets, read_preset
from kbit.numerics import codebooks
from kbit.numerics.codebooks import Codebook, check_bits, check_exponent_bits, decision_thresholds
from kbit.numerics.data_types import DATA_TYPES, check_signs, make_codebook
from kbit.numerics.scale_formats import SCALE_FORMATS, ScaleFormat, Scales, Stored

BASELINE_BITS: Final = 16  # the unquantized 16-bit model: the paper's reference point on every curve
CODEBOOK_VALUE_BITS: Final = 16  # a per-tensor codebook is stored as float16
CENTER_BITS: Final = 16  # the tensor mean that centering subtracts is stored as float16
LAYOUTS: Final = ("flat", "row")
NORMALIZATIONS: Final = ("absmax", "signed_absmax", "minmax")
ROUNDINGS: Final = ("nearest", "nearest_even", "stochastic", "truncate")


@dataclass(frozen=True)
class QuantSpec:
    """Block-wise quantization to k bits: x ~ codebook[code] * scale + offset, a scale (and offset) per block.

    Attributes:
        bits: bits of a code, 2..8, or 16 for the unquantized baseline.
        data_type: int, float, dynamic, quantile, nf, af (least expected absolute error of normal values in units of the
            block's maximum, for this block size), learned, or table (the user's own values). dynamic and quantile lack
            -1 or 1: a block's largest magnitude may be clipped, as in the originals.
        exponent_bits: exponent bits of float, 1..bits-1. None is the paper's choice (2 for 3 bits, 3 for 4..8 bits).
        float_bias: where the subnormals of float lie: ieee as in OCP's formats, bnb at 1/4 of that (bitsandbytes'
            create_fp8_map), paper at 1/16 (its Appendix A, and bitsandbytes' FP4).
        table: values of data_type=table, at most 2^bits, within [-1, 1] where 1 is the block's scale.
        block_size: elements per block, >= 1. None is the whole tensor (the whole row if layout=row).
        layout: how blocks lie. With flat they run over the flattened tensor, as in the paper. With row they restart at
            each row, which is one index of all dimensions but the last.
        normalization: how a block's scale and offset are found. absmax has scale = max |x| and offset 0. signed_absmax
            has the x of largest magnitude as its scale, sign kept. With minmax, scale and offset map [min x, max x] to
            the codebook's range (zero point).
        centering: whether the tensor's mean is subtracted first (paper, Appendix B).
        scale_format: fp16 (as the paper counts them), fp32, bf16, e8m0, fp8 (NVFP4), dq8 (QLoRA's double quantization).
            e8m0 scales are powers of two. For int and float the scale is the power at or below max |x|, as BFP and MX
            have it, with the table on its natural grid (E2M1: up to 1.5). For other tables it is the power at or above.
            Offsets take the same format, or fp16 beside fp8 and dq8. A scale that is not 0 never becomes 0, and one
            that is 0 stays 0: a block of zeros gives zeros, unless centering shifts it.
        rounding: nearest has ties away from zero. nearest_even has them to the value at an even place from 0, which is
            the even mantissa of OCP's formats (MX), and with it e8m0 has OCP's smallest scale. stochastic goes up with
            the probability that makes it unbiased within the table's range, seeded. truncate goes towards 0 in units of
            the scale, so weights go towards the block's offset, which with minmax and centering need not be 0.
        seed: seed of stochastic rounding and of data_type=learned. quantize_model adds to it a hash of each tensor's
            name, so that tensors do not share their random numbers.
        signed: whether values may be below 0. Without, int, dynamic and table have no code for a sign, and a tensor
            with a negative value is refused. It is for optimizers' second moments.
        zero: whether the table has a 0. False needs signed=false. A second moment of 0 makes Adam's step as large as
            its momentum allows. A block whose values are all 0 stays 0.

    Raises:
        ValueError: a value outside its allowed set, named with what is allowed.
    """

    bits: int = 4
    data_type: str = "nf"
    exponent_bits: int | None = None
    float_bias: str = "ieee"
    table: tuple[float, ...] | None = None
    block_size: int | None = 64
    layout: str = "flat"
    normalization: str = "absmax"
    centering: bool = False
    scale_format: str = "fp16"
    rounding: str = "nearest"
    seed: int = 0
    signed: bool = True
    zero: bool = True

    def __post_init__(self) -> None:
        self._convert_types()
        check_choice("data_type", self.data_type, tuple(DATA_TYPES))
        check_choice("float_bias", self.float_bias, codebooks.FLOAT_BIASES)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("scale_format", self.scale_format, tuple(SCALE_FORMATS))
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} is not >= 1 (null is the whole tensor)")
        if self.bits == BASELINE_BITS:
            return
        try:
            check_bits(self.bits)
        except ValueError as error:
            raise ValueError(f"{error}, nor {BASELINE_BITS} (the unquantized baseline)") from None
        self._check_combinations()

    def _convert_types(self) -> None:
        """Make plain Python values of NumPy's and YAML's, so that specs compare, hash and are written as JSON."""
        for name in ("bits", "block_size", "exponent_bits", "seed"):
            value = getattr(self, name)
            if value is None and name in ("block_size", "exponent_bits"):
                continue
            if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
                raise ValueError(f"{name}={value!r} is not an integer")
            object.__setattr__(self, name, operator.index(value))
        for name in ("centering", "signed", "zero"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: False, True")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not in 0..2^63 - 1")
        if self.table is not None:
            try:
                object.__setattr__(self, "table", tuple(float(value) for value in self.table))
            except (TypeError, ValueError):
                raise ValueError(f"table={self.table!r} is not a list of numbers") from None

    def _check_combinations(self) -> None:
        check_signs(self.data_type, signed=self.signed, zero=self.zero)
        if not self.signed and (self.normalization != "absmax" or self.centering or self.scale_type.holds_only_powers):
            raise ValueError(
                f"signed=false divides each block by its largest value: normalization={self.normalization}, centering="
                f"{self.centering}, scale_format={self.scale_format} do not go with it; allowed are normalization="
                "absmax, centering=false and a scale_format with a fraction"
            )
        if self.data_type == "float" and self.exponent_bits is not None:
            check_exponent_bits(self.bits, self.exponent_bits)
        if self.data_type == "table":
            if self.table is None:
                raise ValueError("data_type=table needs quant.table, such as [-1, 0.3, 0.5, 1]")
            codebooks.table_codebook(self.bits, self.table, signed=self.signed, zero=self.zero)
        if self.data_type == "af" and self.block_size is None:
            raise ValueError("data_type=af is made for a block size: block_size=null has none")
        if self.scale_type.holds_only_powers and self.normalization != "absmax":
            raise ValueError(
                f"scale_format={self.scale_format} has neither sign nor fraction: normalization={self.normalization} "
                "needs another; allowed is absmax"
            )

    @staticmethod
    def from_name(name: str) -> QuantSpec:
        """Return the named quantizer of conf/quant, such as nf4_dq or mxfp4: `kbit.presets()` has them all.

        Raises:
            ValueError: there is no such name, or it is that of a mix (QuantConfig.from_name).
        """
        fields = find_preset(name)
        if fields.get("rules"):
            raise ValueError(f"{name} is a mix of quantizers: QuantConfig.from_name has its rules")
        return QuantSpec.from_json(fields)  # default also names its method, round to nearest

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> QuantSpec:
        """Return the spec again that went through dataclasses.asdict and JSON.

        Fields that an earlier version did not write are at their default. What is no field is ignored.
        """
        known = {field.name: values[field.name] for field in dataclasses.fields(QuantSpec) if field.name in values}
        if known.get("table") is not None:
            known["table"] = tuple(known["table"])  # JSON has lists
        return QuantSpec(**known)

    def _repr_html_(self) -> str:
        """Return a small table for notebooks: the name, and every field that is not at its default."""
        return tabulate_html({"quantizer": self.label()} | non_defaults(self, type(self)()))

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unquantized 16-bit model."""
        return self.bits == BASELINE_BITS

    @property
    def scale_type(self) -> ScaleFormat:
        """How scales are stored."""
        return SCALE_FORMATS[self.scale_format]

    @property
    def offset_type(self) -> ScaleFormat:
        """How minmax's offsets are stored."""
        return self.scale_type if self.scale_type.holds_offsets else SCALE_FORMATS["fp16"]

    @property
    def largest_weight(self) -> float:
        """The largest magnitude of weights whose scales and offsets can be stored."""
        stored = (self.scale_type, self.offset_type) if self.normalization == "minmax" else (self.scale_type,)
        return min(form.largest for form in stored)

    def canonical(self) -> QuantSpec:
        """Return the same quantizer with every field that has no effect at its default.

        Specs with equal canonical forms describe the same quantizer, so a grid of overrides collapses to its distinct
        experiments: exponent_bits mean nothing to an int, the order of a table nothing, and nothing does at 16 bits.
        """
        if self.is_baseline:
            return QuantSpec(bits=BASELINE_BITS)
        spec = self
        if spec.data_type == "float":
            exponent_bits = spec.exponent_bits or codebooks.PAPER_EXPONENT_BITS[spec.bits]
            spec = dataclasses.replace(spec, exponent_bits=exponent_bits)
            if exponent_bits == spec.bits - 1:  # no mantissa, so no subnormals for float_bias to place
                spec = dataclasses.replace(spec, float_bias="ieee")
        else:
            spec = dataclasses.replace(spec, exponent_bits=None, float_bias="ieee")
        table = None if spec.data_type != "table" or spec.table is None else tuple(sorted(set(spec.table)))
        spec = dataclasses.replace(spec, table=table)
        if spec.rounding != "stochastic" and spec.data_type != "learned":
            spec = dataclasses.replace(spec, seed=0)
        return spec

    def make_codebook(self, tensor: NDArray[Any] | None = None) -> Codebook:
        """Return this spec's codebook.

        Args:
            tensor: the tensor, which quantile needs, or its normalised values, which learned needs.
        """
        codebook = make_codebook(
            self.data_type,
            self.bits,
            exponent_bits=self.exponent_bits,
            float_bias=self.float_bias,
            block_size=self.block_size,
            table=self.table,
            tensor=tensor,
            seed=self.seed,
            signed=self.signed,
            zero=self.zero,
        )
        return np.asarray(codebook * np.float32(self._find_peak()), np.float32)

    def make_thresholds(self, codebook: Codebook) -> Float32[np.ndarray, " thresholds"]:
        """Return the numbers where one code of this spec's codebook ends and the next begins.

        The ties of nearest_even are those of int's and float's exact values, which a float32 codebook has only rounded.
        """
        if self.rounding == "stochastic":
            return decision_thresholds(codebook, "floor")
        if self.rounding == "nearest_even" and self.data_type in ("int", "float"):
            return decision_thresholds(self._make_exact_grid() * self._find_peak(), self.rounding)
        return decision_thresholds(codebook, self.rounding)

    def _make_exact_grid(self) -> NDArray[np.float64]:
        if not self.signed:
            return codebooks.unsigned_grid_values(self.bits, zero=self.zero)
        return codebooks.grid_values(self.data_type, self.bits, self.exponent_bits, self.float_bias)

    def _find_peak(self) -> float:
        """Return the codebook's largest value where it is a grid, 1 unless scales are powers of two."""
        peak = codebooks.natural_peak(self.data_type, self.bits, self.exponent_bits)
        return peak if self.scale_type.holds_only_powers else 1.0

    def count_blocks(self, shape: Sequence[int]) -> int:
        """Return the number of blocks of a tensor of this shape."""
        elements = math.prod(shape)
        if elements == 0:
            return 0
        row, block_size = self.find_block_shape(shape)
        return (elements // row) * math.ceil(row / block_size)

    def find_block_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the elements of a row (the whole tensor if layout=flat) and of a block, which is at most a row."""
        row = shape[-1] if self.layout == "row" and len(shape) else math.prod(shape)
        return row, min(self.block_size or row, row)

    def decode_scales(self, stored: Stored) -> Scales:
        """Return the scales. One below 0 is 0 where scales have no sign: a zero block's double-quantized one may be."""
        scales = self.scale_type.decode(stored)
        return scales if self.normalization == "signed_absmax" else np.maximum(scales, np.float32(0))

    def decode_offsets(self, stored: Stored, center: NDArray[np.float16], scales: Scales) -> Scales:
        """Return the offset of each block: the block's own, which minmax alone has, plus the tensor's mean."""
        total = self.offset_type.decode(stored) if stored else np.zeros_like(scales)
        return total + center.astype(np.float32) if center.size else total

    def count_bits(self, shape: Sequence[int]) -> int:
        """Return the bits of a tensor of this shape: codes, scales, offsets, mean and its own codebook."""
        elements = math.prod(shape)
        if self.is_baseline or elements == 0:
            return BASELINE_BITS * elements
        blocks = self.count_blocks(shape)
        bits = self.bits * elements + self.scale_type.count_bits(blocks)
        if self.normalization == "minmax":
            bits += self.offset_type.count_bits(blocks)
        if self.centering:
            bits += CENTER_BITS
        if self.data_type in codebooks.ADAPTIVE:
            bits += 2**self.bits * CODEBOOK_VALUE_BITS
        return bits

    def label(self) -> str:
        """Return the short name used in tables and plots, such as nf4, float4-e3m0, or 16-bit for the baseline."""
        if self.is_baseline:
            return "16-bit"
        signs = {"signed": self.signed, "zero": self.zero}
        return codebooks.data_type_label(self.data_type, self.bits, self.exponent_bits, **signs)


def check_state(role: str, spec: QuantSpec) -> None:
    """Raise ValueError if a quantizer cannot hold an optimizer's state of this role, momentum or variance."""
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"{role}={spec!r} is no QuantSpec (None keeps the state in float32)")
    if spec.is_baseline:
        raise ValueError(f"{role} has bits={spec.bits}: None keeps the state in float32; allowed are bits 2..8")
    fixed = {"scale_format": "fp32", "normalization": "absmax", "layout": "flat", "centering": False}
    for name, allowed in fixed.items():
        if (value := getattr(spec, name)) != allowed:
            raise ValueError(f"{role} has {name}={value}: a state of an optimizer has {name}={allowed}")
    if spec.data_type in codebooks.ADAPTIVE:
        raise ValueError(f"{role} has data_type={spec.data_type}, whose table is each tensor's own: use another")
    if role == "momentum" and not spec.signed:
        raise ValueError("momentum has signed=False, but it has values below 0: signed=False is for the variance")
    if role == "momentum" and 0 not in spec.make_codebook():
        raise ValueError(f"momentum has {spec.label()}, whose table has no 0: what gets no gradient would move")


def write_table(values: Iterable[float]) -> str:
    """Return a user's own table as quant.table takes it: [-1, 0.3, 0.5, 1]."""
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def find_preset(name: str) -> dict[str, Any]:
    """Return the fields that a named quantizer sets.

    Raises:
        ValueError: there is no such name.
    """
    check_choice("quant", name, tuple(list_presets()))
    fields = read_preset(name)
    return fields | ({"table": tuple(map(float, fields["table"]))} if fields.get("table") else {})  # YAML has lists
