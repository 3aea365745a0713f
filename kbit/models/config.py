"""Which model: the fields of model, their types and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kbit.checks import check_choice

DTYPES: Final = ("float32", "bfloat16", "float16")


MAX_WINDOW: Final = 2048  # tokens: what quantization papers use; less where the model's context is shorter


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and the dtype it computes in.

    Attributes:
        name: short name (see `kbit models`), local folder or hub id.
        dtype: float32, bfloat16 or float16; the weights are 16-bit values in each case.
    """

    name: str = "nano-neox-98k"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
