"""FAST: block floating point whose precision follows the tensor, the layer and the step (Zhang et al. 2022, HPCA).

A number has a sign and m bits of magnitude, and a group of 16 shares the exponent of its largest magnitude. What the
low precision loses against the high one is

    r(X) = sum |BFP(X, 4) - BFP(X, 2)| / sum |BFP(X, 2)|

and a tensor of layer l (of L) at step i (of I) takes the high precision if r(X) is not below

    eps(l, i) = alpha - beta i / I - beta l / L

Late steps and deep layers so have the high one. The paper's text was not found: alpha = 0.6 and beta = 0.3 are from a
summary of it. They fit the formula, as r is about 0.5 for weights, activations and gradients alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from jaxtyping import Float
from torch import Tensor

from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.training.products.linear import Roles, Use

GROUP: Final = 16  # numbers that share an exponent
PERIODS: Final = 20  # parts of a training whose choices are counted together


def block_float(m: int, *, rounding: str = "truncate", group: int = GROUP) -> QuantSpec:
    """Return the quantizer of block floating point: a sign, m bits of magnitude and a shared exponent of 8 bits.

    FAST shares 3 or 4 bits of exponent. Its storage of a group, m even, is exponent + group (m / 2) 3 bits, as each
    2-bit chunk has a sign of its own.
    """
    return QuantSpec(
        bits=m + 1, data_type="int", block_size=group, layout="row", scale_format="e8m0", rounding=rounding
    )  # fmt: skip


def make_roles(m: int) -> Roles:
    """Return block floating point for all operands: weights and activations truncated, gradients stochastic."""
    return Roles(block_float(m), block_float(m), block_float(m, rounding="stochastic"))


def count_periods(steps: int) -> int:
    """Return the number of parts of a training whose choices are counted: 20, or one for each step of fewer."""
    return min(PERIODS, steps)


def find_improvement(values: Float[Tensor, "rows columns"], low: QuantSpec, high: QuantSpec) -> float:
    """Return r, the relative improvement of the high precision over the low one, 0 where there is none.

    Both are truncated for it, whatever their rounding.
    """
    coarse, fine = (fake_quantize(values, dataclasses.replace(spec, rounding="truncate")) for spec in (low, high))
    gained, present = float((fine - coarse).abs().sum()), float(coarse.abs().sum())
    if not gained:
        return 0.0
    return gained / present if present else math.inf


@dataclass
class Fast:
    """The policy for quantize_products.

    Attributes:
        alpha: threshold of the first layer at the first step.
        beta: how much the threshold falls to the last step, and again to the last layer.
        low: the quantizers that a tensor has below the threshold.
        high: the quantizers that it has from the threshold on. The roles are those of low.
        uses: how often tensors of each (role, number of the layer, period) were quantized.
        high_uses: how often that was with high precision.
    """

    alpha: float = 0.6
    beta: float = 0.3
    low: Roles = field(default_factory=lambda: make_roles(2))
    high: Roles = field(default_factory=lambda: make_roles(4))
    uses: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    high_uses: Counter[tuple[str, int, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number")
        for role in dataclasses.fields(Roles):
            if (getattr(self.low, role.name) is None) != (getattr(self.high, role.name) is None):
                raise ValueError(f"{role.name} have a quantizer at one precision only: give it to low and high")

    @property
    def possible(self) -> tuple[Roles, ...]:
        """Both precisions."""
        return self.low, self.high

    def find_threshold(self, use: Use) -> float:
        """Return eps of a layer at a step.

        Raises:
            ValueError: begin_step was not called, so that the share of the training is not known.
        """
        if use.steps is None:
            raise ValueError("FAST goes by the training's progress: call begin_step(step, steps) before each step")
        return self.alpha - self.beta * use.step / use.steps - self.beta * use.number / use.layers

    def choose(self, role: str, use: Use, values: Float[Tensor, "rows columns"]) -> QuantSpec | None:
        """Return the quantizer of an operand by its values, and count the choice.

        Raises:
            FloatingPointError: a value is NaN or Inf, as those of a training that diverges are.
            ValueError: a block is beyond the scales' range.
        """
        low: QuantSpec | None = getattr(self.low, role)
        high: QuantSpec | None = getattr(self.high, role)
        if low is None or high is None:
            return None
        threshold = self.find_threshold(use)
        try:
            is_high = find_improvement(values, low, high) >= threshold
        except ValueError as error:
            raise use.explain(values, role, error) from error
        if use.trains:
            place = (role, use.number, use.step * PERIODS // (use.steps or 1))
            self.uses[place] += 1
            self.high_uses[place] += is_high
        return high if is_high else low

    def find_high_shares(self) -> dict[tuple[str, int, int], float]:
        """Return the share of high precision by (role, number of the layer, period of the training)."""
        return {place: self.high_uses[place] / count for place, count in sorted(self.uses.items())}
