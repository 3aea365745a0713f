"""The figure of mixes beside uniform precisions: kinds, rivals and gains on planted losses."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from toy_curves import make_results

from kbit.analysis.curves.curves import Measure
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.mixes.allocation import find_rivals, name_kind, tabulate_kinds
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
    results = add_mix(results, 0.2, 0.999, objective="kl", allocation="3 bits by kl of 2, 3, 4")
    return add_mix(results, -0.1, 3.5 / 3, rules="mlp: bits=4")


def test_a_mix_is_beside_the_best_uniform_model_of_its_bits(mixed: pd.DataFrame) -> None:
    points = tabulate_kinds(mixed, LOSS)
    assert set(points["kind"]) == {"one precision", "rules", "allocated by kl"}
    rivals = find_rivals(points)
    assert len(rivals) == 6  # two mixes of three models
    pairs: list[tuple[Any, Any]] = list(rivals.items())
    for mix, rival in pairs:
        assert points.loc[mix, "model"] == points.loc[rival, "model"]
        assert points.loc[rival, "bits"] == 3  # 4 bits take more


def test_the_verdict_has_the_planted_gains(mixed: pd.DataFrame) -> None:
    figure = FIGURES["allocation"](mixed)
    assert "Mixes beat one precision in 1 of 2 comparisons beyond the interval, and lose in 1." in figure.verdict
    assert "toy, allocated by kl (3): +0.2000 nats" in figure.verdict
    assert "toy, rules (3): -0.1000 nats" in figure.verdict
    (axes,) = figure.fig.axes
    drawn = [len(line.get_xdata()) for line in axes.get_lines()]  # type: ignore[arg-type]
    assert drawn[::2] == [9, 3, 3]  # markers: uniform, rules, allocated


def test_a_mix_smaller_than_every_uniform_model_has_no_rival(mixed: pd.DataFrame) -> None:
    alone = mixed[mixed["bits"].isin([8, 16]) | mixed["objective"].notna()]
    figure = FIGURES["allocation"](alone)
    assert figure.verdict == "No mix has as many bits as a model with one precision for all matrices."


def test_without_mixes_the_study_is_named() -> None:
    with pytest.raises(MissingResults, match=r"kbit run \+sweeps=nano/allocation or kbit run \+sweeps=nano/rules"):
        FIGURES["allocation"](make_results())


def test_kinds() -> None:
    assert name_kind("fisher", "mlp: bits=3") == "allocated by fisher"
    assert name_kind(None, "mlp: bits=3") == "rules"
    assert name_kind(float("nan"), None) == "one precision"
