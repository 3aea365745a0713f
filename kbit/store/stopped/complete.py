"""What an experiment that stopped early would have with all items, as far as the others say: paired on what is shared.

An experiment e was measured on n of N items, and others, its references r, on more. The estimate on all items is that
of the references and the difference on what e and they share (the difference estimator, Cochran 1977, section 7.9):

    y_e = y_r + mean over the n items of (e_i - r_i)

So two values never differ by the items that one of them lacks. Each such value is stored as N numbers of which it is
the mean, as if all items had been measured. Their spread, and that of their differences to other experiments item by
item, give the intervals that n items allow:

    item i:   r_i + mean (e_i - r_i) + (N / n) (e_i - r_i - mean (e_i - r_i))

where the last part is 0 for an item that e lacks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.measurement import Measurement, decode_items, exponentiate, mean_accuracy, measure_mean
from kbit.evaluation.rounds.order import LAST, SHARES, list_places
from kbit.experiments.result import Result
from kbit.store.filesystem import open_files
from kbit.store.records import list_finished, retry
from kbit.store.results import load_results
from kbit.store.stopped.records import list_stopped, load_stopped

Floats = NDArray[np.float64]
Group = tuple[str, str, str, int]  # task, metric, family, number of all items


@dataclass(frozen=True)
class Measured:
    """What was measured of an experiment: the values of the items of its rounds, in order."""

    key: str
    model: str
    rounds: int
    values: Floats


def read_completed(path: str | Path, metric: str, keys: Collection[str]) -> dict[str, dict[str, Floats]]:
    """Return for each task the numbers [N] of those of these experiments that stopped early, by key."""
    found: dict[str, dict[str, Floats]] = {}
    for key, (_, items) in complete_store(path).items():
        if key in keys:
            for (task, of), values in items.items():
                if of == metric:
                    found.setdefault(task, {})[key] = values
    return found


def find_share(result: Result) -> float:
    """Return the share of its items that an experiment measured that stopped early: the least of its parts."""
    return min(SHARES[part.rounds - 1] for part in result.sampled)


def read_measured(path: str | Path, keys: Collection[str]) -> dict[str, dict[str, dict[str, Floats]]]:
    """Return what was measured by metric, task and key: the value of each item [N], NaN where it was not measured."""
    files = open_files(path)
    early = load_stopped(files, list_stopped(files).keys() & set(keys))
    found: dict[str, dict[str, dict[str, Floats]]] = {}
    for result in [*early.values(), *load_results(path, set(keys) - early.keys())]:
        for (task, metric), (rounds, total, values) in _list_values(result).items():
            whole = np.full(total, np.nan)
            whole[list_places(total, rounds)] = values
            found.setdefault(metric, {}).setdefault(task, {})[result.key] = whole
    return found


Completed = dict[str, tuple[Result, dict[tuple[str, str], Floats]]]


def complete_store(path: str | Path) -> Completed:
    """Return each experiment that stopped early as a result on all items, and the numbers behind it by task and metric.

    Its measurements are the means of these numbers, a perplexity and the mean accuracy where there was one. Their n
    is the number of items that were measured. What is no such mean is left out.
    """
    files = open_files(path)
    names = list_stopped(files)
    if not names:
        return {}
    finished = retry(files, lambda: list_finished(files, {}))
    return _complete(str(path), tuple(sorted(names.values())), frozenset(finished))


@functools.lru_cache(maxsize=4)
def _complete(path: str, names: tuple[str, ...], finished: frozenset[str]) -> Completed:
    """Return complete_store of a store with these files, which never change."""
    files = open_files(path)
    stopped = load_stopped(files, list_stopped(files))
    families = {result.family for result in stopped.values()}
    whole = [result for result in load_results(path, finished) if result.family in families]
    groups: dict[Group, list[Measured]] = defaultdict(list)
    for result in [*stopped.values(), *whole]:
        for (task, metric), (rounds, total, values) in _list_values(result).items():
            own = Measured(result.key, result.experiment.model.name, rounds, values)
            groups[task, metric, result.family, total].append(own)
    numbers: dict[str, dict[tuple[str, str], Floats]] = defaultdict(dict)
    for (task, metric, _, total), group in groups.items():
        for key, values in complete_items(group, total).items():
            numbers[key][task, metric] = values
    return {key: (_measure(result, numbers[key]), numbers[key]) for key, result in stopped.items()}


def _list_values(result: Result) -> dict[tuple[str, str], tuple[int, int, Floats]]:
    """Return the rounds, the number of all items, and the measured values, by task and metric."""
    parts = {task: (part.rounds, total) for part in result.sampled for task, total in part.totals.items()}
    found = {}
    for items in result.items:
        if is_mean(items.metric):
            rounds, total = parts.get(items.task, (LAST, items.n))
            found[items.task, items.metric] = (rounds, total, decode_items(items))
    return found


def is_mean(metric: str) -> bool:
    """Whether the measurement of this name is the mean of the items of this name: accuracies, and those of windows."""
    return metric.startswith("acc") or metric in ("cross_entropy", "kl_divergence", "top1_agreement")


def complete_items(group: list[Measured], total: int) -> dict[str, Floats]:
    """Return the N numbers of each experiment of a group, by key. Those of one that was measured in full are its items.

    The references of an experiment are those with more rounds: of its own model, or else of its family. Without any
    the experiment's own mean stands for the items that nobody measured.
    """
    done: dict[str, Floats] = {}
    for own in sorted(group, key=lambda measured: -measured.rounds):
        if own.rounds == LAST:
            done[own.key] = own.values
            continue
        longer = [other for other in group if other.rounds > own.rounds]
        references = [other for other in longer if other.model == own.model] or longer
        places = list_places(total, own.rounds)
        difference, base = own.values, np.zeros(total)
        if references:
            base = np.mean([done[other.key] for other in references], axis=0)
            shared = [other.values[np.searchsorted(list_places(total, other.rounds), places)] for other in references]
            difference = own.values - np.mean(shared, axis=0)
        numbers = base + difference.mean()
        numbers[places] += total / places.size * (difference - difference.mean())
        done[own.key] = numbers
    return done


def _measure(result: Result, numbers: Mapping[tuple[str, str], Floats]) -> Result:
    """Return a result with the measurements that follow from its numbers on all items."""
    counts = {(m.task, m.metric): m.n for m in result.measurements}
    found: list[Measurement] = []
    for (task, metric), values in numbers.items():
        value = dataclasses.replace(measure_mean(task, metric, values.tolist()), n=counts[task, metric])
        found += [value, *(exponentiate(value, "perplexity") if metric == "cross_entropy" else [])]
    mean = counts.get(("mean_zero_shot", "acc"))
    if mean is not None and not any(task.groups for task in result.tasks):  # in a mean, a group counts as one task
        accuracies = [m for m in found if m.metric == "acc"]
        found.append(dataclasses.replace(mean_accuracy(accuracies), n=mean))
    return dataclasses.replace(result, measurements=tuple(found))
