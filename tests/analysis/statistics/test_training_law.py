"""The law of trainings: what was planted is found, intervals cover it, and comparisons are at equal bit operations."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.roles import LAW_ROLES, tabulate_roles
from kbit.analysis.statistics.laws import TooFewPoints
from kbit.analysis.statistics.training_law import (
    TrainingLaw,
    compare_equal_work,
    count_bit_operations,
    describe_law,
    find_gains,
    fit_seeds,
    predict_mean,
)

SIZES: Final = {"small": 231_168, "large": 694_272}
DECAYS: Final = {"weights": 0.9, "activations": 0.6, "gradients": 1.2, "momentum": 1.0, "variance": 0.5}
PLANTED: Final = TrainingLaw(2.5, 40.0, 0.25, DECAYS)


def make_formats() -> list[dict[str, float]]:
    """The formats of nano/training_law: one role at a time, all products, and all roles."""
    exact = dict.fromkeys(LAW_ROLES, np.inf)
    one = [exact | {role: bits} for role in LAW_ROLES for bits in ((2, 3, 4) if role in DECAYS else ())]
    products = dict.fromkeys(("weights", "activations", "gradients"), 3)
    return [exact, *one, exact | dict.fromkeys(products, 2), exact | products, dict.fromkeys(LAW_ROLES, 3)]


def make_points(noise: float = 0.0, seeds: int = 3, draw: int = 0) -> pd.DataFrame:
    """Trainings of the planted law. Seeds shift all losses of a model alike, which a larger noise would hide."""
    rng, parts = np.random.default_rng(draw), []
    for model, parameters in SIZES.items():
        rows = pd.DataFrame(make_formats()).assign(model=model, parameters=parameters)
        for seed in range(seeds):
            value = PLANTED.predict(rows) + rng.normal(0, 3 * noise) + rng.normal(0, noise, len(rows))
            parts.append(rows.assign(seed=seed, value=value, diverged=False))
    return pd.concat(parts, ignore_index=True)


def test_exact_losses_give_the_planted_law() -> None:
    laws = fit_seeds(make_points(seeds=1))
    found = describe_law(laws)["mean"]
    assert found["exponent"] == pytest.approx(0.25, rel=1e-3)
    assert {role: found[role] for role in DECAYS} == pytest.approx(DECAYS, rel=1e-3)
    assert laws[0].floor == pytest.approx(2.5, abs=1e-2)
    points = make_points(seeds=1)
    assert predict_mean(laws, points) == pytest.approx(points["value"].to_numpy(), abs=1e-5)


def test_the_effective_parameters_by_hand() -> None:
    """With g = 1 / ln 2 one bit leaves a half of the parameters, two bits three quarters."""
    law = TrainingLaw(1.0, 8.0, 1.0, {"weights": 1 / np.log(2), "gradients": 1 / np.log(2)})
    points = pd.DataFrame({"parameters": [4.0] * 3, "weights": [np.inf, 1, 1], "gradients": [np.inf, np.inf, 2]})
    assert law.predict(points) == pytest.approx([1 + 8 / 4, 1 + 8 / 2, 1 + 8 / 1.5])


def test_intervals_over_seeds_cover_the_planted_law() -> None:
    """95% intervals from three seeds hold what was planted in 95% of draws, within three standard errors."""
    trials, truth = 15, pd.Series({"exponent": PLANTED.exponent} | DECAYS)
    inside = []
    for draw in range(trials):
        found = describe_law(fit_seeds(make_points(noise=0.002, draw=draw)))
        inside.append((found["low"] <= truth) & (truth <= found["high"]))
    covered = pd.DataFrame(inside).mean()
    assert covered.mean() >= 0.9
    assert (covered >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)).all()


def test_one_more_bit_is_for_the_role_that_lacks_most() -> None:
    """At 3 bits everywhere gradients have the smallest factor, and the gains follow g. All cost as much."""
    laws = fit_seeds(make_points(noise=0.0005))
    gains = find_gains(laws, 3, SIZES["large"])
    assert list(gains.index) == ["gradients", "weights", "activations"]
    truth = PLANTED.predict(pd.DataFrame([dict.fromkeys(LAW_ROLES, np.inf) | {"parameters": SIZES["large"]}] * 2
                                         ).assign(weights=3, activations=3, gradients=[3, 4]))  # fmt: skip
    assert gains["low"]["gradients"] <= truth[0] - truth[1] <= gains["high"]["gradients"]
    assert gains["lead_low"]["weights"] > 0
    assert gains.loc["gradients", "lead"] == 0


def test_bit_operations_by_hand() -> None:
    points = pd.DataFrame({"weights": [4, np.inf, 5], "activations": [4, np.inf, 3], "gradients": [4, 2, 3]})
    assert count_bit_operations(points).tolist() == [16, (256 + 32 + 32) / 3, (15 + 15 + 9) / 3]


def test_formats_of_equal_work_are_paired_by_seed() -> None:
    """3 3 5 in three orders: weights are best, activations lose .01 and .03, gradients .1. Others have no rival."""
    rows: list[dict[str, Any]] = []
    for seed, whole in enumerate((3.0, 4.0)):
        for role, lost in (("weights", 0.0), ("activations", 0.01 + 0.02 * seed), ("gradients", 0.1)):
            bits = dict.fromkeys(LAW_ROLES[:3], 3) | {role: 5, "momentum": np.inf, "variance": np.inf}
            rows.append({"model": "m", "seed": seed, "value": whole + lost} | bits)
        rows.append(rows[-1] | {"weights": 5, "activations": 5, "gradients": 5, "value": 1.0})
        rows.append(rows[0] | {"momentum": 2, "value": 9.0, "seed": seed})
    found = compare_equal_work(pd.DataFrame(rows)).set_index("format")
    assert set(found["work"]) == {"3 3 5"}
    assert found["operations"].tolist() == pytest.approx([13] * 3)
    assert found["mean"].to_dict() == pytest.approx({"W5 A3 G3": 0, "W3 A5 G3": 0.02, "W3 A3 G5": 0.1})
    half = 12.7062 * 0.01  # t of one degree of freedom, and the standard error of .01 and .03
    assert list(found.loc["W3 A5 G3", ["low", "high"]]) == pytest.approx([0.02 - half, 0.02 + half], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda points: points[points["model"] == "small"], "of two sizes, and there are 1"),
        (lambda points: points[np.isfinite(points["weights"])], "of two sizes, and there are 0"),
        (lambda points: points[~np.isfinite(points[list(DECAYS)]).any(axis=1)], "no role has few bits"),
        (lambda points: points[points.index.isin([0, 1, 19, 20])], "1 roles have 4 parameters, which 4 trainings"),
        (
            lambda points: points.assign(value=-points["value"]),
            r"the largest model ends at -\d\.\d{4} nats and the smallest at -\d\.\d{4}: they were trained too",
        ),
    ],
    ids=["one size", "no exact ones", "no roles", "few", "larger is worse"],
)
def test_what_tells_no_law_is_refused(change: Any, message: str) -> None:
    with pytest.raises(TooFewPoints, match=message):
        fit_seeds(change(make_points(seeds=1)))


def test_a_seed_without_one_of_the_formats_is_left_out() -> None:
    points = make_points(seeds=2)
    lost = points.assign(value=points["value"].where((points["seed"] == 0) | np.isinf(points["weights"])))
    assert list(fit_seeds(lost)) == [0]
    neither = lost[(lost["seed"] == 1) | (lost["gradients"] != 2)]
    with pytest.raises(TooFewPoints, match="no seed has a training of each format"):
        fit_seeds(neither)


def make_rows(model: str, seed: int, loss: float | None, **fields: Any) -> list[dict[str, Any]]:
    """The rows of read_results of one training. A diverged one has no loss."""
    train = {"steps": 9, "text": "t", "start": "random"} | fields | ({"seed": seed} if seed else {})
    row = {"key": f"{model} {json.dumps(train)}", "model": model, "parameters": SIZES[model], "task": "training"}
    row |= {"training": "trained", "train_fields": json.dumps(train)}
    ends = [row | {"metric": "diverged", "value": float(loss is None)}]
    return ends if loss is None else [*ends, row | {"metric": "loss", "value": loss}]


def test_trainings_of_one_recipe_and_kind_are_rows() -> None:
    int3 = {"bits": 3, "data_type": "int", "block_size": 16}
    rows = [
        *make_rows("small", 0, 4.0),
        *make_rows("large", 0, 3.5, lr=0.1),  # sizes may have a learning rate each
        *make_rows("small", 1, 4.1, weights=int3, momentum={"bits": 2, "data_type": "dynamic"}),
        *make_rows("small", 2, 4.2, weights=int3 | {"bits": 2}),
        *make_rows("small", 3, 9.9, weights={"bits": 3, "data_type": "nf"}),  # another kind
        *make_rows("small", 4, 9.9, steps=99),  # another recipe
        *make_rows("small", 2, 9.9, weights=int3 | {"bits": 2}, lr=0.5),  # another learning rate
        *make_rows("small", 5, 9.9, fast={}),
        *make_rows("small", 6, 9.9, replicas=2),
        *make_rows("small", 7, None, gradients=int3),
    ]
    table = tabulate_roles(pd.DataFrame(rows)).set_index("seed")
    assert sorted(table.index) == [0, 0, 1, 2, 7]
    assert table[list(LAW_ROLES)].loc[1].to_numpy().tolist() == [3, np.inf, np.inf, 2, np.inf]
    assert table.loc[2, "weights"] == 2
    assert bool(table["diverged"][7])
    assert np.isnan(table["value"][7])
    assert tabulate_roles(pd.DataFrame(rows[:0], columns=["training"])).empty
