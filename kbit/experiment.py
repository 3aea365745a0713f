"""Run one experiment: load, quantize, evaluate, and keep what is known of it in one typed record."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from kbit import provenance
from kbit.config import EvalConfig, Experiment, ModelConfig
from kbit.evaluation import PreparedTask, prepare_task, score_tasks
from kbit.families import family_of
from kbit.measurement import ItemValues, Measurement
from kbit.models import (
    LoadedModel,
    QuantizationReport,
    copy_weights,
    hash_weights,
    load_model,
    plan_quantization,
    quantize_model,
    restore_weights,
)
from kbit.perplexity import MAX_WINDOW, Windows, make_windows, measure_cross_entropy
from kbit.scorer import Scorer
from kbit.tasks import LoadedTask, load_tasks


@dataclass(frozen=True)
class TaskRecord:
    """Which data a task's numbers come from."""

    name: str
    version: str
    source: str
    sha256: str
    revision: str


@dataclass(frozen=True)
class TextRecord:
    """Which tokens a cross entropy comes from."""

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
        weight_rmse: relative error of the quantized weights, see QuantizationReport; None in results from before.
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
    weight_rmse: float | None = None


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

    def run(self, experiment: Experiment) -> Result:
        """Quantize, evaluate, restore the weights, and return the result.

        Raises:
            ValueError: experiment.model is another model; or see quantize_model.
            NonFiniteError: see evaluate. The weights are restored in each case.
        """
        if experiment.model != self.config:
            raise ValueError(f"this session holds {self.config}, not {experiment.model}")
        model, quant = self._loaded.model, experiment.quant
        options = {"include": quant.include, "exclude": quant.exclude}
        original = copy_weights(model, plan_quantization(model, quant.spec, **options))
        try:
            start = time.perf_counter()
            report = quantize_model(model, quant.spec, **options, min_coverage=quant.min_coverage)
            quantized = time.perf_counter()
            result = self._evaluate(experiment, report)
            return dataclasses.replace(
                result,
                seconds_quantize=quantized - start,
                seconds_evaluate=time.perf_counter() - quantized,
                peak_memory_bytes=provenance.peak_memory_bytes(self.device),
            )
        finally:
            restore_weights(model, original)

    def _evaluate(self, experiment: Experiment, report: QuantizationReport) -> Result:
        model, config = self._loaded.model, experiment.eval
        weights_hash = hash_weights(model)
        self._scorer.truncated = 0
        self._scorer.batch_size_per_gpu = config.batch_size
        tasks = self._prepare_tasks(config)
        scores = score_tasks(self._scorer, tasks)
        measurements, items = scores.measurements, scores.items
        windows = self._make_windows(config)
        if windows is not None:
            of_text = measure_cross_entropy(model, windows, batch_size=config.batch_size)
            measurements, items = measurements + of_text.measurements, items + of_text.items
        if hash_weights(model) != weights_hash:  # lm-eval can tie weights behind one's back
            raise RuntimeError("the weights changed during the evaluation: its numbers belong to no quantizer")
        return Result(
            key=experiment.key,
            experiment=experiment,
            family=family_of(experiment.model.name),
            architecture=type(model).__name__,
            parameters=report.parameters,
            quantized_parameters=report.quantized_parameters,
            total_bits=report.total_bits,
            bits_per_param=report.bits_per_param,
            coverage=report.coverage,
            skipped=tuple(
                SkippedTensor(t.name, t.shape, t.reason)
                for t in report.tensors
                if not t.quantized and len(t.shape) >= 2
            ),
            measurements=tuple(measurements),
            model_revision=self._loaded.revision,
            checkpoint_dtype=self._loaded.checkpoint_dtype,
            weights_hash=weights_hash,
            tasks=tuple(_record_task(prepared.loaded) for prepared in tasks),
            text=None if windows is None else TextRecord(windows.name, windows.sha256, *windows.tokens.shape),
            truncated=self._scorer.truncated,
            versions=provenance.package_versions(),
            git_commit=provenance.git_commit(),
            device=provenance.describe_device(self.device),
            threads=torch.get_num_threads(),
            seconds_quantize=0.0,
            seconds_evaluate=0.0,
            peak_memory_bytes=0,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            items=tuple(items),
            weight_rmse=report.weight_rmse,
        )

    def _prepare_tasks(self, config: EvalConfig) -> list[PreparedTask]:
        wanted = (config.tasks, config.limit, config.task_path)
        if wanted not in self._tasks:
            loaded = load_tasks(config.tasks, config.task_path) if config.tasks else []
            self._tasks[wanted] = [prepare_task(task, config.limit) for task in loaded]
        return self._tasks[wanted]

    def _make_windows(self, config: EvalConfig) -> Windows | None:
        if config.perplexity is None:
            return None
        wanted = (config.perplexity, config.perplexity_windows)
        if wanted not in self._windows:
            context = min(MAX_WINDOW, int(self._scorer.max_length))
            self._windows[wanted] = make_windows(
                config.perplexity, self._loaded.tokenizer, context=context, max_windows=config.perplexity_windows
            )
        return self._windows[wanted]


def _record_task(task: LoadedTask) -> TaskRecord:
    return TaskRecord(task.name, task.version, task.source, task.sha256, task.revision)


def run_experiment(experiment: Experiment, device: str = "cpu") -> Result:
    """Run one experiment from scratch; see Session to run several on one model."""
    return Session(experiment.model, device).run(experiment)
