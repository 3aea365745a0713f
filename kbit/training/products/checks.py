"""What quantizers of activations, gradients and exchanged gradients may be. Nothing here loads torch."""

from __future__ import annotations

from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.spec import QuantSpec


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
