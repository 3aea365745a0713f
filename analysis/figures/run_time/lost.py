"""What models lose whose inputs of products, or keys and values, are rounded while they run."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from kbit.analysis.curves.curves import Measure, find_cross_entropy, pick_rows
from kbit.analysis.curves.run_time import BITS, split_bits
from kbit.analysis.statistics.degradation import measure_lost
from kbit.analysis.statistics.grades import NEGLIGIBLE, count_grades, grade_interval, grade_level


def tabulate_lost(results: pd.DataFrame) -> tuple[pd.DataFrame, Measure | None]:
    """Return what each model adds to the cross entropy of itself at 16 bits, see split_bits and measure_lost."""
    measure = find_cross_entropy(results) if set(BITS) <= set(results.columns) else None
    if measure is None:
        return pd.DataFrame(), None
    rows = split_bits(pick_rows(results, measure.metric, measure.task))
    return measure_lost(rows, measure, results), measure


def judge_level(rows: pd.DataFrame, what: str) -> str:
    """Return for how many models, a row each, it holds that something adds next to nothing, and what each adds."""
    limit = NEGLIGIBLE[False]
    ends = list(zip(rows["low"].astype(float), rows["high"].astype(float), strict=True))
    is_level = [grade_level(low, high, limit) for low, high in ends]
    adds = [grade_interval(low - limit, high - limit) for low, high in ends]
    return (
        f"{what} adds less than {limit:g} nats per token: {_count(is_level)}, and more: {_count(adds)} "
        f"({rows['lost'].min():+.4f} to {rows['lost'].max():+.4f})"
    )


def _count(grades: Iterable[str]) -> str:
    found = list(grades)
    return f"{found[0]} in the one model" if len(found) == 1 else count_grades(found)
