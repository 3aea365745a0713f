"""How large a model is, and what memory a worker with it needs: from the files that are here, else by its name."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kbit.models.catalog import locate_model
from kbit.models.config import MAX_WINDOW

_UNITS: Final = {"k": 1e3, "m": 1e6, "b": 1e9}


_NAMED_SIZE: Final = re.compile(r"(?:^|[-_])(\d+)(?:\.(\d+))?([kmb])(\d*)(?=$|[-_])", re.IGNORECASE)  # 125m, 1.3b, 7b1


# Published sizes of models whose names have none.
_NAMELESS: Final = {
    "gpt2": 124_000_000,
    "gpt2-medium": 355_000_000,
    "gpt2-large": 774_000_000,
    "gpt2-xl": 1_558_000_000,
    "bloom": 176_000_000_000,
    "bloomz": 176_000_000_000,
}


# A block has 12 hidden^2 parameters, and transformers have about one block for each 100 of their hidden size (GPT-3's
# sizes: 64 to 128): parameters = 0.12 hidden^3.
_PARAMETERS_PER_CUBE: Final = 0.12


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides memory and time.

    Attributes:
        parameters: tied ones counted once; of a model that is not here, by its name.
        hidden: size of the residual stream.
        context: tokens that it takes at once.
        vocabulary: tokens of its tokenizer; None if that is not known.
    """

    parameters: int
    hidden: int
    context: int
    vocabulary: int | None


def find_size(name: str) -> ModelSize | None:
    """Return the size of a model by its folder, its files in the hub's cache, or its name; None if none of them tells.

    Reads no weights: a safetensors file begins with the shapes of its tensors.
    """
    folder = _find_folder(name)
    stored = _count_stored(folder) if folder else None
    parameters = stored or _read_name(name)
    if parameters is None:
        return None
    config = json.loads((folder / "config.json").read_text()) if folder else {}
    guess = round((parameters / _PARAMETERS_PER_CUBE) ** (1 / 3))
    return ModelSize(
        parameters,
        hidden=_first(config, "hidden_size", "n_embd") or guess,
        context=_first(config, "max_position_embeddings", "n_positions", "seq_length") or MAX_WINDOW,
        vocabulary=_first(config, "vocab_size"),
    )


def _find_folder(name: str) -> Path | None:
    """Return where a model's files are, as far as they are here."""
    try:
        place = locate_model(name)
    except ValueError:
        return None
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache  # which models that are here need not wait for

        cached = try_to_load_from_cache(place, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "config.json").is_file() else None


def _count_stored(folder: Path) -> int | None:
    """Return the elements in a folder's safetensors files; None if there are none, or one is damaged."""
    try:
        return sum(_count_elements(path) for path in folder.glob("model*.safetensors")) or None
    except (OSError, ValueError, struct.error):  # that it cannot be loaded is said when it is
        return None


def _count_elements(path: Path) -> int:
    """Return the elements of a safetensors file: 8 bytes of length, then JSON with a shape for each tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _read_name(name: str) -> int | None:
    """Return the parameters that a name states: opt-125m, pythia-1.4b-v0, bloom-7b1 (7.1 billion)."""
    last = name.rpartition("/")[2]
    if last in _NAMELESS:
        return _NAMELESS[last]
    found = _NAMED_SIZE.search(last)
    if found is None:
        return None
    whole, fraction, unit, tenths = found.groups()
    return round(float(f"{whole}.{fraction or tenths or 0}") * _UNITS[unit.lower()])


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)
