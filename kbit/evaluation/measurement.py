"""A measurement is one number with its 95% interval and the count that it rests on. Its items are stored beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray


class NonFiniteError(ArithmeticError):
    """The model gave a NaN or infinite value: whatever follows from it is not a measurement."""


Z_95: Final = 1.959963984540054  # the 97.5% quantile of N(0, 1): two-sided 95%
# Ranges of metrics by the beginning of their names. They hold for values within them: a share in percent is no share.
RANGES: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(("share", "top1_", "acc", "exact_match", "f1"), (0.0, 1.0)),
    **dict.fromkeys(("kl_divergence", "cross_entropy", "word_cross_entropy", "byte_cross_entropy"), (0.0, math.inf)),
    "spearman": (-1.0, 1.0),
}
FEW: Final = 30  # from so many values on, Student's quantile is within 5% of the normal one


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Attributes:
        task: an lm-eval task, a text's name, mean_zero_shot, or the name of a measure and what it measured.
        metric: acc, acc_norm, acc_bytes, perplexity, cross_entropy and kl_divergence (nats per token), bits_per_byte,
            top1_agreement, word_cross_entropy (nats per word), word_perplexity, byte_perplexity.
        value: the estimate.
        low, high: the 95% interval. Both are NaN where there is none (a mean of one item).
        n: the number of items (or windows) that the value rests on.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion (Wilson 1927). Its width is not zero at 0 or 1."""
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At p = 0 and p = 1 the bound is exactly p, and rounding must not put it on the wrong side.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def measure_accuracy(task: str, metric: str, correct: Sequence[float]) -> Measurement:
    """Return the share of correct items with its Wilson interval."""
    low, high = wilson_interval(sum(correct), len(correct))
    return Measurement(task, metric, fmean(correct), low, high, len(correct))


def measure_mean(task: str, metric: str, values: Sequence[float]) -> Measurement:
    """Return the mean with its interval, mean +- q s / sqrt(n), see quantile_95. A single value has NaN bounds.

    The interval stays in the range of its metric (RANGES), and in 0..1 where all values are 0 or 1.
    """
    mean = fmean(values)
    half = quantile_95(len(values)) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    least, most = find_range(metric, values)
    return Measurement(task, metric, mean, max(mean - half, least), min(mean + half, most), len(values))


def find_range(metric: str, values: Sequence[float]) -> tuple[float, float]:
    """Return the range that the mean of such values can have."""
    usual = (0.0, 1.0) if all(value in (0, 1) for value in values) else (-math.inf, math.inf)
    low, high = next((bounds for name, bounds in RANGES.items() if metric.startswith(name)), usual)
    return (low, high) if low <= min(values) and max(values) <= high else (-math.inf, math.inf)


def quantile_95(n: int) -> float:
    """Return how many standard errors a 95% interval of a mean of n > 1 values reaches to each side.

    This is the normal quantile 1.96. Fewer than FEW values say little of their own spread, so that for them it is the
    97.5% quantile of Student's t with n - 1 degrees of freedom: 12.7 for 2 values, 2.05 for 29.
    """
    if n >= FEW:
        return Z_95
    from scipy.special import stdtrit  # not at the top: most measurements need none of scipy

    return float(stdtrit(n - 1, 0.975))


def measure_ratio(task: str, metric: str, values: Sequence[float], weights: Sequence[float]) -> Measurement:
    """Return r = sum(values) / sum(weights) with the interval of a ratio of totals. A single item has no interval: NaN.

    The interval is r +- q sqrt(n / (n - 1) sum (v_i - r w_i)^2) / sum(weights), the usual linearization (Cochran 1977,
    section 6.3), with q from quantile_95. It stays in the range of its metric, see measure_mean.
    """
    n, total = len(values), math.fsum(weights)
    ratio = math.fsum(values) / total
    squares = math.fsum((v - ratio * w) ** 2 for v, w in zip(values, weights, strict=True))
    half = quantile_95(n) * math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan
    least, most = find_range(metric, values)
    return Measurement(task, metric, ratio, max(ratio - half, least), min(ratio + half, most), n)


def transform(measurement: Measurement, metric: str, function: Callable[[float], float]) -> Measurement:
    """Return the same measurement on another, increasing scale: the function maps the value and both bounds."""
    value, low, high = (function(x) for x in (measurement.value, measurement.low, measurement.high))
    return Measurement(measurement.task, metric, value, low, high, measurement.n)


def exponentiate(loss: Measurement, metric: str) -> list[Measurement]:
    """Return exp of a cross entropy as the perplexity of this name, or nothing if float64 cannot hold it.

    A broken quantizer may lose more than 709 nats, and so may words where nothing separates them. The cross entropy
    says as much, while an infinity would be no number, and no JSON.
    """
    try:
        return [transform(loss, metric, math.exp)]
    except OverflowError:
        return []


def mean_accuracy(accuracies: Sequence[Measurement]) -> Measurement:
    """Return the mean zero-shot accuracy over tasks, in which each task weighs the same (the paper's metric)."""
    return average("mean_zero_shot", "acc", accuracies, [1] * len(accuracies))


def average(task: str, metric: str, measurements: Sequence[Measurement], weights: Sequence[int]) -> Measurement:
    """Return the weighted mean of several tasks' measurements, as a measurement of this task and metric.

    The tasks are independent, so the distances to the bounds add in squares (Newcombe's square-and-add):
    low = mean - sqrt(sum (w_i (v_i - l_i))^2) / sum w_i, and high likewise.
    """
    total, pairs = sum(weights), list(zip(weights, measurements, strict=True))
    mean = fmean((m.value for m in measurements), weights)
    below = math.sqrt(sum((w * (m.value - m.low)) ** 2 for w, m in pairs)) / total
    above = math.sqrt(sum((w * (m.high - m.value)) ** 2 for w, m in pairs)) / total
    return Measurement(task, metric, mean, mean - below, mean + above, sum(m.n for m in measurements))


@dataclass(frozen=True)
class ItemValues:
    """The value of every item of a measurement in a compact form, for paired comparisons of two variants.

    Attributes:
        task, metric: the measurement's task and metric.
        n: the number of items (or windows), which are in order.
        encoding: bits (every value is 0 or 1: np.packbits, big-endian), float32 or float64 (little-endian).
        data: the bytes in base64.
    """

    task: str
    metric: str
    n: int
    encoding: str
    data: str


def encode_items(task: str, metric: str, values: Sequence[float], *, exactly: bool = False) -> ItemValues:
    """Pack the values of a measurement's items: a bit for each value if all are 0 or 1, else a float32.

    To go on from later, values are packed exactly: as a float64 each, if they are not all 0 or 1.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.isin(array, (0.0, 1.0)).all():
        encoding, content = "bits", np.packbits(array.astype(bool)).tobytes()
    elif exactly:
        encoding, content = "float64", array.astype("<f8").tobytes()
    else:
        encoding, content = "float32", array.astype("<f4").tobytes()
    return ItemValues(task, metric, len(array), encoding, base64.b64encode(content).decode("ascii"))


def decode_items(items: ItemValues) -> NDArray[np.float64]:
    """Return the values [n] in item order.

    Raises:
        ValueError: the encoding is unknown, or the data has another length than n items take.
    """
    content = base64.b64decode(items.data, validate=True)
    sizes = {"bits": -(-items.n // 8), "float32": 4 * items.n, "float64": 8 * items.n}
    if items.encoding not in sizes:
        raise ValueError(f"items of {items.task} {items.metric}: encoding {items.encoding!r} is not bits or a float's")
    if len(content) != sizes[items.encoding]:
        raise ValueError(f"items of {items.task} {items.metric}: {len(content)} bytes do not hold {items.n} items")
    if items.encoding == "bits":
        return np.unpackbits(np.frombuffer(content, np.uint8), count=items.n).astype(np.float64)
    return np.frombuffer(content, "<f4" if items.encoding == "float32" else "<f8").astype(np.float64)


@dataclass(frozen=True)
class Layer:
    """A hidden dimension at one input of a decoder layer.

    Attributes:
        layer: the index of the decoder layer.
        input: attention or feed_forward.
        share: the share of positions at which the dimension is large.
        largest: the value of largest magnitude, with its sign.
    """

    layer: int
    input: str
    share: float
    largest: float


@dataclass(frozen=True)
class Feature:
    """A hidden dimension on a text.

    Attributes:
        dimension: the dimension's index.
        is_feature: whether the dimension meets the criteria.
        layers: the share of layers in which the dimension is large anywhere.
        positions: the share of (input, position) pairs at which the dimension is large.
        one_sided: whether its large values all have one sign.
        quartiles: the quartiles of its large values, with their sign. There are none without large values.
        by_layer: the dimension at every input.
    """

    dimension: int
    is_feature: bool
    layers: float
    positions: float
    one_sided: bool
    quartiles: tuple[float, ...]
    by_layer: tuple[Layer, ...]


@dataclass(frozen=True)
class TaskRecord:
    """Which data a task's numbers come from, and what the model was sent of it.

    Attributes:
        name, version, source, sha256, fingerprint, definition_sha256: see kbit.data.tasks.LoadedTask. The last is empty
            in results from before it was kept.
        truncated: the number of requests that lost tokens to the model's context length.
        first_tokens: the first request's context and continuation, at most 64 tokens.
        groups: the names of the groups and tags that the task was asked by, the outermost first.
    """

    name: str
    version: str
    source: str
    sha256: str
    fingerprint: str
    truncated: int
    first_tokens: tuple[int, ...]
    definition_sha256: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextRecord:
    """Which tokens a cross entropy comes from: windows of one length, or (rolling, length 0) whole documents."""

    name: str
    sha256: str
    windows: int
    window_length: int


@dataclass(frozen=True)
class MeasureRecord:
    """A measure of one's own (kbit.evaluation.measure).

    Attributes:
        name: what its measurements' tasks are called, or begin with.
        sha256: the hash of its source file.
        notes: what it says of itself.
    """

    name: str
    sha256: str
    notes: dict[str, Any] = field(default_factory=dict)


def check_own(name: str, measurements: Sequence[Measurement], items: Sequence[ItemValues]) -> None:
    """Check what a measure of this name returned.

    Raises:
        ValueError: there is no number, a number or its items are of another measure's task, two numbers have one task
            and metric, or items belong to no number.
        NonFiniteError: a value is NaN or infinite.
    """
    if not measurements:
        raise ValueError(f"the measure {name!r} gave no number")
    for task in {m.task for m in measurements} | {own.task for own in items}:
        if task != name and not task.startswith(f"{name}/"):
            raise ValueError(f"the measure {name!r} gave a number of task {task!r}, not of {name!r} or '{name}/...'")
    if len({(m.task, m.metric) for m in measurements}) < len(measurements):
        raise ValueError(f"the measure {name!r} gave two numbers of one task and metric")
    if strange := {(own.task, own.metric) for own in items} - {(m.task, m.metric) for m in measurements}:
        raise ValueError(f"the measure {name!r} gave items of {sorted(strange)[0]}, but no such number")
    for m in measurements:
        if not math.isfinite(m.value):
            raise NonFiniteError(f"{m.metric} of {m.task!r} is {m.value}")
