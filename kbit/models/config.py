"""Which model: the fields of model, their types and their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kbit.checks import check_choice

DTYPES: Final = ("float32", "bfloat16", "float16")
MAX_WINDOW: Final = 2048  # tokens, as in quantization papers. A model of shorter context has shorter windows.
UNITS: Final = {"k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and the dtype that it computes in.

    Attributes:
        name: a short name (see `kbit models`), a local folder or a hub id.
        dtype: float32, bfloat16 or float16. The weights are 16-bit values in each case.
        revision: a branch, tag or commit of a hub id. None takes the newest.
        tokenizer: a folder, hub id or short name whose tokenizer is used. None takes the model's own.
        adapter: a folder or hub id of a PEFT adapter, which is merged into the weights before they are rounded.
        gguf_file: the name of a GGUF file in the model's folder. None takes the only one of a folder without
            safetensors.
        family: the curve that the model belongs to. None derives it from the name (kbit.models.catalog.family_of).
        size: the number of parameters (1.3b) of a model whose files are not here and whose name does not tell it, for
            estimates of memory and time.
    """

    name: str = "nano-neox-98k"
    dtype: str = "float32"
    revision: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    gguf_file: str | None = None
    family: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        for name in ("revision", "tokenizer", "adapter", "gguf_file", "family"):
            if getattr(self, name) == "":
                raise ValueError(f"model.{name} is empty")
        if self.size is not None:
            read_count(self.size)

    @property
    def parts(self) -> dict[str, str]:
        """The parts of a checkpoint that are not its default, as load_model takes them."""
        named = {name: getattr(self, name) for name in ("revision", "tokenizer", "adapter", "gguf_file")}
        return {name: value for name, value in named.items() if value is not None}


def read_count(text: str) -> int:
    """Return a number of parameters: 1300000000, 1.3b, 350M.

    Raises:
        ValueError: the text is no such number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text, re.IGNORECASE)
    count = round(float(found.group(1)) * UNITS.get(found.group(2).lower(), 1)) if found else 0
    if count < 1:
        raise ValueError(f"model.size={text!r} is no number of parameters, such as 350m, 1.3b or 1300000000")
    return count
