"""Quantizers of values that exist for a moment: activations, the cache of keys and values, gradients of a training.

Nothing here loads torch, as configurations are checked by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kbit.checks import check_choice, non_defaults
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.spec import BASELINE_BITS, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

AXES: Final = ("token", "channel")


@dataclass(frozen=True)
class ActivationConfig(QuantSpec):
    """The inputs of the quantized products.

    The default layout is one scale for each token. With block_size a token has several, along the inputs of a product.
    layout=flat without block_size is one scale for the whole tensor, so that texts are scored one at a time.

    Attributes:
        exclude: regular expression of the names of weights whose inputs stay at 16 bits.
    """

    bits: int = BASELINE_BITS
    data_type: str = "int"
    block_size: int | None = None
    layout: str = "row"
    scale_format: str = "fp32"
    exclude: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_baseline:
            _check_role("quant.activations", self)
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ValueError(f"quant.activations.exclude={self.exclude!r} is no regular expression: {error}") from None

    @property
    def identity_fields(self) -> dict[str, Any]:
        """The fields that decide the numbers, canonical. At 16 bits there are none."""
        return _identify(self, ActivationConfig())


@dataclass(frozen=True)
class CacheConfig(QuantSpec):
    """The cache of keys and values, as transformers holds it: keys after the rotary embedding.

    Attributes:
        keys: what shares a scale. With token it is a token's key in one head, or blocks of block_size within it. With
            channel it is one number of the keys of block_tokens tokens, which are rounded when the last one is there.
            Tokens of a block that is not full yet stay at 16 bits.
        values: the same for values.
        block_tokens: tokens of a block of keys=channel or values=channel.
    """

    bits: int = BASELINE_BITS
    data_type: str = "int"
    block_size: int | None = None
    layout: str = "row"
    keys: str = "token"
    values: str = "token"
    block_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quant.kv_cache.keys", self.keys, AXES)
        check_choice("quant.kv_cache.values", self.values, AXES)
        if self.block_tokens < 1:
            raise ValueError(f"quant.kv_cache.block_tokens={self.block_tokens} is not >= 1")
        if self.is_baseline:
            return
        _check_role("quant.kv_cache", self)
        if sees_whole_tensor(self):
            raise ValueError(
                f"quant.kv_cache: layout={self.layout}, block_size={self.block_size}, centering={self.centering}, "
                f"scale_format={self.scale_format} and rounding={self.rounding} together let a token's key depend on "
                "later tokens, or on its place in a batch; allowed are layout=row, centering=false, scale_format=fp16, "
                "fp32, bf16 or e8m0, and a rounding that is not stochastic"
            )

    @property
    def has_blocks_of_tokens(self) -> bool:
        """Whether several tokens share a scale."""
        return not self.is_baseline and "channel" in (self.keys, self.values)

    @property
    def of_channels(self) -> QuantSpec:
        """The quantizer of one channel of a block of tokens, with the tokens in columns."""
        return dataclasses.replace(self, block_size=self.block_tokens)

    @property
    def identity_fields(self) -> dict[str, Any]:
        """The fields that decide the numbers, canonical. At 16 bits there are none."""
        fields = _identify(self, CacheConfig())
        idle = set() if self.has_blocks_of_tokens else {"block_tokens"}
        idle |= {"block_size"} if self.keys == self.values == "channel" else set()
        return {name: value for name, value in fields.items() if name not in idle}


def _identify(spec: QuantSpec, default: QuantSpec) -> dict[str, Any]:
    """Return the fields of a role that are not at its default, and its bits. A role at 16 bits has none."""
    return {} if spec.is_baseline else non_defaults(spec.canonical(), default) | {"bits": spec.bits}


def _check_role(role: str, spec: QuantSpec) -> None:
    if not spec.signed:
        raise ValueError(f"{role}.signed=false has no values below 0, and inputs, keys and values have both signs")
    check_transient(role, spec)


def sees_whole_tensor(spec: QuantSpec) -> bool:
    """Whether what a row of a matrix becomes depends on the other rows, or on its place among them.

    layout=flat with blocks counts as if blocks divided the rows, which check_blocks asks for.
    """
    formats = [spec.scale_type, *([spec.offset_type] if spec.normalization == "minmax" else [])]
    blocks = 2  # any number: a format that stores one array for all blocks has something that they share
    is_shared = any(n != blocks for form in formats for _, n in form.list_arrays(blocks).values())
    is_one_block = spec.layout == "flat" and spec.block_size is None
    return is_one_block or is_shared or spec.centering or spec.rounding == "stochastic"


def check_transient(role: str, spec: QuantSpec, *, is_gradient: bool = False) -> None:
    """Raise ValueError if a quantizer cannot be for values that change with each call.

    A fitted table would have to be fitted anew each time. Gradients are small: a mean over thousands of tokens puts
    whole blocks below 6e-8, where float16 scales end.

    Args:
        role: what is quantized.
        spec: its quantizer.
        is_gradient: whether gradients are quantized.
    """
    if spec.data_type in ADAPTIVE:
        raise ValueError(
            f"{role}: data_type={spec.data_type} is fitted to a tensor, and these values change with each call: take "
            "a data type with a fixed table, such as int, float, nf or dynamic"
        )
    if is_gradient and spec.scale_format == "fp16":
        raise ValueError(f"{role}: scale_format=fp16 ends at 6e-8, and gradients are smaller: take fp32, bf16 or e8m0")


def with_own_seed(spec: QuantSpec, label: str) -> QuantSpec:
    """Return the quantizer with random numbers that depend on its seed and a label, the same in every process."""
    if spec.rounding != "stochastic":
        return spec
    own = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big")
    return dataclasses.replace(spec, seed=(spec.seed + own) % 2**63)


def explain_refusal(values: Tensor, where: str, error: ValueError) -> Exception:
    """Return the error of values that no quantizer takes, with the place where they are."""
    kind = ValueError if bool(values.isfinite().all()) else FloatingPointError
    return kind(f"{where}: {error}")


def check_blocks(role: str, spec: QuantSpec | None, length: int, what: str) -> None:
    """Raise ValueError unless a quantizer's blocks lie within a dimension that a product sums.

    Args:
        role: the operand's role.
        spec: its quantizer.
        length: the length of the dimension.
        what: the product and the dimension, for the message.
    """
    if spec is None or spec.block_size is None:
        return
    if length < spec.block_size:
        raise ValueError(f"{what}, fewer than the {spec.block_size} of a block of {role}: lower block_size")
    if spec.layout == "flat" and length % spec.block_size:
        raise ValueError(
            f"{what}, which blocks of {spec.block_size} do not divide: layout=flat would let blocks of {role} run over "
            "several sums; take layout=row"
        )


def describe_role(spec: QuantSpec, fields: Mapping[str, Any]) -> str:
    """Return a role's quantizer in a few characters: its name, and of the fields what the name does not tell."""
    told = ("bits", "data_type", "exponent_bits", "signed", "zero")
    others = {name: value for name, value in fields.items() if name not in told}
    more = ",".join(f"{name}={value}" for name, value in others.items())
    return spec.label() + (f"({more})" if more else "")
