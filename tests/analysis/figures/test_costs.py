"""Figures of measured cost on planted times: what is compared, what is left out, and the slope that was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.curves import ZERO_SHOT
from kbit.analysis.figures.costs.against import find_shares
from kbit.analysis.figures.costs.points import gather_costs
from kbit.analysis.figures.costs.slope import Slope, fit_slope, judge_slope
from kbit.analysis.figures.costs.times import draw_bench
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.registry import draw_figure
from kbit.analysis.figures.roofline import DEVICES

MACHINE = "Toy CPU, 2 threads, 64 + 16 tokens"
SIZES = {"toy-1m": 10**6, "toy-4m": 4 * 10**6, "toy-16m": 16 * 10**6}
COST_FIGURES = ("cost_accuracy", "cost_loss", "time_per_token", "time_by_bits", "figure_16")


def plant(
    model: str,
    bits: int,
    *,
    slope: float = 0.5,
    packed: bool = True,
    machine: str = MACHINE,
    method: str = "rtn",
) -> list[dict[str, Any]]:
    """The rows of one experiment. A step takes 10 ms x (MB)^slope at batch 1, and at 8 bits do not matter."""
    parameters = SIZES[model]
    per_param = 16.0 if bits == 16 else bits + 0.25
    megabytes = parameters * per_param / 8e6
    quality = -3.5 + 0.25 * np.log(parameters) - 2.0 ** (1 - bits)
    shared = {
        "key": f"{model}-{bits}-{packed}-{machine}-{method}", "model": model, "family": "toy", "architecture": "Toy",
        "parameters": parameters,
        "bits": bits, "data_type": None if bits == 16 else "nf" if method == "rtn" else "int",
        "block_size": pd.NA if bits == 16 or method != "rtn" else 64,
        "exponent_bits": pd.NA, "method": None if bits == 16 else method, "dtype": "bfloat16",
        "total_bits": int(parameters * per_param), "bits_per_param": per_param,
    }  # fmt: skip
    numbers = [
        ("mean_zero_shot", "acc", quality, "all items"),
        ("text", "cross_entropy", 5 - quality, "16 windows"),
        ("speed", "weight_megabytes", megabytes, machine),
        ("speed", "step_megabytes", megabytes, machine),
        ("speed", "packed_share", float(packed and bits < 16), machine),
        ("speed", "matmul_gigaflops", 40.0, machine),
        ("speed", "read_gigabytes_per_second", 10.0, machine),
        ("speed/batch_1", "ms_per_token", 10 * megabytes**slope, machine),
        ("speed/batch_1", "peak_megabytes", megabytes + 1, machine),
        ("speed/batch_8", "ms_per_token", 5.0 * parameters / 8e6, machine),
        ("speed/batch_8", "peak_megabytes", megabytes + 8, machine),
    ]
    return [
        shared
        | {"task": task, "metric": metric, "value": v, "low": v - 0.001, "high": v + 0.001, "n": 7, "evaluation": e}
        for task, metric, v, e in numbers
    ]


def make_results(*rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([row for of_one in rows for row in of_one]).astype(
        {"block_size": "Int64", "exponent_bits": "Int64"}
    )


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return make_results(*(plant(model, bits) for model in SIZES for bits in (3, 4, 8, 16)))


@pytest.mark.parametrize("name", COST_FIGURES)
def test_each_is_drawn_and_says_where_it_was_measured(results: pd.DataFrame, name: str) -> None:
    figure = draw_figure(name, results)
    figure.fig.draw_without_rendering()
    assert any(f"Measured on {MACHINE}" in note for note in figure.notes)


@pytest.mark.parametrize("name", [name for name in COST_FIGURES if name != "figure_16"])
def test_without_times_it_says_what_to_run(planted: pd.DataFrame, name: str) -> None:
    with pytest.raises(MissingResults, match=r"kbit run \+sweeps=nano/speed"):
        draw_figure(name, planted)
    with pytest.raises(MissingResults, match=r"kbit run \+sweeps=nano/speed"):
        draw_figure(name, make_results(*(plant(model, bits, packed=False) for model in SIZES for bits in (3, 4, 16))))


def test_the_slope_is_the_planted_one(results: pd.DataFrame) -> None:
    points = gather_costs(results, "time_by_bits").points
    exact = fit_slope(points, 1)
    assert exact is not None
    assert (exact.slope, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (exact.points, exact.models) == (12, 3)
    flat = fit_slope(points, 8)
    assert flat is not None
    assert flat.slope == pytest.approx(0, abs=1e-12)
    figure = draw_figure("time_by_bits", results)
    assert "at batch 1 slope 0.50 (0.50 to 0.50): less than in proportion" in figure.verdict
    assert "at batch 8 slope 0.00 (0.00 to 0.00): " in figure.verdict.replace("-0.00", "0.00")
    assert "Slope of packed weights alone: 0.50 (0.50 to 0.50) at batch 1" in figure.notes[0]


def test_the_interval_of_the_slope_is_least_squares(results: pd.DataFrame) -> None:
    """Beside statsmodels' formula by hand: dummies for the models, and the covariance s^2 (X^T X)^-1."""
    points = gather_costs(results, "time_by_bits").points
    noise = np.random.default_rng(0).normal(0, 0.1, len(points))
    points = points.assign(ms_per_token=points["ms_per_token"] * np.exp(noise))
    found = fit_slope(points, 1)
    assert found is not None
    at = points[points["batch"] == 1]
    x = np.column_stack([np.log(at["step_megabytes"]), *(at["model"] == model for model in SIZES)]).astype(float)
    y = np.log(at["ms_per_token"].to_numpy())
    beta, residuals, _, _ = np.linalg.lstsq(x, y)
    error = np.sqrt(residuals[0] / (12 - 4) * np.linalg.inv(x.T @ x)[0, 0])
    assert found.slope == pytest.approx(beta[0])
    assert (found.low, found.high) == pytest.approx((beta[0] - 2.306 * error, beta[0] + 2.306 * error), rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.9, 1.1, "in proportion"),
        (0.1, 0.4, "less than in proportion"),
        (0.3, 1.5, "rises with the bytes, perhaps in proportion"),
        (-0.05, 0.95, "less than in proportion, perhaps not at all"),
        (1.3, 1.6, "more than in proportion"),
        (-0.4, -0.1, "does not rise with the bytes"),
        (-0.5, 1.5, "undecided"),
    ],
)
def test_slopes_are_judged_by_their_interval(low: float, high: float, words: str) -> None:
    assert judge_slope(Slope(1, (low + high) / 2, low, high, 9, 3)) == words


def test_only_one_machine_is_compared_and_only_weights_in_their_bits(results: pd.DataFrame) -> None:
    others = make_results(
        plant("toy-1m", 4, machine="Another CPU, 1 threads, 64 + 16 tokens"), plant("toy-1m", 3, packed=False)
    )
    costs = gather_costs(pd.concat([results, others], ignore_index=True), "time_by_bits")
    assert set(costs.points["key"]) == set(results["key"])
    assert costs.conditions == MACHINE
    assert "Left out: 1 experiment of other machines or numbers of tokens." in costs.notes
    assert any(note.startswith("Left out: 1 experiment that are quantized and not packed") for note in costs.notes)


def test_int8_methods_are_series_of_their_own(results: pd.DataFrame) -> None:
    """They are never packed, and beside packed 8 bits."""
    methods = ("llm_int8", "absmax")
    int8 = make_results(*(plant(model, 8, packed=False, method=name) for model in SIZES for name in methods))
    both = pd.concat([results, int8], ignore_index=True)
    times = draw_figure("time_per_token", both)
    assert times.table is not None
    assert times.table["precision"].tolist()[:6] == ["16-bit", "8-bit", "absmax", "llm_int8", "4-bit", "3-bit"]
    assert "llm_int8 1.39 to 1.39" in times.verdict  # (16 / 8.25)^0.5, as planted
    assert not any("plain numbers" in note for note in times.notes)
    assert {"llm_int8", "absmax"} < set(draw_figure("cost_accuracy", both).data["series"])
    slope = draw_figure("time_by_bits", both)
    assert slope.verdict == draw_figure("time_by_bits", results).verdict
    assert any(note.startswith("Left out: 6 experiments that multiply in int8") for note in slope.notes)
    alone = draw_figure("time_per_token", pd.concat([results[results["bits"] == 16], int8], ignore_index=True))
    assert any("Shown: absmax, llm_int8, computed in bfloat16" in note for note in alone.notes)
    assert "measured" not in set(draw_figure("figure_16", int8).data["source"])


def test_the_slope_is_of_one_quantizer(results: pd.DataFrame) -> None:
    gptq = make_results(*(plant(model, 4, method="gptq", slope=3) for model in SIZES))
    mixed = draw_figure("time_by_bits", pd.concat([results, gptq], ignore_index=True))
    assert mixed.verdict == draw_figure("time_by_bits", results).verdict
    assert "Left out: 3 experiments with other settings (choose with --where)." in mixed.notes


def test_shares_of_budgets_are_those_of_the_lines() -> None:
    """4 bits are better below a cost of 10^1.5, halfway of the budgets, where the lines cross."""
    curves = pd.DataFrame(
        {"series": ["4-bit", "4-bit", "8-bit", "8-bit"], "cost": [10, 100, 10, 100], "value": [0.5, 0.6, 0.45, 0.65]}
    )
    assert find_shares(curves, "cost", higher_is_better=True) == {"4-bit": 0.5, "8-bit": 0.5}
    apart = curves.assign(cost=[1, 2, 10, 100])
    assert find_shares(apart, "cost", higher_is_better=True) is None


def test_the_same_precision_wins_by_every_cost_where_time_follows_bits() -> None:
    figure = draw_figure(
        "cost_accuracy", make_results(*(plant(model, bits, slope=1) for model in SIZES for bits in (3, 4, 8, 16)))
    )
    shares = [
        find_shares(figure.data, cost, higher_is_better=ZERO_SHOT.higher_is_better)
        for cost in ("total_bits", "ms_per_token")
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert figure.verdict.startswith("toy, best over most budgets: by total bits 4-bit (")


def test_the_roofline_has_this_machine_with_what_was_measured(results: pd.DataFrame, planted: pd.DataFrame) -> None:
    figure = draw_figure("figure_16", results)
    assert len(figure.fig.axes) == len(DEVICES) + 1
    measured = figure.data[figure.data["source"] == "measured"].set_index(["bits", "batch"])["speedup"]
    assert measured[4, 1] == pytest.approx((16 / 4.25) ** 0.5)
    assert measured[4, 8] == pytest.approx(1)
    line = figure.data[(figure.data["device"] == MACHINE) & (figure.data["source"] == "roofline")]
    small = line.set_index(["bits", "batch"])["seconds"]
    assert small[16, 1] == pytest.approx((2 * 4 * 12288**2 + 2 * 5 * 12288) / 10e9, rel=1e-3)  # 10 GB/s, as planted
    assert small[16, 1024] == pytest.approx(2 * 4 * 12288**2 * 1024 / 40e9)  # 40 GFLOP/s
    without = draw_figure("figure_16", planted)
    assert len(without.fig.axes) == len(DEVICES)
    assert figure.verdict.startswith(without.verdict)


def test_the_table_has_a_cell_for_each_batch(results: pd.DataFrame) -> None:
    table = draw_figure("time_per_token", results).table
    assert table is not None
    assert list(table) == ["model", "precision", "batch 1", "batch 8"]
    assert table["precision"].tolist() == ["16-bit", "8-bit", "4-bit", "3-bit"] * 3
    assert table.iloc[0].tolist() == ["toy-1m", "16-bit", f"{10 * 2**0.5:.3g}", "0.625"]


def test_what_bench_measured_is_drawn() -> None:
    shared = {"model": "toy", "bits": 4, "dtype": "bfloat16", "conditions": MACHINE}
    rows = [
        shared | {"precision": precision, "batch": batch, "ms_per_token": ms, "low": np.nan, "high": np.nan}
        for precision, batch, ms in (("nf4", 1, 2.0), ("nf4", 8, 1.0), ("bf16", 1, 3.0), ("bf16", 8, np.nan))
    ]
    figure = draw_bench(pd.DataFrame(rows), pd.DataFrame({"precision": ["nf4"]}))
    figure.fig.draw_without_rendering()
    assert figure.verdict == "Fastest are, of toy: nf4 at batch 1, nf4 at batch 8."


def test_a_machine_that_was_not_steady_is_in_the_verdict(results: pd.DataFrame) -> None:
    is_noise = (results["metric"] == "matmul_gigaflops") & (results["key"] == results["key"].iloc[0])
    uneven = results.assign(value=results["value"].mask(is_noise, 20.0))
    for name in ("cost_accuracy", "time_per_token", "time_by_bits"):
        assert "varied" not in draw_figure(name, results).verdict
        assert "The machine's own speed varied 2.0-fold meanwhile" in draw_figure(name, uneven).verdict
