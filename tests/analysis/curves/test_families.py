"""Curves that are worked out once are those that are worked out anew, and know of no change of the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from kbit.analysis.curves.curves import ZERO_SHOT, AmbiguousResults, precision_curves
from kbit.analysis.curves.families import find_curves, keep_curves, take_family


def make_row(bits: int, size: int, family: str, method: str = "rtn") -> dict[str, Any]:
    """One row of results, as kbit.read_results gives it."""
    is_plain = bits == 16
    value = 0.1 * bits
    return {
        "key": f"{family}-{method}-{bits}-{size}", "model": f"{family}-{size}", "family": family, "bits": bits,
        "data_type": None if is_plain else "nf", "block_size": pd.NA if is_plain else 64, "exponent_bits": pd.NA,
        "method": "none" if is_plain else method, "total_bits": size * bits, "task": ZERO_SHOT.task,
        "metric": ZERO_SHOT.metric, "value": value, "low": value - 0.01, "high": value + 0.02,
    }  # fmt: skip


def make_results() -> pd.DataFrame:
    """Two families. The second has settings of its own, of which the first knows nothing."""
    points = [(bits, size) for bits in (3, 4, 16) for size in (1, 2)]
    rows = [make_row(bits, size, family) for family in ("toy", "other") for bits, size in points]
    return pd.DataFrame([*rows, *(make_row(3, size, "other", "gptq") for size in (1, 2))])


def test_a_family_taken_of_all_is_the_family_by_itself() -> None:
    results = make_results()
    known: dict[Any, Any] = {}
    for family in ("toy", "other"):
        own = precision_curves(results[results["family"] == family], ZERO_SHOT.metric, ZERO_SHOT.task)
        pd.testing.assert_frame_equal(take_family(results, family, ZERO_SHOT, known), own, check_dtype=False)


def test_an_ambiguous_family_stops_no_other() -> None:
    results = make_results()
    again = results[results["family"] == "other"].assign(value=0.5, key="again")
    both = pd.concat([results, again], ignore_index=True)
    known: dict[Any, Any] = {}
    own = precision_curves(results[results["family"] == "toy"], ZERO_SHOT.metric, ZERO_SHOT.task)
    pd.testing.assert_frame_equal(take_family(both, "toy", ZERO_SHOT, known), own)
    with pytest.raises(AmbiguousResults, match="differ in"):
        take_family(both, "other", ZERO_SHOT, known)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    work_out: Callable[..., pd.DataFrame] = precision_curves

    def record(results: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
        calls.append(metric)
        return work_out(results, metric, task)

    monkeypatch.setattr("kbit.analysis.curves.families.precision_curves", record)
    return calls


def test_kept_results_are_worked_out_once_and_others_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    results, calls = make_results(), count_calls(monkeypatch)
    kept = keep_curves(results)
    results["value"] = 0.0  # of the user's table, which is another
    first, second = (find_curves(kept, ZERO_SHOT.metric, ZERO_SHOT.task) for _ in range(2))
    first["value"] = 1.0  # of what one figure got
    assert second["value"].max() == pytest.approx(1.6)
    assert len(calls) == 1
    assert find_curves(results, ZERO_SHOT.metric, ZERO_SHOT.task)["value"].max() == 0.0
    assert find_curves(kept[kept["family"] == "toy"], ZERO_SHOT.metric, ZERO_SHOT.task)["family"].nunique() == 1
    assert len(calls) == 3
