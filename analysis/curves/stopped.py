"""Points of experiments that stopped early (study.until.decided): which they are, and what a caption says of them."""

from __future__ import annotations

import pandas as pd


def is_stopped(points: pd.DataFrame, results: pd.DataFrame) -> pd.Series[bool]:
    """Return which points rest on an experiment that measured a part of its items.

    Args:
        points: points with a column key, which may hold several keys.
        results: the table that they come from (kbit.read_results with stopped=True).
    """
    early = results.attrs.get("stopped", {})
    found = [any(own in early for own in str(key).split()) for key in points["key"]]
    return pd.Series(found, points.index, dtype=bool)


def describe_stopped(results: pd.DataFrame) -> str:
    """Return what a caption says of the experiments of a table that stopped early, or nothing."""
    early = results.attrs.get("stopped", {})
    shares = [early[key] for key in results["key"].unique() if key in early] if early else []
    if not shares:
        return ""
    count = f"{len(shares)} of {results['key'].nunique()} experiments"
    least, most = f"{min(shares):.3g}", f"{max(shares):.3g}"
    share = f"a share of {least}" if least == most else f"shares of {least} to {most}"
    return (
        f"{count} stopped early (study.until.decided), after {share} of their items. Their values are those of others "
        "that went on, with the differences on the items that both measured, and their intervals are of these items."
    )
