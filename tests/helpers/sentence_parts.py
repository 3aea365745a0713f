"""What sentences about curves consist of, computed by numpy alone: budgets, leads, intervals, grades, shares."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

NUMBER: Final = r"[+-]\d+\.\d+"


LEAD: Final = rf"({NUMBER})(?: nats)? \((?:95% interval ({NUMBER}) to ({NUMBER})|no interval)\)"


SHARE: Final = r"(more than 99%|less than 1%|\d+%)"


UNITS: Final = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}


NEGLIGIBLE: Final = {"acc": 0.005, "cross_entropy": 0.01}


def read_bits(text: str) -> float:
    """Return the number behind "20 Mbit"."""
    number, unit = text.split()
    return float(number) * UNITS[unit]


def list_curves(points: pd.DataFrame, by: str) -> dict[Any, pd.DataFrame]:
    """Return the curves of two sizes or more, each sorted by size."""
    curves = {name: rows.sort_values("total_bits", kind="stable") for name, rows in points.groupby(by)}
    return {name: rows for name, rows in curves.items() if rows["total_bits"].nunique() > 1}


def list_budgets(curves: Iterable[pd.DataFrame]) -> Floats:
    """Return 200 budgets that all quantized curves reach, or all curves if one alone is quantized. Perhaps none."""
    curves = list(curves)
    quantized = [rows for rows in curves if (rows["bits"] < 16).any()]
    compared = quantized if len(quantized) > 1 else curves
    if len(compared) < 2:
        return np.empty(0)
    low, high = max(c["total_bits"].min() for c in compared), min(c["total_bits"].max() for c in compared)
    if low >= high:
        return np.empty(0)
    budgets = np.exp(np.linspace(np.log(low), np.log(high), 200))
    budgets[[0, -1]] = low, high  # not a rounding error outside
    return np.asarray(budgets, dtype=np.float64)


def weigh(curve: pd.DataFrame, budgets: Floats) -> pd.DataFrame:
    """Return the weight of each point (column) in the curve's value at each budget (row)."""
    x = np.log(curve["total_bits"].to_numpy(dtype=float))
    rows = [np.interp(np.log(budgets), x, unit, left=np.nan, right=np.nan) for unit in np.eye(len(x))]
    return pd.DataFrame(np.stack(rows, axis=1), columns=curve.index)


def find_lead(points: pd.DataFrame, first: list[str], second: list[str], sign: float) -> tuple[float, float] | None:
    """Return the mean lead of some curves over others with its standard error, or None if they do not meet."""
    kept = points[points["series"].isin([*first, *second])]
    curves = list_curves(kept, "series")
    budgets = list_budgets(curves.values())
    if not budgets.size or not {*first} & {*curves} or not {*second} & {*curves}:
        return None
    total = pd.Series(0.0, kept.index)
    for names, factor in ((first, sign), (second, -sign)):
        named = [name for name in names if name in curves]
        for name in named:
            total = total.add(factor / len(named) * weigh(curves[name], budgets).mean(), fill_value=0.0)
    error = (kept["high"] - kept["low"]) / (2 * 1.959964)
    return float((total * kept["value"]).sum()), float(np.sqrt(((total * error) ** 2).sum(skipna=False)))


def check_lead(words: tuple[str, ...], lead: float, error: float, *, strongest: bool = False) -> None:
    """Compare a printed lead and its interval with our own. That over the strongest of several is wider."""
    assert abs(float(words[0]) - lead) < 6e-5
    assert (not words[1]) == bool(np.isnan(error))
    if words[1]:
        low, high = float(words[1]), float(words[2])
        slack = error / 3 + 6e-5
        assert abs(low - (lead - 1.96 * error)) < slack
        assert high > lead + 1.96 * error - slack
        assert strongest or high < lead + 1.96 * error + slack


def grade(low: str, high: str, expected: str, limit: float) -> set[str]:
    """Return the grades that an interval allows, several where rounding decides. Without one it is undecided."""
    if not low:
        return {"undecided"}
    a, b = float(low), float(high)
    if expected == "level":
        a, b = min(a + limit, limit - b), max(-abs(limit), min(b + limit, limit - a))
    elif expected == "worse":
        a, b = -b, -a
    elif expected == "no better":
        a, b = limit - b, limit - a
    near = {"holds", "does not hold", "undecided"} if min(abs(a), abs(b)) < 1.1e-4 else set()
    return near | {"holds" if a > 0 else "does not hold" if b < 0 else "undecided"}


def count_grades(verdict: str) -> Counter[str]:
    """Return the grades that a sentence counts: "Of 3 panels: holds in 2, undecided in 1", or a single one."""
    head = verdict.split(". ")[0].split(" (")[0]
    if not head.startswith("Of "):
        return Counter([head.split(":")[0].lower()])
    parts = re.findall(r"(holds|does not hold|undecided|not tested) in (\d+)", head.lower())
    return Counter({name: int(count) for name, count in parts})


def check_counts(counts: Counter[str], allowed: list[set[str]]) -> None:
    """Compare counted grades with the grades that each panel's interval allows."""
    for name in ("holds", "does not hold", "undecided"):
        sure = sum(grades == {name} for grades in allowed)
        assert sure <= counts[name] <= sum(name in grades for grades in allowed), (name, counts, allowed)


def check_share(words: str, share: float) -> None:
    """Compare a printed share with our own, where all and none are exact."""
    if words == "more than 99%":
        assert 0.99 < share < 1
    elif words == "less than 1%":
        assert 0 < share < 0.01
    else:
        assert abs(int(words[:-1]) / 100 - share) < 0.0051
        assert (words == "100%") == (share == 1)
        assert (words == "0%") == (share == 0)
