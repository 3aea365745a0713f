"""The codebook of each data type, for arguments that come from outside: they are checked here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kbit.checks import check_choice
from kbit.numerics import fitted_codebooks
from kbit.numerics.codebooks import (
    FLOAT_BIASES,
    PAPER_EXPONENT_BITS,
    UNSIGNED,
    Codebook,
    as_codebook,
    check_bits,
    dynamic_codebook,
    float_codebook,
    int_codebook,
    nf_codebook,
    table_codebook,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What a codebook is made from. The arguments of make_codebook describe the fields."""

    bits: int
    exponent_bits: int | None = None
    float_bias: str = "ieee"
    block_size: int | None = None
    table: Sequence[float] | None = None
    tensor: Any = None
    seed: int = 0
    signed: bool = True
    zero: bool = True


def make_codebook(
    data_type: str,
    bits: int,
    *,
    exponent_bits: int | None = None,
    float_bias: str = "ieee",
    block_size: int | None = None,
    table: Sequence[float] | None = None,
    tensor: Any = None,
    seed: int = 0,
    signed: bool = True,
    zero: bool = True,
) -> Codebook:
    """Return the codebook of a data type: sorted float32 values within [-1, 1].

    Args:
        data_type: int, float, dynamic, quantile, nf, af, learned, table, or a registered one.
        bits: bits of a code, 2..8.
        exponent_bits: exponent bits of float, 1..bits-1. None is the paper's choice (PAPER_EXPONENT_BITS).
        float_bias: where the subnormals of float lie: "ieee" as in OCP's formats, "bnb" at 1/4 of that (bitsandbytes'
            create_fp8_map), "paper" at 1/16 (its Appendix A and bitsandbytes' FP4).
        block_size: the block size that the code of af is optimal for.
        table: the user's values, for data type table.
        tensor: the tensor of a quantile codebook, or the normalised values of a learned one (array or torch tensor).
        seed: seed of the sample that k-means sees, for learned.
        signed: whether there are values below 0. False: int, dynamic and table alone.
        zero: whether 0 is a value. False: only if unsigned.

    Raises:
        ValueError: a value outside its allowed set, or an argument that the data type needs and does not get, or
            a tensor that is empty or holds NaN or Inf.
    """
    check_choice("data_type", data_type, tuple(DATA_TYPES))
    check_bits(bits)
    check_signs(data_type, signed=signed, zero=zero)
    wanted = Wanted(bits, exponent_bits, float_bias, block_size, table, tensor, seed, signed, zero)
    codebook = DATA_TYPES[data_type](wanted)
    if not 1 <= len(codebook) <= 2**bits or (np.diff(codebook) <= 0).any() or np.abs(codebook).max() > 1:
        raise ValueError(f"data_type {data_type!r} gives no table of 1..{2**bits} rising values within [-1, 1]")
    return codebook


def check_signs(data_type: str, *, signed: bool, zero: bool) -> None:
    """Raise ValueError if the data type has no table without negative values, or without 0."""
    if not signed and data_type not in UNSIGNED:
        raise ValueError(f"signed=false is for {', '.join(UNSIGNED)}: data_type={data_type} has values below 0")
    if signed and not zero:
        raise ValueError("zero=false is for tables without values below 0: it needs signed=false")


def register_data_type(name: str, make: Callable[[Wanted], Codebook]) -> None:
    """Add a data type under a name, for quant.data_type and kbit.codebook.

    Its table is the same for all tensors, and a power-of-two scale is the one at or above a block's largest magnitude.

    Raises:
        ValueError: there is a data type of this name.
    """
    if name in DATA_TYPES:
        raise ValueError(f"there is a data type {name!r} already")
    DATA_TYPES[name] = make


def _make_float(wanted: Wanted) -> Codebook:
    check_choice("float_bias", wanted.float_bias, FLOAT_BIASES)
    exponent_bits = PAPER_EXPONENT_BITS[wanted.bits] if wanted.exponent_bits is None else wanted.exponent_bits
    return float_codebook(wanted.bits, exponent_bits, wanted.float_bias)


def _make_af(wanted: Wanted) -> Codebook:
    return as_codebook(fitted_codebooks.af_values(wanted.bits, _needed("af", block_size=wanted.block_size)))


def _make_quantile(wanted: Wanted) -> Codebook:
    values = _as_numbers(_needed("quantile", tensor=wanted.tensor))
    return as_codebook(fitted_codebooks.quantile_values(wanted.bits, values))


def _make_learned(wanted: Wanted) -> Codebook:
    values = _as_numbers(_needed("learned", tensor=wanted.tensor)).ravel().astype(np.float32, copy=False)
    return as_codebook(fitted_codebooks.learned_values(wanted.bits, values, wanted.seed))


def _make_table(wanted: Wanted) -> Codebook:
    values = _needed("table", table=wanted.table)
    return table_codebook(wanted.bits, values, signed=wanted.signed, zero=wanted.zero)


# Name in quant.data_type -> how its codebook is made
DATA_TYPES: Final[dict[str, Callable[[Wanted], Codebook]]] = {
    "int": lambda wanted: int_codebook(wanted.bits, signed=wanted.signed, zero=wanted.zero),
    "float": _make_float,
    "dynamic": lambda wanted: dynamic_codebook(wanted.bits, signed=wanted.signed, zero=wanted.zero),
    "quantile": _make_quantile,
    "nf": lambda wanted: nf_codebook(wanted.bits),
    "af": _make_af,
    "learned": _make_learned,
    "table": _make_table,
}


def _needed(data_type: str, **argument: T | None) -> T:
    """Return the one argument, which this data type cannot do without."""
    ((name, value),) = argument.items()
    if value is None:
        raise ValueError(f"data_type {data_type!r} needs {name}=")
    return value


def _as_numbers(tensor: Any) -> NDArray[Any]:
    """Return an array or a torch tensor, which must hold numbers, as an array."""
    if hasattr(tensor, "detach"):  # without importing torch, which this module does not need
        tensor = tensor.detach().float().cpu().numpy()
    values: NDArray[Any] = tensor
    if values.size == 0:
        raise ValueError(f"tensor of shape {values.shape} has no elements to fit a codebook to")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {values.size} values of the tensor are NaN or Inf")
    return values
