"""Run one experiment: load, quantize, evaluate, and keep what is known of it in one typed record."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import torch

from kbit import provenance
from kbit.config import EvalConfig, Experiment, ModelConfig
from kbit.coverage import QuantizationReport, plan_quantization
from kbit.evaluation import PreparedTask, TaskScores, prepare_task, score_tasks
from kbit.families import family_of
from kbit.features import Feature, measure_features
from kbit.measurement import ItemValues, Measurement
from kbit.methods import copy_weights, quantize_model, restore_weights
from kbit.methods.llm_int8 import describe_products
from kbit.models import LoadedModel, hash_weights, load_model
from kbit.perplexity import (
    MAX_WINDOW,
    Reference,
    TextScores,
    Windows,
    compute_reference,
    make_windows,
    measure_cross_entropy,
    measure_rolling,
)
from kbit.scorer import Scorer
from kbit.tasks import LoadedTask, load_tasks
from kbit.textdata import read_documents

FIRST_TOKENS: Final = 64  # recorded of a task's first request: enough to see a tokenizer's or a prompt's fault


@dataclass(frozen=True)
class TaskRecord:
    """Which data a task's numbers come from, and what of it the model was sent.

    Attributes:
        name, version, source, sha256, fingerprint: see LoadedTask.
        truncated: requests that lost tokens to the model's context length.
        first_tokens: of the first request, context and continuation, at most 64.
    """

    name: str
    version: str
    source: str
    sha256: str
    fingerprint: str
    truncated: int
    first_tokens: tuple[int, ...]


@dataclass(frozen=True)
class TextRecord:
    """Which tokens a cross entropy comes from: all windows of one length, or (rolling, length 0) whole documents."""

    name: str
    sha256: str
    windows: int
    window_length: int


@dataclass(frozen=True)
class SkippedTensor:
    """A matrix that was not quantized, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Result:
    """All that is known of one finished experiment.

    Attributes:
        key: experiment.key.
        experiment: its full configuration.
        family, architecture: of the model.
        parameters, quantized_parameters: tied tensors counted once.
        total_bits: whole model; bits_per_param: of the quantized tensors, scales and codebooks included.
        coverage: share of the block matrices' parameters that is quantized; skipped: matrices that are not.
        measurements: every measured number.
        model_revision: see LoadedModel; checkpoint_dtype: the 16-bit dtype the weights were rounded to.
        weights_hash: of the model's weights as they were evaluated.
        tasks, text: identity of the data.
        truncated: requests that lost tokens to the model's context length.
        versions, git_commit, device, threads: of the software and the machine.
        seconds_quantize, seconds_evaluate, peak_memory_bytes: cost.
        finished: UTC, ISO 8601.
        items: correctness of each item of a task, cross entropy of each window of the text, for paired comparisons;
            empty in results from before they were kept.
        scorer: how log-likelihoods were computed, see kbit.scorer; batch_tokens: at once, after any lack of memory.
        features: the dimensions that are large most often, if eval.features asks for them, see kbit.features.
        weight_rmse: relative error of the quantized weights, see QuantizationReport; None in results from before.
        method_notes: what the method says of itself, see QuantizationReport.notes.
    """

    key: str
    experiment: Experiment
    family: str
    architecture: str
    parameters: int
    quantized_parameters: int
    total_bits: int
    bits_per_param: float
    coverage: float
    skipped: tuple[SkippedTensor, ...]
    measurements: tuple[Measurement, ...]
    model_revision: str
    checkpoint_dtype: str
    weights_hash: str
    tasks: tuple[TaskRecord, ...]
    text: TextRecord | None
    truncated: int
    versions: dict[str, str]
    git_commit: str
    device: str
    threads: int
    seconds_quantize: float
    seconds_evaluate: float
    peak_memory_bytes: int
    finished: str
    items: tuple[ItemValues, ...] = ()
    scorer: str = ""
    batch_tokens: int = 0
    features: tuple[Feature, ...] = ()
    weight_rmse: float | None = None
    method_notes: dict[str, Any] = field(default_factory=dict)


class Session:
    """A loaded model with its tasks and texts, kept between the experiments that share them.

    Raises:
        ValueError, OSError: see load_model.
    """

    def __init__(self, model: ModelConfig, device: str = "cpu") -> None:
        self.config = model
        self.device = device
        self._loaded: LoadedModel = load_model(model.name, dtype=model.dtype, device=device)
        self._scorer = Scorer(self._loaded.model, self._loaded.tokenizer)
        self._tasks: dict[tuple[tuple[str, ...], int | None, str | None], list[PreparedTask]] = {}
        self._windows: dict[tuple[str, int | None], Windows] = {}
        self._hidden: dict[tuple[str, int | None], torch.Tensor] = {}  # of the 16-bit model, see compute_reference

    def run(self, experiment: Experiment) -> Result:
        """Quantize, evaluate, restore the weights, and return the result.

        Raises:
            ValueError: experiment.model is another model; or see quantize_model.
            NonFiniteError: see evaluate. The weights are restored in each case.
        """
        if experiment.model != self.config:
            raise ValueError(f"this session holds {self.config}, not {experiment.model}")
        model, quant = self._loaded.model, experiment.quant
        reference = self._make_reference(experiment)  # while the weights have 16 bits
        original = copy_weights(model, plan_quantization(model, quant))
        try:
            start = time.perf_counter()
            report = quantize_model(model, quant, self._loaded.tokenizer)
            quantized = time.perf_counter()
            result = self._evaluate(experiment, report, reference)
            return dataclasses.replace(
                result,
                seconds_quantize=quantized - start,
                seconds_evaluate=time.perf_counter() - quantized,
                peak_memory_bytes=provenance.peak_memory_bytes(self.device),
            )
        finally:
            restore_weights(model, original)

    def _evaluate(self, experiment: Experiment, report: QuantizationReport, reference: Reference | None) -> Result:
        model, config = self._loaded.model, experiment.eval
        weights_hash = hash_weights(model)
        self._scorer.set_batch_size(config.batch_size, row_by_row=experiment.quant.sees_whole_input)
        tasks = self._prepare_tasks(config)
        scores = score_tasks(self._scorer, tasks)
        text, of_text = self._measure_text(config, reference)
        features, of_features = self._measure_features(config)
        if hash_weights(model) != weights_hash:  # lm-eval can tie weights behind one's back
            raise RuntimeError("the weights changed during the evaluation: its numbers belong to no quantizer")
        result = self._describe(experiment, report)
        return dataclasses.replace(
            result,
            measurements=(*scores.measurements, *of_text.measurements, *of_features),
            features=tuple(features),
            items=(*scores.items, *of_text.items),
            weights_hash=weights_hash,
            tasks=tuple(_record_task(prepared.loaded, scores) for prepared in tasks),
            text=text,
            truncated=sum(scores.truncated.values()),
        )

    def _describe(self, experiment: Experiment, report: QuantizationReport) -> Result:
        """Return the record without what is measured."""
        skipped = [t for t in report.tensors if not t.quantized and len(t.shape) >= 2]
        return Result(
            key=experiment.key,
            experiment=experiment,
            family=family_of(experiment.model.name),
            architecture=type(self._loaded.model).__name__,
            parameters=report.parameters,
            quantized_parameters=report.quantized_parameters,
            total_bits=report.total_bits,
            bits_per_param=report.bits_per_param,
            coverage=report.coverage,
            skipped=tuple(SkippedTensor(t.name, t.shape, t.reason) for t in skipped),
            measurements=(),
            model_revision=self._loaded.revision,
            checkpoint_dtype=self._loaded.checkpoint_dtype,
            weights_hash="",
            tasks=(),
            text=None,
            truncated=0,
            versions=provenance.package_versions(),
            git_commit=provenance.git_commit(),
            device=provenance.describe_device(self.device),
            threads=torch.get_num_threads(),
            seconds_quantize=0.0,
            seconds_evaluate=0.0,
            peak_memory_bytes=0,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            scorer=self._scorer.path,
            batch_tokens=self._scorer.budget.tokens,
            weight_rmse=report.weight_rmse,
            method_notes=report.notes | describe_products(self._loaded.model),
        )

    def _prepare_tasks(self, config: EvalConfig) -> list[PreparedTask]:
        wanted = (config.tasks, config.limit, config.task_path)
        if wanted not in self._tasks:
            loaded = load_tasks(config.tasks, config.task_path) if config.tasks else []
            self._tasks[wanted] = [prepare_task(task, config.limit) for task in loaded]
        return self._tasks[wanted]

    def _measure_text(self, config: EvalConfig, reference: Reference | None) -> tuple[TextRecord | None, TextScores]:
        """Measure the text that the configuration asks for, if any, and say which tokens it has."""
        if config.perplexity is None:
            return None, TextScores([], [])
        if config.perplexity_kind == "rolling":
            documents, sha256 = read_documents(config.perplexity)
            scores = measure_rolling(self._scorer, config.perplexity, documents)
            return TextRecord(config.perplexity, sha256, len(documents), 0), scores
        windows = self._make_windows(config.perplexity, config.perplexity_windows)
        scores = measure_cross_entropy(self._loaded.model, windows, self._scorer.budget, reference)
        return TextRecord(windows.name, windows.sha256, *windows.tokens.shape), scores

    def _measure_features(self, config: EvalConfig) -> tuple[list[Feature], list[Measurement]]:
        """Look for emergent features if the configuration asks for it."""
        if not config.features.measure or config.perplexity is None:
            return [], []
        windows = self._make_windows(config.perplexity, config.perplexity_windows)
        return measure_features(self._loaded.model, windows, self._scorer.budget, config.features)

    def _make_windows(self, text: str, most: int | None) -> Windows:
        if (text, most) not in self._windows:
            context = min(MAX_WINDOW, int(self._scorer.max_length))
            self._windows[text, most] = make_windows(text, self._loaded.tokenizer, context=context, max_windows=most)
        return self._windows[text, most]

    def _make_reference(self, experiment: Experiment) -> Reference | None:
        """Return the 16-bit model's states on the text: computed once, kept for every variant."""
        model: Any = self._loaded.model
        config = experiment.eval
        if config.perplexity is None or config.perplexity_kind != "windows" or self._scorer.path == "hflm":
            return None
        self._scorer.set_batch_size(config.batch_size)
        wanted = (config.perplexity, config.perplexity_windows)
        windows = self._make_windows(*wanted)
        if wanted not in self._hidden:
            self._hidden[wanted] = compute_reference(model, windows, self._scorer.budget)
        head = model.get_output_embeddings()
        # quant.include is the only way to quantize a head; the copy is of the head as it was
        return Reference(self._hidden[wanted], head if experiment.quant.include is None else copy.deepcopy(head))


def _record_task(task: LoadedTask, scores: TaskScores) -> TaskRecord:
    sent = scores.first_tokens[task.name][:FIRST_TOKENS]
    truncated = scores.truncated[task.name]
    return TaskRecord(task.name, task.version, task.source, task.sha256, task.fingerprint, truncated, sent)


def run_experiment(experiment: Experiment, device: str = "cpu") -> Result:
    """Run one experiment from scratch; see Session to run several on one model."""
    return Session(experiment.model, device).run(experiment)
