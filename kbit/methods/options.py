"""Options that some methods have: the text that they calibrate on, and GPTQ's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kbit.checks import check_choice, non_defaults

if TYPE_CHECKING:
    from kbit.numerics.spec import QuantSpec

UNSEEN: Final = ("error", "rtn")
TOKENS_AT_ONCE: Final = 2048  # of a forward pass over a calibration text: one of GPTQ's published code's sequences


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that a method with data, or an allocation, sees. Nothing of it should be in the text that is measured.

    Attributes:
        text: an embedded text, a path, or a text of the hub (wikitext2_train, c4_train). See eval.perplexity.
        samples: windows drawn at random, without overlap.
        length: tokens of a window. None is the model's context, at most 2048 (GPTQ: 128 samples of 2048 tokens).
        seed: seed of the draw.
        unseen: treatment of a weight that the text never reaches, such as a rarely chosen expert: error, or rtn.
    """

    text: str = "nano_calibration"
    samples: int = 128
    length: int | None = None
    seed: int = 0
    unseen: str = "error"

    def __post_init__(self) -> None:
        check_choice("quant.calibration.unseen", self.unseen, UNSEEN)
        for name in ("samples", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"quant.calibration.{name}={value} is not >= 1")

    @property
    def identity_fields(self) -> dict[str, Any]:
        """The fields that decide the windows, canonical, with the text by the name that the user gave it."""
        return non_defaults(self, CalibrationConfig()) | {"text": self.text}


@dataclass(frozen=True)
class GptqConfig:
    """Options of method=gptq. The defaults are those of the published code.

    Attributes:
        act_order: whether columns are taken by falling Hessian diagonal instead of in their order.
        static_groups: whether all block scales are those of the weights as they were, and not of the weights as they
            are when their block's turn comes.
        search_scales: whether each block's scale is searched, as method=mse does, and not its largest magnitude.
        damping: number added to the Hessian's diagonal, in means of it. It is raised tenfold, and recorded, if that is
            too little.
    """

    act_order: bool = False
    static_groups: bool = False
    search_scales: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"quant.gptq.damping={self.damping:g} is not a finite number >= 0")

    def check_quantizer(self, spec: QuantSpec) -> None:
        """Raise ValueError if these options do not go with a quantizer."""
        if self.act_order and not self.static_groups and spec.block_size:
            raise ValueError(
                "quant.gptq.act_order=true with blocks needs quant.gptq.static_groups=true: blocks of reordered "
                "columns would need an index for each column, which total_bits does not count"
            )
