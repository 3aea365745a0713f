"""The schemes of multiplication in int8, by the names of LLM.int8() (Dettmers et al. 2022), Table 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ZERO_POINT_BITS: Final = 8  # an integer in -127..127


@dataclass(frozen=True)
class Scheme:
    """How a method multiplies in int8 (kbit.methods.llm_int8).

    Attributes:
        input_rows: whether each token has constants of its own, or all tokens share one.
        weight_rows: whether each output has constants of its own, or all outputs share one.
        zero_point: whether values are shifted.
        decomposes: whether input dimensions with large activations are multiplied at 16 bits.
    """

    input_rows: bool
    weight_rows: bool
    zero_point: bool = False
    decomposes: bool = False

    @property
    def sees_whole_input(self) -> bool:
        """Whether an output depends on more of a layer's input than its own token: on what else is in the batch."""
        return self.decomposes or not self.input_rows


# The names are those of LLM.int8(), Table 1.
SCHEMES: Final = {
    "absmax": Scheme(input_rows=False, weight_rows=False),
    "zeropoint": Scheme(input_rows=False, weight_rows=False, zero_point=True),
    "rowwise": Scheme(input_rows=True, weight_rows=False),
    "vectorwise": Scheme(input_rows=True, weight_rows=True),
    "zeropoint_vectorwise": Scheme(input_rows=True, weight_rows=True, zero_point=True),
    "rowwise_decomposition": Scheme(input_rows=True, weight_rows=False, decomposes=True),
    "llm_int8": Scheme(input_rows=True, weight_rows=True, decomposes=True),
    "zeropoint_llm_int8": Scheme(input_rows=True, weight_rows=True, zero_point=True, decomposes=True),
}
