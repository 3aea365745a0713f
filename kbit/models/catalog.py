"""The studied model families: short names, and where their weights are.

Embedded models ship inside the package and need no network. All others are Hugging Face hub ids.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

EMBEDDED: Final = Path(str(files("kbit"))) / "assets" / "models"


@dataclass(frozen=True)
class StudiedModel:
    """One size of a family.

    Attributes:
        name: the short name, as in model.name.
        family: the curve that the model belongs to.
        hub_id: the Hugging Face id, or None for an embedded model.
    """

    name: str
    family: str
    hub_id: str | None = None


def _hub_family(family: str, organisation: str, names: str) -> list[StudiedModel]:
    return [StudiedModel(name, family, f"{organisation}/{name}") for name in names.split()]


_NANO_FAMILIES: Final = ("nano-gpt2", "nano-opt", "nano-bloom")  # the paper's other architectures, see kbit/nano
_PYTHIA_SIZES: Final = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")

# The paper (December 2022) used Pythia before its retraining of April 2023: the weights that are now named -v0. Weights
# of OPT-175B are given on request only, so that they need a local path. Hub ids are those of November 2026.
STUDIED: Final[dict[str, StudiedModel]] = {
    model.name: model
    for model in [
        *(StudiedModel(f"nano-neox-{size}", "nano-neox") for size in ("98k", "332k", "1m", "3m", "7m")),
        *(StudiedModel(f"{family}-{size}", family) for family in _NANO_FAMILIES for size in ("98k", "332k", "1m")),
        StudiedModel("nano-stories-260k", "nano-stories"),
        *_hub_family("pythia", "EleutherAI", " ".join(f"pythia-{size}-v0" for size in _PYTHIA_SIZES)),
        StudiedModel("gpt-neox-20b", "pythia", "EleutherAI/gpt-neox-20b"),
        *_hub_family("pythia-v1", "EleutherAI", " ".join(f"pythia-{size}" for size in _PYTHIA_SIZES)),
        *_hub_family("opt", "facebook", "opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b opt-13b opt-30b opt-66b"),
        *_hub_family("bloom", "bigscience", "bloom-560m bloom-1b1 bloom-1b7 bloom-3b bloom-7b1 bloom"),
        *_hub_family("bloomz", "bigscience", "bloomz-560m bloomz-1b1 bloomz-1b7 bloomz-3b bloomz-7b1 bloomz"),
        *_hub_family("gpt2", "openai-community", "gpt2 gpt2-medium gpt2-large gpt2-xl"),
    ]
}


# Folders of one training run, which do not say what was trained.
_CHECKPOINT: Final = re.compile(
    r"((checkpoint|ckpt|step|global_?step|epoch|iter)[-_]?)?\d+|checkpoints?|final|last|best|latest|hf|model|merged",
    re.IGNORECASE,
)


def family_of(name: str, given: str | None = None, parts: Mapping[str, str] | None = None) -> str:
    """Return the family that a model's results are drawn with.

    The family is the given one, that of a studied model, or the last part of the name. The checkpoints of a training
    run are named by the run's folder (see name_run), as those of another run are another family. A revision, adapter or
    tokenizer makes a family of its own, as its numbers compare with none of the plain models'.
    """
    if given is not None:
        return given
    changed = {part: value for part, value in (parts or {}).items() if part != "gguf_file"}
    if changed:
        return " ".join([family_of(name), *(f"{part}={name_run(Path(value))}" for part, value in changed.items())])
    if name in STUDIED:
        return STUDIED[name].family
    return name_run(Path(name).resolve()) if Path(name).is_dir() else Path(name).name


def name_run(folder: Path) -> str:
    """Return what names a local model: runs/a for runs/a/checkpoint-1000, and otherwise its folder's name."""
    if not _CHECKPOINT.fullmatch(folder.name):
        return folder.name
    while _CHECKPOINT.fullmatch(folder.name) and folder.parent.name:
        folder = folder.parent
    return "/".join(part for part in folder.parts[-2:] if part != folder.anchor)


def locate_model(name: str) -> str:
    """Return what transformers loads for a short name, a local folder or a hub id.

    Raises:
        ValueError: the name is none of these. The message has the short names that are near.
    """
    if name in STUDIED:
        hub_id = STUDIED[name].hub_id
        return str(EMBEDDED / name) if hub_id is None else hub_id
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    near = difflib.get_close_matches(name, STUDIED, n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ValueError(
        f"model.name={name!r} is neither a short name, nor a folder here, nor a hub id 'organisation/name'; "
        f"{hint}`kbit models` lists the short names"
    )


def locate_tokenizer(name: str) -> str:
    """Return what transformers loads for a tokenizer's short name, folder or hub id, see locate_model."""
    try:
        return locate_model(name)
    except ValueError as error:
        raise ValueError(str(error).replace("model.name", "model.tokenizer", 1)) from None
