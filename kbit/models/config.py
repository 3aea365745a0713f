"""Which model: the fields of model, their types and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kbit.checks import check_choice

DTYPES: Final = ("float32", "bfloat16", "float16")
MAX_WINDOW: Final = 2048  # tokens, as in quantization papers. A model of shorter context has shorter windows.


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and the dtype that it computes in.

    Attributes:
        name: a short name (see `kbit models`), a local folder or a hub id.
        dtype: float32, bfloat16 or float16. The weights are 16-bit values in each case.
    """

    name: str = "nano-neox-98k"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
