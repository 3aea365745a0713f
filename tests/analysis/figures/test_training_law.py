"""The figure of the law of trainings: what it says of planted losses, of one size, and of losses that are no law's."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Final

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.roles import LAW_ROLES, tabulate_roles
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.registry import draw_figure
from kbit.analysis.figures.training.law import name_series
from kbit.analysis.statistics.training_law import TrainingLaw

SIZES: Final = {"small": 231_168, "large": 694_272}
PLANTED: Final = TrainingLaw(2.5, 40.0, 0.25, {"weights": 0.9, "activations": 0.6, "gradients": 1.2})


def make_results(models: tuple[str, ...] = ("small", "large"), diverged: bool = False) -> pd.DataFrame:
    """Three seeds of the planted law, in the long form of read_results: single roles, all products, 3 3 5 bits."""
    rng, rows = np.random.default_rng(0), []
    exact: dict[str, Any] = dict.fromkeys(LAW_ROLES, np.inf)
    products = ("weights", "activations", "gradients")
    formats = [exact, *(exact | {role: k} for role in products for k in (2, 3))]
    formats += [exact | dict.fromkeys(products, 3) | more for more in ({}, {"weights": 5}, {"gradients": 5})]
    for model in models:
        for seed in range(3):
            for bits in formats:
                value = PLANTED.predict(pd.DataFrame([bits | {"parameters": SIZES[model]}]))[0] + 0.1 * seed
                roles = {role: {"bits": int(k), "data_type": "int"} for role, k in bits.items() if np.isfinite(k)}
                rows += make_rows(model, seed, value + rng.normal(0, 1e-4), **roles)
    if diverged:
        rows += make_rows(models[0], 0, None, gradients={"bits": 1, "data_type": "int"})
    return pd.DataFrame(rows)


def make_rows(model: str, seed: int, loss: float | None, **roles: Any) -> list[dict[str, Any]]:
    train = {"steps": 9, "text": "t", "start": "random"} | roles | ({"seed": seed} if seed else {})
    row = {"key": f"{model} {json.dumps(train)}", "model": model, "family": "f", "architecture": "A", "bits": 16}
    row |= {"parameters": SIZES[model], "total_bits": 16 * SIZES[model], "bits_per_param": 16.0, "evaluation": "e"}
    row |= {"seed": 0, "low": np.nan, "high": np.nan, "n": 1, "task": "training", "train_seed": seed}
    row |= {"training": "trained", "train_fields": json.dumps(train)}
    ends = [row | {"metric": "diverged", "value": float(loss is None)}]
    return ends if loss is None else [*ends, row | {"metric": "loss", "value": loss}]


def test_a_planted_law_is_drawn_and_said() -> None:
    figure = draw_figure("training_law", make_results(diverged=True))
    assert len(figure.fig.axes) == 3
    assert figure.verdict.startswith(
        "By the law gradients deserve the bits: from 3 bits in all products one more in gradients gains 0.0"
    )
    assert "Bits by which a role's loss falls by e: weights 0.90 (0." in figure.verdict
    assert "The exponent of the effective parameters is 0.25 (0." in figure.verdict
    assert "At 13 bit operations on large W3 A3 G5 has the lowest mean, worse: W5 A3 G3 +0.0" in figure.verdict
    assert "1 training diverged and left out." in figure.notes[-1]
    assert "fits poorly" not in figure.verdict
    apart = figure.data["law"] - figure.data["added"]
    assert 0 < apart.dropna().abs().max() < 1e-3  # the noise


def test_a_law_that_misses_much_of_what_few_bits_add_says_so_first() -> None:
    """The highest losses are moved away from the law by as much as few bits add."""
    rows = make_results()
    is_loss = rows["metric"] == "loss"
    worst = is_loss & (rows["value"] > rows.loc[is_loss, "value"].quantile(0.8))
    shifted = rows.assign(value=rows["value"].mask(worst, rows["value"] + 3.0))
    assert draw_figure("training_law", shifted).verdict.startswith("The law fits poorly: what is said by it is weak.")


def test_one_size_has_no_law_but_comparisons_at_equal_work() -> None:
    figure = draw_figure("training_law", make_results(("small",)))
    assert len(figure.fig.axes) == 1
    assert figure.verdict.startswith(
        "No law: it takes trainings without quantized roles of two sizes, and there are 1."
    )
    assert "At 13 bit operations on small W3 A3 G5 has the lowest mean" in figure.verdict


def test_seeds_that_differ_more_than_operands_tell_nothing() -> None:
    results = make_results()
    noise = np.random.default_rng(1).normal(0, 0.05, len(results))
    noisy = results.assign(value=results["value"] + noise * (results["metric"] == "loss"))
    verdict = draw_figure("training_law", noisy).verdict
    assert verdict.startswith("The law fits poorly")
    assert "By the law no operand is shown to deserve the bits" in verdict
    assert "has the lowest mean, not told apart from it: " in verdict
    assert "worse: " not in verdict


def test_a_role_at_a_bound_of_the_fit_has_no_interval() -> None:
    """Variance of 2 bits costs every seed .3 nats, and of 3 bits nothing at all."""
    more = []
    for model in SIZES:
        for seed in range(3):
            value = PLANTED.predict(pd.DataFrame([{"parameters": SIZES[model]} | dict.fromkeys(LAW_ROLES, np.inf)]))[0]
            for bits in (1, 2, 3):
                loss = value + 0.1 * seed + 0.3 * (seed == 0 and bits == 1)
                more += make_rows(model, seed, loss, variance={"bits": bits, "data_type": "dynamic"})
    verdict = draw_figure("training_law", pd.concat([make_results(), pd.DataFrame(more)])).verdict
    assert re.search(r"variance not known, as [12] of 3 seeds have it at a bound of the fit", verdict), verdict


def test_what_quantizes_some_layers_alone_is_another_quantizer() -> None:
    results = make_results(("small",))
    fields = [json.loads(cell) for cell in results["train_fields"]]
    is_one = np.array(["weights" in own and own["weights"]["bits"] == 2 for own in fields])
    some = results[is_one].assign(
        train_fields=[json.dumps(own | {"include": "mlp"}) for own in itertools.compress(fields, is_one)],
        key="some " + results.loc[is_one, "key"],
        value=results.loc[is_one, "value"] - 0.5,
    )
    both = tabulate_roles(pd.concat([some, results]))
    pd.testing.assert_frame_equal(both, tabulate_roles(results))


def test_a_role_that_loses_nothing_has_no_bits_to_fall_by() -> None:
    """Momentum of 3 bits ends below float32, which the law cannot say: it takes the loss as none."""
    more = []
    for model in SIZES:
        for seed in range(3):
            value = PLANTED.predict(pd.DataFrame([{"parameters": SIZES[model]} | dict.fromkeys(LAW_ROLES, np.inf)]))[0]
            more += make_rows(model, seed, value + 0.1 * seed - 0.01, momentum={"bits": 3, "data_type": "dynamic"})
    verdict = draw_figure("training_law", pd.concat([make_results(), pd.DataFrame(more)])).verdict
    assert "momentum none, as nothing is lost" in verdict


def test_series_are_named_by_what_is_quantized() -> None:
    exact = dict.fromkeys(LAW_ROLES, np.inf)
    products = dict.fromkeys(LAW_ROLES[:3], 3)
    assert name_series(exact) is None
    assert name_series(exact | {"variance": 2}) == "variance"
    assert name_series(exact | products) == "all products"
    assert name_series(dict.fromkeys(LAW_ROLES, 3)) == "all roles"
    assert name_series(exact | products | {"weights": 5}) == "mixed"
    assert name_series(exact | {"weights": 3, "variance": 3}) == "mixed"


def test_trainings_in_float32_alone_are_no_law() -> None:
    with pytest.raises(MissingResults, match=r"run: kbit run \+sweeps=nano/training_law"):
        draw_figure("training_law", pd.DataFrame(make_rows("small", 0, 3.0)))
