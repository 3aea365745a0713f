"""The sections of train other than quantizers: adapters, and FAST's rule."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside a frozen base (LoRA), which may be quantized (QLoRA). They are trained alone.

    Attributes:
        rank: the rank of each adapter. 0 trains the weights themselves, without adapters.
        alpha: an adapter's output is multiplied by alpha / rank.
        targets: regular expression of the names of the linear layers that get an adapter, such as attention. None is
            every linear layer inside the transformer blocks.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"train.lora.rank={self.rank} is not >= 0 (0: no adapters)")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"train.lora.alpha={self.alpha:g} is not a finite number > 0")
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise ValueError(f"train.lora.targets={self.targets!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class FastConfig:
    """FAST's rule, by which each product's operands choose between two precisions of block floating point.

    A tensor X takes `high` mantissa bits if r(X) = sum |X_high - X_low| / sum |X_low| is at least the threshold
    alpha - beta (step / steps) - beta (layer / layers), and `low` ones otherwise (Zhang et al. 2022).

    Attributes:
        adapt: whether the rule decides. The data types of weights, activations and gradients then mean nothing.
        alpha: the threshold of the first layer at the first step.
        beta: how far the threshold falls to the last layer, and again to the last step.
        low: mantissa bits of the lower precision, without the sign.
        high: mantissa bits of the higher precision, without the sign.
    """

    adapt: bool = False
    alpha: float = 0.6
    beta: float = 0.3
    low: int = 2
    high: int = 4

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"train.fast.{name}={getattr(self, name)} is not a finite number")
        if not 1 <= self.low < self.high <= 7:  # a sign and 7 bits are the widest code
            raise ValueError(f"train.fast.low={self.low} and train.fast.high={self.high} are not 1 <= low < high <= 7")
