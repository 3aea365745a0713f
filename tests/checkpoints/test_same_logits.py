"""Packed models compute what fake quantization computes, bit for bit: pairs of all settings over four families."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import torch

from kbit.checkpoints.loading import pack_model
from kbit.checkpoints.packing import compute_exactly
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.parameters import hash_weights

FAMILIES: Final = ("gpt_neox", "gpt2", "opt", "llama")
QUANTIZERS: Final[tuple[dict[str, Any], ...]] = (
    {"bits": 2, "data_type": "int", "scale_format": "e8m0"},
    {"bits": 3, "data_type": "nf"},
    {"bits": 3, "data_type": "dynamic", "block_size": 32},
    {"bits": 4, "data_type": "nf", "scale_format": "dq8"},
    {"bits": 4, "data_type": "float", "exponent_bits": 2, "scale_format": "fp8", "block_size": 16},
    {"bits": 4, "data_type": "int", "normalization": "minmax"},
    {"bits": 5, "data_type": "quantile", "block_size": None},
    {"bits": 5, "data_type": "learned", "block_size": 96},
    {"bits": 6, "data_type": "float", "scale_format": "bf16", "layout": "row"},
    {"bits": 7, "data_type": "int", "normalization": "signed_absmax", "scale_format": "fp32"},
    {"bits": 8, "data_type": "int", "block_size": None, "layout": "row"},
    {"bits": 4, "data_type": "nf", "centering": True},
)
SMALL: Final = CalibrationConfig(samples=2, length=32)
METHODS: Final[dict[str, dict[str, Any]]] = {
    "rtn": {},
    "mse": {"method": "mse"},
    "gptq": {"method": "gptq", "calibration": SMALL},
    "awq": {"method": "awq", "calibration": SMALL},
    "outliers": {"outlier_fraction": 0.05, "outlier_selection": "column"},
}
# Some of a layer's matrices, as each takes its time.
FEWER: Final[dict[str, Any]] = {"exclude": "k_proj|v_proj|up_proj|fc2|c_fc|dense_h_to_4h", "min_coverage": 0}
TOKENS: Final = torch.arange(40).view(2, 20)


def pair_settings() -> Iterator[tuple[str, int, str]]:
    """Cases in which each quantizer meets each method, and each family meets each quantizer and each method.

    60 quantizers with a method, and a family to each of them, so that the families go round in both directions.
    """
    for number, (method, quantizer) in enumerate(itertools.product(METHODS, range(len(QUANTIZERS)))):
        yield FAMILIES[(number + number // len(QUANTIZERS)) % len(FAMILIES)], quantizer, method


def compute(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def test_the_pairs_are_complete() -> None:
    cases = list(pair_settings())
    values = (FAMILIES, range(len(QUANTIZERS)), METHODS)
    for one, other in itertools.combinations(range(3), 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(values[one], values[other]))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_fake_quantization(family: str, build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    """Of one layer each, with 1,024 tokens for the calibration text."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    for name, number, method in pair_settings():
        if name != family:
            continue
        quant = QuantConfig(**QUANTIZERS[number], **METHODS[method], **FEWER)
        fake, packed = (build_tiny(family, vocab_size=1024, **{layers: 1}) for _ in range(2))
        report = quantize_model(fake, quant, tokenizer)
        assert pack_model(packed, quant, tokenizer) == report, quant
        compute_exactly(packed)
        expected = compute(fake)
        assert torch.equal(compute(packed), expected), quant
        packed.dequantize()
        assert hash_weights(packed) == hash_weights(fake), quant
