"""Result: all that is known of one finished experiment, as it is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kbit.evaluation.measurement import Feature, ItemValues, Measurement, MeasureRecord, TaskRecord, TextRecord
from kbit.experiments.config import Experiment


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
        scorer: how log-likelihoods were computed, see kbit.evaluation.scorer; batch_tokens: at once, after any lack of
            memory; 1: a row at a time.
        tokens: sent to the model in all, shared beginnings counted with each request; 0 in results from before.
        features: the dimensions that are large most often, if eval.features asks for them, see
            kbit.evaluation.outlier_features.
        weight_rmse: relative error of the quantized weights, see QuantizationReport; None in results from before.
        method_notes: what the method says of itself, see QuantizationReport.notes.
        measures: the measures of eval.measures, with what they say of themselves.
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
    tokens: int = 0
    features: tuple[Feature, ...] = ()
    weight_rmse: float | None = None
    method_notes: dict[str, Any] = field(default_factory=dict)
    measures: tuple[MeasureRecord, ...] = ()
