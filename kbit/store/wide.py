"""One row for each experiment, for pandas' groupby and pivot: every measure is a column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from kbit.experiments.config import Experiment
from kbit.experiments.names import find_varied, name_experiment
from kbit.store.records import read_as

_MEASURED: Final = ["task", "metric", "value", "low", "high", "n", "evaluation"]


@dataclass(frozen=True)
class _Cost:
    """The fields of a Result that name an experiment and tell its cost."""

    key: str
    experiment: Experiment
    seconds_quantize: float
    seconds_evaluate: float
    peak_memory_bytes: int
    finished: str


def widen(rows: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Return one row for each experiment of a table of measurements.

    Args:
        rows: the table of read_results, with words in place of missing settings.
        path: the store that it is from.
    """
    experiments = rows.drop(columns=_MEASURED).drop_duplicates("key").set_index("key")
    wide = _read_costs(path).join(experiments, how="right").join(_spread(rows))
    order = wide[["family", "parameters", "bits", "data_type", "block_size"]].astype({"block_size": str})
    return wide.loc[order.sort_values(list(order.columns)).index].reset_index()


def _spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a column for each task and metric with its value, and two for its interval, by key."""
    names = rows["task"] + " " + rows["metric"]
    parts = [
        rows.assign(column=names + suffix).pivot(index="key", columns="column", values=field)
        for field, suffix in (("value", ""), ("low", " low"), ("high", " high"))
    ]
    spread = pd.concat(parts, axis="columns")
    return spread[[name + suffix for name in dict.fromkeys(names) for suffix in ("", " low", " high")]]


def _read_costs(path: str | Path) -> pd.DataFrame:
    """Return the label, seconds, peak memory and time of the end of each experiment, by key."""
    costs = list(read_as(_Cost, path))
    varied = find_varied(cost.experiment for cost in costs)
    rows = [
        {"key": cost.key, "label": name_experiment(cost.experiment, varied)}
        | {"seconds": cost.seconds_quantize + cost.seconds_evaluate}
        | {"peak_memory_bytes": cost.peak_memory_bytes, "finished": cost.finished}
        for cost in costs
    ]
    return pd.DataFrame(rows, columns=["key", "label", "seconds", "peak_memory_bytes", "finished"]).set_index("key")
