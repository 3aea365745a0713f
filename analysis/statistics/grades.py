"""The words for what an interval says: the grades of a claim, and a lead with its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from kbit.analysis.curves.curves import Measure

NEGLIGIBLE: Final = {True: 0.005, False: 0.01}  # "no gain", "level": half a point of accuracy, a hundredth of a nat
NAMED: Final = 6  # panels that a sentence names, each with its lead
GRADES: Final = ("holds", "does not hold", "undecided", "not tested")
SIGN: Final = "A lead above 0 is better: higher accuracy, lower cross entropy."


def grade_interval(low: float, high: float) -> str:
    """Return the verdict on "x > 0" by a 95% interval of x. Without an interval (NaN) nothing is decided."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def grade_level(low: float, high: float, negligible: float) -> str:
    """Return the verdict on "-negligible < x < negligible" by a 95% interval of x."""
    return grade_interval(min(low + negligible, negligible - high), min(high + negligible, negligible - low))


def count_grades(grades: Iterable[str]) -> str:
    """Return for example "holds in 2, undecided in 1". A single grade stands alone."""
    counts = Counter(grades)
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{grade} in {counts[grade]}" for grade in GRADES if counts[grade])


def join_parts(parts: Sequence[str], count: int) -> str:
    """Return the parts as one list, which ends with how many of `count` there are beyond them."""
    return "; ".join(parts) + (f"; and {count - len(parts)} more" if count > len(parts) else "")


def describe_share(share: float) -> str:
    """Return a share in whole percent, where 0% and 100% are said of none and all alone."""
    if 0 < share <= 0.005:  # half a percent would be rounded to none
        return "less than 1%"
    return "more than 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def describe_sources(sources: Iterable[str]) -> str:
    """Return how the uncertainty of several leads was found, each way once, or "no intervals" where it was not."""
    return "; ".join(sorted({source or "no intervals" for source in sources}))


def describe_lead(gap: float, low: float, high: float, measure: Measure) -> str:
    """Return for example "+0.0123 nats (95% interval +0.0100 to +0.0140)". Above 0 is better, see SIGN."""
    unit = "" if measure.higher_is_better else " nats"
    interval = "no interval" if np.isnan(low) else f"95% interval {low:+.4f} to {high:+.4f}"
    return f"{round(gap, 4) + 0.0:+.4f}{unit} ({interval})"  # + 0.0: never "-0.0000"
