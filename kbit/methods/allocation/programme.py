"""The choice for each unit with the least sum of losses within a budget, as an integer programme.

minimise     sum_uc loss_uc x_uc
subject to   sum_c x_uc = 1 for each u,   sum_uc bits_uc x_uc <= budget,   x in {0, 1}
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from kbit.checks import KbitError

# HiGHS stops at an absolute gap of 1e-6, which no option of scipy's changes. Losses are scaled to add up to this.
_SCALE: Final = 1e6


def choose_least_loss(
    losses: Float64[np.ndarray, "units choices"], bits: Int64[np.ndarray, "units choices"], budget: int
) -> Int64[np.ndarray, " units"]:
    """Return the choice of each unit, exactly the best within the budget.

    Args:
        losses: what each unit loses with each choice, finite.
        bits: the bits that it then takes.
        budget: the most bits in all, at least those of the smallest choices.

    Raises:
        KbitError: HiGHS does not prove an optimum, or its solution is beyond the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # not at the top: it takes part of a second, and few
    from scipy.sparse import coo_array  # experiments have a budget

    units, choices = losses.shape
    divisor = int(np.gcd.reduce(bits.ravel()))  # small whole numbers are exact in HiGHS' tolerances
    sizes = bits.ravel() // divisor
    one_each = coo_array(
        (np.ones(losses.size), (np.repeat(np.arange(units), choices), np.arange(losses.size))),
        shape=(units, losses.size),
    )
    limits: list[Any] = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(sizes[np.newaxis].astype(np.float64), -np.inf, budget // divisor),
    ]
    found: Any = milp(
        _scale(losses).ravel(),
        integrality=np.ones(losses.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 0.0},
    )
    if found.status != 0:
        raise KbitError(
            f"quant.allocation: the integer programme of {units} units and {choices} choices was not solved: "
            f"{found.message} Fewer quant.allocation.choices, or unit=layer, make it smaller"
        )
    chosen = np.asarray(found.x.reshape(losses.shape).argmax(1), dtype=np.int64)
    if (taken := int(bits[np.arange(units), chosen].sum())) > budget:
        raise KbitError(f"quant.allocation: the solution of the integer programme takes {taken} bits of {budget}")
    return chosen


def _scale(losses: Float64[np.ndarray, "units choices"]) -> NDArray[np.float64]:
    """Return the losses above each unit's least one, so that their largest add up to _SCALE."""
    above = losses - losses.min(axis=1, keepdims=True)
    total = above.max(axis=1).sum()
    return np.asarray(above * (_SCALE / total) if total > 0 else above, dtype=np.float64)
