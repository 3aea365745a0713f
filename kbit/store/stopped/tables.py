"""Experiments that stopped early as results, for tables: what they would have with all items (complete)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kbit.evaluation.measurement import Measurement, exponentiate, mean_accuracy, measure_mean
from kbit.evaluation.rounds.order import SHARES
from kbit.experiments.result import Result
from kbit.store.filesystem import open_files
from kbit.store.stopped.complete import Numbers, complete_store
from kbit.store.stopped.records import load_stopped


def load_completed(path: str | Path) -> dict[str, Result]:
    """Return each experiment that stopped early as a result on all items, by key.

    Its measurements are the means of its numbers on all items, a perplexity and the mean accuracy where there was one.
    Their n is the number of items that were measured. What is no such mean is left out.
    """
    numbers = complete_store(path)
    stopped = load_stopped(open_files(path), numbers.keys(), Result) if numbers else {}
    return {key: _measure(result, numbers[key]) for key, result in stopped.items()}


def find_share(result: Result) -> float:
    """Return the share of its items that an experiment measured that stopped early: the least of its parts."""
    return min(SHARES[part.rounds - 1] for part in result.sampled)


def _measure(result: Result, numbers: Numbers) -> Result:
    """Return a result with the measurements that follow from its numbers on all items."""
    counts = {(m.task, m.metric): m.n for m in result.measurements}
    found: list[Measurement] = []
    for (task, metric), values in numbers.items():
        value = dataclasses.replace(measure_mean(task, metric, values.tolist()), n=counts[task, metric])
        found += [value, *(exponentiate(value, "perplexity") if metric == "cross_entropy" else [])]
    mean = counts.get(("mean_zero_shot", "acc"))
    if mean is not None:
        accuracies = [m for m in found if m.metric == "acc"]
        found.append(dataclasses.replace(mean_accuracy(accuracies), n=mean))
    return dataclasses.replace(result, measurements=tuple(found))
