"""Parametric scaling laws of quantized models: fitted robustly, with intervals, and checked on the largest model.

Every law here is of one form, an exponential of linear terms plus linear terms. Other forms are fitted by the same
functions, see Terms and kbit.analysis.statistics.bit_laws.

    y = exp(X a) + Z b                 X: design of the power law, Z: design of what is added to it

| law | y | formula | source |
|---|---|---|---|
| power | L | C N^-p k^-q | bivariate in parameters and bits: by the paper (section 4) it fits poorly |
| offset | L | C N^-p + E + e_k | a base curve and an offset per precision, e_16 = 0: the paper's "nearly parallel" |
| kumar | L - L_16 | C N^-b exp(-k / g) | Kumar et al. 2024, arXiv 2411.04330, equation of delta_PTQ |
| block | L - L_16 | C N^-b (log2 G)^c | arXiv 2505.14302, on quantization-aware training, G is the block size |
| mixed | L - L_16 | C N^-b Q^q (log2 G)^c | Q is the share of the parameters that is quantized, see below |

That larger models tolerate a larger share Q, as the factors N^-b and Q^q of "mixed" have it, is what "Scaling laws for
mixed quantization" finds (arXiv 2410.06722). The powers of Q and of log2 G are this module's choice.

L is the cross entropy in nats per token, N the number of parameters, and k the bits. Both laws of L - L_16 have a
factor D^a in the training tokens D. It is part of C here, because the sizes of a family were trained on (nearly) as
many tokens, and a store does not hold their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from scipy import stats

from kbit.analysis.curves.curves import Floats
from kbit.analysis.statistics.robust_fit import Terms, choose_scale, fit_once, refit, sum_products
from kbit.evaluation.measurement import Z_95
from kbit.numerics.spec import BASELINE_BITS

LAWS: Final = ("power", "offset", "kumar", "block", "mixed")
DRAWS: Final = 400
MIN_SPARE: Final = 2  # fewer points than parameters + 2 say nothing about the law's form


class TooFewPoints(ValueError):
    """A law has more parameters than these points can tell."""


@dataclass(frozen=True)
class Design:
    """The terms of a law at given points.

    Attributes:
        power: X, [points, terms of the exponent].
        added: Z, [points, added terms], perhaps without columns.
        names: the parameters' names, those of X first.
    """

    power: Floats
    added: Floats
    names: tuple[str, ...]

    def predict(self, parameters: Floats) -> Floats:
        """Return y for parameters [..., terms]: [..., points]."""
        split = self.power.shape[1]
        with np.errstate(over="ignore"):
            grown = np.exp(parameters[..., :split] @ self.power.T)
        return np.asarray(grown + parameters[..., split:] @ self.added.T)

    def slope(self, parameters: Floats) -> Floats:
        """Return dy / dparameters: [..., points, terms]."""
        split = self.power.shape[1]
        with np.errstate(over="ignore"):
            grown = np.exp(parameters[..., :split] @ self.power.T)
        added = np.broadcast_to(self.added, (*grown.shape, self.added.shape[1]))
        return np.concatenate([grown[..., None] * self.power, added], axis=-1)

    def weigh_slopes(self, parameters: Floats, pull: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Return the sums of Terms.weigh_slopes as matrix products of the terms, without a slope for each sample."""
        split = self.power.shape[1]
        with np.errstate(over="ignore"):
            grown = np.exp(parameters[..., :split] @ self.power.T)
        bent = grown * weight
        curvature = np.empty((*grown.shape[:-1], len(self.names), len(self.names)))
        curvature[..., :split, :split] = sum_products(grown * bent, self.power, self.power)
        curvature[..., :split, split:] = mixed = sum_products(bent, self.power, self.added)
        curvature[..., split:, :split] = np.swapaxes(mixed, -1, -2)
        curvature[..., split:, split:] = sum_products(weight, self.added, self.added)
        return curvature, np.concatenate([(grown * pull) @ self.power, pull @ self.added], axis=-1)

    def guess_starts(self, y: Floats) -> list[Floats]:
        """Return starts: a fit of log y by linear least squares, after taking away candidate constants."""
        split = self.power.shape[1]
        lows = (0.0,) if not self.added.shape[1] else tuple(share * float(y.min()) for share in (0.0, 0.5, 0.9))
        starts = []
        for low in lows:
            positive = y > low
            power = np.linalg.lstsq(self.power[positive], np.log(y[positive] - low))[0]
            added = np.zeros(self.added.shape[1])
            added[:1] = low
            starts.append(np.concatenate([power[:split], added]))
        return starts


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: its name.
        design: its terms at the points that it was fitted on.
        parameters: the fitted parameters, in the order of design.names.
        draws: bootstrap draws of the parameters, [draws, terms].
        residuals: y - prediction at the points, in nats.
        r2: share of the variance of y that it explains.
    """

    law: str
    design: Terms
    parameters: Floats
    draws: Floats
    residuals: Floats
    r2: float

    @property
    def intervals(self) -> Floats:
        """95% interval of each parameter (percentiles of the draws): [terms, 2]."""
        return np.asarray(np.quantile(self.draws, [0.025, 0.975], axis=0).T)

    @property
    def rmse(self) -> float:
        """Root mean square of the residuals, nats."""
        return float(np.sqrt(np.mean(self.residuals**2)))


def make_design(law: str, points: pd.DataFrame, precisions: Sequence[int] | None = None) -> Design:
    """Return a law's terms at points.

    Args:
        law: one of LAWS.
        points: a table with the columns parameters and bits, block_size for "block" and "mixed", and share for "mixed",
            one row per point.
        precisions: the precisions to which "offset" gives an offset of their own. None: those of the points.

    Raises:
        ValueError: another law.
    """
    rows = len(points)
    size = -np.log(points["parameters"].to_numpy(dtype=np.float64))
    bits = points["bits"].to_numpy(dtype=np.float64)
    terms = {"log C": np.ones(rows), "N exponent": size}
    added: dict[str, Floats] = {}
    if law == "power":
        terms["k exponent"] = -np.log(bits)
    elif law == "offset":
        own = sorted({int(k) for k in (bits if precisions is None else precisions)} - {BASELINE_BITS})
        added = {"E": np.ones(rows)} | {f"e_{k}": (bits == k).astype(np.float64) for k in own}
    elif law == "kumar":
        terms["1 / g"] = -bits
    elif law == "block":
        terms["G exponent"] = measure_block(points)
    elif law == "mixed":
        terms["Q exponent"] = np.log(points["share"].to_numpy(dtype=np.float64))
        terms["G exponent"] = measure_block(points)
    else:
        raise ValueError(f"law={law!r} is not one of: {', '.join(LAWS)}")
    columns = list(added.values())
    return Design(
        np.stack(list(terms.values()), axis=1),
        np.stack(columns, axis=1) if columns else np.empty((rows, 0)),
        (*terms, *added),
    )


def measure_block(points: pd.DataFrame) -> Floats:
    """Return log log2 of each point's block size."""
    return np.asarray(np.log(np.log2(points["block_size"].to_numpy(dtype=np.float64))))


def fit_law(law: str, points: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0, near: Fit | None = None) -> Fit:
    """Fit a law by robust least squares, with bootstrap intervals.

    minimize sum_i rho((y_i - f(x_i)) / (s_i softness)),  rho(z) = 2 (sqrt(1 + z^2) - 1)   (scipy's soft_l1)

    The bootstrap resamples the standardized residuals, puts them on the fitted values and fits again. Residuals of n
    points and p parameters are too small by sqrt((n - p) / n), and their spread is itself uncertain, which Student's t
    counts: they are enlarged by sqrt(n / (n - p)) t(n - p) / t(infinity), t at 97.5%.

    Args:
        law: one of LAWS.
        points: a table with the columns y, error (the standard error of y, where NaN makes all alike), and those of
            make_design.
        draws: the number of bootstrap draws.
        seed: the seed of the bootstrap.
        near: a fit of the same law to nearly the same points, from which the search starts.

    Raises:
        TooFewPoints: see fit_terms.
    """
    return fit_terms(law, make_design(law, points), points, draws=draws, seed=seed, near=near)


def fit_terms(
    law: str, design: Terms, points: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0, near: Fit | None = None
) -> Fit:
    """Fit any form as fit_law does.

    Args:
        law: the law's name, for messages.
        design: its terms at the points.
        points: a table with the columns y and error, see fit_law.
        draws, seed, near: see fit_law.

    Raises:
        ValueError: a value of y is not finite.
        TooFewPoints: fewer points than parameters + 2, points that are all alike, or points that cannot tell the
            parameters apart, as where the best fit has the loss of large models fall below zero (E < 0).
    """
    y = points["y"].to_numpy(dtype=np.float64)
    n, p = len(y), len(design.names)
    few = TooFewPoints(f"the law {law!r} has {p} parameters; {n} such points cannot tell them")
    if n < p + MIN_SPARE:
        raise few
    scale = choose_scale(points)
    if not np.isfinite(y).all():
        raise ValueError(f"the law {law!r}: {int((~np.isfinite(y)).sum())} of {n} values of y are NaN or infinite")
    if not (scale > 0).all():
        raise TooFewPoints(f"the law {law!r} says nothing of {n} points that are all alike")
    start = near.parameters if near is not None and near.design.names == design.names else None
    parameters = fit_once(design, y, scale, start)
    if "E" in design.names and (floor := parameters[design.names.index("E")]) < 0:
        raise TooFewPoints(
            f"the law {law!r} has its floor at E = {floor:.3g} nats: such sizes cannot tell E and N apart"
        )
    slope = design.slope(parameters)
    size = np.linalg.norm(slope, axis=0)
    if not size.all() or np.linalg.matrix_rank(slope / size) < p:
        raise few
    fitted = design.predict(parameters)
    rng = np.random.default_rng(seed)
    noise = rng.choice(standardize((y - fitted) / scale, p), (draws, n))
    sample = refit(design, fitted + noise * scale, scale, parameters)
    spread = float(np.sum((y - y.mean()) ** 2))
    r2 = 1 - float(np.sum((y - fitted) ** 2)) / spread if spread else np.nan
    return Fit(law, design, parameters, sample, y - fitted, r2)


def standardize(residuals: Floats, parameters: int) -> Floats:
    """Return the residuals of a fit, in standard errors, centred and enlarged as fit_law says."""
    spare = len(residuals) - parameters
    larger = np.sqrt(len(residuals) / spare) * stats.t.ppf(0.975, spare) / Z_95
    return np.asarray((residuals - residuals.mean()) * larger)


@dataclass(frozen=True)
class HeldOut:
    """A law fitted without the largest model, and its predictions for it.

    Attributes:
        model: the largest model.
        rmse: the root mean square error of the predictions, nats.
        inside: the share of its points within the 95% prediction interval.
        naive: the root mean square error, nats, of the rule "as the next smaller model at the same setting".
    """

    model: str
    rmse: float
    inside: float
    naive: float


def check_held_out(
    law: str, points: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0, near: Fit | None = None
) -> HeldOut:
    """Fit a law on all but the largest model and predict that one.

    Args:
        law, draws, seed, near: the same as in fit_law.
        points: the same as in fit_law, with a column model.

    Raises:
        TooFewPoints: see fit_law, or the largest model shares no precision with others.
    """
    known, held = hold_out(points)
    precisions = [int(k) for k in known["bits"].unique()]
    held = held[held["bits"].isin(precisions)]
    if held.empty:
        model = points.sort_values("parameters")["model"].iloc[-1]
        raise TooFewPoints(f"the law {law!r} cannot be checked on {model}: no other model has its precisions")
    fit = fit_law(law, known, draws=draws, seed=seed, near=near)
    setting = ["bits", "block_size", *(["share"] if "share" in points else [])]
    return judge_prediction(fit, make_design(law, held, precisions), known, held, setting, seed)


def hold_out(points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the points without those of the largest model, and those, with a column _scale (see choose_scale)."""
    largest = points.sort_values("parameters")["model"].iloc[-1]
    points = points.assign(_scale=choose_scale(points))
    return points[points["model"] != largest], points[points["model"] == largest]


def judge_prediction(
    fit: Fit, design: Terms, known: pd.DataFrame, held: pd.DataFrame, setting: list[str], seed: int
) -> HeldOut:
    """Return how well a law predicts the points of a model that it was not fitted on.

    A prediction interval holds the uncertainty of the parameters and the scatter of the residuals: these are
    standardized and enlarged as for fit_law, and have the standard errors of the points that are predicted.

    Args:
        fit: the law without that model.
        design: its terms at the model's points.
        known, held: the points that it was fitted on, and the model's, see hold_out.
        setting: the columns that are equal where a smaller model has the same setting.
        seed: the seed of the scatter.
    """
    y = held["y"].to_numpy(dtype=np.float64)
    rng = np.random.default_rng(seed)
    standard = standardize(fit.residuals / known["_scale"].to_numpy(), len(fit.parameters))
    scatter = rng.choice(standard, (len(fit.draws), len(held))) * held["_scale"].to_numpy()
    low, high = np.quantile(design.predict(fit.draws) + scatter, [0.025, 0.975], axis=0)
    error = y - design.predict(fit.parameters)
    smaller = known[known["parameters"] == known["parameters"].max()]
    smaller = smaller.drop_duplicates(setting)
    naive = dict(zip(_list_settings(smaller, setting), smaller["y"].tolist(), strict=True))
    before = np.array([naive.get(own, np.nan) for own in _list_settings(held, setting)])
    return HeldOut(
        model=str(held["model"].iloc[0]),
        rmse=float(np.sqrt(np.mean(error**2))),
        inside=float(np.mean((y >= low) & (y <= high))),
        naive=float(np.sqrt(np.nanmean((y - before) ** 2))) if np.isfinite(before).any() else np.nan,
    )


def _list_settings(points: pd.DataFrame, columns: list[str]) -> list[tuple[float, ...]]:
    """Return the cells of some columns as numbers that are equal where the cells are, also where both are missing."""
    return [tuple(row) for row in points[columns].astype(np.float64).fillna(np.inf).to_numpy().tolist()]
