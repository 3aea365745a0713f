"""FAST: its block floating point against a converter of scalars, r and eps on values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.training.products.fast import Fast, block_float, find_improvement, make_roles
from kbit.training.products.linear import Roles, Use, quantize_products


def convert(group: list[float], m: int) -> list[float]:
    """Return numbers as sign, m bits of magnitude and the exponent of the largest one, cut off."""
    exponent = max((math.frexp(x)[1] - 1 for x in group if x), default=0)
    unit = math.ldexp(1.0, exponent - (m - 1))
    return [math.copysign(math.floor(abs(x) / unit) * unit, x) if x else 0.0 for x in group]


def make_use(number: int = 0, step: int = 0, steps: int | None = 100) -> Use:
    return Use("layer", number, layers=4, step=step, steps=steps, replica=0, count=0, trains=True)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_block_floating_point_equals_a_converter_of_scalars(m: int) -> None:
    rng = np.random.default_rng(m)
    x = (rng.standard_normal((40, 40)) * 10.0 ** rng.integers(-9, 6, (40, 1))).astype(np.float32)
    x[0, :16], x[1, :8], x[2, 3] = 0, 0, 2.0**10  # a zero group, zeros, and one number far above the others
    x[3, :4] = [1.0, -1.5, 1.9999999, 2.0**-126]
    expected = [
        convert(row[i : i + 16], m)[j] for row in x.tolist() for i in (0, 16, 32) for j in range(len(row[i : i + 16]))
    ]
    np.testing.assert_array_equal(fake_quantize(x, block_float(m)).ravel(), np.array(expected, np.float32))


def test_presets_are_the_two_precisions() -> None:
    """m excludes the sign, so that m = 2 is 3 bits. bfp4 has m = 3, which FAST has not."""
    assert [QuantSpec.from_name(name) for name in ("fast_m2", "fast_m4", "bfp4")] == [block_float(m) for m in (2, 4, 3)]


def test_r_of_a_group_by_hand() -> None:
    """Exponent 0. m = 2 has units of 0.5, m = 4 of 0.125.

    x       1.9    -1.2    0.7    0.3
    m = 2   1.5    -1.0    0.5    0.0       sum of magnitudes 3.0
    m = 4   1.875  -1.125  0.625  0.25      differences 0.375 + 0.125 + 0.125 + 0.25 = 0.875
    """
    x = torch.tensor([[1.9, -1.2, 0.7, 0.3] + [0.0] * 12])
    assert find_improvement(x, block_float(2), block_float(4)) == 0.875 / 3.0
    stochastic = block_float(2, rounding="stochastic"), block_float(4, rounding="stochastic")
    assert find_improvement(x, *stochastic) == 0.875 / 3.0


def test_r_without_a_sum() -> None:
    assert find_improvement(torch.zeros(2, 16), block_float(2), block_float(4)) == 0.0
    assert find_improvement(torch.ones(2, 16), block_float(2), block_float(4)) == 0.0


@pytest.mark.parametrize(("name", "r"), [("normal", 0.53), ("laplace", 0.62), ("uniform", 0.25)])
def test_r_of_distributions(name: str, r: float) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(getattr(rng, name)(size=(2000, 160)) - (0.5 if name == "uniform" else 0)).float()
    assert abs(find_improvement(x, block_float(2), block_float(4)) - r) < 0.01


def test_eps_by_hand() -> None:
    policy = Fast(alpha=0.6, beta=0.3)
    assert policy.find_threshold(make_use()) == 0.6
    assert policy.find_threshold(make_use(number=1, step=50)) == pytest.approx(0.6 - 0.15 - 0.075, abs=1e-15)
    assert policy.find_threshold(make_use(number=3, step=99)) == pytest.approx(0.6 - 0.297 - 0.225, abs=1e-15)
    with pytest.raises(ValueError, match="call begin_step"):
        policy.find_threshold(make_use(steps=None))


def test_a_tensor_takes_the_high_precision_from_the_threshold_on() -> None:
    policy = Fast(alpha=0.6, beta=0.3)
    x = torch.tensor([[1.9, -1.2, 0.7, 0.3] + [0.0] * 12])  # r = .2917
    low = [policy.choose("weights", make_use(step=step), x) == block_float(2) for step in (0, 99)]
    assert low == [True, True]  # .6 and .303
    assert policy.choose("gradients", make_use(number=1, step=99), x) == block_float(4, rounding="stochastic")  # .228
    assert policy.find_high_shares() == {("gradients", 1, 19): 1.0, ("weights", 0, 0): 0.0, ("weights", 0, 19): 0.0}


def test_the_precision_of_a_layer_rises_with_the_step() -> None:
    """r is about a half for normal tensors: the first layer's eps falls from .6 below it, the second begins at .45."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    x = torch.randn(64, 64)
    policy = Fast()
    passes = []
    with quantize_products(model, policy, include="") as products:
        for step in (0, 99):
            products.begin_step(step, 100)
            before = products.counter.passes
            model(x).square().mean().backward()
            passes.append((products.counter.passes - before) / 64**3)
    # weights are uniform (r = .25): low throughout but in the last layer at the end. First step: eps is .6 and .45
    shares = policy.find_high_shares()
    expected = {"activations": [0, 1, 1, 1], "weights": [0, 0, 0, 1]}
    for role, high in expected.items():
        places = [(role, layer, period) for layer in (0, 1) for period in (0, 19)]
        assert [shares[place] for place in places] == high
    assert passes[0] < passes[1]


def test_bad_thresholds_and_roles() -> None:
    with pytest.raises(ValueError, match="alpha=nan is not a finite number"):
        Fast(alpha=math.nan)
    with pytest.raises(ValueError, match="gradients have a quantizer at one precision only"):
        Fast(high=Roles(block_float(4), block_float(4)))
    policy = Fast(low=Roles(block_float(2)), high=Roles(block_float(4)))
    assert policy.choose("gradients", make_use(), torch.ones(1, 16)) is None
    assert make_roles(2).gradients == block_float(2, rounding="stochastic")
