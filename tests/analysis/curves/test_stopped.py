"""Which points are hollow: those whose own measure rests on a part of its items."""

from __future__ import annotations

import pandas as pd
import pytest

from kbit.analysis.curves.curves import ZERO_SHOT, Measure
from kbit.analysis.curves.stopped import describe_stopped, is_stopped

LOSS = Measure("cross entropy", "cross_entropy", "text", higher_is_better=False)


@pytest.fixture
def results() -> pd.DataFrame:
    """The tasks of an experiment stopped after an eighth, its text went on. Another one is whole."""
    rows = [
        ("a", "mean_zero_shot", "acc", 0.125),
        ("a", "text", "cross_entropy", 1.0),
        ("b", "mean_zero_shot", "acc", 1.0),
        ("b", "text", "cross_entropy", 1.0),
    ]
    return pd.DataFrame(rows, columns=["key", "task", "metric", "measured"])


def test_a_loss_of_all_windows_is_not_hollow_as_tasks_stopped(results: pd.DataFrame) -> None:
    points = pd.DataFrame({"key": ["a", "b", "b a"]})
    assert is_stopped(points, results, LOSS).tolist() == [False, False, False]
    assert is_stopped(points, results, ZERO_SHOT).tolist() == [True, False, True]
    assert is_stopped(points, results).tolist() == [True, False, True]


def test_a_caption_says_that_other_values_are_whole(results: pd.DataFrame) -> None:
    assert describe_stopped(results).startswith(
        "1 of 2 experiments stopped early (study.until.decided), after a share of 0.125 of their items "
        "(other values of theirs are of all items)."
    )
    assert describe_stopped(results[results["metric"] == "cross_entropy"]) == ""
    assert describe_stopped(results.drop(columns="measured")) == ""
