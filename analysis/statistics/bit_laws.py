"""Laws of models in which several things have few bits, such as weights, activations, cache, gradients or states.

k_x are the bits of thing x, and g_x says how fast what they cost decays with them. N is the number of parameters.

| law | y | formula | source |
|---|---|---|---|
| effective | L | A (N prod_x f_x)^-a + E,  f_x = 1 - exp(-k_x / g_x) | Kumar et al. 2024, arXiv 2411.04330 |
| effective added | L - L_16 | A N^-a (prod_x f_x^-a - prod_x f_x(16)^-a) | the same, of which E is taken away |
| separate | L - L_16 | sum over k_x < 16 of C_x N^-b_x exp(-k_x / g_x) | the same paper's delta_PTQ, one for each x |

N prod_x f_x are that paper's effective parameters.

The first is for models that were trained with few bits, each of which has a loss of its own. The other two are for one
trained model that is rounded afterwards, whose loss at 16 bits is known. Effective parameters let the bits of one thing
matter more where another has few. With separate ones they add up. The factor of the training tokens is part of A and
C_x here, as in kbit.analysis.statistics.laws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Floats
from kbit.analysis.statistics.laws import (
    DRAWS,
    Fit,
    HeldOut,
    TooFewPoints,
    fit_terms,
    hold_out,
    judge_prediction,
)
from kbit.analysis.statistics.robust_fit import Terms, weigh_stacked_slopes
from kbit.checks import check_choice
from kbit.numerics.spec import BASELINE_BITS

BIT_LAWS: Final = ("effective", "effective added", "separate")
_STARTS: Final = (0.5, 1.0, 2.0)  # of g, in bits: the paper has 0.96 to 2.67 in training, and 0.59 after it
_EXPONENTS: Final = (0.1, 0.4)  # of N
_LEAST: Final = 0.01  # exponent of N: sizes a hundred times apart would then differ by 5% in what they lose
_TRIED: Final = 2  # of the starts, those nearest to the points
_RANGE: Final = (1e-100, 700.0)  # of k / g: beyond it exp(-k / g) is 1 or 0


@dataclass(frozen=True)
class Effective:
    """The terms of a law of effective parameters at given points.

    The decays are fitted as log g, so that g > 0.

    Attributes:
        size: log N, [points].
        bits: k_x, [points, things].
        things: what has few bits.
        is_added: whether the law is of L - L_16, so that it has no E.
    """

    size: Floats
    bits: Floats
    things: tuple[str, ...]
    is_added: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        floor = () if self.is_added else ("E",)
        return ("log A", "N exponent", *(f"log g {name}" for name in self.things), *floor)

    def predict(self, parameters: Floats) -> Floats:
        """Return y for parameters [..., terms]: [..., points]."""
        if self.is_added:
            return self._grow(parameters, self.bits) - self._grow(parameters, self._whole)
        return self._grow(parameters, self.bits) + parameters[..., -1:]

    def slope(self, parameters: Floats) -> Floats:
        """Return dy / dparameters: [..., points, terms]."""
        slope = self._slope(parameters, self.bits)
        if self.is_added:
            return np.asarray(slope - self._slope(parameters, self._whole))
        return np.concatenate([slope, np.ones((*slope.shape[:-1], 1))], axis=-1)

    def weigh_slopes(self, parameters: Floats, pull: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Return the sums of Terms.weigh_slopes."""
        return weigh_stacked_slopes(self.slope(parameters), pull, weight)

    def guess_starts(self, y: Floats) -> list[Floats]:
        """Return starts from a grid of exponents and decays, with the A that fits best to each."""
        starts = []
        for exponent, decay in product(_EXPONENTS, _STARTS):
            rest = [exponent, *[np.log(decay)] * len(self.things)]
            shape = self.predict(np.array([0.0, *rest, *([] if self.is_added else [0.0])]))
            if self.is_added:
                starts.append(np.array([np.log(max(float(shape @ y / (shape @ shape)), 1e-6)), *rest]))
            else:
                factor, floor = np.polyfit(shape, y, 1)
                starts.append(np.array([np.log(max(float(factor), 1e-6)), *rest, max(float(floor), 0.0)]))
        return _pick_nearest(self, starts, y)

    @property
    def _whole(self) -> Floats:
        return np.full_like(self.bits, BASELINE_BITS)

    def _split(self, parameters: Floats, bits: Floats) -> tuple[Floats, Floats, Floats]:
        """Return k / g and f, [..., points, things], and log N + sum_x log f_x, [..., points]."""
        last = 2 + len(self.things)
        with np.errstate(over="ignore", divide="ignore"):
            rounds = np.clip(bits * np.exp(-parameters[..., None, 2:last]), *_RANGE)
            factors = -np.expm1(-rounds)
            return rounds, factors, np.asarray(self.size + np.log(factors).sum(axis=-1))

    def _grow(self, parameters: Floats, bits: Floats) -> Floats:
        """Return A (N prod_x f_x)^-a."""
        size = self._split(parameters, bits)[2]
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.exp(parameters[..., :1] - parameters[..., 1:2] * size))

    def _slope(self, parameters: Floats, bits: Floats) -> Floats:
        rounds, factors, size = self._split(parameters, bits)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            # d log f / d log g = -(k / g) exp(-k / g) / f
            by_decay = parameters[..., 1:2, None] * rounds * np.exp(-rounds) / factors
            logs = np.concatenate([np.ones_like(size)[..., None], -size[..., None], by_decay], axis=-1)
            return np.asarray(self._grow(parameters, bits)[..., None] * logs)


@dataclass(frozen=True)
class Separate:
    """The terms of the law in which each thing with few bits adds a loss of its own.

    Attributes:
        size: log N, [points].
        bits: k_x, [points, things].
        things: what has few bits.
    """

    size: Floats
    bits: Floats
    things: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(f"{name} {thing}" for thing in self.things for name in ("log C", "N exponent", "1 / g"))

    def predict(self, parameters: Floats) -> Floats:
        """Return y for parameters [..., terms]: [..., points]."""
        return np.asarray(self._grow(parameters).sum(axis=-1))

    def slope(self, parameters: Floats) -> Floats:
        """Return dy / dparameters: [..., points, terms]."""
        terms = np.stack([np.ones_like(self.bits), -np.broadcast_to(self.size[:, None], self.bits.shape), -self.bits])
        slope = self._grow(parameters)[..., None] * np.moveaxis(terms, 0, -1)
        return np.asarray(slope.reshape(*slope.shape[:-2], -1))

    def weigh_slopes(self, parameters: Floats, pull: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Return the sums of Terms.weigh_slopes."""
        return weigh_stacked_slopes(self.slope(parameters), pull, weight)

    def guess_starts(self, y: Floats) -> list[Floats]:
        """Return starts from a grid of exponents and decays, with the C that fit best to each."""
        starts = []
        for exponent, decay in product(_EXPONENTS, _STARTS):
            rest = np.tile([0.0, exponent, 1 / decay], len(self.things))
            shapes = self._grow(rest)
            factors = np.linalg.lstsq(shapes, y)[0].clip(1e-3 * float(np.abs(y).max()))
            rest[::3] = np.log(factors)
            starts.append(rest)
        return _pick_nearest(self, starts, y)

    def _grow(self, parameters: Floats) -> Floats:
        """Return what each thing adds: [..., points, things]."""
        log_c, exponent, rate = np.moveaxis(parameters.reshape(*parameters.shape[:-1], -1, 3), -1, 0)
        with np.errstate(over="ignore"):
            grown = np.exp(
                log_c[..., None, :] - exponent[..., None, :] * self.size[:, None] - rate[..., None, :] * self.bits
            )
        return np.asarray(np.where(self.bits < BASELINE_BITS, grown, 0.0))


def _pick_nearest(design: Terms, starts: list[Floats], y: Floats) -> list[Floats]:
    return sorted(starts, key=lambda start: float(((design.predict(start) - y) ** 2).sum()))[:_TRIED]


def make_terms(law: str, points: pd.DataFrame, things: Sequence[str]) -> Terms:
    """Return a law's terms at points.

    Args:
        law: one of BIT_LAWS.
        points: a table with a column parameters and one of bits for each thing, one row per point.
        things: the columns of bits, such as weight_bits and activation_bits.

    Raises:
        ValueError: another law, no things, a column that is missing or holds something else than bits > 0.
    """
    check_choice("law", law, BIT_LAWS)
    if not things:
        raise ValueError("a law of bits needs the names of one or more columns of bits")
    if missing := [name for name in things if name not in points]:
        raise ValueError(f"points lack the columns of bits {missing}; they have: {', '.join(map(str, points.columns))}")
    bits = points[list(things)].to_numpy(dtype=np.float64)
    if not (bits > 0).all():  # NaN is not, either
        names = ", ".join(things)
        raise ValueError(f"{names}: bits must be > 0 in every row, {BASELINE_BITS} where nothing is rounded")
    size = np.log(points["parameters"].to_numpy(dtype=np.float64))
    if law == "separate":
        return Separate(size, bits, tuple(things))
    return Effective(size, bits, tuple(things), law == "effective added")


def fit_bits(law: str, points: pd.DataFrame, things: Sequence[str], *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Fit a law of several things' bits, robustly and with bootstrap intervals, see laws.fit_law.

    Args:
        law, things: see make_terms.
        points: a table with the columns of make_terms, y and error (the standard error of y, NaN if it is not known).
        draws, seed: see laws.fit_law.

    Raises:
        ValueError: see make_terms.
        TooFewPoints: see laws.fit_terms. Models of one size, whose bits alone would have to tell the exponent of N. A
            law of effective parameters of models of which larger ones lose no less: the exponent then goes to 0 and A
            to infinity.
    """
    fit = fit_terms(law, make_terms(law, points, things), points, draws=draws, seed=seed)
    if points["parameters"].nunique() < 2:
        raise TooFewPoints(f"the law {law!r} needs models of two sizes or more, and these are of one")
    exponent = float(fit.parameters[1])
    if law == "effective added" and exponent < _LEAST:
        raise TooFewPoints(
            f"the law {law!r} has the exponent {exponent:.1g} of N: larger ones of these models lose no less, which "
            "effective parameters cannot say"
        )
    return fit


def check_largest(
    law: str, points: pd.DataFrame, things: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> HeldOut:
    """Fit a law of bits on all but the largest model and predict that one.

    Args:
        law, things, draws, seed: see fit_bits.
        points: see fit_bits, with a column model.

    Raises:
        ValueError, TooFewPoints: see fit_bits.
    """
    known, held = hold_out(points)
    fit = fit_bits(law, known, things, draws=draws, seed=seed)
    return judge_prediction(fit, make_terms(law, held, things), known, held, list(things), seed)


def list_parameters(fit: Fit) -> pd.DataFrame:
    """Return the columns name, value, low, high (95% interval) of a fit's parameters. A decay is g and not its log."""
    ends = np.column_stack([fit.parameters, fit.intervals])
    names = fit.design.names
    is_log = np.array([name.startswith("log g ") for name in names])
    table = pd.DataFrame(np.where(is_log[:, None], np.exp(ends), ends), columns=["value", "low", "high"])
    table.insert(0, "name", [name.removeprefix("log ") if name.startswith("log g ") else name for name in names])
    return table
