"""Robust nonlinear least squares, for the data and for many bootstrap samples of them at once.

    minimize sum_i rho((y_i - f(x_i)) / (s_i softness)),  rho(z) = 2 (sqrt(1 + z^2) - 1)   (scipy's soft_l1)

scipy's solver fits one sample at a time. refit takes Levenberg-Marquardt's steps for all samples in matrix products.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from kbit.analysis.curves.curves import Floats

SOFTNESS: Final = 2.0  # residuals beyond 2 standard errors count linearly, not in squares (Huber's idea, smooth)
STEPS: Final = 60
ROUGH_STEPS: Final = 20  # of the search among several starts
# Levenberg-Marquardt's first damping. The exponents of a law and its factor are nearly collinear, so that a step with
# damping moves hardly along them. A sample that starts at the fit of the data is near its own optimum and needs none.
FAR: Final = 1e-3
NEAR: Final = 1e-8
# Relative change of the objective: parameters are then within 1e-4 of their standard errors. One sample in fifty of a
# law with a floor has not settled after STEPS.
SETTLED: Final = 1e-9


class Terms(Protocol):
    """What the fit of a law needs of its form at given points."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""

    def predict(self, parameters: Floats) -> Floats:
        """Return y for parameters [..., terms]: [..., points]."""

    def slope(self, parameters: Floats) -> Floats:
        """Return dy / dparameters: [..., points, terms]."""

    def weigh_slopes(self, parameters: Floats, pull: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Return the two sides of the normal equations at parameters [samples, terms], with the slopes J there.

        Args:
            parameters: [samples, terms].
            pull, weight: a number for each point, [samples, points].

        Returns:
            J^T diag(weight) J, [samples, terms, terms], and J^T pull, [samples, terms].
        """

    def guess_starts(self, y: Floats) -> list[Floats]:
        """Return parameters to start a fit of y from."""


def fit_once(design: Terms, y: Floats, scale: Floats, near: Floats | None = None) -> Floats:
    """Return the parameters that fit best. scipy ends the search: E and the exponent of N can lie in a long valley.

    Args:
        design: the law's terms.
        y: the points' values.
        scale: their standard errors.
        near: parameters near the best ones. None: some steps are taken from each of the law's own starts.
    """
    if near is None:
        starts = np.stack(design.guess_starts(y))
        same = np.tile(y, (len(starts), 1))
        found = refit(design, same, scale, starts, damping=FAR, steps=ROUGH_STEPS)
        near = found[np.argmin(measure_cost(measure_residuals(design, found, same, scale * SOFTNESS)))]

    def residuals(theta: Floats) -> Floats:
        return (design.predict(theta) - y) / scale

    def slopes(theta: Floats) -> Floats:
        return design.slope(theta) / scale[:, None]

    return np.asarray(least_squares(residuals, near, slopes, x_scale="jac", loss="soft_l1", f_scale=SOFTNESS).x)


def refit(
    design: Terms, samples: Floats, scale: Floats, start: Floats, *, damping: float = NEAR, steps: int = STEPS
) -> Floats:
    """Return the parameters of many samples at once: Levenberg-Marquardt on the same robust objective as fit_once.

    Args:
        design: the law's terms.
        samples: y of each sample, [samples, points].
        scale: standard errors, [points].
        start: parameters to start from, [terms] or [samples, terms].
        damping: the damping of the first step, in units of the curvature's diagonal.
        steps: the number of steps, at most.
    """
    theta = np.array(np.broadcast_to(start, (len(samples), start.shape[-1])))
    dampings = np.full(len(samples), damping)
    unit = scale * SOFTNESS
    share = unit.mean() / unit  # the normal equations in the mean unit, as the square of a tiny one is 0
    residual = measure_residuals(design, theta, samples, unit)
    cost = measure_cost(residual)
    active = np.arange(len(samples))  # those that have not settled
    for _ in range(steps):
        now, missed = theta[active], residual[active]
        weight = 1 / np.sqrt(1 + missed**2)  # rho's derivative by the residual is 2 weight missed, the next 2 weight^3
        curvature, pull = design.weigh_slopes(now, weight * missed * share * unit.mean(), weight**3 * share**2)
        diagonal = np.einsum("...ii->...i", curvature)
        diagonal += dampings[active, None] * diagonal + 1e-300
        tried = now + np.linalg.solve(curvature, pull[..., None])[..., 0]
        left = measure_residuals(design, tried, samples[active], unit)
        before, after = cost[active], measure_cost(left)
        better = after < before
        moved = active[better]
        theta[moved], residual[moved], cost[moved] = tried[better], left[better], after[better]
        dampings[active] = np.clip(np.where(better, dampings[active] / 5, dampings[active] * 20), 1e-9, 1e9)
        active = active[~(np.abs(before - after) <= SETTLED * before)]
        if not active.size:
            break
    return theta


def measure_residuals(design: Terms, theta: Floats, samples: Floats, unit: Floats) -> Floats:
    """Return the residuals in these units, infinite or NaN where they overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (samples - design.predict(theta)) / unit


def measure_cost(residuals: Floats) -> Floats:
    """Return the robust objective of each sample's residuals [..., points], infinite where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        cost = np.sum(np.sqrt(1 + residuals**2) - 1, axis=-1)
    return np.where(np.isfinite(cost), cost, np.inf)


def sum_products(weights: Floats, left: Floats, right: Floats) -> Floats:
    """Return sum_i w_i l_i r_i^T: [..., points], [points, l] and [points, r] become [..., l, r]."""
    pairs = (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)
    return (weights @ pairs).reshape(*weights.shape[:-1], left.shape[1], right.shape[1])


def weigh_stacked_slopes(slope: Floats, pull: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Return Terms.weigh_slopes for slopes that are at hand, [samples, points, terms]."""
    turned = np.swapaxes(slope, -1, -2)
    return (turned * weight[..., None, :]) @ slope, (turned @ pull[..., None])[..., 0]


def choose_scale(points: pd.DataFrame) -> Floats:
    """Return the standard error of each point. Where it is not known for all points, it is the same for all."""
    error = points["error"].to_numpy(dtype=np.float64)
    return error if np.isfinite(error).all() and (error > 0).all() else np.full(len(points), float(points["y"].std()))
