"""The loss of a training by the bits of its roles, and which role deserves the bits.

    L = E + A N_eff^-a,    N_eff = N (1 - exp(-P_w / g_w)) (1 - exp(-P_a / g_a)) ...

is the law "effective" of kbit.analysis.statistics.bit_laws (Kumar et al. 2024, "Scaling laws for precision", arXiv
2411.04330, for weights, activations and the cache). Here gradients and the states of the optimizer have a factor of the
same form, and a role that is not quantized has the factor 1. g is how many bits a role takes for its loss to fall by
the factor e. The term of the data is part of E, as all trainings of a study have as many tokens.

Each seed is fitted by itself. Every interval is Student's over the seeds.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from scipy.optimize import least_squares, nnls

from kbit.analysis.curves.curves import Floats
from kbit.analysis.curves.roles import LAW_ROLES
from kbit.analysis.curves.trainings import describe_seeds
from kbit.analysis.statistics.bit_laws import make_terms
from kbit.analysis.statistics.laws import MIN_SPARE, TooFewPoints
from kbit.numerics.spec import BASELINE_BITS
from kbit.training.config import PRODUCTS

EXPONENTS: Final = (0.005, 3.0)  # bounds of a
DECAYS: Final = (0.1, 50.0)  # bounds of g. At .1, 2 bits lose a part in 10^9
_STARTS: Final = ((0.05, 0.5), (0.05, 1.5), (0.5, 0.5), (0.5, 1.5))  # a, and g of all roles


@dataclass(frozen=True)
class TrainingLaw:
    """The law as it was fitted to the trainings of one seed.

    Attributes:
        floor: E, nats.
        scale: A, nats at one parameter.
        exponent: a.
        decays: g of each role that was quantized, bits.
    """

    floor: float
    scale: float
    exponent: float
    decays: Mapping[str, float]

    def predict(self, points: pd.DataFrame) -> Floats:
        """Return the loss of trainings: rows with the columns parameters and each role of the law."""
        terms, decays = make_terms("effective", points, list(self.decays)), np.log(list(self.decays.values()))
        return terms.predict(np.array([np.log(max(self.scale, 1e-300)), self.exponent, *decays, self.floor]))


def fit_seed(points: pd.DataFrame) -> TrainingLaw:
    """Fit the law to the trainings of one seed by least squares.

    E and A, neither below 0, are linear and solved for within each step of the others.

    Args:
        points: rows with the columns value, parameters and LAW_ROLES. A role without bits anywhere is no part of it.

    Raises:
        TooFewPoints: one size, or fewer points than parameters + 2, or no training with all roles exact. Or larger
            models have the higher loss, which the law cannot say.
    """
    roles = [role for role in LAW_ROLES if np.isfinite(points[role]).any()]
    _check_points(points, roles)
    y, terms = points["value"].to_numpy(dtype=np.float64), make_terms("effective", points, roles)

    def solve(theta: Floats) -> tuple[Floats, Floats]:
        power = terms.predict(np.array([0.0, np.exp(theta[0]), *theta[1:], 0.0]))
        columns = np.stack([np.ones(len(y)), power / power.max()], axis=1)
        linear = nnls(columns, y)[0]
        return np.asarray(columns @ linear), np.asarray(linear / [1, power.max()])

    def miss(theta: Floats) -> Floats:
        return np.asarray(solve(theta)[0] - y)

    low, high = np.log([EXPONENTS, *[DECAYS] * len(roles)]).T
    starts = [np.log([a, *[g] * len(roles)]) for a, g in _STARTS]
    fits = [least_squares(miss, start, bounds=(low, high), x_scale="jac") for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost)).x
    floor, scale = solve(best)[1]
    decays = dict(zip(roles, np.exp(best[1:]).tolist(), strict=True))
    return TrainingLaw(float(floor), float(scale), float(np.exp(best[0])), decays)


def _check_points(points: pd.DataFrame, roles: Sequence[str]) -> None:
    """Raise TooFewPoints if trainings cannot tell the parameters of the law of these roles, see fit_seed."""
    exact = points[~np.isfinite(points[list(roles)]).any(axis=1)].groupby("parameters")["value"].mean()
    count = len(roles) + 3
    if not roles:
        raise TooFewPoints("no role has few bits in these trainings")
    if len(exact) < 2:
        raise TooFewPoints(f"it takes trainings without quantized roles of two sizes, and there are {len(exact)}")
    if len(points) < count + MIN_SPARE:
        raise TooFewPoints(f"{len(roles)} roles have {count} parameters, which {len(points)} trainings cannot tell")
    if exact.iloc[-1] >= exact.iloc[0]:
        raise TooFewPoints(
            f"the largest model ends at {exact.iloc[-1]:.4f} nats and the smallest at {exact.iloc[0]:.4f}: they were "
            "trained too shortly for a law"
        )


def fit_seeds(points: pd.DataFrame) -> dict[int, TrainingLaw]:
    """Fit each seed that has all formats, a format being the bits of all roles on one model.

    Args:
        points: the same as of fit_seed, with the columns model and seed. Rows without a value are left out.

    Raises:
        TooFewPoints: see fit_seed, or no seed has all formats.
    """
    points = points[points["value"].notna()]
    counts = points.groupby("seed").size()
    formats = len(points.drop_duplicates(["model", *LAW_ROLES]))
    whole = counts.index[counts == formats]
    if not len(whole):
        raise TooFewPoints("no seed has a training of each format")
    return {int(seed): fit_seed(points[points["seed"] == seed]) for seed in whole}


def describe_logs(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean over seeds with Student's 95% interval of the logarithms."""
    mean, low, high = describe_seeds(pd.Series(np.log(values)))
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))


def describe_law(laws: Mapping[int, TrainingLaw]) -> pd.DataFrame:
    """Return mean, low and high over seeds of the exponent a and of each role's g, a row each."""
    roles = list(next(iter(laws.values())).decays)
    rows = {"exponent": describe_logs([law.exponent for law in laws.values()])}
    rows |= {role: describe_logs([law.decays[role] for law in laws.values()]) for role in roles}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])


def predict_mean(laws: Mapping[int, TrainingLaw], points: pd.DataFrame) -> Floats:
    """Return the mean prediction of the seeds' laws."""
    return np.asarray(np.mean([law.predict(points) for law in laws.values()], axis=0))


def find_gains(laws: Mapping[int, TrainingLaw], bits: int, parameters: float) -> pd.DataFrame:
    """Return what one more bit gains in each operand of the products, if all have `bits`: nats, by role, best first.

    One more bit costs as many bit operations in each operand (see count_bit_operations), so this is a comparison at
    equal bit operations.

    Returns:
        A row for each operand that the laws know, with mean, low and high over seeds, and with lead, lead_low and
        lead_high: how much more the best one gains, paired by seed.
    """
    known = next(iter(laws.values())).decays
    roles = [role for role in PRODUCTS if role in known]
    flat = pd.DataFrame([{role: bits if role in roles else np.inf for role in known} | {"parameters": parameters}])
    gains = pd.DataFrame(
        {
            role: {
                seed: float((law.predict(flat) - law.predict(flat.assign(**{role: bits + 1})))[0])
                for seed, law in laws.items()
            }
            for role in roles
        }
    )
    columns = ["mean", "low", "high", "lead", "lead_low", "lead_high"]
    if not roles:
        return pd.DataFrame(columns=columns)
    best = gains[str(gains.mean().idxmax())]
    rows = {role: (*describe_seeds(gains[role]), *describe_seeds(best - gains[role])) for role in roles}
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).sort_values("mean", ascending=False)


def count_bit_operations(points: pd.DataFrame) -> Floats:
    """Return the bit operations of a multiply-accumulate, the mean over the three products of a linear layer.

        (P_w P_a + P_g P_w + P_g P_a) / 3

    An operand that is not quantized has 16 bits.
    """
    bits = points[list(PRODUCTS)].clip(upper=BASELINE_BITS)
    weights, activations, gradients = (bits[role].to_numpy(dtype=np.float64) for role in PRODUCTS)
    return np.asarray((weights * activations + gradients * weights + gradients * activations) / 3)


def compare_equal_work(points: pd.DataFrame) -> pd.DataFrame:
    """Compare formats of products that have the same bits in another order, so that bit operations are equal.

    Returns:
        A row for each such format of each model, but those whose states have few bits. Columns: model, work (the bits
        of the three operands, sorted, such as "3 3 5"), operations, format (such as "W5 A3 G3"), mean, low and high:
        its loss above that of the best format, paired by seed, 0 for the best itself.
    """
    states = [role for role in LAW_ROLES if role not in PRODUCTS]
    is_exact = ~np.isfinite(points[states].to_numpy(dtype=np.float64)).any(axis=1)
    own = points[points["value"].notna().to_numpy() & is_exact]
    bits = own[list(PRODUCTS)].clip(upper=BASELINE_BITS).astype("int64")
    own = own.assign(
        work=[" ".join(map(str, sorted(row))) for row in bits.to_numpy()],
        format=[" ".join(f"{role[0].upper()}{k}" for role, k in row.items()) for row in bits.to_dict("records")],
        operations=count_bit_operations(own),
    )
    rows = []
    for about, group in own.groupby(["model", "work"], sort=True):
        model, work = typing.cast(tuple[str, str], about)
        values = group.pivot_table("value", "seed", "format").dropna()
        if values.shape[1] < 2 or values.empty:
            continue
        best = values.mean().idxmin()
        for name in values.mean().sort_values().index:
            above = describe_seeds(values[name] - values[best]) if name != best else (0.0, 0.0, 0.0)
            rows.append((model, work, group["operations"].iloc[0], name, *above))
    return pd.DataFrame(rows, columns=["model", "work", "operations", "format", "mean", "low", "high"])
