"""Quantize a model in place by one of the methods.

A method is a function (model, weights, quant, tokenizer) -> notes, in a module of this package. It quantizes each
weight with its kept columns at 0 (see Weight), ends with Weight.put, and returns what the record should say of it. To
add one: write the module, and name it in kbit.methods.config.METHODS and in METHOD_FUNCTIONS.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kbit.layers.int8_linear import undo_products
from kbit.methods.awq import scale_by_activations
from kbit.methods.config import INT8_METHODS, QuantConfig
from kbit.methods.gptq import quantize_by_gptq
from kbit.methods.hqq import fit_half_quadratic
from kbit.methods.llm_int8 import quantize_products
from kbit.methods.nearest import round_to_nearest, search_scales
from kbit.methods.outlier_columns import choose_kept
from kbit.methods.report import QuantizationReport, describe_low_coverage, plan_quantization
from kbit.methods.weight import Weight, sum_squares
from kbit.models.parameters import as_matrix, check_finite, owner_of
from kbit.numerics.scale_formats import check_scale_range
from kbit.numerics.spec import QuantSpec

log = logging.getLogger(__name__)


Method = Callable[[nn.Module, Sequence[Weight], QuantConfig, PreTrainedTokenizerBase | None], dict[str, Any]]


# Name in quant.method -> the function
METHOD_FUNCTIONS: Final[dict[str, Method]] = {
    "rtn": round_to_nearest,
    "mse": search_scales,
    "hqq": fit_half_quadratic,
    "awq": scale_by_activations,
    "gptq": quantize_by_gptq,
    **dict.fromkeys(INT8_METHODS, quantize_products),
}


def quantize_model(
    model: nn.Module, quant: QuantSpec, tokenizer: PreTrainedTokenizerBase | None = None
) -> QuantizationReport:
    """Quantize the block matrices in place: each becomes values that its quantizer can represent, in its own dtype.

    Args:
        model: any Hugging Face causal language model.
        quant: the quantizer: a QuantSpec (round to nearest, all block matrices), or a QuantConfig, which says the
            method and the tensors too. At 16 bits nothing changes and the report counts the baseline.
        tokenizer: of the model; for methods with calibration data.

    Raises:
        ValueError: the model is quantized already in another way; coverage too low; a weight holds NaN or Inf, or is
            beyond scale_format's range; an include that finds nothing; outliers by proxy, and what comes before a
            weight is not known. The model is unchanged then; what a method finds wrong half-way
            (kbit.methods.calibration) leaves it quantized in part.
    """
    config = QuantConfig.of(quant)
    if (done := _find_earlier_report(model, config)) is not None:
        return done
    report = plan_quantization(model, config)
    if not config.is_baseline and report.coverage < config.min_coverage:
        raise ValueError(describe_low_coverage(report, config.min_coverage))
    check_finite(model)
    weights = find_weights(model, report, config)
    if config.keeps_outliers:
        report = plan_quantization(model, config, {weight.name: len(weight.kept) for weight in weights})
    norm = sum(sum_squares(weight.values) for weight in weights)
    notes = METHOD_FUNCTIONS[config.method](model, weights, config, tokenizer) if weights else {}
    lost = sum(weight.squared_error for weight in weights)
    report = dataclasses.replace(report, notes=notes, weight_rmse=math.sqrt(lost / norm) if norm else 0.0)
    if not config.is_baseline:
        model.kbit_quantized = (config, report)  # type: ignore[assignment]
    return report


def copy_weights(model: nn.Module, report: QuantizationReport) -> dict[str, torch.Tensor]:
    """Return CPU copies of the tensors that the report quantizes, to restore them between variants."""
    parameters = dict(model.named_parameters())
    names = [t.name.split(" = ")[0] for t in report.tensors if t.quantized]
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


def restore_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the copies and the layers' own products back, and forget that the model was quantized."""
    undo_products(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    if hasattr(model, "kbit_quantized"):
        del model.kbit_quantized


def _find_earlier_report(model: nn.Module, config: QuantConfig) -> QuantizationReport | None:
    """Return the report of an earlier quantization with the same settings (and say so), None if there was none."""
    done: tuple[QuantConfig, QuantizationReport] | None = getattr(model, "kbit_quantized", None)
    if done is None:
        return None
    if done[0].identity_fields != config.identity_fields:
        raise ValueError(
            f"the model is already quantized with {done[0].identity_fields}, not {config.identity_fields}: "
            "load it again, or restore its weights"
        )
    log.warning("the model is already quantized with this spec: nothing done")
    return done[1]


def find_weights(model: nn.Module, report: QuantizationReport, config: QuantConfig) -> list[Weight]:
    """Return the weights that the report quantizes, checked for their scale format's range."""
    parameters, weights = dict(model.named_parameters()), []
    names = [tensor.name.split(" = ")[0] for tensor in report.tensors if tensor.quantized]
    kept = choose_kept(model, names, config)
    for name in names:
        values = parameters[name].detach()
        try:
            check_scale_range(float(values.abs().max()), report.spec.scale_format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        # tensors of one model must not share their random numbers
        own_seed = dataclasses.replace(report.spec, seed=(report.spec.seed + zlib.crc32(name.encode())) % 2**63)
        weight = Weight(name, as_matrix(values, owner_of(model, name)), own_seed)
        weights.append(dataclasses.replace(weight, kept=kept[name]) if name in kept else weight)
    return weights
