"""How large a model is, from the files that are here, else by its name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from kbit.models.catalog import locate_model
from kbit.models.checkpoint_files import is_packed_by_kbit, is_readable, read_json
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
        embedded: the number of parameters in matrices with a row for each token (the embedding, and a head that is not
            tied), or None if the files are not here.
        largest: the number of parameters of the largest tensor, in which experts of one layer count together as they
            are loaded. None if the files are not here.
        inner: the size of the inner layer of a decoder layer, or None if no file here tells it.
    """

    parameters: int
    hidden: int
    context: int
    vocabulary: int | None
    embedded: int | None = None
    largest: int | None = None
    inner: int | None = None


def find_size(name: str, given: str | None = None) -> ModelSize | None:
    """Return the size of a model by its folder, its files in the hub's cache, or its name. None: none of them tells it.

    No weights are read, as a safetensors file begins with the shapes of its tensors.

    Args:
        name: the model's name.
        given: the number of parameters that the user gave, see read_count. The files win, the name does not.
    """
    folder = _find_folder(name)
    shapes = _read_shapes(folder) if folder else {}
    stored = sum(map(math.prod, shapes.values()))
    parameters = stored or (_read_name(name) if given is None else read_count(given))
    if parameters is None:
        return None
    config = read_json(folder / "config.json") if folder else {}
    vocabulary = _first(config, "vocab_size")
    guess = round((parameters / _PARAMETERS_PER_CUBE) ** (1 / 3))
    return ModelSize(
        parameters,
        hidden=_first(config, "hidden_size", "n_embd") or guess,
        context=_first(config, *CONTEXT_FIELDS) or MAX_WINDOW,
        vocabulary=vocabulary,
        embedded=sum(math.prod(s) for s in shapes.values() if s[:1] == (vocabulary,)) if shapes else None,
        largest=_find_largest(shapes) if shapes else None,
        inner=_first(config, "intermediate_size", "ffn_dim", "n_inner"),
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


def find_model_type(name: str) -> str | None:
    """Return the type of a model that its configuration names, such as llama, or None if none is here."""
    folder = _find_folder(name)
    return read_json(folder / "config.json").get("model_type") if folder else None


def find_layer_count(name: str) -> int | None:
    """Return the number of decoder layers that a model's configuration names, or None if none names it."""
    folder = _find_folder(name)
    config = read_json(folder / "config.json") if folder else {}
    return _first(config.get("text_config", config), "num_hidden_layers", "n_layer", "n_layers", "num_layers")


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
    folder = find_files(name, revision)
    return folder if folder is not None and is_packed_by_kbit(folder) else None


def is_of_other_tool(name: str, revision: str | None = None) -> bool:
    """Whether a model was quantized by another tool whose weights kbit reads. See find_packed for the arguments."""
    folder = find_files(name, revision)
    return folder is not None and (folder / "config.json").is_file() and is_readable(read_json(folder / "config.json"))


def find_files(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's files, if they are here. See find_packed for the arguments."""
    place = locate_model(name)
    return Path(place) if Path(place).is_dir() else find_cached_folder(place, revision)


def _read_shapes(folder: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the shape of each tensor of a folder, by its file and name. It is empty if a file is damaged.

    Only the headers of the files are read.
    """
    shapes = {}
    try:
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    shapes[path.name, name] = tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError):  # loading the model will say what is wrong
        return {}
    return shapes


def _find_largest(shapes: Mapping[tuple[str, str], Sequence[int]]) -> int:
    """Return the number of elements of the largest tensor. A layer's experts are loaded as one."""
    together: Counter[str] = Counter()
    for (_, name), shape in shapes.items():
        layer, is_expert, _ = name.partition(".experts.")
        together[layer if is_expert else name] += math.prod(shape)
    return max(together.values())


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
