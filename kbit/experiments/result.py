"""What is stored of an experiment: a Result if it finished, a Failure if it did not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from kbit.checks import tabulate_html
from kbit.evaluation.measurement import Feature, ItemValues, Measurement, MeasureRecord, TaskRecord, TextRecord
from kbit.evaluation.rounds.sample import SampledPart
from kbit.evaluation.speed.record import SpeedRecord
from kbit.experiments.config import Experiment

FAILED: Final = "failed"
CRASHED: Final = "crashed"


@dataclass(frozen=True)
class SkippedTensor:
    """A matrix that was not quantized, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that is known about one finished experiment.

    A field with a default is missing in results from before it was kept.

    Attributes:
        key: the experiment's key, see kbit.experiments.identity.
        experiment: its full configuration.
        family, architecture: the model's.
        parameters, quantized_parameters: counts in which a tied tensor is counted once.
        total_bits: bits of the whole model.
        bits_per_param: bits per parameter of the quantized tensors, scales and codebooks included.
        coverage: share of the block matrices' parameters that is quantized.
        skipped: matrices that are not quantized.
        measurements: every measured number.
        model_revision: see LoadedModel.
        checkpoint_dtype: 16-bit dtype to which the weights were rounded.
        checkpoint_quantization: how the checkpoint was quantized, see LoadedModel. Such a model is no 16-bit baseline.
        weights_hash: hash of the model's weights as they were evaluated.
        tasks, text: identity of the data.
        truncated: number of requests that lost tokens to the model's context length.
        versions, git_commit, device, threads: software and machine.
        seconds_quantize, seconds_evaluate, peak_memory_bytes: cost.
        finished: time of the end in UTC, ISO 8601.
        items: correctness of each item of a task and cross entropy of each window of the text, for paired comparisons.
        scorer: way in which log-likelihoods were computed, see kbit.evaluation.scorer.
        batch_tokens: tokens that were scored at once, after any lack of memory. 1 means one row at a time.
        tokens: tokens sent to the model in all. Shared beginnings are counted with each request.
        features: dimensions that are large most often, if eval.features asks for them, see
            kbit.evaluation.outlier_features.
        weight_rmse: relative error of the quantized weights, see QuantizationReport.
        method_notes: what the method reports about itself, see QuantizationReport.notes.
        measures: the measures of eval.measures, with what they say of themselves.
        speed: what time and memory were measured of, if eval.speed asks for them.
        training_text: what a training was trained on, and the windows of it that are held back.
        sampled: how far each part of the evaluation was measured, of an experiment that stopped before it had measured
            all items (study.until.decided). Its measurements are those of the measured items, in items.
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
    tasks: tuple[TaskRecord, ...] = ()
    text: TextRecord | None = None
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
    checkpoint_quantization: str = ""
    speed: SpeedRecord | None = None
    training_text: TextRecord | None = None
    sampled: tuple[SampledPart, ...] = ()

    def _repr_html_(self) -> str:
        """Return a small table for notebooks: the experiment, and each number with its interval."""
        rows: dict[str, object] = {"experiment": self.experiment.label(), "key": self.key}
        rows |= {"bits per parameter": f"{self.bits_per_param:.4g}", "total bits": f"{self.total_bits:,}"}
        rows |= {
            f"{m.task} {m.metric}": f"{m.value:.5g} ({m.low:.5g} to {m.high:.5g}; n = {m.n})" for m in self.measurements
        }
        return tabulate_html(rows)


@dataclass(frozen=True)
class Failure:
    """An experiment without a result.

    Attributes:
        key: the experiment's key, see kbit.experiments.identity.
        experiment: its full configuration.
        reason: the error in one line.
        traceback: the whole error.
        finished: time of the failure in UTC, ISO 8601.
        label: Experiment.label. It is empty in failures from before it was kept.
        state: crashed if the next run should try again (its process was killed, memory ran out, a node was lost), and
            failed if the experiment itself is at fault.
    """

    key: str
    experiment: Experiment
    reason: str
    traceback: str
    finished: str
    label: str = ""
    state: str = FAILED
