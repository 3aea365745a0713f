"""Points of experiments that stopped early (study.until.decided): which they are, and what a caption says of them.

The column measured of a table of results has the share of its items that each value rests on (kbit.read_results with
stopped=True). Tables without it have values of all items alone.
"""

from __future__ import annotations

import pandas as pd

from kbit.analysis.curves.curves import Measure


def find_stopped(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table whose values rest on a part of the items."""
    return results[results["measured"] < 1] if "measured" in results else results.iloc[:0]


def is_stopped(points: pd.DataFrame, results: pd.DataFrame, measure: Measure | None = None) -> pd.Series[bool]:
    """Return which points rest on an experiment that measured a part of its items.

    Args:
        points: points with a column key, which may hold several keys.
        results: the table that they come from.
        measure: what the points are values of. None: anything that was measured of an experiment counts.
    """
    early = find_stopped(results)
    if measure is not None:
        early = early[(early["task"] == measure.task) & (early["metric"] == measure.metric)]
    keys = set(early["key"])
    found = [any(own in keys for own in str(key).split()) for key in points["key"]]
    return pd.Series(found, points.index, dtype=bool)


def describe_stopped(results: pd.DataFrame) -> str:
    """Return what a caption says of the experiments of a table that stopped early, or nothing."""
    early = find_stopped(results)
    if early.empty:
        return ""
    count = f"{early['key'].nunique()} of {results['key'].nunique()} experiments"
    least, most = f"{early['measured'].min():.3g}", f"{early['measured'].max():.3g}"
    share = f"a share of {least}" if least == most else f"shares of {least} to {most}"
    is_whole = results["key"].isin(set(early["key"])) & (results["measured"] == 1)
    whole = " (other values of theirs are of all items)" if is_whole.any() else ""
    return (
        f"{count} stopped early (study.until.decided), after {share} of their items{whole}. Such values are those of "
        "others that went on, with the differences on the items that both measured, and their intervals are of these "
        "items."
    )
