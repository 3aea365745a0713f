"""How large a model is, from the files that are here, else by its name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from kbit.models.catalog import locate_model
from kbit.models.checkpoint_files import is_packed_by_kbit, read_json
from kbit.models.config import MAX_WINDOW, UNITS, read_count

_NAMED_SIZE: Final = re.compile(r"(?:^|[-_])(\d+)(?:\.(\d+))?([kmb])(\d*)(?=$|[-_])", re.IGNORECASE)  # 125m, 1.3b, 7b1

CONTEXT_FIELDS: Final = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")

# Hidden states of one token that are in memory at once within a decoder layer: residual stream, its norm, queries,
# keys, values, attention's output, 4 + 4 of the inner layer, and 2 spare.
STATES_PER_TOKEN: Final = 16

# Published sizes of models whose names have none.
_NAMELESS: Final = {
    "gpt2": 124_000_000,
    "gpt2-medium": 355_000_000,
    "gpt2-large": 774_000_000,
    "gpt2-xl": 1_558_000_000,
    "bloom": 176_000_000_000,
    "bloomz": 176_000_000_000,
}

# A decoder layer has 12 hidden^2 parameters, and transformers have about one layer for each 100 of their hidden size
# (GPT-3's sizes: 64 to 128). So parameters = 0.12 hidden^3.
_PARAMETERS_PER_CUBE: Final = 0.12


@dataclass(frozen=True)
class ModelSize:
    """Properties of a model that determine memory and run time.

    Attributes:
        parameters: the number of parameters, where tied ones count once. The name tells it if the model is not here.
        hidden: the size of the residual stream.
        context: the number of tokens that the model takes at once.
        vocabulary: the number of its tokenizer's tokens, or None if that is not known.
    """

    parameters: int
    hidden: int
    context: int
    vocabulary: int | None


def find_size(name: str, given: str | None = None) -> ModelSize | None:
    """Return the size of a model by its folder, its files in the hub's cache, or its name. None: none of them tells it.

    No weights are read, as a safetensors file begins with the shapes of its tensors.

    Args:
        name: the model's name.
        given: the number of parameters that the user gave, see read_count. The files win, the name does not.
    """
    folder = _find_folder(name)
    stored = _count_stored(folder) if folder else None
    parameters = stored or (_read_name(name) if given is None else read_count(given))
    if parameters is None:
        return None
    config = read_json(folder / "config.json") if folder else {}
    guess = round((parameters / _PARAMETERS_PER_CUBE) ** (1 / 3))
    return ModelSize(
        parameters,
        hidden=_first(config, "hidden_size", "n_embd") or guess,
        context=_first(config, *CONTEXT_FIELDS) or MAX_WINDOW,
        vocabulary=_first(config, "vocab_size"),
    )


def _find_folder(name: str) -> Path | None:
    """Return the folder of a model's files if they are here."""
    try:
        place = locate_model(name)
    except ValueError:
        return None
    folder: Path | None = Path(place)
    if folder is not None and not folder.is_dir():
        folder = find_cached_folder(place)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def find_context(name: str) -> int | None:
    """Return the number of tokens that a model takes at once, or None if no configuration here tells it."""
    folder = _find_folder(name)
    config = read_json(folder / "config.json") if folder else {}
    return _first(config, *CONTEXT_FIELDS)


def find_cached_folder(hub_id: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's files in the hub's cache, if they are there."""
    from huggingface_hub import try_to_load_from_cache  # takes time that models in folders need not wait for

    cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def find_commit(hub_id: str, revision: str | None = None) -> str:
    """Return the commit of a hub's model that is in the cache, as its folder there is named.

    Raises:
        FileNotFoundError: the model is not in the cache.
    """
    folder = find_cached_folder(hub_id, revision)
    if folder is None:
        raise FileNotFoundError(f"model {hub_id} ({revision or 'main'}) is not in the hub's cache")
    return folder.name


def find_packed(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model that kbit has packed. None: it is a plain one, or one that is not here yet.

    Args:
        name: a short name, a folder or a hub id, of which the hub's cache is looked at.
        revision: a branch, tag or commit of a hub id.

    Raises:
        ValueError: the name is unknown.
    """
    place = locate_model(name)
    folder = Path(place) if Path(place).is_dir() else find_cached_folder(place, revision)
    return folder if folder is not None and is_packed_by_kbit(folder) else None


def _count_stored(folder: Path) -> int | None:
    """Return the number of elements in a folder's safetensors files. None: there are none, or one is damaged."""
    try:
        return sum(_count_elements(path) for path in folder.glob("model*.safetensors")) or None
    except (OSError, SafetensorError):  # loading the model will say what is wrong
        return None


def _count_elements(path: Path) -> int:
    """Return the number of elements in a safetensors file, of which only the header is read."""
    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


def _read_name(name: str) -> int | None:
    """Return the number of parameters that a name states: opt-125m, pythia-1.4b-v0, bloom-7b1 (7.1 billion)."""
    last = name.rpartition("/")[2]
    if last in _NAMELESS:
        return _NAMELESS[last]
    found = _NAMED_SIZE.search(last)
    if found is None:
        return None
    whole, fraction, unit, tenths = found.groups()
    return round(float(f"{whole}.{fraction or tenths or 0}") * UNITS[unit.lower()])


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)
