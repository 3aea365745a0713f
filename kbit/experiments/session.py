"""Run one experiment: load, quantize, evaluate, and keep what is known of it in one typed record."""

from __future__ import annotations

import copy
import dataclasses
import time
from datetime import UTC, datetime
from typing import Any, Final

import torch

from kbit.data.tasks import LoadedTask, load_tasks
from kbit.data.texts import read_documents
from kbit.data.windows import Windows, make_windows
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import Feature, Measurement
from kbit.evaluation.outlier_features import measure_features
from kbit.evaluation.perplexity import Reference, TextScores, compute_reference, measure_cross_entropy, measure_rolling
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import PreparedTask, PreparedTasks, TaskScores, prepare_task, score_tasks
from kbit.experiments import provenance
from kbit.experiments.config import Experiment
from kbit.experiments.identity import check_unchanged, find_key, identify_model, identify_tasks, name_content
from kbit.experiments.result import Result, SkippedTensor, TaskRecord, TextRecord
from kbit.methods.llm_int8 import describe_products
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.methods.report import QuantizationReport, plan_quantization
from kbit.models.catalog import family_of
from kbit.models.config import MAX_WINDOW, ModelConfig
from kbit.models.loading import LoadedModel, load_model
from kbit.models.parameters import hash_weights

FIRST_TOKENS: Final = 64  # recorded of a task's first request: enough to see a tokenizer's or a prompt's fault


class Session:
    """A loaded model with its tasks and texts, kept between the experiments that share them.

    What is kept is found again by its content, as the experiment's key has it, so that a result never holds numbers of
    a file that has been edited since.

    Args:
        prepared: of an earlier session, to render and tokenize the same tasks once.
        gpus: see load_model.

    Raises:
        ValueError: the model's folder was changed while it was read; or see load_model.
        OSError: see load_model.
    """

    def __init__(
        self, model: ModelConfig, device: str = "cpu", prepared: PreparedTasks | None = None, gpus: int = 1
    ) -> None:
        self.config = model
        self.device = device
        self._identity = identify_model(model.name)
        self._loaded: LoadedModel = load_model(model.name, dtype=model.dtype, device=device, gpus=gpus)
        _check_read(model.name, identify_model(model.name), self._identity)
        self._scorer = Scorer(self._loaded.model, self._loaded.tokenizer)
        self._prepared = PreparedTasks() if prepared is None else prepared
        self._scorer.tokens = self._prepared.tokens_of(self._scorer.identify_tokenizer())
        self._windows: dict[tuple[str, str, int | None], Windows] = {}
        # the 16-bit model's states on the last text, see compute_reference: gigabytes, so of no more than one
        self._hidden: tuple[tuple[str, str, int | None], torch.Tensor] | None = None

    def holds(self, model: ModelConfig) -> bool:
        """Whether this is the session of that model, as its files are now."""
        return model == self.config and identify_model(model.name) == self._identity

    def run(self, experiment: Experiment, key: str | None = None) -> Result:
        """Quantize, evaluate, restore the weights, and return the result.

        Args:
            experiment: what to run.
            key: the experiment's key as it was planned; None finds it now.

        Raises:
            ValueError: experiment.model is another model; a file is no longer what the experiment's key was computed
                from; or see quantize_model.
            NonFiniteError: see evaluate. The weights are restored in each case.
        """
        key = find_key(experiment) if key is None else key
        content = check_unchanged(experiment, key)
        if not self.holds(experiment.model):
            raise ValueError(f"this session holds {self.config} ({self._identity}), not {experiment.model}")
        model, quant = self._loaded.model, experiment.quant
        data = content["eval"]
        reference = self._make_reference(experiment, data)  # while the weights have 16 bits
        original = copy_weights(model, plan_quantization(model, quant))
        try:
            start = time.perf_counter()
            report = quantize_model(model, quant, self._loaded.tokenizer)
            quantized = time.perf_counter()
            result = self._evaluate(experiment, data, report, reference)
            return dataclasses.replace(
                result,
                key=key,
                seconds_quantize=quantized - start,
                seconds_evaluate=time.perf_counter() - quantized,
                peak_memory_bytes=provenance.peak_memory_bytes(self.device),
            )
        finally:
            restore_weights(model, original)

    def _evaluate(
        self, experiment: Experiment, data: dict[str, Any], report: QuantizationReport, reference: Reference | None
    ) -> Result:
        model, config = self._loaded.model, experiment.eval
        weights_hash = hash_weights(model)
        self._scorer.set_batch_size(config.batch_size)
        tasks = self._prepare_tasks(config, data["tasks"])
        sent_before = self._scorer.sent
        scores = score_tasks(self._scorer, tasks)
        text, of_text = self._measure_text(config, data, reference)
        features, of_features = self._measure_features(config, data)
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
            tokens=self._scorer.sent - sent_before + (text.windows * text.window_length if text else 0),
        )

    def _describe(self, experiment: Experiment, report: QuantizationReport) -> Result:
        """Return the record without what is measured."""
        skipped = [t for t in report.tensors if not t.quantized and len(t.shape) >= 2]
        return Result(
            key="",
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
            batch_tokens=self._scorer.batch_tokens,
            weight_rmse=report.weight_rmse,
            method_notes=report.notes | describe_products(self._loaded.model),
        )

    def _prepare_tasks(self, config: EvalConfig, identity: list[str]) -> list[PreparedTask]:
        wanted = (config.tasks, tuple(identity), config.limit)
        if wanted not in self._prepared.tasks:
            loaded = load_tasks(config.tasks, config.task_path) if config.tasks else []
            prepared = [prepare_task(task, config.limit) for task in loaded]
            _check_read(f"eval.task_path={config.task_path}", identify_tasks(config.tasks, config.task_path), identity)
            self._prepared.tasks[wanted] = prepared
        return self._prepared.tasks[wanted]

    def _measure_text(
        self, config: EvalConfig, data: dict[str, Any], reference: Reference | None
    ) -> tuple[TextRecord | None, TextScores]:
        """Measure the text that the configuration asks for, if any, and say which tokens it has."""
        if config.perplexity is None:
            return None, TextScores([], [])
        if config.perplexity_kind == "rolling":
            documents, sha256 = read_documents(config.perplexity)
            _check_read(config.perplexity, name_content(config.perplexity, sha256), data["perplexity"])
            scores = measure_rolling(self._scorer, config.perplexity, documents)
            return TextRecord(config.perplexity, sha256, len(documents), 0), scores
        windows = self._make_windows((config.perplexity, data["perplexity"], config.perplexity_windows))
        scores = measure_cross_entropy(self._loaded.model, windows, self._scorer.budget, reference)
        return TextRecord(windows.name, windows.sha256, *windows.tokens.shape), scores

    def _measure_features(self, config: EvalConfig, data: dict[str, Any]) -> tuple[list[Feature], list[Measurement]]:
        """Look for emergent features if the configuration asks for it."""
        if not config.features.measure or config.perplexity is None:
            return [], []
        windows = self._make_windows((config.perplexity, data["perplexity"], config.perplexity_windows))
        return measure_features(self._loaded.model, windows, self._scorer.budget, config.features)

    def _make_windows(self, wanted: tuple[str, str, int | None]) -> Windows:
        if wanted not in self._windows:
            text, identity, most = wanted
            context = min(MAX_WINDOW, int(self._scorer.max_length))
            windows = make_windows(text, self._loaded.tokenizer, context=context, max_windows=most)
            _check_read(text, name_content(text, windows.sha256), identity)
            self._windows[wanted] = windows
        return self._windows[wanted]

    def _make_reference(self, experiment: Experiment, data: dict[str, Any]) -> Reference | None:
        """Return the 16-bit model's states on the text: computed once for all variants measured on it."""
        model: Any = self._loaded.model
        config = experiment.eval
        if config.perplexity is None or config.perplexity_kind != "windows" or self._scorer.path == "hflm":
            return None
        self._scorer.set_batch_size(config.batch_size)
        wanted = (config.perplexity, data["perplexity"], config.perplexity_windows)
        windows = self._make_windows(wanted)
        if self._hidden is None or self._hidden[0] != wanted:
            self._hidden = None  # before the space of the next is taken
            self._hidden = (wanted, compute_reference(model, windows, self._scorer.budget))
        head = model.get_output_embeddings()
        # quant.include is the only way to quantize a head; the copy is of the head as it was
        return Reference(self._hidden[1], head if experiment.quant.include is None else copy.deepcopy(head))


def _check_read(what: str, found: object, expected: object) -> None:
    """Raise ValueError if what was read is not what the experiment's key was computed of."""
    if found != expected:
        raise ValueError(f"{what} was changed while it was read: {found}, where the experiment asks for {expected}")


def _record_task(task: LoadedTask, scores: TaskScores) -> TaskRecord:
    sent = scores.first_tokens[task.name][:FIRST_TOKENS]
    truncated = scores.truncated[task.name]
    identity = (task.name, task.version, task.source, task.sha256, task.fingerprint)
    return TaskRecord(*identity, truncated, sent, task.definition_sha256)


def run_experiment(experiment: Experiment, device: str = "cpu") -> Result:
    """Run one experiment from scratch; see Session to run several on one model."""
    return Session(experiment.model, device).run(experiment)
