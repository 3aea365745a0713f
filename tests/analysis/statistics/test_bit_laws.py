"""Laws of several things' bits find what was planted, within their intervals, and predict the largest model."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.curves import Floats
from kbit.analysis.statistics.bit_laws import BIT_LAWS, check_largest, fit_bits, list_parameters, make_terms
from kbit.analysis.statistics.laws import TooFewPoints

THINGS = ["weight_bits", "activation_bits"]
TRUE: dict[str, list[float]] = {
    "effective": [4.0, 0.3, np.log(2.0), np.log(1.4), 1.2],
    "effective added": [4.0, 0.3, np.log(2.0), np.log(1.4)],
    "separate": [6.0, 0.3, 1.1, 8.0, 0.4, 1.6],
}
NOISE = 0.02  # of what the bits add
TRIALS = 24


def compute(law: str, points: pd.DataFrame) -> Floats:
    """The formulas of the module's table, point by point."""
    values = []
    for n, k, m in points[["parameters", *THINGS]].to_numpy(dtype=float):
        true = TRUE[law]
        if law == "separate":
            first = np.exp(true[0]) * n ** -true[1] * np.exp(-k * true[2]) if k < 16 else 0.0
            second = np.exp(true[3]) * n ** -true[4] * np.exp(-m * true[5]) if m < 16 else 0.0
            values.append(first + second)
            continue
        scale, exponent, g_k, g_m = np.exp(true[0]), true[1], np.exp(true[2]), np.exp(true[3])
        effective = n * (1 - np.exp(-k / g_k)) * (1 - np.exp(-m / g_m))
        whole = n * (1 - np.exp(-16 / g_k)) * (1 - np.exp(-16 / g_m))
        floor = 1.2 if law == "effective" else -scale * whole**-exponent
        values.append(scale * effective**-exponent + floor)
    return np.array(values)


def make_points(law: str, seed: int | None = None) -> pd.DataFrame:
    """Four sizes, with three precisions of weights, two of activations, and 16 bits of either or both."""
    grid = list(itertools.product(2.0 ** np.arange(16, 24, 2), (3, 4, 6, 16), (3, 5, 16)))
    points = pd.DataFrame(grid, columns=["parameters", *THINGS])
    if law != "effective":
        points = points[(points[THINGS] < 16).any(axis=1)].reset_index(drop=True)
    y = compute(law, points)
    error = NOISE * (y if law != "effective" else np.full(len(y), 0.3))
    noise = 0.0 if seed is None else np.random.default_rng(seed).standard_normal(len(y)) * error
    return points.assign(y=y + noise, error=error, model=points["parameters"].map("m{:.0f}".format))


@pytest.mark.parametrize("law", BIT_LAWS)
def test_exact_points_give_the_planted_parameters(law: str) -> None:
    points = make_points(law)
    assert make_terms(law, points, THINGS).predict(np.array(TRUE[law])) == pytest.approx(compute(law, points))
    fit = fit_bits(law, points, THINGS, draws=10)
    assert fit.parameters == pytest.approx(TRUE[law], rel=1e-3, abs=1e-3)
    assert fit.rmse < 1e-5
    table = list_parameters(fit).set_index("name")["value"]
    if law != "separate":
        assert table["g weight_bits"] == pytest.approx(2.0, rel=1e-2)
        assert table["g activation_bits"] == pytest.approx(1.4, rel=1e-2)


@pytest.mark.parametrize("law", BIT_LAWS)
def test_intervals_cover_the_planted_parameters(law: str) -> None:
    """95% intervals cover in 95% of the trials, to three standard errors of a share of TRIALS."""
    inside = []
    for seed in range(TRIALS):
        low, high = fit_bits(law, make_points(law, seed), THINGS, draws=100, seed=seed).intervals.T
        inside.append((low <= TRUE[law]) & (TRUE[law] <= high))
    covered = np.mean(inside, axis=0)
    assert covered.mean() >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / TRIALS)
    assert (covered >= 0.90 - 3 * np.sqrt(0.9 * 0.1 / TRIALS)).all()


@pytest.mark.parametrize("law", BIT_LAWS)
def test_the_slope_is_the_derivative(law: str) -> None:
    design, theta = make_terms(law, make_points(law), THINGS), np.array(TRUE[law])
    for k, step in enumerate(1e-6 * np.eye(theta.size)):
        numeric = (design.predict(theta + step) - design.predict(theta - step)) / 2e-6
        assert design.slope(theta)[:, k] == pytest.approx(numeric, rel=1e-5, abs=1e-7)
        stacked = np.stack([theta, theta + step])
        assert design.predict(stacked)[1] == pytest.approx(design.predict(theta + step))
        assert design.slope(stacked)[1] == pytest.approx(design.slope(theta + step))


@pytest.mark.parametrize("law", BIT_LAWS)
def test_the_largest_model_is_predicted_from_the_smaller(law: str) -> None:
    points = make_points(law, 3)
    check = check_largest(law, points, THINGS)
    assert check.model == f"m{2**22}"
    assert check.rmse < 6 * float(points.loc[points["model"] == check.model, "error"].mean())
    assert check.inside >= 0.6
    assert check.naive > check.rmse


def test_another_law_leaves_larger_residuals() -> None:
    """Separate losses do not grow together as those of effective parameters do."""
    points = make_points("effective added")
    right, wrong = (fit_bits(law, points, THINGS, draws=10).rmse for law in ("effective added", "separate"))
    assert wrong > 100 * right + 1e-4


def test_models_that_lose_no_less_if_they_are_larger_have_no_effective_parameters() -> None:
    points = make_points("separate")
    same = points.groupby(THINGS)["y"].transform("first")
    with pytest.raises(TooFewPoints, match=r"exponent .* of N: larger ones of these models lose no less"):
        fit_bits("effective added", points.assign(y=same, error=0.1 * same), THINGS, draws=10)


def test_bits_that_cannot_be_told_are_refused() -> None:
    points = make_points("separate")
    with pytest.raises(ValueError, match=r"law='cubic' is not one of: effective, effective added, separate"):
        make_terms("cubic", points, THINGS)
    with pytest.raises(ValueError, match=r"points lack the columns of bits \['state_bits'\]; they have: parameters, w"):
        fit_bits("separate", points, ["weight_bits", "state_bits"])
    with pytest.raises(ValueError, match="needs the names of one or more columns"):
        fit_bits("separate", points, [])
    with pytest.raises(ValueError, match="bits must be > 0 in every row, 16 where nothing is"):
        fit_bits("separate", points.assign(weight_bits=np.nan), THINGS)
    with pytest.raises(TooFewPoints, match="'separate' has 6 parameters; 44 such points cannot tell them"):
        fit_bits("separate", points.assign(activation_bits=16), THINGS)
    with pytest.raises(TooFewPoints, match="'effective added' needs models of two sizes or more"):
        fit_bits("effective added", points[points["parameters"] == 2**16], THINGS, draws=5)
    with pytest.raises(TooFewPoints, match="'effective added' has 4 parameters; 5 such points"):
        fit_bits("effective added", points.head(5), THINGS)
