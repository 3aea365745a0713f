"""What mixes of precisions gain over one precision at equal total bits, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Floats, Measure
from kbit.analysis.statistics.frontier import Draws, draw_values, find_pareto_frontier, mean_interval, weigh_curve
from kbit.analysis.statistics.grades import describe_lead

UNIFORM: Final = "one precision"
RULES: Final = "rules"
ALLOCATED: Final = "allocated by "
SLACK: Final = 1.005  # a mix may be larger than every uniform model by so much


class Gain(NamedTuple):
    """What the mixes of one kind and budget gain in one family against one precision at their bits, as a mean.

    Attributes:
        family, kind, budget: whose mixes they are.
        mixes: how many they are.
        mean, low, high: nats gained, and the 95% interval.
    """

    family: str
    kind: str
    budget: str
    mixes: int
    mean: float
    low: float
    high: float

    @property
    def wins(self) -> bool:
        """Whether the gain is above 0 beyond its interval."""
        return self.low > 0


def measure_gains(points: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Gain]:
    """Return what the mixes of each family, kind and budget gain. A mix without a rival is left out, see weigh_rivals.

    Args:
        points: the columns family, model, kind, budget, total_bits, value, low, high, key.
        measure: the measure that the values are of.
        results: the table behind the points, see draw_values.
    """
    gains = []
    for family, own in points.groupby("family", sort=False):
        own = own.reset_index(drop=True)
        draws, rivals = draw_values(own, measure, results), weigh_rivals(own)
        compared = own.loc[list(rivals)]
        for (kind, budget), mixes in compared.groupby(["kind", "budget"], sort=True):
            weights = np.mean([rivals[place] - np.eye(len(own))[place] for place in mixes.index], axis=0)
            gains.append(_make_gain((str(family), str(kind), str(budget), len(mixes)), weights, own, draws))
    return gains


def _make_gain(names: tuple[str, str, str, int], weights: Floats, points: pd.DataFrame, draws: Draws) -> Gain:
    mean = float(weights @ points["value"].to_numpy(dtype=np.float64))
    return Gain(*names, mean, *mean_interval(draws, weights))


def weigh_rivals(points: pd.DataFrame) -> dict[Any, Floats]:
    """Return the weights of the points in the value of one precision at a mix' bits, by the mix' place.

    It is the frontier of the uniform experiments of the mix' model, interpolated in the logarithm of total bits. A mix
    that is smaller than all of them, or larger, is left out.

    Args:
        points: the columns model, kind, total_bits, value, with the index 0, 1, ...
    """
    found: dict[Any, Floats] = {}
    for _, own in points.groupby("model", sort=False):
        uniform, mixes = own[own["kind"] == UNIFORM], own[own["kind"] != UNIFORM]
        frontier = find_pareto_frontier(uniform, higher_is_better=False)
        if frontier.empty:
            continue
        budgets = mixes["total_bits"].to_numpy(dtype=np.float64)
        rows = weigh_curve(frontier["total_bits"].to_numpy(dtype=np.float64), budgets, extend=True)
        largest = SLACK * uniform["total_bits"].max()
        for place, bits, row in zip(mixes.index, budgets, rows, strict=True):
            if bits <= largest and not np.isnan(row).any():
                found[place] = np.zeros(len(points))
                found[place][frontier.index] = row
    return found


def describe_gains(gains: list[Gain], measure: Measure) -> str:
    """Say in how many comparisons mixes beat one precision, what each kind and budget gains, and fisher's share."""
    if not gains:
        return "Each mix is smaller, or larger, than every model with one precision for all matrices."
    won, lost = sum(gain.wins for gain in gains), sum(gain.high < 0 for gain in gains)
    head = f"Mixes beat one precision in {won} of {len(gains)} comparisons beyond the interval, and lose in {lost}."
    groups: dict[tuple[str, str], list[Gain]] = {}
    for gain in gains:
        groups.setdefault((gain.kind, gain.budget), []).append(gain)
    parts = [f"{kind} at {budget}: {_describe_group(own, measure)}" for (kind, budget), own in groups.items()]
    return " ".join(filter(None, [head, f"{'; '.join(parts)}.", describe_share(gains)]))


def _describe_group(gains: list[Gain], measure: Measure) -> str:
    if len(gains) == 1:
        gain = gains[0]
        return f"{gain.family} ({gain.mixes}) {describe_lead(gain.mean, gain.low, gain.high, measure)}"
    means = [gain.mean for gain in gains]
    least, most = (f"{round(value, 4) + 0.0:+.4f}" for value in (min(means), max(means)))
    wins = sum(gain.wins for gain in gains)
    return f"{least} to {most} nats in {len(gains)} families, above 0 beyond the interval in {wins}"


def describe_share(gains: Iterable[Gain]) -> str:
    """Say which share of kl's gain fisher has, where kl gains beyond the interval. Empty without both."""
    by = {(gain.family, gain.budget, gain.kind): gain for gain in gains}
    pairs = [
        (by[family, budget, kind], by[family, budget, f"{ALLOCATED}fisher"])
        for family, budget, kind in by
        if kind == f"{ALLOCATED}kl" and (family, budget, f"{ALLOCATED}fisher") in by
    ]
    shares = [fisher.mean / kl.mean for kl, fisher in pairs if kl.wins]
    if not pairs:
        return ""
    if not shares:
        return "kl gains nowhere beyond the interval, so that fisher's share of its gain is not known."
    least, most = (f"{share:.0%}" for share in (min(shares), max(shares)))
    share = least if least == most else f"{least} to {most}"
    where = f"the {len(shares)} of {len(pairs)} comparisons where kl gains beyond the interval"
    return f"fisher has {share} of kl's gain, in {where}."
