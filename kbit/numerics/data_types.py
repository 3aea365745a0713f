"""The codebook of each data type, for arguments that come from outside: they are checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kbit.checks import check_choice
from kbit.numerics import fitted_codebooks
from kbit.numerics.codebooks import (
    DATA_TYPES,
    FLOAT_BIASES,
    PAPER_EXPONENT_BITS,
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
) -> Codebook:
    """Return the codebook of a data type: sorted float32 values within [-1, 1].

    Args:
        data_type: int, float, dynamic, quantile, nf, af, learned or table.
        bits: bits of a code, 2..8.
        exponent_bits: exponent bits of float, 1..bits-1. None is the paper's choice (PAPER_EXPONENT_BITS).
        float_bias: where the subnormals of float lie: "ieee" as in OCP's formats, "bnb" at 1/4 of that (bitsandbytes'
            create_fp8_map), "paper" at 1/16 (its Appendix A and bitsandbytes' FP4).
        block_size: the block size that the code of af is optimal for.
        table: the user's values, for data type table.
        tensor: the tensor of a quantile codebook, or the normalised values of a learned one (array or torch tensor).
        seed: seed of the sample that k-means sees, for learned.

    Raises:
        ValueError: a value outside its allowed set, or an argument that the data type needs and does not get, or
            a tensor that is empty or holds NaN or Inf.
    """
    check_choice("data_type", data_type, DATA_TYPES)
    check_bits(bits)
    match data_type:
        case "int":
            return int_codebook(bits)
        case "float":
            check_choice("float_bias", float_bias, FLOAT_BIASES)
            exponent_bits = PAPER_EXPONENT_BITS[bits] if exponent_bits is None else exponent_bits
            return float_codebook(bits, exponent_bits, float_bias)
        case "dynamic":
            return dynamic_codebook(bits)
        case "nf":
            return nf_codebook(bits)
        case "af":
            return as_codebook(fitted_codebooks.af_values(bits, _needed("af", block_size=block_size)))
        case "quantile":
            return as_codebook(fitted_codebooks.quantile_values(bits, _as_numbers(_needed("quantile", tensor=tensor))))
        case "learned":
            values = _as_numbers(_needed("learned", tensor=tensor)).ravel()
            return as_codebook(fitted_codebooks.learned_values(bits, values.astype(np.float32, copy=False), seed))
        case _:
            return table_codebook(bits, _needed("table", table=table))


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
