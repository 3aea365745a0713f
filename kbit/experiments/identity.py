"""The identity of an experiment: its key, made from what decides its numbers and from the files that it reads.

    key = first 16 hexadecimal digits of sha256(JSON of the identity fields, with files named by their content)

A configuration names a model, tasks and texts, and opens no file. This module alone reads the files behind those names
to identify them, so that a copy of a file at another path has the same key, and an edited file has another one. A plan
keeps the keys (kbit.engine.plan): an experiment whose files change between planning and running is an error.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kbit.data.task_files import list_own_names, list_task_files
from kbit.data.text_files import read_bytes
from kbit.data.texts import is_json_lines, list_embedded_texts, locate_text
from kbit.evaluation.measure_sources import identify_measures
from kbit.experiments.config import Experiment
from kbit.models.catalog import STUDIED, locate_tokenizer
from kbit.models.checkpoint_files import find_gguf
from kbit.models.config import ModelConfig

_KEY_DIGITS: Final = 16  # 64 bits: among a million experiments two keys are equal once in 37 million studies
_MEBIBYTE: Final = 2**20
_VOCABULARIES: Final = (".model", ".txt", ".jinja")  # files of a tokenizer beside its JSON


def find_key(experiment: Experiment) -> str:
    """Return the experiment's key in the store, as its files are now."""
    return _hash_fields(identify_experiment(experiment))


def check_unchanged(experiment: Experiment, key: str) -> dict[str, dict[str, Any]]:
    """Hash the experiment's files again and return its identity fields. Raise if the planned key no longer fits.

    Raises:
        ValueError: a file was changed after the study was planned, or check_texts refuses the experiment.
    """
    check_texts(experiment)
    fields = identify_experiment(experiment)
    if _hash_fields(fields) != key:
        model = [experiment.model.name, *experiment.model.parts.values()]
        files = [*model, *experiment.texts, experiment.eval.task_path, *experiment.eval.measures]
        raise ValueError(
            f"one of {', '.join(str(file) for file in files if file)} has changed since {key} was planned, so that its "
            "result would belong to another key: plan the study again"
        )
    return fields


def check_texts(experiment: Experiment) -> None:
    """Raise ValueError if the experiment would calibrate, or train, on the text that it measures."""
    measured = experiment.eval.perplexity
    for key, seen in experiment.seen_texts.items():
        if measured is not None and identify_text(seen) == identify_text(measured):
            raise ValueError(f"{key}={seen!r} is the text that is measured: {measured!r}")


def identify_experiment(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return Experiment.identity_fields with every model, task and text named by its content."""
    fields = experiment.identity_fields
    model, quant, evaluation = fields["model"], fields["quant"], fields["eval"]
    model.pop("gguf_file", None)
    model |= identify_parts(experiment.model)
    if evaluation.get("apply_chat_template"):
        evaluation["apply_chat_template"] = identify_chat_template(experiment.model)
    evaluation["tasks"] = identify_tasks(evaluation["tasks"], experiment.eval.task_path)
    if "perplexity" in evaluation:
        evaluation["perplexity"] = identify_text(evaluation["perplexity"])
    if "measures" in evaluation:
        evaluation["measures"] = identify_measures(evaluation["measures"])
    if "calibration" in quant:
        quant["calibration"]["text"] = identify_text(quant["calibration"]["text"])
    if "train" in fields:
        fields["train"]["text"] = identify_text(fields["train"]["text"])
    return fields


def identify_parts(model: ModelConfig) -> dict[str, str]:
    """Return what identifies a model and the parts of its checkpoint that are not its default, by content.

    A GGUF file is named by its content in the model's name, so that its file name does not count.
    """
    parts = {name: value for name, value in model.parts.items() if name != "gguf_file"}
    parts |= {
        name: identify_model(parts[name], others=_VOCABULARIES) for name in ("tokenizer", "adapter") if name in parts
    }
    return parts | {"name": identify_model(model.name, model.gguf_file)}


def identify_chat_template(model: ModelConfig) -> str | bool:
    """Return the hash of a local tokenizer's file of a chat template, or True if the template is in its JSON files."""
    path = Path(locate_tokenizer(model.tokenizer or model.name)) / "chat_template.jinja"
    return hash_file(path) if path.is_file() else True


def identify_model(name: str, gguf_file: str | None = None, others: Sequence[str] = ()) -> str:
    """Return a model's name, or for a local folder the last part of its path with a fingerprint of its files.

    The fingerprint covers each configuration and weight file's name, size, first and last mebibyte: planning a study
    must not read all weights. The result of an experiment has the hash of all of them.

    Args:
        name: the model's name.
        gguf_file: see ModelConfig.
        others: suffixes of further files that count.
    """
    folder = Path(name)
    if name in STUDIED or not folder.is_dir():
        return name
    digest = hashlib.sha256()
    gguf = find_gguf(folder, gguf_file)
    counted = {".json", *others} | ({".safetensors"} if gguf is None else set())
    paths = [path for path in folder.iterdir() if path.suffix in counted]
    for path in sorted(paths if gguf is None else [*paths, gguf]):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_MEBIBYTE)
            file.seek(max(0, size - _MEBIBYTE))
            name = "gguf" if path == gguf else path.name  # copies of one GGUF file have all kinds of names
            digest.update(f"{name} {size}".encode() + head + file.read())
    return f"{folder.resolve().name}@{digest.hexdigest()[:16]}"


def identify_tasks(names: Sequence[str], task_path: str | None) -> list[str]:
    """Return the sorted names of tasks, where a user's own task or group carries the hash of its folder's content."""
    if task_path is None:
        return sorted(names)
    own = list_own_names(task_path)
    if not own & set(names):
        return sorted(names)
    digest = hashlib.sha256()
    for path in list_task_files(task_path):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    folder_hash = digest.hexdigest()[:16]
    return sorted(f"{name}@{folder_hash}" if name in own else name for name in names)


def identify_text(name: str) -> str:
    """Return the name of an embedded text or of a hub's text, or for a file the sha256 of its content.

    A file with the documents of an embedded text, at any path, is that text. Two files of one content are one text too,
    and their results carry the name of the file that was measured first. JSON lines are marked, since the same bytes in
    a .txt file would be one document.
    """
    path = locate_text(name)
    return name if path is None or name in list_embedded_texts() else name_content(name, hash_file(path))


def name_content(name: str, sha256: str) -> str:
    """Return the identity that the text of this name has if its content has this hash, see identify_text."""
    path = locate_text(name)
    if path is None:
        return name
    return _name_embedded().get(sha256, f"{sha256}.jsonl") if is_json_lines(path) else sha256


@functools.cache
def _name_embedded() -> dict[str, str]:
    """Return the name of each embedded text by the hash of its content. Installed files do not change."""
    return {hash_file(path): name for name, path in list_embedded_texts().items()}


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's uncompressed content. A changed file is hashed again."""
    state = path.stat()  # an editor may keep the size, and `cp -p` the time of modification, but not that of the change
    return _hash_state(path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _hash_state(path: Path, *_state: int) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _hash_fields(fields: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]
