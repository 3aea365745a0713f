"""Run one experiment: load, quantize, measure, and keep what is known of it in one typed record."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from kbit.checkpoints.foreign import find_stored_report
from kbit.checkpoints.loading import load_model
from kbit.checkpoints.packing import compute_exactly, count_stored_bytes, find_packed_report, hash_values
from kbit.evaluation.measure import Measured, Memory, Subject, check_read
from kbit.evaluation.measures import MEASURES
from kbit.evaluation.rounds.sample import WHOLE, Sample
from kbit.evaluation.scorer import Scorer
from kbit.experiments import identity, provenance
from kbit.experiments.config import Experiment
from kbit.experiments.identity import check_unchanged, find_key, identify_parts
from kbit.experiments.requirements import describe_packed
from kbit.experiments.result import Result, SkippedTensor
from kbit.experiments.rounds import check_weights
from kbit.experiments.training import TrainedModel, measure_training, trained_and_quantized
from kbit.methods.config import QuantConfig
from kbit.methods.llm_int8 import describe_products
from kbit.methods.quantize_model import copy_weights, quantize_model, refuse_quantized, restore_weights
from kbit.methods.report import QuantizationReport, plan_quantization
from kbit.models.catalog import family_of
from kbit.models.config import ModelConfig
from kbit.models.inference import in_evaluation_mode
from kbit.models.loading import LoadedModel
from kbit.models.size import find_packed
from kbit.training.files import TrainingFiles


class Session:
    """A loaded model with what its measures keep between the experiments that share it, such as tasks and texts.

    Measures find what they kept by its content, as the experiment's key has it, so that a result never holds numbers of
    a file that has been edited since.

    Args:
        model: the model to load.
        device: cpu, cuda or cuda:N.
        lasting: what measures kept in earlier sessions, to render and tokenize the same tasks once.
        gpus: see load_model.
        loaded: the model, if it is loaded already. The configuration then only says what results call it.
        packed_as: the quantizer by which weights are packed while the model is loaded, or None. See Experiment.packed.

    Raises:
        ValueError: the model's folder was changed while it was read, or see load_model.
        OSError: see load_model.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: str = "cpu",
        lasting: Memory | None = None,
        gpus: int = 1,
        *,
        loaded: LoadedModel | None = None,
        packed_as: QuantConfig | None = None,
    ) -> None:
        self.config = model
        self.device = device
        self._identity = identify_parts(model)
        options: dict[str, Any] = {"dtype": model.dtype, "device": device, "gpus": gpus, **model.parts}
        start = time.perf_counter()
        self._loaded = loaded or load_model(model.name, packed_as=packed_as, **options)
        self._load_seconds = None if loaded else time.perf_counter() - start
        self._packed_as = packed_as
        check_read(model.name, identify_parts(model), self._identity)
        self._stored = find_stored_report(self._loaded.model)
        self._bytes = _measure_bytes(model, self._loaded)
        if self._stored is None:
            refuse_quantized(self._loaded.model)
        else:
            compute_exactly(self._loaded.model)
        self._scorer = Scorer(self._loaded.model, self._loaded.tokenizer)
        self._memory = Memory()
        self._lasting = Memory() if lasting is None else lasting

    def holds(self, model: ModelConfig, packed_as: QuantConfig | None = None) -> bool:
        """Whether this session holds that model, as its files are now, and packed by that quantizer if any."""
        return model == self.config and packed_as == self._packed_as and identify_parts(model) == self._identity

    def run(
        self,
        experiment: Experiment,
        key: str | None = None,
        files: TrainingFiles | None = None,
        sample: Sample = WHOLE,
    ) -> Result:
        """Let measures prepare, train and quantize, run the measures, restore the weights, and return the result.

        Args:
            experiment: what to run.
            key: the experiment's key as it was planned; None finds it now.
            files: where a training is kept, to go on from. None keeps nothing.
            sample: which items and windows are measured now.

        Raises:
            ValueError: experiment.model is another model, or a file is no longer what the experiment's key was computed
                from, or see quantize_model and the measures. The weights are restored in each case.
            NonFiniteError: the model gave NaN or Inf.
        """
        key = find_key(experiment) if key is None else key
        fields = check_unchanged(experiment, key)
        if not self.holds(experiment.model, experiment.packed_as):
            raise ValueError(
                f"this session holds {self.config} ({self._identity}, packed as {self._packed_as}), not "
                f"{experiment.model} packed as {experiment.packed_as}"
            )
        model = self._loaded.model
        stored = self._find_stored(experiment)
        original = {} if stored else self._copy_what_changes(experiment)
        subject = self._make_subject(experiment, fields["eval"], frozenset(original), sample)
        try:
            with in_evaluation_mode(model):  # a model of the user's own may be in training
                return self._quantize_and_measure(experiment, key, subject, files)
        finally:
            if stored is None:
                restore_weights(model, original)

    def _find_stored(self, experiment: Experiment) -> QuantizationReport | None:
        """Return the report of a model that is evaluated as it was loaded, or None of one that is to be changed.

        The values of a GGUF file may be trained, and quantized again, as transformers makes a plain model of them.
        Adapters are trained beside a model that stays as it was loaded.

        Raises:
            ValueError: a model would be trained, or quantized again, whose weights are codes.
        """
        is_as_asked = experiment.quant.is_unchanged or self._packed_as is not None
        if self._stored is None or (is_as_asked and not (experiment.train.steps and not experiment.train.lora.rank)):
            return self._stored
        if self._loaded.checkpoint_quantization.startswith("gguf"):
            return None
        if experiment.train.steps:
            raise ValueError(f"model.name={experiment.model.name} is packed, and packed weights are not trained")
        raise ValueError(describe_packed(experiment.model.name))

    def _copy_what_changes(self, experiment: Experiment) -> dict[str, torch.Tensor]:
        """Return copies of what is quantized. A training without adapters changes every parameter."""
        model, train = self._loaded.model, experiment.train
        if train.steps and not train.lora.rank:
            return {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}
        return copy_weights(model, plan_quantization(model, experiment.quant.without_allocation()))

    def _quantize_and_measure(
        self, experiment: Experiment, key: str, subject: Subject, files: TrainingFiles | None
    ) -> Result:
        for measure in MEASURES:
            measure.prepare(subject)
        start = time.perf_counter()
        with self._quantized(experiment, key, files) as (report, trained):
            quantized = time.perf_counter()
            result = self._measure(experiment, key, subject, report, trained)
        return dataclasses.replace(
            result,
            key=key,
            seconds_quantize=quantized - start,
            seconds_evaluate=time.perf_counter() - quantized,
            peak_memory_bytes=provenance.peak_memory_bytes(self.device),
        )

    @contextlib.contextmanager
    def _quantized(
        self, experiment: Experiment, key: str, files: TrainingFiles | None
    ) -> Iterator[tuple[QuantizationReport, TrainedModel | None]]:
        """Train the model, if the experiment asks for it, and quantize it."""
        stored = self._find_stored(experiment)
        if experiment.train.steps:
            with trained_and_quantized(experiment, key, self._loaded, stored, self._memory, files) as done:
                yield done.report, done
        else:
            yield stored or quantize_model(self._loaded.model, experiment.quant, self._loaded.tokenizer), None

    def _make_subject(
        self, experiment: Experiment, fields: Mapping[str, Any], quantized: frozenset[str], sample: Sample
    ) -> Subject:
        self._scorer.set_batch_size(experiment.eval.batch_size)
        return Subject(
            self._loaded.model,
            self._loaded.tokenizer,
            self._scorer,
            experiment.eval,
            fields,
            identity,
            quantized,
            self._memory,
            self._lasting,
            sees_original=self._find_stored(experiment) is None and not experiment.train.is_from_scratch,
            load_seconds=self._load_seconds,
            sample=sample,
        )

    def _measure(
        self, experiment: Experiment, key: str, subject: Subject, report: QuantizationReport, done: TrainedModel | None
    ) -> Result:
        """Run the measures. A diverged training is measured by nothing but its own numbers."""
        weights_hash = hash_values(subject.model)
        check_weights(experiment, key, subject.sample, weights_hash)
        subject = dataclasses.replace(subject, counted_bits=report.total_bits)
        has_diverged = done is not None and done.trained.diverged
        measured = [] if has_diverged else [measure.run(subject) for measure in MEASURES]
        if done is not None:
            measured.append(measure_training(subject.model, done, self._scorer.budget))
        if hash_values(subject.model) != weights_hash:  # lm-eval can tie weights behind one's back
            raise RuntimeError("the weights changed during the evaluation: its numbers belong to no quantizer")
        if not any(done.measurements for done in measured):
            raise ValueError("nothing was measured: no task, text or measure gave a number")
        return _add(dataclasses.replace(self._describe(experiment, report), weights_hash=weights_hash), measured)

    def _describe(self, experiment: Experiment, report: QuantizationReport) -> Result:
        """Return the record without what is measured."""
        skipped = [t for t in report.tensors if not t.quantized and len(t.shape) >= 2]
        return Result(
            key="",
            experiment=experiment,
            family=family_of(experiment.model.name, experiment.model.family, experiment.model.parts),
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
            checkpoint_quantization=self._loaded.checkpoint_quantization,
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
            method_notes=report.notes | describe_products(self._loaded.model) | self._bytes,
        )


def _measure_bytes(model: ModelConfig, loaded: LoadedModel) -> dict[str, int]:
    """Return what a packed model takes: the bytes in memory as it was loaded, and those of a packed folder's files."""
    if find_packed_report(loaded.model) is None:
        return {}
    folder = find_packed(model.name, model.revision)
    stored = 0 if folder is None else sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"bytes_in_memory": count_stored_bytes(loaded.model)} | ({"bytes_on_disk": stored} if stored else {})


def _add(result: Result, measured: list[Measured]) -> Result:
    """Return the result with what was measured."""
    return dataclasses.replace(
        result,
        measurements=tuple(measurement for done in measured for measurement in done.measurements),
        items=tuple(items for done in measured for items in done.items),
        tokens=sum(done.tokens for done in measured),
        sampled=tuple(part for done in measured for part in done.sampled),
        **{name: value for done in measured for name, value in done.records.items()},
    )


def run_experiment(experiment: Experiment, device: str = "cpu") -> Result:
    """Run one experiment from scratch. A Session runs several on one model."""
    return Session(experiment.model, device, packed_as=experiment.packed_as).run(experiment)
