"""The integer programme finds what brute force finds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.checks import KbitError
from kbit.methods.allocation.programme import choose_least_loss

UNITS, CHOICES = 8, 4
EVERY_MAP = np.array(list(itertools.product(range(CHOICES), repeat=UNITS)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1), largest=st.sampled_from([1000, 10**7, 10**10]))
def test_the_map_is_the_best_of_all(seed: int, tightness: float, largest: int) -> None:
    """8 tensors and 4 choices: 65,536 maps. Losses span eight orders of magnitude, as those of 2 to 8 bits do."""
    rng = np.random.default_rng(seed)
    losses = np.exp(rng.uniform(-18, 2, (UNITS, CHOICES)))
    bits = rng.integers(1, largest, (UNITS, CHOICES))  # without a common divisor
    least, most = int(bits.min(1).sum()), int(bits.max(1).sum())
    budget = least + int(tightness * (most - least))

    chosen = choose_least_loss(losses, bits, budget)

    rows = np.arange(UNITS)
    fits = bits[rows, EVERY_MAP].sum(1) <= budget
    best = losses[rows, EVERY_MAP].sum(1)[fits].min()
    assert bits[rows, chosen].sum() <= budget
    # HiGHS' absolute gap of 1e-6 beside losses that are scaled to add up to a million
    assert losses[rows, chosen].sum() <= best + 2e-12 * losses.max(1).sum()


@pytest.mark.parametrize("losses", [np.zeros((3, 2)), np.full((3, 2), 7.0)], ids=["nothing lost", "all alike"])
def test_equal_losses_still_keep_the_budget(losses: np.ndarray) -> None:
    bits = np.array([[2, 3], [20, 30], [200, 300]])
    assert choose_least_loss(losses, bits, 222).tolist() == [0, 0, 0]


def test_an_unsolved_programme_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "scipy.optimize.milp", lambda *_, **__: SimpleNamespace(status=1, message="Time limit reached.", x=None)
    )
    with pytest.raises(KbitError, match=r"of 1 units and 2 choices was not solved: Time limit reached\. Fewer"):
        choose_least_loss(np.array([[0.0, 1.0]]), np.array([[3, 2]]), 3)
