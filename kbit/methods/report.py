"""Which of a model's weights are quantized, which are not and why, and how many bits each takes.

By default every weight matrix inside the transformer blocks is quantized, that is nn.Linear, transformers' Conv1D (in
GPT-2, blocked as the equivalent Linear) and fused 3-D expert weights. Embeddings, lm_head, norms and biases are not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from kbit.methods.config import QuantConfig
from kbit.methods.weight import Codes
from kbit.models.parameters import as_matrix, distinct_parameters, owner_of
from kbit.numerics.spec import BASELINE_BITS, QuantSpec


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor of the model, once per distinct storage.

    Attributes:
        name: the parameter's name. The names of tied parameters are joined by " = ".
        shape: the parameter's shape.
        in_block: whether it is a weight matrix (2-D or more) inside a transformer block.
        quantized: whether it was quantized.
        reason: the reason why it was not, empty if it was.
        bits: bits that the tensor takes in the quantized model.
    """

    name: str
    shape: tuple[int, ...]
    in_block: bool
    quantized: bool
    reason: str
    bits: int


@dataclass(frozen=True)
class QuantizationReport:
    """Coverage and bit accounting of a quantized model (or of the baseline: nothing quantized, 16 bits each).

    Attributes:
        spec: the quantizer.
        tensors: every distinct tensor of the model.
        notes: the method's own record, such as the hash of its calibration data, with values fit for JSON.
        weight_rmse: relative error of all quantized weights together, sqrt(sum (w - w')^2 / sum w^2). It is 0 where
            nothing is quantized, and None for a plan.
        codes: the codes of each quantized tensor by its parameter's name, if quantize_model was asked to keep them.
    """

    spec: QuantSpec
    tensors: tuple[TensorReport, ...]
    notes: dict[str, Any] = field(default_factory=dict, compare=False)  # a plan is equal to the report of its execution
    weight_rmse: float | None = field(default=None, compare=False)
    codes: dict[str, Codes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return sum(_elements(t) for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Parameters in quantized tensors."""
        return sum(_elements(t) for t in self.tensors if t.quantized)

    @property
    def total_bits(self) -> int:
        """Bits of the whole model: quantized tensors with their scales and codebooks, everything else at 16."""
        return sum(t.bits for t in self.tensors)

    @property
    def bits_per_param(self) -> float:
        """Bits per quantized parameter, scales and codebooks included, or 16 where nothing is quantized."""
        quantized_bits = sum(t.bits for t in self.tensors if t.quantized)
        return quantized_bits / self.quantized_parameters if self.quantized_parameters else float(BASELINE_BITS)

    def with_bits(self, bits: Mapping[str, int]) -> QuantizationReport:
        """Return the report with the bits of these tensors, by the first of each tensor's names."""
        tensors = (dataclasses.replace(t, bits=bits.get(t.name.split(" = ")[0], t.bits)) for t in self.tensors)
        return dataclasses.replace(self, tensors=tuple(tensors))

    @property
    def coverage(self) -> float:
        """Share of the block matrices' parameters that is quantized, 0 for the baseline."""
        in_blocks = sum(_elements(t) for t in self.tensors if t.in_block)
        covered = sum(_elements(t) for t in self.tensors if t.in_block and t.quantized)
        return covered / in_blocks if in_blocks else 0.0


def plan_quantization(model: nn.Module, quant: QuantSpec) -> QuantizationReport:
    """Return the report that quantize_model would return, without touching the model (meta tensors will do).

    Bits are those of the formula (QuantConfig.count_bits). quantize_model counts what the codes hold, which is the same
    but for outlier_zscore: only the weights' values tell how many dimensions it keeps, so here it keeps none.

    Args:
        model: see quantize_model.
        quant: see quantize_model.

    Raises:
        ValueError: an include that finds nothing.
    """
    config = QuantConfig.of(quant)
    spec, include, exclude = config.spec, config.include, config.exclude
    tensors = []
    for names, parameter in distinct_parameters(model):
        owner = owner_of(model, names[0])
        in_block = _is_in_block(names[0]) and parameter.ndim >= 2 and not isinstance(owner, nn.Embedding)
        reason = _why_not(names, parameter, owner, include, exclude)
        quantized = not reason and not spec.is_baseline
        outliers = 0 if parameter.ndim < 2 else None  # a vector has no input dimensions that could stay at 16 bits
        blocked = as_matrix(parameter, owner).shape
        bits = config.count_bits(blocked, outliers) if quantized else BASELINE_BITS * parameter.numel()
        reason = "16-bit baseline" if spec.is_baseline and not reason else reason
        tensors.append(TensorReport(" = ".join(names), tuple(parameter.shape), in_block, quantized, reason, bits))
    if include is not None and not any(re.search(include, n) for t in tensors for n in t.name.split(" = ")):
        raise ValueError(f"quant.include={include!r} finds none of the model's tensors")
    return QuantizationReport(spec, tuple(tensors))


def _why_not(
    names: list[str], parameter: nn.Parameter, owner: nn.Module, include: str | None, exclude: str | None
) -> str:
    """Return why a tensor is not quantized, or an empty string if it is."""
    if exclude is not None and any(re.search(exclude, name) for name in names):
        return f"excluded by {exclude!r}"
    if include is not None and any(re.search(include, name) for name in names):
        return ""
    if not _is_in_block(names[0]):
        return "outside the transformer blocks"
    if parameter.ndim < 2:
        return "not a matrix (bias or norm)"
    is_convolution = isinstance(owner, _ConvNd)
    if isinstance(owner, nn.Linear | Conv1D) or (parameter.ndim == 3 and not is_convolution):  # 3-D: fused experts
        return ""
    return f"matrix of {type(owner).__name__}, which is neither a linear layer nor fused experts"


def _is_in_block(name: str) -> bool:
    """Whether a parameter belongs to a transformer block: a numbered member of a list such as layers or h."""
    return re.search(r"\.\d+\.", name) is not None


def describe_low_coverage(report: QuantizationReport, min_coverage: float) -> str:
    """Return the error of a model of which too little would be quantized."""
    skipped = [t for t in report.tensors if t.in_block and not t.quantized]
    examples = "; ".join(f"{t.name} {list(t.shape)}: {t.reason}" for t in skipped[:3])
    return (
        f"only {report.coverage:.1%} of the block matrices' parameters would be quantized, "
        f"quant.min_coverage={min_coverage:g}; "
        + (f"skipped {len(skipped)} tensors, such as {examples}" if skipped else "there are no matrices in blocks")
    )


def _elements(tensor: TensorReport) -> int:
    return int(torch.Size(tensor.shape).numel())
