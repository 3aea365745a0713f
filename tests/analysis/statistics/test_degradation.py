"""What a quantized model loses, where it loses on no item at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.analysis.statistics.degradation import widen_degenerate


@given(n=st.integers(1, 100_000), at=st.floats(-1, 1))
def test_no_discordant_item_leaves_an_interval_that_shrinks_with_n(n: int, at: float) -> None:
    low, high = widen_degenerate(np.array([at, at]), np.array([at, at]), np.array([n, 2 * n], dtype=np.float64))
    assert low[0] < low[1] < at < high[1] < high[0]
    # the chance to see no discordant item is 2.5% at the bound
    assert (1 - (high[0] - at)) ** n == pytest.approx(0.025, rel=1e-3)


def test_other_intervals_stay() -> None:
    low, high = widen_degenerate(np.array([-0.1]), np.array([0.2]), np.array([30.0]))
    assert (low[0], high[0]) == (-0.1, 0.2)
