"""Figures of trainings that differ in what they quantize: names, differences to float32, and what is drawn."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.figures.registry import draw_figure
from kbit.analysis.figures.training.exchange import name_exchange, name_stages
from kbit.analysis.figures.training.fast_precision import draw_map, judge_products, tabulate_shares
from kbit.analysis.figures.training.formats import find_differences, name_products, tabulate_formats
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.session import Session
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.numerics.spec import QuantSpec
from kbit.store.readers import read_results
from kbit.store.store import Store
from kbit.training.config import TrainConfig
from kbit.training.products.fast import PERIODS, block_float
from kbit.training.sections import FastConfig

RECIPE: dict[str, Any] = {"steps": 40, "text": "t", "start": "random"}
RECIPE_ROLES = ("weights", "activations", "gradients")
M2 = {"bits": 3, "data_type": "int", "block_size": 16, "layout": "row", "scale_format": "e8m0"}


def make_rows(
    loss: float, seed: int, cost: float | None = None, metric: str = "", **fields: Any
) -> list[dict[str, Any]]:
    """The rows of read_results of one training: its cross entropy, and what it cost."""
    fields = RECIPE | fields | ({"seed": seed} if seed else {})
    words = {name: part for name, part in fields.items() if name != "seed"}
    row = {"key": json.dumps(fields), "model": "m", "family": "f", "architecture": "A", "parameters": 9, "bits": 16}
    row |= {"total_bits": 144, "bits_per_param": 16.0, "evaluation": "e", "seed": 0, "low": np.nan, "high": np.nan}
    row |= {"n": 9, "training": json.dumps(words), "train_seed": seed, "train_fields": json.dumps(fields)}
    rows = [row | {"task": "text", "metric": "cross_entropy", "value": loss}]
    return rows + ([row | {"task": "training", "metric": metric, "value": cost}] if cost is not None else [])


def make_products() -> pd.DataFrame:
    """float32, one format that costs .1 in both seeds, and FAST that costs .01 and .03."""
    rows = []
    for seed, whole in enumerate((3.0, 3.2)):
        rows += make_rows(whole, seed)
        rows += make_rows(
            whole + 0.1,
            seed,
            1.0,
            "passes_per_mac",
            weights=M2,
            activations=M2,
            gradients=M2 | {"rounding": "stochastic"},
        )
        rows += make_rows(whole + 0.01 + 0.02 * seed, seed, 3.5, "passes_per_mac", fast={"alpha": 0.9})
        rows += make_rows(9.0, seed, 1.0, "passes_per_mac", weights=M2, activations=M2, lr=1.0)  # another recipe
    return pd.DataFrame(rows)


def test_products_are_named_by_their_fields() -> None:
    mx = {"bits": 4, "exponent_bits": 2, "block_size": 32, "layout": "row", "scale_format": "e8m0"}
    rows = {"bits": 8, "data_type": "int", "block_size": None, "layout": "row", "scale_format": "fp32"}
    names: list[tuple[dict[str, Any], str | None]] = [
        ({}, "float32"),
        ({"fast": {}}, "FAST 0.6/0.3"),
        ({"fast": {"alpha": 0.9, "low": 3}}, "FAST 0.9/0.3 m=3/4"),
        (dict.fromkeys(("weights", "activations", "gradients"), M2), "BFP m=2"),
        (dict.fromkeys(("weights", "activations", "gradients"), mx), "MX float4-e2m1"),
        (dict.fromkeys(("weights", "activations", "gradients"), rows), "int8 rows"),
        ({"weights": M2, "activations": M2}, "W BFP m=2, A BFP m=2, G float32"),
        ({"exchange": rows}, None),
    ]
    for fields, name in names:
        assert name_products({**RECIPE, **fields}) == name
    exchange = {"bits": 8, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}
    assert name_exchange(RECIPE) is None
    assert name_exchange(RECIPE | {"replicas": 2}) == "float32"
    assert name_exchange(RECIPE | {"replicas": 2, "exchange": exchange, "exchange_form": "two_shot"}) == (
        "dynamic8 block 256 in two shots"
    )
    whole = exchange | {"block_size": None}
    assert name_exchange(RECIPE | {"replicas": 2, "exchange": whole, "error_feedback": True}) == (
        "dynamic8 one scale with feedback"
    )


def test_a_study_with_fast_is_drawn_before_one_with_more_formats_and_the_rest_is_counted() -> None:
    others = [
        row
        for bits in (2, 3, 4, 5)
        for row in make_rows(5.0, 0, 1.0, "passes_per_mac", steps=9, weights=M2 | {"bits": bits})
    ]
    wider = make_rows(0.5, 0, 1.0, "passes_per_mac", **dict.fromkeys(RECIPE_ROLES, M2 | {"block_size": 32}))
    figure = draw_figure("fast_precision", pd.DataFrame([*make_products().to_dict("records"), *others, *wider]))
    losses = figure.data.groupby("format")["value"].mean()
    assert losses["BFP m=2"] == pytest.approx(3.2)
    assert losses["BFP m=2 block 32"] == 0.5
    assert figure.notes[-1] == "Not shown: 6 trainings that diverged or are of other models, recipes or quantizers."


def test_losses_are_paired_by_seed_with_students_interval() -> None:
    table = tabulate_formats(make_products(), "passes_per_mac", name_products, frozenset({"fast", *RECIPE_ROLES}))
    assert list(dict.fromkeys(table["format"])) == ["float32", "FAST 0.9/0.3", "BFP m=2"]
    lost = find_differences(table)
    assert list(lost.loc["BFP m=2"]) == pytest.approx([1.0, 0.1, 0.1, 0.1, 2])
    half = 12.7062 * 0.01  # t of one degree of freedom, and the standard error of .01 and .03
    assert list(lost.loc["FAST 0.9/0.3"]) == pytest.approx([3.5, 0.02, 0.02 - half, 0.02 + half, 2], abs=1e-5)


def list_marks(axes: Any) -> list[float]:
    """The heights of the marks that have bars."""
    return sorted(float(bars.lines[0].get_ydata()[0]) for bars in axes.containers)


def test_products_are_drawn_without_a_store() -> None:
    """The rows may come from anywhere. Maps need the items of a store."""
    figure = draw_figure("fast_precision", make_products())
    (axes,) = figure.fig.axes
    assert axes.get_ylabel() == "nats per token above float32"
    assert list_marks(axes) == pytest.approx([0.02, 0.1])
    assert "BFP m=2 +0.1000 (+0.1000 to +0.1000) at 1.00 passes" in figure.verdict
    assert "2 seeds" in figure.notes[-2]
    half = 12.7062 * 0.01  # see above
    interval = f"{-0.08 - half:+.4f} to {-0.08 + half:+.4f}"
    beside = f"FAST 0.9/0.3 ends -0.0800 ({interval}) from BFP m=2, which is fixed, with 3.50 times its passes."
    assert beside in figure.verdict
    without = make_products().query("train_fields.str.contains('weights|fast')")
    (axes,) = draw_figure("fast_precision", without).fig.axes
    assert axes.get_ylabel() == "cross entropy (nats per token)"
    assert list_marks(axes) == pytest.approx([3.12, 3.2])


def test_exchanges_are_drawn() -> None:
    exchange = {"bits": 8, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}
    rows = []
    for seed, whole in enumerate((3.0, 3.2, 3.1)):
        rows += make_rows(whole, seed, 4.0, "exchanged_bytes_per_param", replicas=2)
        for bits, cost in ((8, 1.016), (4, 0.516)):
            lost = (0.001 * (seed - 1)) if bits == 8 else 0.2 + 0.001 * seed
            role = exchange | {"bits": bits}
            rows += make_rows(whole + lost, seed, cost, "exchanged_bytes_per_param", replicas=2, exchange=role)
    figure = draw_figure("exchange", pd.DataFrame(rows))
    assert figure.verdict.startswith(
        "Gradients between replicas: dynamic4 block 256 loses to float32, 1 of 2 cannot be told from it. Nats lost: "
        "dynamic8 block 256 +0.0000 (-0.0025 to +0.0025) at 1.02 bytes"
    )
    assert set(figure.data["format"]) == {"float32", "dynamic8 block 256", "dynamic4 block 256"}


def test_stages_have_a_panel_of_their_own() -> None:
    eight = {"bits": 8, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}
    four = eight | {"bits": 4}
    rows = []
    for seed, whole in enumerate((3.0, 3.2, 3.1)):
        rows += make_rows(whole, seed, 0.0, "steps")  # float32, which sends nothing
        both = {"stages": 2, "stage_activations": eight, "stage_gradients": eight}
        rows += make_rows(whole + 0.01, seed, 130.0, "stage_bytes_per_token", **both)
        rows += make_rows(whole + 0.1, seed, 98.0, "stage_bytes_per_token", **both | {"stage_gradients": four})
        rows += make_rows(whole, seed, 4.0, "exchanged_bytes_per_param", replicas=2)
        rows += make_rows(whole, seed, 1.0, "exchanged_bytes_per_param", replicas=2, exchange=eight)
    figure = draw_figure("exchange", pd.DataFrame(rows))
    assert list(dict.fromkeys(figure.data["panel"])) == ["gradients between replicas", "activations between stages"]
    stages = figure.data[figure.data["panel"] == "activations between stages"]
    mixed = "dynamic8 block 256 forward and dynamic4 block 256 back"
    assert set(stages["format"]) == {"float32", "dynamic8 block 256", mixed}
    assert name_stages({"stages": 3, "stage_gradients": eight}) == "dynamic8 block 256 back alone (3 stages)"
    assert name_stages({"stages": 2, "stage_activations": four}) == "dynamic4 block 256 forward alone"
    assert name_stages({"stages": 2, "stage_activations": four, "weights": M2}) is None
    assert f"{mixed} +0.1000 (+0.1000 to +0.1000) at 98.00 bytes" in figure.verdict
    assert "Activations between stages: " in figure.verdict
    assert len(figure.fig.axes) == 2
    plain = [row for seed in range(3) for row in make_rows(2.9, seed, 0.0, "steps", batch_size=2)]  # sorts first
    both_at_once = make_rows(3.0, 0, 9.0, "stage_bytes_per_token", replicas=2, **both)
    more = draw_figure("exchange", pd.DataFrame([*rows, *plain, *both_at_once]))
    pd.testing.assert_frame_equal(more.data, figure.data)
    assert any(note.startswith("Not shown: 1 training that") for note in more.notes)
    assert not any(note.startswith("Not shown") for note in figure.notes)


def test_quantizers_that_share_a_name_are_not_averaged() -> None:
    nearest = {"bits": 8, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}
    rows = []
    for seed in range(5):
        rows += make_rows(3.0, seed, 4.0, "exchanged_bytes_per_param", replicas=2)
        role = nearest if seed < 3 else nearest | {"rounding": "stochastic"}
        lost = 0.1 if seed < 3 else 0.5
        rows += make_rows(3.0 + lost, seed, 1.0, "exchanged_bytes_per_param", replicas=2, exchange=role)
    figure = draw_figure("exchange", pd.DataFrame(rows))
    assert "dynamic8 block 256 +0.1000 (+0.1000 to +0.1000)" in figure.verdict
    assert figure.notes[-1].startswith("Not shown: 2 trainings that")


def test_one_seed_and_what_ends_below_are_said() -> None:
    role = {"bits": 8, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}

    def judge(seeds: int) -> str:
        rows = []
        for seed in range(seeds):
            rows += make_rows(3.0, seed, 4.0, "exchanged_bytes_per_param", replicas=2)
            rows += make_rows(2.9, seed, 1.0, "exchanged_bytes_per_param", replicas=2, exchange=role)
        return draw_figure("exchange", pd.DataFrame(rows)).verdict

    assert "One seed of each shows no difference to float32, nor likeness." in judge(1)
    assert "nothing is shown to lose to float32, 1 of 1 ends below it, 0 of 1 cannot be told from it." in judge(3)


def test_without_float32_losses_are_drawn() -> None:
    role = {"bits": 8, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}
    figure = draw_figure(
        "exchange", pd.DataFrame(make_rows(3.0, 0, 130.0, "stage_bytes_per_token", stages=2, stage_gradients=role))
    )
    assert (
        figure.notes[-1]
        == "Activations between stages: 1 training of m, 1 seed. It shows losses, as there is no float32."
    )


def test_a_format_without_counted_passes_is_not_the_best_for_its_passes() -> None:
    aware = pd.DataFrame([row for seed in (0, 1) for row in make_rows(1.0, seed, weights=M2)])
    results = pd.concat([make_products(), aware], ignore_index=True)
    assert "nan" not in draw_figure("fast_precision", results).verdict.split("Nats lost")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The results of a training in block floating point and of one with FAST, 22 small steps each."""
    folder = tmp_path_factory.mktemp("fast")
    text = folder / "pages.txt"
    text.write_text("The cat sat on the mat and looked at the hat that the rat had on. " * 300)
    store, session = Store(folder / "store"), Session(ModelConfig())
    stochastic = block_float(2, rounding="stochastic")
    roles: list[dict[str, Any]] = [
        {"fast": FastConfig(adapt=True)},
        {"weights": block_float(2), "activations": block_float(2), "gradients": stochastic},
        {"replicas": 2, "exchange": QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32")},
    ]
    for role in roles:
        train = TrainConfig(steps=22, text=str(text), batch_size=2, context=32, lr=1e-3, **role)
        experiment = Experiment(
            quant=QuantConfig(bits=16), eval=EvalConfig(tasks=(), perplexity_windows=2), train=train
        )
        store.write(session.run(experiment))
    return read_results(folder / "store")


def get_value(results: pd.DataFrame, metric: str) -> list[float]:
    rows = results[(results["task"] == "training") & (results["metric"] == metric)]
    return sorted(rows["value"])


def test_a_result_says_what_products_and_exchange_cost(trained: pd.DataFrame) -> None:
    low, between = get_value(trained, "passes_per_mac")
    assert low == 1.0
    assert 1 < between < 4
    (sent,) = get_value(trained, "exchanged_bytes_per_param")
    assert 1 + 4 / 256 <= sent < 1.02  # vectors end in short blocks


def test_maps_show_the_share_of_high_precision(trained: pd.DataFrame) -> None:
    """Weights, activations and gradients of 8 layers, whose share rises with the step as the threshold falls."""
    data = tabulate_formats(trained, "passes_per_mac", name_products, frozenset({"fast", *RECIPE_ROLES}))
    shares = tabulate_shares(trained, data)
    assert len(shares) == 3 * 8 * PERIODS
    assert shares["share"].between(0, 1).all()
    by_period = shares.groupby("period")["share"].mean()
    assert by_period.iloc[-1] > by_period.iloc[0]
    assert judge_products(data, shares).startswith("FAST 0.6/0.3 takes the high precision in ")
    figure = draw_figure("fast_precision", trained)
    assert [axes.get_title(loc="left") for axes in figure.fig.axes[1:]] == [
        f"FAST 0.6/0.3: {role}" for role in ("weights", "activations", "gradients")
    ]
    axes = figure.fig.axes[0]
    axes.clear()
    one = shares[shares["role"] == "weights"]
    draw_map(axes, one)
    image = axes.images[0].get_array()
    assert image is not None
    assert image[3, 7] == one[(one["layer"] == 3) & (one["period"] == 7)]["share"].iloc[0]


def test_trainings_of_other_studies_may_be_measured_in_other_ways() -> None:
    rows = [row | {"evaluation": "64 windows"} for seed in (0, 1) for row in make_rows(4.0, seed, steps=5, weights=M2)]
    alone = make_products()
    together = pd.concat([alone, pd.DataFrame(rows)], ignore_index=True)
    pd.testing.assert_frame_equal(
        draw_figure("fast_precision", together).data, draw_figure("fast_precision", alone).data
    )
    with pytest.raises(AmbiguousResults, match="f was measured in 2 ways"):
        draw_figure("fast_precision", alone.assign(evaluation=np.where(alone["train_seed"] == 1, "64 windows", "e")))
