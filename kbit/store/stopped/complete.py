"""What an experiment that stopped early would have with all items, as far as the others say: paired on what is shared.

An experiment e was measured on n of N items, and others, its references r, on more. The estimate on all items is that
of the references and the difference on what e and they share (the difference estimator, Cochran 1977, section 7.9):

    y_e = y_r + mean over the n items of (e_i - r_i)

So two values with the same rounds and references do not differ by the items that they lack. With other references a
difference rests on the estimates of these, too. Each such value is stored as N numbers of which it is the mean, as if
all items had been measured. Their spread, and that of their differences to other experiments item by item, give the
intervals that n items allow:

    item i:   r_i + mean (e_i - r_i) + f (N / n) (e_i - r_i - mean (e_i - r_i))

where the last part is 0 for an item that e lacks. The factor f makes the interval of N numbers that of n: Student's
quantile and the deviation of n values, for those of N.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.measurement import (
    ItemValues,
    TaskRecord,
    TextRecord,
    decode_items,
    find_range,
    quantile_95,
)
from kbit.evaluation.rounds.order import LAST, list_places
from kbit.evaluation.rounds.sample import SampledPart
from kbit.store.damage import DamagedRecord, set_aside
from kbit.store.filesystem import open_files
from kbit.store.records import find_records, list_finished, retry
from kbit.store.stopped.records import list_stopped, load_stopped

Floats = NDArray[np.float64]
Group = tuple[object, ...]  # what must be equal for items to compare, see _describe_items


@dataclass(frozen=True)
class _Model:
    """The fields of a Result's model that say whether its items compare with others'."""

    name: str
    dtype: str = ""


@dataclass(frozen=True)
class _Evaluation:
    """How tasks were asked."""

    num_fewshot: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class _Training:
    """Whether a model was trained."""

    steps: int = 0


@dataclass(frozen=True)
class _Experiment:
    """The fields of a Result's experiment that say whether its items compare with others'."""

    model: _Model
    eval: _Evaluation = _Evaluation()
    train: _Training = _Training()


@dataclass(frozen=True)
class _Items:
    """The fields of a Result that hold its items, and say of what they are."""

    key: str
    experiment: _Experiment
    family: str
    items: tuple[ItemValues, ...] = ()
    sampled: tuple[SampledPart, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    text: TextRecord | None = None


@dataclass(frozen=True)
class Completed:
    """What an experiment would have with all items.

    Attributes:
        values: N numbers of which the estimate is the mean.
        measured: the values of the n items that were measured.
        is_alone: whether no other experiment has more items, so that nothing but these n says anything of the others.
    """

    values: Floats
    measured: Floats
    is_alone: bool = False


Numbers = dict[tuple[str, str], Completed]  # by task and metric


@dataclass(frozen=True)
class Measured:
    """What was measured of an experiment: the values of the items of its rounds, in order."""

    key: str
    model: str
    rounds: int
    values: Floats


def read_completed(path: str | Path, metric: str, keys: Collection[str]) -> dict[str, dict[str, Floats]]:
    """Return for each task the numbers [N] of those of these experiments that stopped early, by key.

    A single item says nothing of the spread of the others, so that its experiment has no numbers.
    """
    found: dict[str, dict[str, Floats]] = {}
    for key, numbers in complete_store(path).items():
        if key in keys:
            for (task, of), completed in numbers.items():
                if of == metric and completed.measured.size > 1:
                    found.setdefault(task, {})[key] = completed.values
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
    for (task, metric, total, *_), group in _group([*stopped.values(), *whole]).items():
        for key, completed in complete_items(group, total).items():
            if key in numbers:
                numbers[key][task, metric] = _keep_in_range(metric, completed)
    return numbers


def _keep_in_range(metric: str, completed: Completed) -> Completed:
    """Return numbers whose mean is in the range of their metric: an accuracy is never above 1."""
    mean = completed.values.mean()
    shift = np.clip(mean, *find_range(metric, completed.measured.tolist())) - mean
    return replace(completed, values=completed.values + shift) if shift else completed


def _group(results: Iterable[_Items]) -> dict[tuple[str, str, int, Group], list[Measured]]:
    """Return what was measured by what can be compared: task, metric, number of all items, _describe_items."""
    groups: dict[tuple[str, str, int, Group], list[Measured]] = defaultdict(list)
    for result in results:
        for (task, metric), (rounds, total, values) in _list_values(result).items():
            own = Measured(result.key, result.experiment.model.name, rounds, values)
            groups[task, metric, total, _describe_items(result, task)].append(own)
    return groups


def _describe_items(result: _Items, task: str) -> Group:
    """Return the family, the evaluation and the data of a task's items, or of a text's windows."""
    experiment, text = result.experiment, result.text
    about = (result.family, experiment.model.dtype, experiment.train.steps)
    if text is not None and text.name == task:
        return (*about, text.sha256, text.window_length)
    data = next(((own.sha256, own.fingerprint, own.definition_sha256) for own in result.tasks if own.name == task), ())
    return (*about, experiment.eval, data)


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


def complete_items(group: list[Measured], total: int) -> dict[str, Completed]:
    """Return the N numbers of each experiment of a group, by key. Those of one that was measured in full are its items.

    The references of an experiment are those with more rounds: of its own model, or else of its family. Without any
    the experiment's own mean stands for the items that nobody measured.
    """
    done: dict[str, Completed] = {}
    for own in sorted(group, key=lambda measured: -measured.rounds):
        if own.rounds == LAST:
            done[own.key] = Completed(own.values, own.values)
            continue
        longer = [other for other in group if other.rounds > own.rounds]
        references = [other for other in longer if other.model == own.model] or longer
        places = list_places(total, own.rounds)
        difference, base = own.values, np.zeros(total)
        if references:
            base = np.mean([done[other.key].values for other in references], axis=0)
            shared = [other.values[np.searchsorted(list_places(total, other.rounds), places)] for other in references]
            difference = own.values - np.mean(shared, axis=0)
        numbers = base + difference.mean()
        numbers[places] += _find_factor(places.size, total) * total / places.size * (difference - difference.mean())
        done[own.key] = Completed(numbers, own.values, is_alone=not references)
    return done


def _find_factor(n: int, total: int) -> float:
    """Return by how much the interval of n values is wider than that of N numbers of their spread."""
    if n < 2:
        return 1.0  # there are no deviations
    return quantile_95(n) / quantile_95(total) * math.sqrt(n / (n - 1) * (total - 1) / total)
