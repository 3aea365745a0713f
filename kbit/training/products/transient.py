"""Rounding values that exist for a moment in a training: activations, gradients, and weights as products see them."""

from __future__ import annotations

import dataclasses
import hashlib

from torch import Tensor

from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec


def with_own_seed(spec: QuantSpec, label: str) -> QuantSpec:
    """Return the quantizer with random numbers that depend on its seed and a label, the same in every process."""
    if spec.rounding != "stochastic":
        return spec
    own = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big")
    return dataclasses.replace(spec, seed=(spec.seed + own) % 2**63)


def round_values(values: Tensor, spec: QuantSpec, where: str) -> Tensor:
    """Return fake_quantize(values, spec).

    Raises:
        FloatingPointError: a value is NaN or Inf, as those of a training that diverges are. The message says where.
        ValueError: a block is beyond the scales' range.
    """
    try:
        return fake_quantize(values, spec)
    except ValueError as error:
        raise explain_refusal(values, where, error) from error


def explain_refusal(values: Tensor, where: str, error: ValueError) -> Exception:
    """Return the error of values that no quantizer takes, with the place where they are."""
    kind = ValueError if bool(values.isfinite().all()) else FloatingPointError
    return kind(f"{where}: {error}")
