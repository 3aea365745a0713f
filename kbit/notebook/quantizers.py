"""Quantizers by name, and what they do to tensors: tables to look at before a model is evaluated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from kbit.data.presets import list_presets
from kbit.methods.config import QuantConfig
from kbit.methods.report import plan_quantization
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec

Quantizer = str | QuantSpec


def presets() -> dict[str, QuantConfig]:
    """Return every named quantizer of conf/quant, such as nf4, mxfp4 or nf4_dq, by its name."""
    return {name: QuantConfig.from_name(name) for name in list_presets()}


def name_quantizers(quantizers: Iterable[Quantizer]) -> dict[str, QuantConfig]:
    """Return quantizers by the names that tables give them: the name of a preset, else a label with all that tells it.

    Raises:
        ValueError: an unknown name, two quantizers of one name, or none at all.
    """
    named: dict[str, QuantConfig] = {}
    for quantizer in [quantizers] if isinstance(quantizers, str | QuantSpec) else quantizers:
        config = QuantConfig.from_name(quantizer) if isinstance(quantizer, str) else QuantConfig.of(quantizer)
        name = quantizer if isinstance(quantizer, str) else _describe(config)
        if name in named:
            raise ValueError(f"the quantizer {name} is given twice")
        named[name] = config
    if not named:
        raise ValueError("there is no quantizer to compare")
    return named


def list_matrices(model: nn.Module, quantizer: Quantizer = "default") -> pd.DataFrame:
    """Return which tensors of a model a quantizer takes, one row a tensor.

    Columns: name, shape, parameters, quantized, reason (why not), bits (of the tensor in the quantized model).
    """
    [config] = name_quantizers([quantizer]).values()
    rows = [
        {"name": tensor.name, "shape": tensor.shape, "parameters": int(np.prod(tensor.shape))}
        | {"quantized": tensor.quantized, "reason": tensor.reason, "bits": tensor.bits}
        for tensor in plan_quantization(model, config).tensors
    ]
    return pd.DataFrame(rows)


def error_table(tensor: Any, quantizers: Iterable[Quantizer]) -> pd.DataFrame:
    """Return what quantizing a tensor by round to nearest loses, one row a quantizer.

    Args:
        tensor: an array or a torch tensor of any shape.
        quantizers: names of presets, or QuantSpecs.

    Raises:
        ValueError: a quantizer has rules.

    Columns: quantizer, bits_per_param, relative_error (root mean square, in units of the tensor's), largest_error (in
    units of its largest magnitude).
    """
    values = torch.as_tensor(tensor).detach()
    exact = values.double()
    rows = []
    for name, config in name_quantizers(quantizers).items():
        if config.rules:
            raise ValueError(f"{name}: quant.rules choose a model's tensors by their names, and this is one tensor")
        if config.allocates:
            raise ValueError(f"{name}: quant.allocation is for a model's tensors, and this is one tensor")
        error = (fake_quantize(values, config.spec).double() - exact).abs()
        rows.append(
            {
                "quantizer": name,
                "bits_per_param": config.spec.count_bits(values.shape) / values.numel(),
                "relative_error": float(error.square().mean().sqrt() / exact.square().mean().sqrt()),
                "largest_error": float(error.max() / exact.abs().max()),
            }
        )
    return pd.DataFrame(rows)


def _describe(config: QuantConfig) -> str:
    """Return a short name of a quantizer that is no preset, with its block and all else that is not at its default."""
    if config.is_baseline:
        return config.label()
    method = "" if config.method == "rtn" or config.scheme is not None else f" {config.method}"
    block = "" if config.scheme is not None else f" block {config.block_size or 'whole'}"
    others = "".join(f" {name}={value}" for name, value in config.label_details.items())
    return f"{config.label()}{block}{method}{others}"
