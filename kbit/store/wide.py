"""One row for each experiment, for pandas' groupby and pivot: every measure is a column."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from kbit.experiments.config import Experiment
from kbit.experiments.names import find_varied, name_experiment
from kbit.store.records import read_as
from kbit.store.rows import SETTING_COLUMNS

_ORDER: Final = ("family", "parameters", "model", "bits", "data_type", "block_size")
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
    """Return one row for each experiment of a table of measurements, with words in place of missing settings.

    Args:
        rows: the table of read_results, or a part of it.
        path: the store that it is from.
    """
    experiments = write_words(rows.drop(columns=_MEASURED).drop_duplicates("key")).set_index("key")
    wide = _read_costs(path, set(experiments.index)).join(experiments, how="right").join(_spread(rows))
    return sort_experiments(wide.reset_index())


def write_words(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of read_results in which the settings that a quantizer does not have are words."""
    whole = table["block_size"].isna() & table["data_type"].notna() & table["allocation"].isna()
    named = {name: table[name].astype(object).where(table[name].notna(), "none") for name in SETTING_COLUMNS}
    return table.assign(**named | {"block_size": named["block_size"].mask(whole, "whole")})


def sort_experiments(table: pd.DataFrame, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return a table of read_results in order: by these columns, or by model, bits, data type and block size.

    Models are in the order of their family and size. What is no number stands behind the numbers of its column, such as
    the whole tensor behind all other block sizes. A column with a - before its name falls. Equal rows keep their order.
    """
    names = columns or _ORDER
    falls = [name.startswith("-") and name not in table for name in names]
    keys: list[pd.Series[Any]] = []
    for name, is_falling in zip(names, falls, strict=True):
        values = table[name.removeprefix("-") if is_falling else name].astype(object)
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        keys += [numbers, values.where(numbers.isna() & values.notna(), "").astype(str)]
    order = pd.concat(dict(enumerate(keys)), axis="columns")
    rising = [not is_falling for is_falling in falls for _ in range(2)]
    places = order.sort_values(list(order.columns), ascending=rising, kind="stable").index
    ordered: pd.DataFrame = table.loc[places].reset_index(drop=True)
    return ordered


def _spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a column for each task and metric with its value, and two for its interval, by key."""
    names = rows["task"] + " " + rows["metric"]
    parts = [
        rows.assign(column=names + suffix).pivot(index="key", columns="column", values=field)
        for field, suffix in (("value", ""), ("low", " low"), ("high", " high"))
    ]
    spread = pd.concat(parts, axis="columns")
    return spread[[name + suffix for name in dict.fromkeys(names) for suffix in ("", " low", " high")]]


def _read_costs(path: str | Path, keys: Collection[str]) -> pd.DataFrame:
    """Return the label, seconds, peak memory and time of the end of each of these experiments, by key."""
    costs = list(read_as(_Cost, path, keys=keys))
    varied = find_varied(cost.experiment for cost in costs)
    rows = [
        {"key": cost.key, "label": name_experiment(cost.experiment, varied)}
        | {"seconds": cost.seconds_quantize + cost.seconds_evaluate}
        | {"peak_memory_bytes": cost.peak_memory_bytes, "finished": cost.finished}
        for cost in costs
    ]
    return pd.DataFrame(rows, columns=["key", "label", "seconds", "peak_memory_bytes", "finished"]).set_index("key")
