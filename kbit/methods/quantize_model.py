"""Quantize a model in place by one of the methods.

A method is a generator function of a Job, in a module of this package. It yields each weight with the codes that it
makes of it, with the outlier columns at 0 (see Weight). What the codes stand for is written into the weight before the
method goes on, so a method with calibration sees it in the blocks that follow. To add a method, write the module,
describe it in kbit.methods.config.METHODS and name it in METHOD_FUNCTIONS. From outside, call register_method.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kbit.layers.int8_schemes import SCHEMES
from kbit.layers.run_time.forwards import undo_forwards
from kbit.layers.run_time.quantized_cache import CachedForward, make_cached_forwards
from kbit.layers.run_time.quantized_inputs import QuantizedInput, make_quantized_inputs
from kbit.layers.run_time.residual import FindBasis, find_bases
from kbit.methods.allocation.allocate import Allocation, allocate
from kbit.methods.awq import scale_by_activations
from kbit.methods.config import METHODS, Method, QuantConfig
from kbit.methods.gptq import quantize_by_gptq
from kbit.methods.hqq import fit_half_quadratic
from kbit.methods.llm_int8 import quantize_products
from kbit.methods.nearest import round_to_nearest, search_scales
from kbit.methods.report import (
    QuantizationReport,
    describe_low_coverage,
    describe_vain_exclude,
    plan_quantization,
)
from kbit.methods.selection.outlier_columns import choose_outliers
from kbit.methods.weight import Codes, ExpertCodes, Job, Weight
from kbit.models.inference import in_evaluation_mode
from kbit.models.parameters import check_finite, owner_of, split_matrices
from kbit.numerics.spec import QuantSpec

log = logging.getLogger(__name__)
Quantize = Callable[[Job], Iterator[tuple[Weight, Codes]]]  # what a method is: see the module's docstring

METHOD_FUNCTIONS: Final[dict[str, Quantize]] = {
    "rtn": round_to_nearest,
    "mse": search_scales,
    "hqq": fit_half_quadratic,
    "awq": scale_by_activations,
    "gptq": quantize_by_gptq,
    **dict.fromkeys(SCHEMES, quantize_products),
}


def register_method(method: Method, quantize: Quantize) -> None:
    """Make a method known under its name, for quant.method.

    Raises:
        ValueError: another method has the name.
    """
    if method.name in METHODS:
        raise ValueError(f"quant.method={method.name} is registered already")
    METHODS[method.name] = method
    METHOD_FUNCTIONS[method.name] = quantize


def quantize_model(
    model: nn.Module, quant: QuantSpec, tokenizer: PreTrainedTokenizerBase | None = None, *, keep_codes: bool = False
) -> QuantizationReport:
    """Quantize the block matrices in place: each becomes values that its quantizer can represent, in its own dtype.

    Args:
        model: any Hugging Face causal language model.
        quant: the quantizer: a QuantSpec (round to nearest, all block matrices), or a QuantConfig, which says the
            method and the tensors too. At 16 bits nothing changes and the report counts the baseline.
        tokenizer: the model's tokenizer, for methods with calibration data.
        keep_codes: whether the report holds the codes of each weight, which take memory beside the model's own. They
            are in the layout that is quantized (kbit.models.parameters.split_matrices), and those of fused experts are
            kbit.methods.weight.ExpertCodes. With quant.rotation they stand for the rotated weights.

    Raises:
        ValueError: the model is quantized already, in another way or without the codes that are asked for. A budget of
            bits cannot be kept (quant.allocation). The coverage is too low. A weight holds NaN or Inf, or is beyond
            scale_format's range. An include finds nothing. Outliers are chosen by proxy, and what comes before a weight
            is not known. The inputs of a weight's product, or the model's cache, cannot be quantized. In all these
            cases the model is unchanged. What a method finds wrong half-way (kbit.methods.calibration) leaves it
            quantized in part.
    """
    config = QuantConfig.of(quant)
    if (done := _find_earlier_report(model, config)) is not None:
        if keep_codes and not done.codes:
            raise ValueError("the model is quantized already, without its codes being kept: restore its weights first")
        return done
    asked = config
    notes: dict[str, Any] = {}
    if config.allocates:
        allocation = allocate_bits(model, config, tokenizer)
        config, notes = allocation.quant, {"allocation": allocation.notes}
    report = _plan(model, config)
    check_finite(model)
    inputs, caches = _prepare_run_time(model, report, config, notes)
    weights = find_weights(model, report, config)
    norm = sum(weight.sum_squares(weight.values) for weight in weights)
    job = Job(model, weights, config, tokenizer, notes)
    with in_evaluation_mode(model):  # calibration would see dropout
        bits, codes = _replace_weights(job, inputs, keep_codes=keep_codes) if weights else ({}, {})
    for product in inputs.values():
        product.install(product.layer)
    for cache in caches:
        cache.install(cache.trunk)
    rmse = math.sqrt(sum(weight.squared_error for weight in weights) / norm) if norm else 0.0
    report = dataclasses.replace(report.with_bits(bits), notes=job.notes, weight_rmse=rmse, codes=codes)
    if not config.is_unchanged:
        model.kbit_quantized = (asked, report)  # type: ignore[assignment]
    return report


def _plan(model: nn.Module, config: QuantConfig) -> QuantizationReport:
    """Return the plan, after a warning of an exclude that finds nothing.

    Raises:
        ValueError: its coverage is too low.
    """
    report = plan_quantization(model, config)
    if not config.is_unchanged and (warning := describe_vain_exclude(report, config.exclude)):
        log.warning(warning)
    _check_coverage(report, config)
    return report


def _check_coverage(report: QuantizationReport, config: QuantConfig) -> None:
    if not config.is_baseline and report.coverage < config.min_coverage:
        raise ValueError(describe_low_coverage(report, config.min_coverage))


def allocate_bits(model: nn.Module, quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Allocation:
    """Distribute the budget of quant.allocation over a model's tensors, and quantize nothing.

    The result has the configuration with rules in place of the allocation. quantize_model makes the same of both.

    Args:
        model, quant, tokenizer: see quantize_model.

    Raises:
        ValueError: there is no budget, or see quantize_model. The model is unchanged.
    """
    refuse_quantized(model)
    _check_coverage(plan_quantization(model, quant.without_allocation()), quant)
    check_finite(model)
    with in_evaluation_mode(model):
        return allocate(model, quant, tokenizer, plan_quantization, find_weights, run_methods)


def _prepare_run_time(
    model: nn.Module, report: QuantizationReport, config: QuantConfig, notes: dict[str, Any]
) -> tuple[dict[str, QuantizedInput], list[CachedForward]]:
    """Return the forwards that quantize inputs, by their weights' names, and those with a cache, of which notes tell.

    They are installed when the weights are quantized, so that a method with calibration data sees 16-bit inputs.
    """
    inputs: list[QuantizedInput] = []
    caches: list[CachedForward] = []
    if not config.activations.is_baseline:
        inputs = make_quantized_inputs(model, report.products, config.activations, _find_bases(model, config))
    if not config.kv_cache.is_baseline:
        caches, noted = make_cached_forwards(model, config.kv_cache)
        notes |= noted
    return {product.name: product for product in inputs}, caches


def _find_bases(model: nn.Module, config: QuantConfig) -> FindBasis:
    """Return the function from a weight to what it is turned by."""
    return find_bases(model, config.rotation, config.rotation_seed)


def _replace_weights(
    job: Job, inputs: Mapping[str, QuantizedInput], *, keep_codes: bool
) -> tuple[dict[str, int], dict[str, Codes | ExpertCodes]]:
    """Write into each weight what its codes stand for. Return each parameter's bits, and the codes to keep.

    The inputs that are quantized at run time learn what of them stays at 16 bits, and by what they are divided.
    """
    bits: Counter[str] = Counter()
    kept: dict[str, Codes | ExpertCodes] = {}
    for weight, codes in run_methods(job):
        weight.replace(codes.dequantize())
        if weight.name in inputs:
            product = inputs[weight.name]
            product.outlier_columns = weight.outlier_columns if len(weight.outlier_columns) else None
            product.input_scales = getattr(codes, "input_scales", None)
        bits[weight.name] += codes.count_bits()
        if keep_codes:
            before = kept.get(weight.name)
            others = before.experts if isinstance(before, ExpertCodes) else ()
            kept[weight.name] = codes if weight.expert is None else ExpertCodes((*others, codes))
        del codes  # before those of the next weight are made
    return bits, kept


def run_methods(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Yield each weight with its codes, which have its outlier columns.

    Methods that rules name go first, then the job's own, so that one with calibration data sees the weights of the
    rules as they will be.
    """
    own = job.quant.follow(None)
    methods = sorted({weight.method for weight in job.weights if weight.method is not None})
    for method in (*methods, None):
        weights = [weight for weight in job.weights if weight.method == method]
        quant = own if method is None else dataclasses.replace(own, method=method)
        if weights:
            for weight, codes in METHOD_FUNCTIONS[quant.method](dataclasses.replace(job, weights=weights, quant=quant)):
                columns = weight.outlier_columns
                yield weight, codes.keep_columns(columns, weight.copy_outliers()) if len(columns) else codes
                del codes  # before those of the next weight are made


def copy_weights(model: nn.Module, report: QuantizationReport) -> dict[str, torch.Tensor]:
    """Return CPU copies of the tensors that the report quantizes, to restore them between variants."""
    parameters = dict(model.named_parameters())
    names = [t.name.split(" = ")[0] for t in report.tensors if t.quantized]
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


def restore_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the copies and the modules' own forwards back, and forget that the model was quantized."""
    undo_forwards(model)
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].detach().copy_(weight)
    if hasattr(model, "kbit_quantized"):
        del model.kbit_quantized


def refuse_quantized(model: nn.Module) -> None:
    """Raise ValueError if a model is quantized already, so that it is no 16-bit model to start from."""
    if (done := getattr(model, "kbit_quantized", None)) is not None:
        raise ValueError(
            f"the model is already quantized with {done[0].identity_fields}: load it again, or restore its weights"
        )


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
    """Return the weights that the report quantizes, fused experts one by one, checked for the range of scale_format."""
    parameters, weights = dict(model.named_parameters()), []
    rules = {tensor.name.split(" = ")[0]: tensor.rule for tensor in report.tensors if tensor.quantized}
    outliers, find_basis = choose_outliers(model, list(rules), config), _find_bases(model, config)
    for name, rule in rules.items():
        parameter, quant = parameters[name].detach(), config.follow(rule)
        for number, values in enumerate(split_matrices(parameter, owner_of(model, name))):
            weight = make_weight(name, values, quant.spec, number if values.ndim < parameter.ndim else None)
            weight.method = quant.method if quant.method != config.method else None
            weight.basis = find_basis(name, values.shape[-1]) if values.ndim > 1 else None
            if name in outliers:
                weight.outlier_columns = outliers[name][number]
            weights.append(weight)
    return weights


def make_weight(name: str, values: torch.Tensor, spec: QuantSpec, expert: int | None = None) -> Weight:
    """Return a weight with random numbers of its own, checked for the range of scale_format.

    Raises:
        ValueError: a value is beyond the range. The message names the weight.
    """
    weight = Weight(name, values, spec, expert=expert)
    try:
        spec.scale_type.check_range(_find_largest(values))
    except ValueError as error:
        raise ValueError(f"{weight.label}: {error}") from error
    # weights of one model must not share their random numbers
    seed = (spec.seed + zlib.crc32(weight.label.encode())) % 2**63
    weight.spec = dataclasses.replace(spec, seed=seed)
    return weight


def _find_largest(values: torch.Tensor) -> float:
    """Return the largest magnitude, without a copy."""
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))
