"""Figures of optimizers' states: what is computed from known losses and divergences."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.curves.optimizers import read_state, tabulate_trainings
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.registry import draw_figure
from kbit.analysis.figures.training.optimizer_ablation import judge_ablation, summarize, tabulate_ablation
from kbit.analysis.figures.training.states import judge_states, judge_tuned, tabulate_states
from kbit.numerics.spec import QuantSpec

FIELDS: dict[str, Any] = {"steps": 120, "text": "t", "start": "random"}


def make_state(bits: int, data_type: str = "dynamic", block: int | None = 256, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "data_type": data_type, "block_size": block, "scale_format": "fp32"} | more


def make_rows(fields: dict[str, Any], value: float | None, seed: int = 0, model: str = "m") -> list[dict[str, Any]]:
    """The rows of one training: whether it diverged, and its loss unless it did."""
    fields = FIELDS | fields | ({"seed": seed} if seed else {})
    key = f"{model} {json.dumps(fields)}"
    row = {"key": key, "model": model, "parameters": 1000, "bits": 16, "evaluation": "e", "n": 1, "family": "f"}
    row |= {"training": "t", "train_fields": json.dumps(fields), "train_seed": seed, "total_bits": 16000}
    ends = row | {
        "task": "training",
        "metric": "diverged",
        "value": float(value is None),
        "low": np.nan,
        "high": np.nan,
    }
    loss = row | {"task": "text", "metric": "cross_entropy", "value": value, "low": 0.0, "high": 9.0}
    return [ends] if value is None else [ends, loss]


def make_both(**state: Any) -> dict[str, Any]:
    """Fields with both states quantized alike, the variance unsigned."""
    zero = state.pop("zero", False)
    return {"momentum": make_state(**state), "variance": make_state(**state, signed=False, zero=zero)}


def make_ablation() -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for seed in range(3):
        rows += make_rows({}, 4.0 + 0.1 * seed, seed)
        rows += make_rows({"stable_embedding": True}, 3.8 + 0.1 * seed, seed)
        rows += make_rows(make_both(bits=8, data_type="int", block=None, zero=True), None, seed)
        rows += make_rows(make_both(bits=8, block=None, zero=True), None if seed == 2 else 4.1 + 0.1 * seed, seed)
        rows += make_rows(make_both(bits=8, block=2048), 4.01 + 0.1 * seed, seed)
    rows += make_rows({"lr": 1.0}, 9.0)  # other settings
    rows += make_rows({"momentum": make_state(8)}, 9.0)  # one state alone
    return pd.DataFrame(rows)


def test_states_are_read_from_the_fields_of_a_training() -> None:
    fields = make_both(bits=4, block=None)
    assert read_state(fields, "momentum") == QuantSpec(4, "dynamic", block_size=None, scale_format="fp32")
    variance = QuantSpec(4, "dynamic", block_size=None, scale_format="fp32", signed=False, zero=False)
    assert read_state(fields, "variance") == variance
    assert read_state({"momentum": {"bits": 3}}, "momentum") == QuantSpec(3, "float")  # left out where it is float
    assert read_state({}, "variance") is None


def test_the_ablation_counts_what_diverged_and_pairs_the_rest_by_seed() -> None:
    data = tabulate_ablation(make_ablation())
    assert len(data) == 15
    summary: Any = summarize(data).set_index(["states", "block", "stable"])
    assert summary["unstable"].to_dict() == {
        ("32-bit", "", False): 0,
        ("32-bit", "", True): 0,
        ("dynamic", 2048, False): 0,
        ("dynamic, 0 in the variance", "whole", False): pytest.approx(1 / 3),
        ("linear, 0 in the variance", "whole", False): 1,
    }
    lone = summary.loc[("dynamic, 0 in the variance", "whole", False)]
    assert (lone["mean"], lone["low"], lone["high"]) == pytest.approx((0.1, 0.1, 0.1))  # of the two that ended
    assert summary.loc[("dynamic", 2048, False), "mean"] == pytest.approx(0.01)
    assert summary.loc[("32-bit", "", True), "mean"] == pytest.approx(-0.2)
    assert np.isnan(summary.loc[("linear, 0 in the variance", "whole", False), "loss"])
    assert lone["paper_unstable"] == 10
    assert lone["paper_loss"] == pytest.approx(np.log(18.6 / 16.7))
    assert np.isnan(summary.loc[("dynamic", 2048, False), "paper_loss"])  # the paper's tables have a 0
    verdict = judge_ablation(summarize(data))
    assert "Linear, 0 in the variance: 3 of 3 trainings are unstable" in verdict
    assert "The stable embedding changes 32 bits by -0.2000 (-0.2000 to -0.2000)" in verdict


def make_bits() -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for seed in range(3):
        rows += make_rows({}, 4.0 + 0.01 * seed, seed)
        for bits, lost in ((2, 0.5), (4, 0.001 * (seed - 1))):
            rows += make_rows({"momentum": make_state(bits)}, 4.0 + 0.01 * seed + lost, seed)
            rows += make_rows(make_both(bits=bits), None if bits == 2 else 4.02 + 0.01 * seed, seed)
        for beta1, lost in ((0.5, -0.3), (0.8, -0.1)):
            rows += make_rows({"beta1": beta1}, 4.0 + lost + 0.01 * seed, seed)
            rows += make_rows({"beta1": beta1} | make_both(bits=4), 4.05 + lost + 0.01 * seed, seed)
    return pd.DataFrame(rows)


def test_states_are_level_diverge_or_lose_and_are_compared_tuned() -> None:
    trainings = tabulate_trainings(make_bits())
    data = tabulate_states(trainings)
    assert data.groupby(["series", "bits"]).size().to_dict() == {
        ("32-bit", 32): 3, ("both: dynamic", 2): 3, ("both: dynamic", 4): 3,
        ("momentum: dynamic", 2): 3, ("momentum: dynamic", 4): 3,
    }  # fmt: skip
    verdict = judge_states(data)
    assert "m, both: dynamic: 2 bits diverge in 3 of 3, 4 bits lose 0.020" in verdict
    assert "m, momentum: dynamic: 2 bits lose 0.500." in verdict
    edge = "lr 0.0004 and beta1 0.5 (the edge of what was tried)"
    tuned = f" Tuned, 4 bits end +0.0500 (+0.0500 to +0.0500) from 32 bits on m: 32 bits at {edge}, 4 bits at {edge}."
    assert judge_tuned(trainings) == tuned


def test_what_is_tuned_has_one_recipe_and_ends_with_every_seed() -> None:
    """Longer trainings of another study are no better 32-bit states, nor is a setting at which a seed diverged."""
    rows: list[Any] = make_bits().to_dict("records")
    for seed in range(3):
        rows += make_rows({"steps": 400}, 3.0, seed)
        rows += make_rows({"beta1": 0.0}, 3.0, seed)  # which 4 bits have not tried
        rows += make_rows({"beta1": 0.7}, None if seed else 3.0, seed)
        rows += make_rows({"beta1": 0.7} | make_both(bits=4), 4.2 + 0.01 * seed, seed)
    assert judge_tuned(tabulate_trainings(pd.DataFrame(rows))) == judge_tuned(tabulate_trainings(make_bits()))


def test_one_seed_is_said_to_show_nothing() -> None:
    trainings = tabulate_trainings(make_bits().query("train_seed == 0"))
    assert "2 bits have one seed, which shows no difference or likeness" in judge_states(tabulate_states(trainings))
    assert "4 bits end +0.0500 (one seed) from 32 bits on m" in judge_tuned(trainings)


@pytest.mark.parametrize(("name", "make"), [("optimizer_ablation", make_ablation), ("states", make_bits)])
def test_both_are_drawn_and_say_which_study_they_need(name: str, make: Any) -> None:
    figure = draw_figure(name, make())
    assert figure.verdict.endswith(".")
    assert len(figure.data) == 15
    study = {"states": "nano/optimizer_states"}.get(name, "nano/optimizer_ablation")
    for rows in (make()[lambda table: table["train_fields"] == json.dumps(FIELDS)], make().iloc[:0]):
        with pytest.raises(MissingResults, match=study):
            draw_figure(name, rows)


@pytest.mark.parametrize(("name", "make"), [("optimizer_ablation", make_ablation), ("states", make_bits)])
def test_trainings_of_other_studies_may_be_measured_in_other_ways(name: str, make: Any) -> None:
    rows = [row | {"evaluation": "64 windows"} for n in (0, 1) for row in make_rows({"steps": 5}, 4.0, n)]
    alone = make()
    together = pd.concat([alone, pd.DataFrame(rows)], ignore_index=True)
    pd.testing.assert_frame_equal(draw_figure(name, together).data, draw_figure(name, alone).data)
    mixed = alone.assign(evaluation=np.where(alone["train_seed"] == 1, "64 windows", "e"))
    with pytest.raises(AmbiguousResults, match="f was measured in 2 ways"):
        draw_figure(name, mixed)
