"""Which of a model's weights are quantized, which are not and why, and how many bits each takes.

By default every weight matrix inside the language model's transformer blocks is quantized, that is nn.Linear,
transformers' Conv1D (in GPT-2, blocked as the equivalent Linear) and fused 3-D expert weights, each expert by itself.
Embeddings, lm_head, norms and biases are not. Nor are the vision and audio towers of a multimodal model, and LoRA
matrices that were not merged.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kbit.checks import tabulate_html
from kbit.methods.config import QuantConfig
from kbit.methods.selection.rules import PATTERN, write_rule
from kbit.methods.weight import Codes, ExpertCodes
from kbit.models.parameters import (
    OUTSIDE,
    distinct_parameters,
    find_towers,
    is_experts,
    owner_of,
    split_matrices,
    why_outside,
)
from kbit.numerics.spec import BASELINE_BITS, QuantSpec

_AT_BASELINE: Final = "16-bit baseline"  # the reason why nothing is quantized


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor of the model, once per distinct storage.

    Attributes:
        name: the parameter's name. The names of tied parameters are joined by " = ".
        shape: the parameter's shape.
        in_block: whether it is a weight matrix (2-D or more) inside a transformer block of the language model.
        quantized: whether it was quantized.
        reason: the reason why it was not, empty if it was.
        bits: bits that the tensor takes in the quantized model.
        rule: the number of the rule that applies to it (quant.rules), which can leave it at 16 bits. None is no rule.
    """

    name: str
    shape: tuple[int, ...]
    in_block: bool
    quantized: bool
    reason: str
    bits: int
    rule: int | None = None


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
    codes: dict[str, Codes | ExpertCodes] = field(default_factory=dict, compare=False, repr=False)

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

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        rows: dict[str, object] = {"quantizer": self.spec.label(), "bits per parameter": f"{self.bits_per_param:.4g}"}
        rows |= {"total bits": f"{self.total_bits:,}", "coverage": f"{self.coverage:.1%}"}
        rows |= {"relative error of the weights": f"{self.weight_rmse:.4g}"} if self.weight_rmse is not None else {}
        rows |= {"tensors quantized": f"{sum(t.quantized for t in self.tensors)} of {len(self.tensors)}"}
        return tabulate_html(rows)

    def with_bits(self, bits: Mapping[str, int]) -> QuantizationReport:
        """Return the report with the bits of these tensors, by the first of each tensor's names."""
        tensors = (dataclasses.replace(t, bits=bits.get(t.name.split(" = ")[0], t.bits)) for t in self.tensors)
        return dataclasses.replace(self, tensors=tuple(tensors))

    @property
    def products(self) -> list[str]:
        """The first name of each tensor that is quantized, or that would be if the weights were not at 16 bits."""
        return [t.name.split(" = ")[0] for t in self.tensors if t.quantized or t.reason == _AT_BASELINE]

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
        ValueError: an include that finds nothing, a rule that applies to no tensor, or a budget (quant.allocation), of
            which the weights and a text tell what each tensor gets (kbit.allocate_bits).
    """
    config, towers = QuantConfig.of(quant), find_towers(model)
    if config.allocates:
        raise ValueError("quant.allocation: only kbit.allocate_bits tells what each tensor gets of the budget")
    tensors = [
        _plan_tensor(names, parameter, owner_of(model, names[0]), config, towers)
        for names, parameter in distinct_parameters(model)
    ]
    if config.include is not None and not _names_any(config.include, tensors):
        raise ValueError(f"quant.include={config.include!r} finds none of the model's tensors")
    _check_rules(config, tensors)
    return QuantizationReport(config.spec, tuple(tensors))


def _check_rules(config: QuantConfig, tensors: Sequence[TensorReport]) -> None:
    """Raise ValueError if a rule applies to no tensor that could be quantized."""
    applied = {tensor.rule for tensor in tensors}
    for number, rule in enumerate(config.rules):
        if number not in applied:
            found = _names_any(rule[PATTERN], tensors)
            why = "finds only tensors that are not quantized, or that an earlier rule takes" if found else "finds none"
            raise ValueError(
                f"quant.rules[{number}] ({write_rule(rule)}) applies to none of the model's tensors: its match {why}"
            )


def describe_vain_exclude(report: QuantizationReport, exclude: str | None) -> str:
    """Return the warning of an exclude that finds nothing, empty if it finds something or there is none."""
    if exclude is None or _names_any(exclude, report.tensors):
        return ""
    return f"quant.exclude={exclude!r} finds none of the model's {len(report.tensors)} tensors, and leaves nothing out"


def _names_any(pattern: str, tensors: Sequence[TensorReport]) -> bool:
    return any(re.search(pattern, name) for tensor in tensors for name in tensor.name.split(" = "))


def _plan_tensor(
    names: list[str], parameter: nn.Parameter, owner: nn.Module, config: QuantConfig, towers: Sequence[str]
) -> TensorReport:
    is_baseline, outside = config.spec.is_baseline, why_outside(names[0], towers)
    matrices = split_matrices(parameter, owner)
    is_matrix = _is_matrix(matrices[0])
    rule = config.find_rule(names)
    reason = _why_not(
        names, owner, config, outside, is_matrix=is_matrix, is_plain=parameter.ndim == 2, by_rule=rule is not None
    )
    applied = None if reason else rule
    config = config.follow(applied)
    if config.spec.is_baseline and not is_baseline:
        reason = "16 bits by a rule"
    quantized = not reason and not is_baseline
    bits = BASELINE_BITS * parameter.numel()
    if quantized:  # a vector has no input dimensions that could stay at 16 bits
        bits = sum(config.count_bits(matrix.shape, 0 if matrix.ndim < 2 else None) for matrix in matrices)
    in_block = not outside and is_matrix and not isinstance(owner, nn.Embedding)
    reason = _AT_BASELINE if is_baseline and not reason else reason
    return TensorReport(" = ".join(names), tuple(parameter.shape), in_block, quantized, reason, bits, applied)


def _why_not(
    names: list[str],
    owner: nn.Module,
    config: QuantConfig,
    outside: str,
    *,
    is_matrix: bool,
    is_plain: bool,
    by_rule: bool,
) -> str:
    """Return why a tensor is not quantized, or an empty string if it is."""
    if config.exclude is not None and any(re.search(config.exclude, name) for name in names):
        return f"excluded by {config.exclude!r}"
    if config.include is not None and any(re.search(config.include, name) for name in names):
        return ""
    if outside == OUTSIDE and by_rule and is_plain and isinstance(owner, nn.Linear | nn.Embedding):
        return ""
    if outside:
        return outside
    if not is_matrix:
        return "not a matrix (bias or norm)"
    if (is_plain and isinstance(owner, nn.Linear | Conv1D)) or (not is_plain and is_experts(owner)):
        return ""
    return f"matrix of {type(owner).__name__}, which is neither a linear layer nor fused experts"


def _is_matrix(values: torch.Tensor) -> bool:
    """Whether a tensor is no vector. More than two dimensions of which all but one have size 1 are a vector."""
    return values.ndim == 2 or sum(size > 1 for size in values.shape) > 1


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
