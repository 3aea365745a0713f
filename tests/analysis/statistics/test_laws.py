"""Laws find what was planted, their intervals cover it as often as they say, and the twin solver equals scipy's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from kbit.analysis.curves.curves import Floats
from kbit.analysis.statistics.laws import LAWS, Design, TooFewPoints, check_held_out, fit_law, make_design
from kbit.analysis.statistics.robust_fit import SOFTNESS, fit_once, refit

TRUE: dict[str, list[float]] = {
    "power": [2.0, 0.05, 0.1],
    "offset": [2.4, 0.17, 2.3, 0.12, 0.03, 0.01, 0.005],
    "kumar": [7.4, 0.34, 1.69],
    "block": [1.7, 0.36, 0.7],
    "mixed": [1.7, 0.36, 1.2, 0.7],
}
NOISE = 0.01  # relative to the size of what quantization adds; of the loss, in nats
TRIALS = 60


def make_points(law: str, **columns: Any) -> pd.DataFrame:
    """Points without noise: six sizes, six precisions or five block sizes."""
    sizes = 2.0 ** np.arange(17, 23)
    if law in ("block", "mixed"):
        shares = [0.2, 0.5, 0.9] if law == "mixed" else [0.9]
        grid = list(itertools.product(sizes, [4], [16, 64, 128, 512, 2048], shares))
    else:
        grid = list(itertools.product(sizes, [3, 4, 5, 6] + ([16] if law in ("power", "offset") else [8]), [64], [0.9]))
    points = pd.DataFrame(grid, columns=["parameters", "bits", "block_size", "share"])
    points = points.assign(model=points["parameters"].map("m{:.0f}".format), **columns)
    y = make_design(law, points).predict(np.array(TRUE[law]))
    scale = NOISE if law in ("power", "offset") else NOISE * y
    return points.assign(y=y, error=scale)


def add_noise(points: pd.DataFrame, seed: int) -> pd.DataFrame:
    noise = np.random.default_rng(seed).standard_normal(len(points))
    return points.assign(y=points["y"] + noise * points["error"])


@pytest.mark.parametrize("law", LAWS)
def test_exact_points_give_the_planted_parameters(law: str) -> None:
    fit = fit_law(law, make_points(law), draws=10)
    assert fit.parameters == pytest.approx(TRUE[law], rel=1e-4, abs=1e-4)
    assert fit.r2 == pytest.approx(1)
    assert fit.rmse < 1e-5


@pytest.mark.parametrize("law", LAWS)
def test_intervals_cover_the_planted_parameters(law: str) -> None:
    """95% intervals cover in 90 to 99% of the trials, on average over the parameters and about so for each."""
    points = make_points(law)
    inside = []
    for seed in range(TRIALS):
        low, high = fit_law(law, add_noise(points, seed), draws=199, seed=seed).intervals.T
        inside.append((low <= TRUE[law]) & (TRUE[law] <= high))
    covered = np.mean(inside, axis=0)
    assert 0.90 <= covered.mean() <= 0.99
    # of one parameter: three standard errors of a share of TRIALS beyond these bounds
    assert (covered >= 0.90 - 3 * np.sqrt(0.9 * 0.1 / TRIALS)).all()


def solve(design: Design, y: Floats, scale: Floats, start: Floats, max_nfev: int = 2000) -> Any:
    """What scipy's solver finds from a start."""

    def miss(theta: Floats) -> Floats:
        return (design.predict(theta) - y) / scale

    def slopes(theta: Floats) -> Floats:
        return design.slope(theta) / scale[:, None]

    options: dict[str, Any] = {"loss": "soft_l1", "f_scale": SOFTNESS, "x_scale": "jac", "xtol": 1e-12}
    return least_squares(miss, start, slopes, max_nfev=max_nfev, **options)


@pytest.mark.parametrize("law", LAWS)
def test_both_solvers_equal_scipy(law: str) -> None:
    """One sample from the law's own starts, and many from the truth. Samples have a wild point each."""
    points = make_points(law)
    design, scale = make_design(law, points), points["error"].to_numpy()
    samples = np.stack([add_noise(points, seed)["y"].to_numpy() for seed in range(5)])
    samples[np.arange(5), np.arange(5)] += 9 * scale[:5]

    slow = np.stack([solve(design, y, scale, np.array(TRUE[law])).x for y in samples])
    many = refit(design, samples, scale, np.array(TRUE[law]))
    single = np.stack([fit_once(design, y, scale) for y in samples])
    spread = slow.std(axis=0)
    for fast in (many, single):
        assert np.abs(fast - slow) / spread == pytest.approx(0, abs=1e-3)


def test_a_fit_that_starts_near_ends_where_it_would_have_ended() -> None:
    for law in LAWS:
        points = add_noise(make_points(law), 0)
        alone = fit_law(law, points, draws=20)
        other = fit_law(law, add_noise(make_points(law), 1), draws=1)
        assert fit_law(law, points, draws=20, near=other).parameters == pytest.approx(alone.parameters, rel=1e-4)


def test_points_that_are_not_finite_or_all_alike_are_refused() -> None:
    points = add_noise(make_points("kumar"), 0)
    with pytest.raises(ValueError, match=r"the law 'kumar': 1 of .* values of y are NaN"):
        fit_law("kumar", points.assign(y=points["y"].where(np.arange(len(points)) > 0)))
    with pytest.raises(TooFewPoints, match="all alike"):
        fit_law("kumar", points.assign(y=0.0, error=np.nan))


def test_a_long_valley_is_followed_to_its_end() -> None:
    """Three sizes with a floor, whose standard errors differ: E and the exponent of N trade off."""
    rng, points = np.random.default_rng(0), make_points("offset")
    points = points[points["parameters"].isin(sorted(points["parameters"].unique())[:3])].reset_index(drop=True)
    points = points.assign(error=0.01 * np.exp(rng.normal(size=len(points))))
    design, scale = make_design("offset", points), points["error"].to_numpy()
    for _ in range(20):
        y = points["y"].to_numpy() + scale * rng.standard_normal(len(points))
        found = fit_once(design, y, scale)
        least = min(solve(design, y, scale, start).cost for start in (np.array(TRUE["offset"]), found))
        assert solve(design, y, scale, found, max_nfev=1).cost == pytest.approx(least, rel=1e-4)


def test_points_of_any_scale_are_fitted() -> None:
    points = add_noise(make_points("kumar"), 0)
    plain = fit_law("kumar", points, draws=10)
    for unit in (1e-120, 1e90):
        scaled = points.assign(y=points["y"] * unit, error=points["error"] * unit)
        fit = fit_law("kumar", scaled, draws=10)
        assert fit.parameters[1:] == pytest.approx(plain.parameters[1:], rel=1e-6)
        assert fit.parameters[0] == pytest.approx(plain.parameters[0] + np.log(unit), rel=1e-6)


def test_one_wild_point_moves_a_robust_fit_little() -> None:
    points = add_noise(make_points("kumar"), 0)
    clean = fit_law("kumar", points, draws=10).parameters
    shift = np.where(np.arange(len(points)) == 7, 30 * points["error"], 0.0)
    wild = fit_law("kumar", points.assign(y=points["y"] + shift), draws=10).parameters
    assert wild == pytest.approx(clean, rel=0.05)


def test_the_slope_is_the_derivative() -> None:
    for law in LAWS:
        design, theta = make_design(law, make_points(law)), np.array(TRUE[law])
        for k, step in enumerate(1e-6 * np.eye(theta.size)):
            numeric = (design.predict(theta + step) - design.predict(theta - step)) / 2e-6
            assert design.slope(theta)[:, k] == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("law", ["power", "kumar"])
def test_a_prediction_interval_covers_the_held_out_model(law: str) -> None:
    """Errors of very different sizes: 95% intervals hold the largest model's points, within chance."""
    points = make_points(law)
    points = points.assign(error=points["error"] * np.where(points["bits"] == 3, 5.0, 1.0))
    inside = [check_held_out(law, add_noise(points, seed), draws=200, seed=seed).inside for seed in range(40)]
    error = np.std(inside) / len(inside) ** 0.5  # points of one fit miss together
    assert 0.95 - 2.5 * error <= np.mean(inside) <= 0.995


@pytest.mark.parametrize("law", LAWS)
def test_the_largest_model_is_predicted_from_the_smaller(law: str) -> None:
    points = add_noise(make_points(law), 3)
    check = check_held_out(law, points)
    assert check.model == f"m{2**22}"
    typical = float(points.loc[points["model"] == check.model, "error"].mean())
    assert check.rmse < 6 * typical
    assert check.inside >= 0.6
    assert check.naive > check.rmse


def test_a_wrong_law_shows_in_the_residuals_and_in_the_held_out_model() -> None:
    points = make_points("offset")
    assert fit_law("power", points, draws=10).rmse > 5 * fit_law("offset", points, draws=10).rmse + 1e-3
    assert check_held_out("power", points, draws=50).rmse > check_held_out("offset", points, draws=50).rmse


def test_too_few_points_are_refused() -> None:
    points = make_points("kumar")
    with pytest.raises(TooFewPoints, match="'kumar' has 3 parameters; 4 such points"):
        fit_law("kumar", points.head(4))
    with pytest.raises(TooFewPoints):
        fit_law("kumar", points[points["bits"] == 4])  # one precision cannot tell 1 / g


def test_a_curve_that_would_fall_below_zero_is_refused() -> None:
    """Losses straight in log N, as of a few small models: the best floor is far below zero and means nothing."""
    points = make_points("offset")
    straight = 6.0 - 0.2 * np.log(points["parameters"]) + 2.0 * 4.0 ** (2.0 - points["bits"])
    with pytest.raises(TooFewPoints, match=r"floor at E = -\d+(\.\d+)? nats"):
        fit_law("offset", points.assign(y=straight), draws=10)


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(ValueError, match="law='cubic' is not one of: power, offset, kumar, block, mixed"):
        make_design("cubic", make_points("power"))
