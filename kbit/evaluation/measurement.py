"""A measurement: one number with its 95% interval and the count it rests on; and the items it was computed from."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

import numpy as np
from numpy.typing import NDArray

Z_95: Final = 1.959963984540054  # the 97.5% quantile of N(0, 1): two-sided 95%


FEW: Final = 30  # values: Student's quantile is within 5% of the normal one from there on


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Attributes:
        task: an lm-eval task, the name of a text, or mean_zero_shot.
        metric: acc, acc_norm, acc_bytes, perplexity, cross_entropy and kl_divergence (nats per token), bits_per_byte,
            top1_agreement, word_cross_entropy (nats per word), word_perplexity, byte_perplexity.
        value: the estimate.
        low, high: 95% interval; NaN where it is not defined (one item of a mean).
        n: items (or windows) that it rests on.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion; not of zero width at 0 or 1 (Wilson 1927)."""
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # at p = 0 and p = 1 the bound is exactly p; rounding must not put it on the wrong side
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def measure_accuracy(task: str, metric: str, correct: Sequence[float]) -> Measurement:
    """Return the share of correct items with its Wilson interval."""
    low, high = wilson_interval(sum(correct), len(correct))
    return Measurement(task, metric, fmean(correct), low, high, len(correct))


def measure_mean(task: str, metric: str, values: Sequence[float]) -> Measurement:
    """Return the mean with its interval, mean +- q s / sqrt(n), see quantile_95; NaN for a single value."""
    mean = fmean(values)
    half = quantile_95(len(values)) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Measurement(task, metric, mean, mean - half, mean + half, len(values))


def quantile_95(n: int) -> float:
    """Return how many standard errors a 95% interval of a mean of n > 1 values reaches to each side.

    The normal 1.96, and for fewer than FEW values the 97.5% quantile of Student's t with n - 1 degrees of freedom, as
    their own deviation says little of the spread: 12.7 for 2 values, 2.05 for 29.
    """
    if n >= FEW:
        return Z_95
    from scipy.special import stdtrit  # not at the top: most measurements need none of scipy

    return float(stdtrit(n - 1, 0.975))


def measure_ratio(task: str, metric: str, values: Sequence[float], weights: Sequence[float]) -> Measurement:
    """Return r = sum(values) / sum(weights) with the interval of a ratio of totals; NaN for a single item.

    r +- q sqrt(n / (n - 1) sum (v_i - r w_i)^2) / sum(weights), the usual linearization (Cochran 1977, section 6.3),
    with q of quantile_95.
    """
    n, total = len(values), math.fsum(weights)
    ratio = math.fsum(values) / total
    squares = math.fsum((v - ratio * w) ** 2 for v, w in zip(values, weights, strict=True))
    half = quantile_95(n) * math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan
    return Measurement(task, metric, ratio, ratio - half, ratio + half, n)


def transform(measurement: Measurement, metric: str, function: Callable[[float], float]) -> Measurement:
    """Return the same measurement on another, increasing scale: value and bounds mapped by the function."""
    value, low, high = (function(x) for x in (measurement.value, measurement.low, measurement.high))
    return Measurement(measurement.task, metric, value, low, high, measurement.n)


def exponentiate(loss: Measurement, metric: str) -> list[Measurement]:
    """Return exp of a cross entropy as the perplexity of this name; nothing beyond the range of float64.

    A broken quantizer may lose more than 709 nats, and so may words where nothing separates them. The cross entropy
    says as much; an infinity would be no number, and no JSON.
    """
    try:
        return [transform(loss, metric, math.exp)]
    except OverflowError:
        return []


def mean_accuracy(accuracies: Sequence[Measurement]) -> Measurement:
    """Return the mean zero-shot accuracy over tasks, each task weighing the same (the paper's metric).

    The tasks are independent, so the distances to the Wilson bounds add in squares (Newcombe's square-and-add):
    low = mean - sqrt(sum (p_i - l_i)^2) / T, and high likewise.
    """
    tasks = len(accuracies)
    mean = fmean(m.value for m in accuracies)
    below = math.sqrt(sum((m.value - m.low) ** 2 for m in accuracies)) / tasks
    above = math.sqrt(sum((m.high - m.value) ** 2 for m in accuracies)) / tasks
    return Measurement("mean_zero_shot", "acc", mean, mean - below, mean + above, sum(m.n for m in accuracies))


@dataclass(frozen=True)
class ItemValues:
    """The values of every item that a measurement was computed from, compact: for paired comparisons of two variants.

    Attributes:
        task, metric: of the measurement.
        n: items (or windows), in order.
        encoding: bits (every value is 0 or 1: np.packbits, big-endian) or float32 (little-endian).
        data: the bytes, base64.
    """

    task: str
    metric: str
    n: int
    encoding: str
    data: str


def encode_items(task: str, metric: str, values: Sequence[float]) -> ItemValues:
    """Pack the values of a measurement's items: one bit each if all are 0 or 1, else float32."""
    array = np.asarray(values, dtype=np.float64)
    if np.isin(array, (0.0, 1.0)).all():
        encoding, content = "bits", np.packbits(array.astype(bool)).tobytes()
    else:
        encoding, content = "float32", array.astype("<f4").tobytes()
    return ItemValues(task, metric, len(array), encoding, base64.b64encode(content).decode("ascii"))


def decode_items(items: ItemValues) -> NDArray[np.float64]:
    """Return the values [n] in item order.

    Raises:
        ValueError: an encoding that is neither bits nor float32, or data of another length than n items take.
    """
    content = base64.b64decode(items.data, validate=True)
    sizes = {"bits": -(-items.n // 8), "float32": 4 * items.n}
    if items.encoding not in sizes:
        raise ValueError(f"items of {items.task} {items.metric}: encoding {items.encoding!r} is not bits or float32")
    if len(content) != sizes[items.encoding]:
        raise ValueError(f"items of {items.task} {items.metric}: {len(content)} bytes do not hold {items.n} items")
    if items.encoding == "bits":
        return np.unpackbits(np.frombuffer(content, np.uint8), count=items.n).astype(np.float64)
    return np.frombuffer(content, "<f4").astype(np.float64)


@dataclass(frozen=True)
class Layer:
    """A dimension at one input.

    Attributes:
        layer: index of the block.
        input: attention or feed_forward.
        share: of the positions at which it is large.
        largest: value of largest magnitude, with its sign.
    """

    layer: int
    input: str
    share: float
    largest: float


@dataclass(frozen=True)
class Feature:
    """A hidden dimension.

    Attributes:
        dimension: index.
        is_feature: whether it meets the criteria.
        layers: share of layers in which it is large anywhere; positions: of (input, position) pairs at which it is.
        one_sided: whether its large values have one sign.
        quartiles: of its large values, with their sign; empty without any.
        by_layer: at every input.
    """

    dimension: int
    is_feature: bool
    layers: float
    positions: float
    one_sided: bool
    quartiles: tuple[float, ...]
    by_layer: tuple[Layer, ...]
