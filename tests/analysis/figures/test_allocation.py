"""The figure of mixes beside uniform precisions: kinds, rivals and gains on planted losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from toy_curves import make_results

from kbit.analysis.curves.curves import Measure
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.mixes.allocation import name_budget, name_kind, tabulate_kinds
from kbit.analysis.figures.mixes.gains import Gain, describe_gains, measure_gains, weigh_rivals
from kbit.analysis.figures.registry import FIGURES

LOSS = Measure("cross entropy", "cross_entropy", "text", higher_is_better=False)


def add_mix(results: pd.DataFrame, gained: float, size: float = 1.0, **columns: Any) -> pd.DataFrame:
    """Results with a copy of every 3-bit experiment that loses less and takes another size."""
    mix = results[(results["bits"] == 3) & results["objective"].isna()].copy()
    mix["key"] = "mix" + "-".join(map(str, columns.values())) + mix["key"]
    mix["total_bits"] = (mix["total_bits"] * size).astype("int64")
    for column in ("value", "low", "high"):
        mix[column] = mix[column] - gained
    return pd.concat([results, mix.assign(**columns)], ignore_index=True)


@pytest.fixture
def mixed() -> pd.DataFrame:
    """Uniform 3, 4, 8 and 16 bits, a budget by kl that gains 0.2 at 3 bits, and rules that lose 0.1 at 3.5."""
    results = make_results().assign(rules=None, objective=None, include=None, exclude=None)
    results = add_mix(results, 0.2, objective="kl", allocation="3 bits by kl of 2, 3, 4")
    return add_mix(results, -0.1, 3.5 / 3, rules="mlp: bits=4")


def test_a_mix_is_beside_one_precision_at_its_bits(mixed: pd.DataFrame) -> None:
    points = tabulate_kinds(mixed, LOSS)
    assert set(points["kind"]) == {"one precision", "rules", "allocated by kl"}
    rivals = weigh_rivals(points)
    assert len(rivals) == 6  # two mixes of three models
    for place, weights in rivals.items():
        model, bits = points.loc[place, ["model", "total_bits"]]
        ends = points[(points["model"] == model) & (points["kind"] == "one precision") & points["bits"].isin([3, 4])]
        low, high = np.log(ends["total_bits"].to_numpy(dtype=float))
        share = (np.log(bits) - low) / (high - low)  # 0 of the budget, and half way for rules of 3.5 bits
        assert weights[ends.index] == pytest.approx([1 - share, share])
        assert weights.sum() == pytest.approx(1)


def make_points(*rows: tuple[str, int, float]) -> pd.DataFrame:
    """One model of one family, without chance: kind, bits, value."""
    points = pd.DataFrame(rows, columns=["kind", "total_bits", "value"])
    points = points.assign(family="toy", model="toy", budget="3 bits", key=[f"k{n}" for n in range(len(points))])
    return points.assign(low=points["value"], high=points["value"])


def test_a_mix_of_more_bits_does_not_beat_a_precision_of_fewer() -> None:
    """3.9 bits that lose as a precision between 3.25 and 4.25 bits does gain nothing, and not the distance to 3.25."""
    between = 1 - np.log(390 / 325) / np.log(425 / 325)
    points = make_points(
        ("one precision", 325, 1.0), ("one precision", 425, 0.0), ("rules", 390, between), ("rules", 430, -1.0),
        ("one precision", 400, 3.0), ("allocated by kl", 325, 0.75),
    )  # fmt: skip
    gains = {gain.kind: gain for gain in measure_gains(points, LOSS, pd.DataFrame())}
    assert gains["rules"][3:] == pytest.approx((1, 0, 0, 0), abs=1e-12)  # one of two: 430 bits are above all
    assert gains["allocated by kl"][3:] == pytest.approx((1, 0.25, 0.25, 0.25))


def test_the_verdict_has_the_planted_gains(mixed: pd.DataFrame) -> None:
    mixed.loc[mixed["rules"].notna(), "include"] = "wte"  # as the mixes of conf/quant have
    figure = FIGURES["allocation"](mixed)
    assert "Mixes beat one precision in 1 of 2 comparisons beyond the interval, and lose in 1." in figure.verdict
    assert "allocated by kl at 3 bits: toy (3) +0.2000 nats" in figure.verdict
    assert "rules at 3 bits: toy (3) -0." in figure.verdict
    (axes,) = figure.fig.axes
    drawn = [len(line.get_xdata()) for line in axes.get_lines()]  # type: ignore[arg-type]
    assert drawn[::2] == [9, 3, 3]  # markers: uniform, rules, allocated


def test_parts_of_models_are_left_out(mixed: pd.DataFrame) -> None:
    mixed.loc[mixed["rules"].notna(), "exclude"] = "lm_head"
    mixed.loc[mixed["bits"] == 8, "include"] = "wte"
    points = tabulate_kinds(mixed, LOSS)
    assert set(points["kind"]) == {"one precision", "allocated by kl"}
    assert set(points["bits"]) == {3, 4}


def test_budgets_stand_apart_and_fisher_has_a_share() -> None:
    def gain(family: str, kind: str, budget: str, mean: float, spread: float = 0.01) -> Gain:
        return Gain(family, kind, budget, 1, mean, mean - spread, mean + spread)

    gains = [
        gain("neox", "allocated by kl", "2.5 bits", 0.2), gain("opt", "allocated by kl", "2.5 bits", 0.1),
        gain("neox", "allocated by fisher", "2.5 bits", 0.15), gain("opt", "allocated by fisher", "2.5 bits", 0.1),
        gain("neox", "allocated by kl", "3.25 bits", 0.001), gain("neox", "allocated by fisher", "3.25 bits", -0.02),
    ]  # fmt: skip
    assert describe_gains(gains, LOSS) == (
        "Mixes beat one precision in 4 of 6 comparisons beyond the interval, and lose in 1. "
        "allocated by kl at 2.5 bits: +0.1000 to +0.2000 nats in 2 families, above 0 beyond the interval in 2; "
        "allocated by fisher at 2.5 bits: +0.1000 to +0.1500 nats in 2 families, above 0 beyond the interval in 2; "
        "allocated by kl at 3.25 bits: neox (1) +0.0010 nats (95% interval -0.0090 to +0.0110); "
        "allocated by fisher at 3.25 bits: neox (1) -0.0200 nats (95% interval -0.0300 to -0.0100). "
        "fisher has 75% to 100% of kl's gain, in the 2 of 3 comparisons where kl gains beyond the interval."
    )
    unknown = "kl gains nowhere beyond the interval, so that fisher's share of its gain is not known."
    assert describe_gains(gains[4:], LOSS).endswith(unknown)
    assert name_budget("3.25 bits by kl of 2, 3", 3) == "3.25 bits"
    assert name_budget(None, 4) == "4 bits"


def test_a_mix_smaller_than_every_uniform_model_has_no_rival(mixed: pd.DataFrame) -> None:
    alone = mixed[mixed["bits"].isin([8, 16]) | mixed["objective"].notna()]
    figure = FIGURES["allocation"](alone)
    assert figure.verdict == "Each mix is smaller, or larger, than every model with one precision for all matrices."


def test_without_mixes_the_study_is_named() -> None:
    with pytest.raises(MissingResults, match=r"kbit run \+sweeps=nano/allocation or kbit run \+sweeps=nano/rules"):
        FIGURES["allocation"](make_results())


def test_kinds() -> None:
    assert name_kind("fisher", "mlp: bits=3") == "allocated by fisher"
    assert name_kind(None, "mlp: bits=3") == "rules"
    assert name_kind(float("nan"), None) == "one precision"
