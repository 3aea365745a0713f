"""What is known of each method, and the groups of fields below quant, such as the text that methods calibrate on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kbit.checks import check_choice, non_defaults
from kbit.layers.int8_schemes import SCHEMES, ZERO_POINT_BITS, Scheme
from kbit.numerics.spec import BASELINE_BITS, QuantSpec

if TYPE_CHECKING:
    from kbit.methods.config import QuantConfig

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


RUN_TIME: Final = ("activations", "kv_cache")  # fields of QuantConfig: what is rounded while the model runs
ROTATIONS: Final = ("hadamard", "residual")  # see kbit.layers.run_time, rotation.py and residual.py


def check_run_time(quant: QuantConfig) -> None:
    """Raise ValueError if activations or a rotation do not go with the rest of a quantizer."""
    has_scheme = quant.scheme is not None and not quant.is_baseline
    if has_scheme and not quant.activations.is_baseline:
        raise ValueError(
            f"quant.method={quant.method} quantizes its inputs itself: quant.activations.bits={quant.activations.bits} "
            "goes with methods that leave them, such as rtn with quant=int8_rowwise"
        )
    if quant.is_baseline and not quant.activations.is_baseline and (quant.outlier_fraction or quant.outlier_zscore):
        raise ValueError(
            f"quant.bits={quant.bits} keeps no dimensions of weights apart, so that quant.activations would round the "
            "inputs of quant.outlier_*, too: set quant.outlier_fraction=0 and quant.outlier_zscore=null"
        )
    if quant.rotation is None:
        return
    check_choice("quant.rotation", quant.rotation, ROTATIONS)
    if not 0 <= quant.rotation_seed < 2**63:
        raise ValueError(f"quant.rotation_seed={quant.rotation_seed} is not in 0..2^63 - 1")
    if has_scheme:
        raise ValueError(f"quant.method={quant.method} quantizes inputs as they are: it has no quant.rotation")
    if quant.keeps_outliers:
        raise ValueError(
            f"quant.rotation={quant.rotation} mixes all inputs, so that no quant.outlier_* can stay at 16 bits"
        )


@dataclass(frozen=True)
class Method:
    """What the rest of kbit asks about a method.

    It imports nothing heavy. The function that quantizes is in kbit.methods.quantize_model.METHOD_FUNCTIONS.

    Attributes:
        name: the method's name in quant.method.
        options: field of QuantConfig with the method's own options, or None.
        needs_text: whether the method sees a calibration text.
        minimises_error: whether the method minimises an error, which rounding=stochastic would add to.
        scales_inputs: whether each matrix stores a 16-bit scale for each of its inputs.
        scheme: how the method multiplies in int8, or None. A scheme decides the quantizer.
    """

    name: str
    options: str | None = None
    needs_text: bool = False
    minimises_error: bool = False
    scales_inputs: bool = False
    scheme: Scheme | None = None

    def count_extra_bits(self, shape: Sequence[int]) -> int:
        """Return the bits of a matrix [..., out, in] beyond its codes and scales: input scales and zero points."""
        bits = BASELINE_BITS * math.prod(shape[:-2]) * shape[-1] if self.scales_inputs else 0
        if self.scheme is not None and self.scheme.zero_point:
            bits += ZERO_POINT_BITS * (math.prod(shape[:-1]) if self.scheme.weight_rows else 1)
        return bits


METHODS: Final[dict[str, Method]] = {
    method.name: method
    for method in (
        Method("rtn"),
        Method("mse", minimises_error=True),
        Method("hqq", minimises_error=True),
        Method("awq", needs_text=True, scales_inputs=True),
        Method("gptq", options="gptq", needs_text=True, minimises_error=True),
        *(Method(name, scheme=scheme) for name, scheme in SCHEMES.items()),
    )
}
