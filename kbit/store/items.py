"""The values of the items behind stored measurements, read without whole results."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.store.damage import DamagedRecord, set_aside
from kbit.store.records import find_records, open_existing, read_all_items


def read_items(
    path: str | Path, task: str, metric: str, keys: Collection[str] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return the value of each item [n] by experiment key, in item order: 0 or 1 for acc, nats for cross_entropy.

    Experiments without such items are left out. They have another task, or are from before items were kept.

    Args:
        path: the store.
        task: a task as in read_results.
        metric: a metric as in read_results that has items: acc, acc_norm, acc_bytes, or a metric of a text's windows.
        keys: the experiments to read. None reads all.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    return read_items_by_task(path, metric, keys).get(task, {})


def read_items_by_task(
    path: str | Path, metric: str, keys: Collection[str] | None = None
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return for each task with items of a metric what read_items returns: {task: {key: values [n]}}.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for source, record in find_records(open_existing(path), "experiments", keys):
        try:
            for (task, of), values in read_all_items(source, record).items():
                if of == metric:
                    found.setdefault(task, {})[record["key"]] = values
        except DamagedRecord as error:
            set_aside(error)
    return found
