"""The paper's central claim, tested on the curves at hand: is 4-bit precision best at equal total bits?

Only budgets that every quantized precision reaches count (curves.shared_budgets): above the family's largest model in
3 bit a wider precision would win by default, because there is no larger model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves import Measure, split_variants, tabulate_curves

CLAIMED_BITS: Final = 4
HOLDS: Final = 0.9  # "almost universally": at nine budgets in ten or more
HOLDS_MOSTLY: Final = 0.5  # at more budgets than not
GRADES: Final = ("holds", "mostly holds", "does not hold", "cannot be told", "is not tested")


@dataclass(frozen=True)
class Trial:
    """4-bit against the best other precision, over the shared budgets of one variant.

    Attributes:
        share: of the budgets, where 4-bit is best; NaN if it meets no other precision.
        gap: median lead of 4-bit over the best other (< 0: it trails), in the measure's unit.
        apart: share of the budgets where 4-bit leads and the two 95% intervals do not overlap; NaN without
            intervals. A cautious reading: on the same items a lead can be real though the intervals overlap.
        behind: the same for the budgets where 4-bit trails.
        rivals: the best other precision at each budget where 4-bit is not best, most frequent first.
    """

    share: float
    gap: float
    apart: float
    behind: float
    rivals: tuple[int, ...]

    @property
    def grade(self) -> str:
        """One of GRADES."""
        if np.isnan(self.share):
            return "is not tested"
        if self.apart == 0 and self.behind == 0:
            return "cannot be told"
        if self.share >= HOLDS:
            return "holds"
        return "mostly holds" if self.share > HOLDS_MOSTLY else "does not hold"


def try_four_bit(curves: pd.DataFrame, higher_is_better: bool) -> Trial:
    """Return how 4-bit does against every other precision of one variant."""
    value = tabulate_curves(curves)
    reached = value[CLAIMED_BITS].notna() if CLAIMED_BITS in value else pd.Series(False, value.index)
    others = value[reached].drop(columns=CLAIMED_BITS, errors="ignore").dropna(how="all")
    if others.empty:
        return Trial(np.nan, np.nan, np.nan, np.nan, ())
    sign = 1.0 if higher_is_better else -1.0
    rival = (sign * others).idxmax(axis=1)
    gap = sign * value.loc[others.index, CLAIMED_BITS] - (sign * others).max(axis=1)
    beaten = rival[gap <= 0].value_counts()
    ends = ("low", "high")
    return Trial(
        share=float((gap > 0).mean()),
        gap=float(gap.median()),
        apart=measure_apart(curves, rival, *(ends if higher_is_better else ends[::-1]), above=higher_is_better),
        behind=measure_apart(curves, rival, *(ends[::-1] if higher_is_better else ends), above=not higher_is_better),
        rivals=tuple(int(bits) for bits in beaten.index),
    )


def measure_apart(curves: pd.DataFrame, rival: pd.Series[int], own: str, other: str, *, above: bool) -> float:
    """Return the share of budgets where 4-bit's interval end `own` is above (or below) its rival's end `other`."""
    mine = tabulate_curves(curves, own).loc[rival.index, CLAIMED_BITS].to_numpy()
    table = tabulate_curves(curves, other).loc[rival.index]
    rivals = table.to_numpy()[np.arange(len(rival)), table.columns.get_indexer(pd.Index(rival))]
    if np.isnan(mine).any() or np.isnan(rivals).any():
        return float("nan")
    return float(np.mean(mine > rivals if above else mine < rivals))


def judge_four_bit(curves: pd.DataFrame, measure: Measure) -> str:
    """Return one sentence: whether 4-bit is best at equal total bits on these curves, and by how much.

    Args:
        curves: from precision_curves; any number of families and variants.
        measure: what the curves show.
    """
    trials = [try_four_bit(group, measure.higher_is_better) for _, group in split_variants(curves)]
    if len(trials) == 1:
        return describe_trial(trials[0])
    counts = Counter(trial.grade for trial in trials)
    grades = ", ".join(f"{grade} in {counts[grade]}" for grade in GRADES if counts[grade])
    tested = [trial.share for trial in trials if not np.isnan(trial.share)]
    if not tested:
        return f"Not tested: in none of {len(trials)} panels does a 4-bit curve meet another precision."
    return (
        f"Of {len(trials)} panels it {grades}. On average 4-bit is best over {np.mean(tested):.0%} "
        f"of the shared budgets (from {min(tested):.0%} to {max(tested):.0%})."
    )


def describe_trial(trial: Trial) -> str:
    """Return the sentences for a single variant."""
    if np.isnan(trial.share):
        return "Not tested: no 4-bit curve meets another precision at equal total bits."
    rivals = f" (else {' or '.join(f'{bits}-bit' for bits in trial.rivals[:2])})" if trial.rivals else ""
    gap = f"{abs(trial.gap):.2g} {'better' if trial.gap > 0 else 'worse'} than" if trial.gap else "level with"
    clear = "" if np.isnan(trial.apart) else f", and clear of its 95% interval over {trial.apart:.0%}"
    if trial.grade == "cannot be told":
        clear = "; but the two 95% intervals overlap at every budget"
    return (
        f"{trial.grade.capitalize()}: 4-bit is best over {trial.share:.0%} of the shared budgets"
        f"{rivals}, at the median {gap} the best other precision{clear}."
    )
