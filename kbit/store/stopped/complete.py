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

import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.measurement import ItemValues, decode_items
from kbit.evaluation.rounds.order import LAST, list_places
from kbit.evaluation.rounds.sample import SampledPart
from kbit.store.damage import DamagedRecord, set_aside
from kbit.store.filesystem import open_files
from kbit.store.records import find_records, list_finished, retry
from kbit.store.stopped.records import list_stopped, load_stopped

Floats = NDArray[np.float64]
Numbers = dict[tuple[str, str], Floats]  # by task and metric
Group = tuple[str, str, str, int]  # task, metric, family, number of all items


@dataclass(frozen=True)
class _Model:
    """The name of a Result's model."""

    name: str


@dataclass(frozen=True)
class _Experiment:
    """The model of a Result's experiment."""

    model: _Model


@dataclass(frozen=True)
class _Items:
    """The fields of a Result that hold its items, and say of what they are."""

    key: str
    experiment: _Experiment
    family: str
    items: tuple[ItemValues, ...] = ()
    sampled: tuple[SampledPart, ...] = ()


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
    for key, numbers in complete_store(path).items():
        if key in keys:
            for (task, of), values in numbers.items():
                if of == metric:
                    found.setdefault(task, {})[key] = values
    return found


def read_measured(path: str | Path, keys: Collection[str]) -> dict[str, dict[str, dict[str, Floats]]]:
    """Return what was measured by metric, task and key: the value of each item [N], NaN where it was not measured."""
    files = open_files(path)
    early = load_stopped(files, list_stopped(files).keys() & set(keys), _Items)
    found: dict[str, dict[str, dict[str, Floats]]] = {}
    for result in [*early.values(), *_read_whole(path, set(keys) - early.keys())]:
        for (task, metric), (rounds, total, values) in _list_values(result).items():
            whole = np.full(total, np.nan)
            whole[list_places(total, rounds)] = values
            found.setdefault(metric, {}).setdefault(task, {})[result.key] = whole
    return found


def complete_store(path: str | Path) -> dict[str, Numbers]:
    """Return the numbers on all items of each experiment that stopped early."""
    files = open_files(path)
    names = list_stopped(files)
    if not names:
        return {}
    finished = retry(files, lambda: list_finished(files, {}))
    return _complete(str(path), tuple(sorted(names.values())), frozenset(finished))


@functools.lru_cache(maxsize=4)
def _complete(path: str, names: tuple[str, ...], finished: frozenset[str]) -> dict[str, Numbers]:
    """Return complete_store of a store with these files, which never change."""
    files = open_files(path)
    stopped = load_stopped(files, list_stopped(files), _Items)
    families = {result.family for result in stopped.values()}
    whole = (result for result in _read_whole(path, finished) if result.family in families)
    numbers: dict[str, Numbers] = {key: {} for key in stopped}
    for (task, metric, _, total), group in _group([*stopped.values(), *whole]).items():
        for key, values in complete_items(group, total).items():
            if key in numbers:
                numbers[key][task, metric] = values
    return numbers


def _group(results: Iterable[_Items]) -> dict[Group, list[Measured]]:
    """Return what was measured by what can be compared."""
    groups: dict[Group, list[Measured]] = defaultdict(list)
    for result in results:
        for (task, metric), (rounds, total, values) in _list_values(result).items():
            own = Measured(result.key, result.experiment.model.name, rounds, values)
            groups[task, metric, result.family, total].append(own)
    return groups


def _read_whole(path: str | Path, keys: Collection[str]) -> Iterator[_Items]:
    """Yield the items of finished experiments, and warn of those that cannot be read."""
    for source, record in find_records(open_files(path), "experiments", keys):
        try:
            yield source.read(_Items, record)
        except DamagedRecord as error:
            set_aside(error)


def _list_values(result: _Items) -> dict[tuple[str, str], tuple[int, int, Floats]]:
    """Return the rounds, the number of all items, and the measured values, by task and metric."""
    parts = {task: (part.rounds, total) for part in result.sampled for task, total in part.totals.items()}
    found: dict[tuple[str, str], tuple[int, int, Floats]] = {}
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
