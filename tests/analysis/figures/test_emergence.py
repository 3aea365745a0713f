"""The figure of emergent features, on made-up measurements, and the paper's table beside it."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.curves.published import read_published
from kbit.analysis.figures.emergence import METRICS, tabulate_features
from kbit.analysis.figures.registry import FIGURES


def plant(planted: pd.DataFrame) -> pd.DataFrame:
    """The 16-bit rows of one family; the largest model has two features, the others none."""
    base = planted[(planted["bits"] == 16) & (planted["family"] == "opt")]
    rows = [base]
    for _, model in base[base["metric"] == "cross_entropy"].groupby("model"):
        is_large = model["parameters"].iloc[0] == 16_000_000
        loss = model["value"].iloc[0]
        values = {"features": 2.0, "features_one_sided": 1.0, "layers_affected": 0.5, "positions_affected": 0.25}
        if not is_large:
            values = dict.fromkeys(values, 0.0)
        values |= {"top1_probability": 0.4}
        if is_large:
            values |= {"top1_probability_without_features": 0.2, "top1_probability_without_random": 0.39}
            values |= {"cross_entropy_without_features": loss + 2, "cross_entropy_without_random": loss + 0.01}
        rows += [model.assign(task="features/text", metric=name, value=value) for name, value in values.items()]
    return pd.concat(rows, ignore_index=True)


def test_ours_stand_beside_the_papers(planted: pd.DataFrame) -> None:
    figure = FIGURES["features"](plant(planted))
    ours = figure.data[figure.data["source"] == "this store"]
    assert ours["features"].tolist() == [0, 0, 2]
    loss = planted.query("model == 'opt-16m' and bits == 16 and metric == 'cross_entropy'")["value"].iloc[0]
    assert ours["perplexity"].iloc[-1] == pytest.approx(math.exp(loss))
    assert "1 of 3 models have outlier features" in figure.verdict
    assert "up to 50% of layers, at up to 25.0% of positions" in figure.verdict
    assert "adds +2.000 nats on average, as many random dimensions +0.010" in figure.verdict
    assert "0.400 becomes 0.200 and 0.390" in figure.verdict
    assert len(figure.data) == 3 + len(read_published("features"))


def test_without_as_many_other_dimensions_there_is_no_control(planted: pd.DataFrame) -> None:
    rows = plant(planted)
    verdict = FIGURES["features"](rows[~rows["metric"].str.endswith("_without_random")]).verdict
    assert "adds +2.000 nats on average; top-1 probability 0.400 becomes 0.200." in verdict
    assert "nan" not in verdict


def test_a_model_counts_once_at_16_bits_and_criteria_are_said_and_not_mixed(planted: pd.DataFrame) -> None:
    rows = plant(planted)
    is_feature = rows["task"] == "features/text"
    quantized = rows[is_feature].assign(bits=4, key=rows["key"] + "-4", value=9.0)
    ours = tabulate_features(pd.concat([rows, quantized], ignore_index=True))
    assert ours["bits"].tolist() == [16] * 3
    assert ours["features"].tolist() == [0, 0, 2]
    rows.loc[is_feature, "evaluation"] = "float32, 16 windows, criteria magnitude 2"
    verdict = FIGURES["features"](rows).verdict
    assert verdict.startswith("By other criteria than the paper's (magnitude 2): 1 of 3 models")
    rows.loc[is_feature & (rows["model"] == "opt-1m"), "evaluation"] = "float32, 16 windows"
    with pytest.raises(AmbiguousResults, match="measured in 2 ways"):
        FIGURES["features"](rows)


def test_without_features_the_ablation_is_not_spoken_of(planted: pd.DataFrame) -> None:
    rows = plant(planted)
    small = rows[rows["model"] != "opt-16m"]
    assert "zeroing" not in FIGURES["features"](small).verdict


def test_other_measurements_are_no_features(planted: pd.DataFrame) -> None:
    assert tabulate_features(planted).empty
    assert set(METRICS.values()) <= set(tabulate_features(plant(planted)).columns)
