"""Quantizers of values that exist for a moment in a training: activations, gradients, exchanged gradients.

Nothing here loads torch, as configurations are checked by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor


def check_transient(role: str, spec: QuantSpec) -> None:
    """Raise ValueError if a quantizer cannot be for values that are other ones in each step.

    A fitted table would have to be fitted anew each time. Gradients are small: a mean over thousands of tokens puts
    whole blocks below 6e-8, where float16 scales end.
    """
    if spec.data_type in ADAPTIVE:
        raise ValueError(
            f"{role}: data_type={spec.data_type} is fitted to a tensor, and {role} are other ones in each step: take a "
            "data type with a fixed table, such as int, float, nf or dynamic"
        )
    if role != "activations" and spec.scale_format == "fp16":
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
