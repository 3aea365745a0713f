"""What can be known of an experiment before it runs: are its files there, and its texts long enough?

Nothing here loads torch, so that a study is looked through while it is planned.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kbit.data.data_files import check_files
from kbit.data.task_files import EMBEDDED_TASKS, expand_names, find_local_tasks, list_task_files, read_plainly
from kbit.data.texts import locate_text, read_documents
from kbit.experiments.config import Experiment
from kbit.layers.run_time.residual_types import check_residual
from kbit.models.catalog import STUDIED, locate_model, locate_tokenizer
from kbit.models.checkpoint_files import check_adapter, check_model, has_chat_template
from kbit.models.config import MAX_WINDOW, ModelConfig
from kbit.models.size import (
    find_cached_folder,
    find_context,
    find_layer_count,
    find_model_type,
    find_packed,
    find_size,
    is_of_other_tool,
)
from kbit.training.held_out import count_needed

# No tokenizer has tokens so long on average, so that a text of this many bytes for each asked token is long enough.
_LONG_TOKEN: Final = 32
_WEIGHT_BYTES: Final = 2  # of a 16-bit weight: a file has as many or more


def check_model_files(model: ModelConfig) -> None:
    """Look for a model, its tokenizer and its adapter.

    Raises:
        ValueError, OSError: see check_model, locate_tokenizer and check_adapter.
    """
    check_model(model.name, model.revision, model.gguf_file)
    if model.tokenizer is not None:
        locate_tokenizer(model.tokenizer)
    if model.adapter is not None:
        check_adapter(model.adapter)


def check_download_space(models: Iterable[ModelConfig]) -> None:
    """Raise OSError if the disk of the hub's cache is too full for the models that are still to be downloaded.

    A studied model has two bytes a parameter at least. Any other one counts as nothing, as it may be stored in fewer
    bits than its name tells of.
    """
    from huggingface_hub import constants

    sizes = {}
    studied = {*STUDIED, *(model.hub_id for model in STUDIED.values())}
    for model in dict.fromkeys(models):
        place = locate_model(model.name)
        if not Path(place).is_dir() and find_cached_folder(place, model.revision) is None:
            size = find_size(model.name) if model.name in studied else None
            sizes[model.name] = _WEIGHT_BYTES * size.parameters if size else 0
    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free, needed = shutil.disk_usage(there).free, sum(sizes.values())
    if needed > free:
        raise OSError(
            f"{', '.join(sizes)}: to be downloaded are {needed / 1e9:.1f} GB at least, and {free / 1e9:.1f} GB are "
            f"free at {there}; HF_HOME names another place"
        )


def check_not_packed(experiments: Iterable[Experiment]) -> None:
    """Raise ValueError if a model would be quantized again that kbit packed, or that another tool quantized."""
    for model in {experiment.model for experiment in experiments if not experiment.quant.is_unchanged}:
        is_packed = find_packed(model.name, model.revision) is not None
        if is_packed or is_of_other_tool(model.name, model.revision):
            raise ValueError(describe_packed(model.name))


def check_packing(experiment: Experiment, gpus: float | None = None) -> None:
    """Look whether a model can be packed while it is loaded, if packed=true asks for it.

    Args:
        experiment: the experiment.
        gpus: ray.gpus_per_worker.

    Raises:
        ValueError: its quantizer gives no codes, or its model is not read from plain safetensors onto one device.
    """
    if experiment.packed_as is None:
        return
    model = experiment.model
    try:
        experiment.quant.check_packable()
    except ValueError as error:
        raise ValueError(f"packed=true: {error}") from None
    gguf = check_model(model.name, model.revision, model.gguf_file)
    asked = {"model.adapter": model.adapter, "model.gguf_file": None if gguf is None else gguf.name}
    asked |= {"ray.gpus_per_worker": f"{gpus:g}" if gpus and gpus > 1 else None}
    for key, value in asked.items():
        if value is not None:
            raise ValueError(f"{key}={value}: packed=true reads plain safetensors onto one device")


def check_rotation(experiment: Experiment) -> None:
    """Raise ValueError if a model's residual stream would be rotated, and its type does not allow it."""
    name = experiment.model.name
    if experiment.quant.rotation_words and experiment.quant.rotation == "residual":
        model_type = find_model_type(name)
        if model_type is not None:  # otherwise it is known once the model is downloaded
            check_residual(model_type, name)


def check_stages(experiment: Experiment) -> None:
    """Raise ValueError if a training has more pipeline stages than the model has decoder layers."""
    train, name = experiment.train, experiment.model.name
    if train.sends_between_stages:
        layers = find_layer_count(name)
        if layers is not None and train.stages > layers:
            raise ValueError(f"train.stages={train.stages}: {name} has {layers} decoder layers")


def describe_packed(name: str) -> str:
    """Return the error of a quantized model that would be quantized again."""
    tool = "quantized by another tool" if is_of_other_tool(name) else "packed by kbit"
    return (
        f"model.name={name} is {tool} already, and is not quantized again: quant.bits=16 evaluates it as it is. "
        "Quantize the model that it was made of"
    )


def check_tasks(experiment: Experiment) -> None:
    """Look for the data files of the user's own tasks, and for the chat template that prompts go through.

    Raises:
        ValueError, FileNotFoundError: see check_files, or a file is outside eval.task_path, or there is no template.
    """
    config, model = experiment.eval, experiment.model
    place = Path(locate_tokenizer(model.tokenizer or model.name))
    if config.tasks and config.apply_chat_template and place.is_dir() and not has_chat_template(place):
        raise ValueError(f"eval.apply_chat_template: the tokenizer of {place} has no chat template")
    if config.task_path is None:
        return
    local = find_local_tasks(config.task_path)
    states = [(path, path.stat()) for path in list_task_files(config.task_path)]
    changes = tuple((str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns) for path, state in states)
    for name in expand_names(config.tasks, config.task_path):
        if name in local and EMBEDDED_TASKS not in local[name].parents:
            _check_task(local[name], changes)


@functools.lru_cache(maxsize=256)
def _check_task(path: Path, _changes: tuple[tuple[str, int, int, int], ...]) -> None:
    """Look for the data files of a task once, until a file of its folder changes."""
    try:
        check_files(read_plainly(path), path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_lengths(experiment: Experiment) -> None:
    """Compare the texts with the windows that are cut from them, and calibration windows with the model's context.

    Raises:
        ValueError: a calibration window, or what eval.speed generates, is longer than the model's context. Or a text is
            shorter than one window, than all windows that are drawn from it, or than a batch and the windows that
            a training holds back.
    """
    context = find_context(experiment.model.name)
    if experiment.eval.speed.measure:
        experiment.eval.speed.check_context(context)
    calibration, quant = experiment.quant.calibration, experiment.quant
    if quant.sees_text:
        if calibration.length is not None and context is not None and calibration.length > context:
            raise ValueError(
                f"quant.calibration.length={calibration.length} is beyond the model's context of {context} tokens"
            )
        length = calibration.length or min(context or 1, MAX_WINDOW)
        _check_text(calibration.text, length, experiment.model, calibration.samples)
    if experiment.train.steps:
        _check_training(experiment, context)
    if experiment.eval.perplexity is not None and experiment.eval.perplexity_kind == "windows":
        _check_text(experiment.eval.perplexity, min(context or 1, MAX_WINDOW), experiment.model)


def _check_training(experiment: Experiment, context: int | None) -> None:
    """Raise ValueError if a training's windows are longer than the context, or its text is too short for a batch."""
    train = experiment.train
    if train.context is not None and context is not None and train.context > context:
        raise ValueError(f"train.context={train.context} is beyond the model's context of {context} tokens")
    length = train.context or min(context or 1, MAX_WINDOW)
    needed = count_needed(train.batch_size)
    _check_text(train.text, length, experiment.model, needed, "train.text", "train.batch_size + held-back windows")


def _check_text(
    name: str,
    window: int,
    model: ModelConfig,
    windows: int = 1,
    key: str = "quant.calibration.text",
    asked: str = "quant.calibration.samples",
) -> None:
    """Raise ValueError if a local text has fewer tokens than so many windows.

    Args:
        name: the text.
        window: tokens of a window.
        model: the model, whose tokenizer counts.
        windows: how many windows there must be.
        key: the key that names the text.
        asked: the key that asks for so many windows.
    """
    if locate_text(name) is None:
        return
    documents, _ = read_documents(name)
    if sum(len(document.encode()) for document in documents) >= _LONG_TOKEN * window * windows:
        return
    count = _count_tokens(tuple(documents), locate_tokenizer(model.tokenizer or model.name))
    if count is None or count >= window * windows:
        return
    if count < window:
        raise ValueError(f"text {name!r} has {count} tokens, less than one window of {window}")
    raise ValueError(f"{key}={name!r} has {count // window} windows of {window} tokens, less than {asked}={windows}")


@functools.lru_cache(maxsize=16)
def _count_tokens(documents: tuple[str, ...], place: str) -> int | None:
    """Return the most tokens that documents have, one more for each. None: the tokenizer is not in a file here."""
    file = Path(place) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer  # not at the top: most texts are long enough

    tokenizer = Tokenizer.from_file(str(file))
    return sum(1 + len(tokenizer.encode(document, add_special_tokens=False).ids) for document in documents)
