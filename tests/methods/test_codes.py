"""What methods return: codes that stand for the weights bit for bit, and take the bits that the formula counts."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kbit.methods.config import METHODS, CalibrationConfig, GptqConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.methods.weight import ExpertCodes
from kbit.models.parameters import as_matrix, owner_of
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.spec import QuantSpec

Build = Callable[..., Any]

SMALL = CalibrationConfig(samples=2, length=16, unseen="rtn")
# Blocks of 24 end short in rows and tensors. Every scale format, normalization and adaptive data type is there, and
# outlier columns by their share and by their deviation.
OPTIONS: list[dict[str, Any]] = [
    {"data_type": "nf", "block_size": 24, "layout": "row", "scale_format": "fp32", "outlier_fraction": 0.05},
    {"data_type": "quantile", "normalization": "minmax", "block_size": 24, "scale_format": "bf16"},
    {"data_type": "int", "normalization": "minmax", "centering": True, "scale_format": "fp8", "outlier_zscore": 1.5},
    {"data_type": "learned", "scale_format": "dq8", "normalization": "signed_absmax", "block_size": None},
    {"data_type": "float", "exponent_bits": 2, "scale_format": "e8m0", "block_size": 24, "layout": "row"},
]


def list_configs(options: Sequence[dict[str, Any]]) -> list[QuantConfig]:
    """Every method with these groups of options."""
    configs = []
    for name, method in METHODS.items():
        if method.scheme is None:
            configs += [configure(method=name, **fields) for fields in options]
        else:
            configs += [configure(bits=8, method=name, **fields) for fields in ({}, {"outlier_fraction": 0.05})]
    searched = GptqConfig(search_scales=True), GptqConfig(act_order=True, static_groups=True, search_scales=True)
    configs += [configure(method="gptq", gptq=gptq, **fields) for gptq in searched for fields in options[:2]]
    return [*configs, configure(rounding="stochastic", block_size=24, seed=1)]


def configure(**fields: Any) -> QuantConfig:
    usual: dict[str, Any] = {"bits": 3, "calibration": SMALL, "outlier_selection": "column"}
    return QuantConfig(**usual | fields)


@pytest.mark.parametrize(
    ("architecture", "fields", "options"),
    [
        ("gpt2", {"n_layer": 1, "n_embd": 32}, OPTIONS),
        ("mixtral", {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40}, OPTIONS[:2]),
        ("gpt_oss", {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40}, OPTIONS[:2]),
    ],
)
def test_codes_stand_for_the_weights_and_take_the_bits_of_the_formula(
    build_tiny: Build, tokenizer: Any, architecture: str, fields: dict[str, Any], options: list[dict[str, Any]]
) -> None:
    """Conv1D, fused experts as they are stored, and transposed ones."""
    model = build_tiny(architecture, vocab_size=1024, **fields)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for config in list_configs(options):
        if config.scheme is not None and architecture != "gpt2":
            continue  # experts are no linear layers
        restore(model, start)
        report = quantize_model(model, config, tokenizer, keep_codes=True)
        assert report.codes.keys() == {t.name.split(" = ")[0] for t in report.tensors if t.quantized}
        for tensor in report.tensors:
            if not tensor.quantized:
                continue
            name = tensor.name.split(" = ")[0]
            weight, codes = as_matrix(model.get_parameter(name), owner_of(model, name)), report.codes[name]
            assert torch.equal(codes.dequantize().to(weight.dtype), weight), (config, name)
            parts: Any = codes.experts if isinstance(codes, ExpertCodes) else (codes,)
            counts = [0 if part.outlier_columns is None else len(part.outlier_columns) for part in parts]
            shape = weight.shape[1:] if isinstance(codes, ExpertCodes) else weight.shape
            bits = sum(config.count_bits(shape, count) for count in counts)
            assert tensor.bits == codes.count_bits() == bits, (config, name)


def restore(model: nn.Module, start: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(start)
    vars(model).pop("kbit_quantized", None)
    for module in model.modules():
        vars(module).pop("forward", None)


@pytest.mark.parametrize(
    ("method", "dtype"), [("mse", torch.float16), ("awq", torch.bfloat16), ("gptq", torch.float16)]
)
def test_codes_of_16_bit_weights_are_saved_and_loaded(
    build_tiny: Build, tokenizer: Any, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"scale_format": "bf16", "outlier_fraction": 0.05, "outlier_selection": "column"}
    config = QuantConfig(bits=3, data_type="nf", block_size=16, method=method, calibration=SMALL, **fields)
    model = build_tiny("llama", vocab_size=1024, num_hidden_layers=1, hidden_size=32, intermediate_size=40).to(dtype)
    report = quantize_model(model, config, tokenizer, keep_codes=True)
    for name, codes in report.codes.items():
        assert isinstance(codes, QuantizedTensor)
        codes.save(tmp_path / "codes.safetensors")
        loaded = QuantizedTensor.load(tmp_path / "codes.safetensors")
        assert torch.equal(loaded.dequantize(), model.get_parameter(name))
        assert loaded.count_bits() == codes.count_bits()


def test_codes_are_kept_only_when_asked_and_not_missed_silently(build_tiny: Build) -> None:
    model, spec = build_tiny("gpt2"), QuantSpec(bits=4)
    assert quantize_model(model, spec).codes == {}
    with pytest.raises(ValueError, match="quantized already, without its codes being kept: restore its weights"):
        quantize_model(model, spec, keep_codes=True)


def test_quantization_takes_the_memory_of_one_weight() -> None:
    """NumPy's memory alone is traced: the kernels' codes and results. One weight's of both, and not all of them."""
    size, layers = 512, 8
    model = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))})
    spec = QuantSpec(bits=4, data_type="nf")
    quantize_model(model, spec)
    del model.kbit_quantized
    tracemalloc.start()
    quantize_model(model, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 4 * size**2  # a result with its codes and scales: 1 + 4.25 / 32; with all codes 2.06
