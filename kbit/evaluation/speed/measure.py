"""The measure of time and memory: how fast the model generates, and what that takes (eval.speed)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from kbit.evaluation.config import SpeedConfig
from kbit.evaluation.measure import Measure, Measured, Subject
from kbit.evaluation.measurement import ItemValues, Measurement, encode_items
from kbit.evaluation.speed.generation import Generation, Workload, measure_allocated, prepare
from kbit.evaluation.speed.machine import describe_processor, identify_host
from kbit.evaluation.speed.record import TASK, BatchRecord, SpeedRecord, name_batch
from kbit.evaluation.speed.timing import (
    Ceilings,
    Clock,
    attempt,
    interleave,
    make_clock,
    measure_ceilings,
    measure_median,
)
from kbit.evaluation.speed.weights import (
    count_held_bytes,
    count_read_bytes,
    describe_path,
    fastest_paths,
    find_packed_share,
)

_MEGABYTE: Final = 1e6


class Speed(Measure):
    """Time per token, time of a prompt, and memory, for each batch.

    Packed layers take the paths that they take in use, while other measures let them compute exactly. The layers of
    a model that is not packed are plain, whatever bits its weights were rounded to.

    Args:
        make_clock: a function that returns the clock of a device.
    """

    name = TASK
    fields = ("speed",)

    def __init__(self, make_clock: Callable[[torch.device], Clock] = make_clock) -> None:
        self._make_clock = make_clock

    def run(self, subject: Subject) -> Measured:
        """Measure, if eval.speed asks for it.

        Raises:
            ValueError: prompt and steps are longer than the model's context, or the model keeps no cache.
        """
        config, model = subject.config.speed, subject.model
        if not config.measure:
            return Measured()
        config.check_context(int(subject.scorer.max_length))
        clock = self._make_clock(model.device)
        works = {batch: Workload(batch, config.prompt, config.new) for batch in config.batches}
        before = measure_ceilings(model.device, clock)
        with fastest_paths(model):
            calls = {batch: prepare(model, work, clock) for batch, work in works.items()}
            done, reasons = interleave(calls, config.repetitions)
            batches = [record_batch(model, works[batch], reasons.get(batch, "")) for batch in works]
        ceilings = (before, measure_ceilings(model.device, clock))
        record = make_record(model, config, subject.counted_bits, ceilings, batches)
        measurements = list_model_numbers(record, subject.load_seconds)
        items: list[ItemValues] = []
        for batch, generations in done.items():
            of_batch, of_items = list_batch_numbers(works[batch], generations)
            measurements += of_batch
            items += of_items
        measurements += list_peaks(batches)
        tokens = sum(len(generations) * batch * (config.prompt + config.new) for batch, generations in done.items())
        return Measured(measurements, items, tokens, {"speed": record})


def record_batch(model: Any, work: Workload, reason: str) -> BatchRecord:
    """Return how a batch went, and the memory that it takes if it fitted.

    The peak is that of a longer prompt than the timed one. A batch that was timed keeps its times if that does not fit.
    """
    step, prompt = (describe_path(model, rows, model.dtype) for rows in (work.batch, work.batch * work.prompt))
    allocated = None if reason else attempt(lambda: measure_allocated(model, work))
    peak = None if allocated is None else count_held_bytes(model) + allocated
    return BatchRecord(work.batch, reason, step, prompt, peak)


def make_record(
    model: Any, config: SpeedConfig, counted_bits: int | None, ceilings: Sequence[Ceilings], batches: list[BatchRecord]
) -> SpeedRecord:
    """Return what is kept beside the numbers."""
    return SpeedRecord(
        processor=describe_processor(model.device),
        threads=torch.get_num_threads(),
        prompt=config.prompt,
        new=config.new,
        repetitions=config.repetitions,
        gigaflops=tuple(found.gigaflops for found in ceilings),
        gigabytes_per_second=tuple(found.gigabytes_per_second for found in ceilings),
        weight_bytes=count_held_bytes(model),
        counted_bytes=None if counted_bits is None else counted_bits / 8,
        read_bytes=count_read_bytes(model),
        packed_share=find_packed_share(model),
        batches=tuple(batches),
        host=identify_host(),
    )


def list_model_numbers(record: SpeedRecord, load_seconds: float | None) -> list[Measurement]:
    """Return the numbers that are the same for every batch. Those of the machine have the range of before and after."""
    numbers: dict[str, Iterable[float]] = {
        "weight_megabytes": [record.weight_bytes / _MEGABYTE],
        "packed_share": [record.packed_share],
        "matmul_gigaflops": record.gigaflops,
        "read_gigabytes_per_second": record.gigabytes_per_second,
    }
    numbers |= {} if record.read_bytes is None else {"step_megabytes": [record.read_bytes / _MEGABYTE]}
    numbers |= {} if load_seconds is None else {"load_seconds": [load_seconds]}
    return [_summarize(TASK, metric, list(values)) for metric, values in numbers.items()]


def list_batch_numbers(work: Workload, done: Sequence[Generation]) -> tuple[list[Measurement], list[ItemValues]]:
    """Return the times of a batch, and each repetition's.

    ms_per_token is a step's time by the batch. prompt_tokens_per_second counts the tokens of all prompts.
    """
    task = name_batch(work.batch)
    values = {
        "ms_per_token": [one.find_ms_per_token(work) for one in done],
        "prompt_tokens_per_second": [work.batch * work.prompt / one.prompt_seconds for one in done],
    }
    return (
        [measure_median(task, metric, of_metric) for metric, of_metric in values.items()],
        [encode_items(task, metric, of_metric) for metric, of_metric in values.items()],
    )


def list_peaks(batches: Iterable[BatchRecord]) -> list[Measurement]:
    """Return the peak of memory of each batch that fitted."""
    return [
        _summarize(name_batch(batch.batch), "peak_megabytes", [batch.peak_bytes / _MEGABYTE])
        for batch in batches
        if batch.peak_bytes is not None
    ]


def _summarize(task: str, metric: str, values: Sequence[float]) -> Measurement:
    """Return the mean of a few values, with their range where there are several."""
    low, high = (min(values), max(values)) if len(values) > 1 else (float("nan"), float("nan"))
    return Measurement(task, metric, sum(values) / len(values), low, high, len(values))
