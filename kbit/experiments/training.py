"""Training within an experiment: before the model is quantized, or beside its quantized weights as adapters.

weights     load -> train -> round to 16 bits -> quantize -> measure
adapters    load -> quantize -> put adapters in -> train these -> measure
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from kbit.data.texts import read_documents
from kbit.data.windows import Windows
from kbit.evaluation.measure import Measured, Memory, check_read
from kbit.evaluation.measurement import Measurement, TextRecord, encode_items, measure_mean
from kbit.evaluation.perplexity import measure_cross_entropy
from kbit.evaluation.token_budget import TokenBudget
from kbit.experiments.config import Experiment
from kbit.experiments.identity import identify_text, name_content
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model, restore_weights
from kbit.methods.report import QuantizationReport, plan_quantization
from kbit.models.config import MAX_WINDOW
from kbit.models.loading import LoadedModel
from kbit.models.size import CONTEXT_FIELDS
from kbit.numerics.spec import BASELINE_BITS
from kbit.optim.stable_embedding import embedding_stable
from kbit.training.adapters import adapters_in, list_targets, save_adapters
from kbit.training.batches import Tokens, TrainingText, split_text, tokenize_stream
from kbit.training.config import TrainConfig
from kbit.training.files import TrainingFiles
from kbit.training.trainer import Trained, randomize, train_model

TASK: Final = "training"  # the task of what is known of a training
UNSEEN: Final = "training/unseen"  # the windows that a training holds back from its text


class KeptStreams(dict[str, tuple[Tokens, str]]):
    """The texts trained on so far as tokens, with the hash of their content, by what identifies them."""


@dataclass
class KeptTraining:
    """The last training of a model's weights, which the next experiment may share if it only rounds them differently.

    Attributes:
        content: what decides the training: its fields, and the names of the rounded weights.
        trained: how it went.
        weights: the trained weights by name.
    """

    content: tuple[object, ...] = ()
    trained: Trained | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedModel:
    """A model that was trained and quantized.

    Attributes:
        report: what was quantized. Of a diverged training it is the plan.
        trained: how the training went.
        text: what it was trained on.
        text_record: the name and hash of the whole text, and the windows that are held back.
    """

    report: QuantizationReport
    trained: Trained
    text: TrainingText
    text_record: TextRecord


@contextmanager
def trained_and_quantized(
    experiment: Experiment,
    key: str,
    loaded: LoadedModel,
    stored: QuantizationReport | None,
    memory: Memory,
    files: TrainingFiles | None,
) -> Iterator[TrainedModel]:
    """Train and quantize a model, which is what the experiment measures within the block.

    Adapters are taken out again at its end. Weights are not: the caller restores them.

    Args:
        experiment: the experiment, with a training.
        key: its key, by which a checkpoint is its own.
        loaded: the model.
        stored: the report of a model that was loaded quantized, or None of one that is to be quantized.
        memory: what is kept between experiments on one model.
        files: where to keep the training. None keeps nothing.

    Raises:
        ValueError: see read_training_text, train_model, quantize_model and list_targets.
    """
    model, train, quant = loaded.model, experiment.train, experiment.quant
    text, sha256 = read_training_text(train, loaded, memory)
    record = TextRecord(train.text, sha256, *text.held.shape)
    kept: dict[str, Any] = {"checkpoint": files.checkpoint if files else None, "content": {"key": key}}
    if train.lora.rank:
        list_targets(model, train.lora.targets)  # an unknown one is refused before methods take their time
        report = stored or quantize_model(model, quant, loaded.tokenizer)
        with adapters_in(model, train.lora, train.seed):
            trained = round_trained(model, train_model(model, text, train, **kept), loaded.checkpoint_dtype)
            if files is not None and not trained.diverged:
                save_adapters(model, files.adapters)
            yield TrainedModel(report, trained, text, record)
        return
    with embedding_stable(model) if train.stable_embedding else contextlib.nullcontext():
        trained = train_weights(loaded, train, quant, text, memory.recall(KeptTraining), **kept)
        make_report = plan_quantization if trained.diverged else quantize_model
        arguments = (model, quant) if trained.diverged else (model, quant, loaded.tokenizer)
        yield TrainedModel(make_report(*arguments), trained, text, record)


def train_weights(
    loaded: LoadedModel, train: TrainConfig, quant: QuantConfig, text: TrainingText, last: KeptTraining, **kept: Any
) -> Trained:
    """Train a model's weights, or give them the values of the last training if it was the same.

    Args:
        loaded: the model.
        train: the training.
        quant: what the weights are quantized to afterwards.
        text: the text of the training.
        last: the last training, which this one replaces.
        kept: where train_model keeps a checkpoint.
    """
    model, rounded = loaded.model, list_rounded(loaded.model, train, quant)
    content = (dataclasses.replace(train, checkpoint_every=1), identify_text(train.text), tuple(rounded))
    if last.trained is not None and last.content == content:
        restore_weights(model, last.weights)
        return last.trained
    last.content, last.trained, last.weights = (), None, {}  # its memory is free while the model trains
    with all_trained(model):
        if train.start == "random":
            randomize(model, train.seed, stable_embedding=train.stable_embedding)
        trained = train_model(model, text, train, rounded=rounded, **kept)
        trained = round_trained(model, trained, loaded.checkpoint_dtype)
    last.content, last.trained = content, trained
    last.weights = {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}
    return trained


def read_training_text(train: TrainConfig, loaded: LoadedModel, memory: Memory) -> tuple[TrainingText, str]:
    """Return the text of a training, and the hash of its content.

    Raises:
        ValueError: the text was changed while it was read, or is shorter than a batch.
    """
    kept, identity = memory.recall(KeptStreams), identify_text(train.text)
    if identity not in kept:
        documents, sha256 = read_documents(train.text)
        check_read(train.text, name_content(train.text, sha256), identity)
        kept[identity] = (tokenize_stream(documents, loaded.tokenizer), sha256)
    stream, sha256 = kept[identity]
    context = train.context or min(MAX_WINDOW, find_context(loaded.model))
    return split_text(stream, batch_size=train.batch_size, context=context, name=train.text), sha256


def find_context(model: Any) -> int:
    """Return the most tokens that a model's positions are for, or MAX_WINDOW if it has no limit."""
    config = model.config.get_text_config(decoder=True)
    return next((int(value) for name in CONTEXT_FIELDS if (value := getattr(config, name, None))), MAX_WINDOW)


def list_rounded(model: nn.Module, train: TrainConfig, quant: QuantConfig) -> list[str]:
    """Return the names of the parameters that a quantization-aware training rounds: those that quant quantizes.

    Raises:
        ValueError: train.include names none of them, or one of them is tied to another layer's.
    """
    if not train.is_aware:
        return []
    asked = QuantConfig.of(train.weights) if quant.is_baseline else quant
    names = [tensor.name for tensor in plan_quantization(model, asked).tensors if tensor.quantized]
    if train.include is not None:
        names = [name for name in names if re.search(train.include, name.removesuffix(".weight"))]
        if not names:
            raise ValueError(f"train.include={train.include!r} names no layer that is quantized")
    if tied := [name for name in names if " = " in name]:
        raise ValueError(f"{tied[0]} are tied, and a training cannot round one layer's alone: quant.include, exclude")
    return names


@contextmanager
def all_trained(model: nn.Module) -> Iterator[None]:
    """Let every parameter require gradients within the block."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_()
    try:
        yield
    finally:
        for parameter, trains in wanted.items():
            parameter.requires_grad_(trains)


@torch.no_grad()
def round_trained(model: nn.Module, trained: Trained, dtype: str) -> Trained:
    """Round what was trained to 16 bits, as every model is that kbit loads: its bits are counted so.

    Returns:
        How the training went. One whose weights are not finite, or are beyond the dtype, has diverged.
    """
    is_finite = True
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(getattr(torch, dtype)))
            is_finite &= bool(parameter.isfinite().all())
    return dataclasses.replace(trained, diverged=trained.diverged or not is_finite)


def measure_training(model: Any, done: TrainedModel, budget: TokenBudget) -> Measured:
    """Return what is known of a training: its numbers, its curve, and the loss on what it held back of its text."""
    trained = done.trained
    adapters = BASELINE_BITS * trained.trainable if _has_adapters(model) else 0
    exact = {
        "diverged": float(trained.diverged),
        "loss_spikes": trained.spikes,
        "steps": len(trained.losses),
        "trainable": trained.trainable,
        "tokens": trained.tokens,
        "adapter_bits": adapters,
        "state_bits_per_param": trained.state_bits / trained.trainable,
    }
    exact |= {metric: value for metric, value in trained.numbers.items() if math.isfinite(value)}
    numbers = [Measurement(TASK, metric, value, math.nan, math.nan, 1) for metric, value in exact.items()]
    items = [encode_items(TASK, "curve", trained.curve)] if all(map(math.isfinite, trained.losses)) else []
    items += [encode_items(TASK, metric, values) for metric, values in trained.curves.items()]
    if trained.diverged:
        return Measured(numbers, items, records={"training_text": done.text_record})
    numbers.insert(0, measure_mean(TASK, "loss", trained.last))
    unseen = Windows(
        UNSEEN, done.text_record.sha256, done.text.held, 1.0
    )  # bytes_per_token: bits per byte are left out
    scores = measure_cross_entropy(model, unseen, budget)
    numbers += [measured for measured in scores.measurements if measured.metric != "bits_per_byte"]
    records = {"training_text": done.text_record}
    return Measured(numbers, [*items, *scores.items], unseen.tokens.numel(), records)


def _has_adapters(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())
