"""The values of the items behind stored measurements, read without whole results."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.measurement import ItemValues, decode_items
from kbit.experiments.serialize import from_json
from kbit.store.records import read_records


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
    for record in read_records(path, "experiments", keys):
        for items in (from_json(ItemValues, values) for values in record.get("items", ())):
            if items.metric == metric:
                found.setdefault(items.task, {})[record["key"]] = decode_items(items)
    return found
