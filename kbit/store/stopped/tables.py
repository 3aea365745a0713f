"""Experiments that stopped early as results, for tables: what they would have with all items (complete)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from kbit.evaluation.measurement import (
    Measurement,
    exponentiate,
    find_range,
    mean_accuracy,
    measure_mean,
    wilson_interval,
)
from kbit.evaluation.rounds.order import SHARES, TASKS
from kbit.experiments.result import Result
from kbit.store.filesystem import open_files
from kbit.store.stopped.complete import Completed, Numbers, complete_store
from kbit.store.stopped.records import load_stopped


def load_completed(path: str | Path) -> dict[str, Result]:
    """Return each experiment that stopped early as a result on all items, by key.

    Its measurements are the means of its numbers on all items, a perplexity and the mean accuracy where there was one.
    Their n is the number of items that were measured. What is no such mean is left out.
    """
    numbers = complete_store(path)
    stopped = load_stopped(open_files(path), numbers.keys(), Result) if numbers else {}
    return {key: _measure(result, numbers[key]) for key, result in stopped.items()}


def find_shares(result: Result) -> dict[str, float]:
    """Return the share of its items that was measured of each task and text of an experiment that stopped early."""
    shares = {part.part: SHARES[part.rounds - 1] for part in result.sampled}
    found = {task: shares[part.part] for part in result.sampled for task in part.totals}
    return found | ({"mean_zero_shot": shares[TASKS]} if TASKS in shares else {})


def _measure(result: Result, numbers: Numbers) -> Result:
    """Return a result with the measurements that follow from its numbers on all items."""
    own = {(m.task, m.metric): m for m in result.measurements}
    found: list[Measurement] = []
    for (task, metric), completed in numbers.items():
        value = own[task, metric] if completed.is_alone else _estimate(task, metric, completed)
        found += [value, *(exponentiate(value, "perplexity") if metric == "cross_entropy" else [])]
    mean = own.get(("mean_zero_shot", "acc"))
    if mean is not None:
        accuracies = [m for m in found if m.metric == "acc"]
        found.append(dataclasses.replace(mean_accuracy(accuracies), n=mean.n))
    return dataclasses.replace(result, measurements=tuple(found))


def _estimate(task: str, metric: str, completed: Completed) -> Measurement:
    """Return the mean of the numbers on all items with its interval, NaN if one item alone was measured.

    The interval stays in the metric's range. That of right and wrong answers is no narrower than that of all items.
    """
    estimate, n = measure_mean(task, metric, completed.values.tolist()), completed.measured.size
    if n < 2:
        return dataclasses.replace(estimate, low=math.nan, high=math.nan, n=n)
    least, most = find_range(metric, completed.measured.tolist())
    low, high = max(estimate.low, least), min(estimate.high, most)
    if np.isin(completed.measured, (0, 1)).all():
        widest = wilson_interval(estimate.value * completed.values.size, completed.values.size)
        low, high = min(low, widest[0]), max(high, widest[1])
    return dataclasses.replace(estimate, low=low, high=high, n=n)
