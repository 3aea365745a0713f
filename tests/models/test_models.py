"""Which weights are quantized, how their bits are counted, and what quantizing refuses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.methods.report import QuantizationReport, TensorReport, plan_quantization
from kbit.models.parameters import hash_weights
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec

Build = Callable[..., Any]

NF4 = QuantSpec(bits=4, data_type="nf", block_size=64)
configure = functools.partial(QuantConfig, bits=4, data_type="nf", block_size=64)
DENSE = ["gpt_neox", "gpt2", "opt", "bloom", "llama"]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def quantized_names(report: QuantizationReport) -> list[str]:
    return [tensor.name for tensor in report.tensors if tensor.quantized]


def report_of(report: QuantizationReport, part: str) -> TensorReport:
    return next(tensor for tensor in report.tensors if part in tensor.name)


# ---- which tensors


@pytest.mark.parametrize("architecture", DENSE)
def test_every_matrix_of_the_blocks_is_quantized_and_nothing_else(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or ".h." in name)}
    before = snapshot(model)
    report = quantize_model(model, NF4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert set(quantized_names(report)) == matrices == changed
    assert len(matrices) in {8, 12, 14}  # two layers of 4 (fused q, k, v), 6 (OPT) or 7 (Llama) matrices
    assert report.coverage == 1.0


@pytest.mark.parametrize("architecture", ["gpt_neox", "opt", "bloom", "llama"])
def test_a_linear_weight_becomes_its_fake_quantized_self(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    before = snapshot(model)
    for name in quantized_names(quantize_model(model, NF4)):
        assert torch.equal(model.get_parameter(name), fake_quantize(before[name], NF4))


def test_conv1d_is_blocked_as_the_equivalent_linear(build_tiny: Build) -> None:
    model = build_tiny("gpt2")
    before = snapshot(model)
    for name in quantized_names(quantize_model(model, NF4)):
        linear_weight = before[name].t().contiguous()  # [out, in]
        assert torch.equal(model.get_parameter(name).t(), fake_quantize(linear_weight, NF4))
        assert not torch.equal(model.get_parameter(name), fake_quantize(before[name], NF4))


def test_fused_experts_are_quantized(build_tiny: Build) -> None:
    model = build_tiny("mixtral")
    before = snapshot(model)
    report = quantize_model(model, NF4)
    for name in ("gate_up_proj", "down_proj"):
        full_name = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(model.get_parameter(full_name), fake_quantize(before[full_name], NF4))
    assert (
        report.quantized_parameters >= 0.69 * report.parameters
    )  # the experts' share, which a walk over Linear misses
    assert 0.99 < report.coverage < 1  # all but the routers


def test_a_router_is_left_alone_and_reported(build_tiny: Build) -> None:
    router = report_of(quantize_model(build_tiny("mixtral"), NF4), "layers.0.mlp.gate.weight")
    assert router.in_block
    assert not router.quantized
    assert "MixtralTopKRouter" in router.reason


def test_exclude_wins_over_include(build_tiny: Build) -> None:
    model = build_tiny("llama")
    report = quantize_model(model, configure(include="lm_head|down_proj", exclude="down_proj", min_coverage=0.5))
    assert "lm_head.weight" in quantized_names(report)
    assert not any("down_proj" in name for name in quantized_names(report))
    assert "down_proj" in report_of(report, "down_proj").reason


def test_an_include_that_finds_nothing_is_an_error(build_tiny: Build) -> None:
    with pytest.raises(ValueError, match="no_such_tensor"):
        quantize_model(build_tiny("llama"), configure(include="no_such_tensor"))


def test_low_coverage_names_what_was_skipped(build_tiny: Build) -> None:
    model = build_tiny("opt")
    before = hash_weights(model)
    with pytest.raises(ValueError, match=r"33\.3%.*min_coverage=0\.9.*layers\.0\.fc1\.weight \[256, 64\]"):
        quantize_model(model, configure(exclude=r"\.fc[12]\."))  # fc1 and fc2 hold 2/3 of a block's parameters
    assert hash_weights(model) == before


def test_low_coverage_can_be_allowed(build_tiny: Build) -> None:
    report = quantize_model(build_tiny("opt"), configure(exclude=r"\.fc[12]\.", min_coverage=0.3))
    assert report.coverage == pytest.approx(1 / 3)


def test_layers_that_are_not_understood_are_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

    model = nn.Module()
    model.layers = nn.ModuleList([Odd()])
    wrapped = nn.Module()
    wrapped.model = model
    with pytest.raises(ValueError, match=r"model\.layers\.0\.weight \[8, 8\]: matrix of Odd"):
        quantize_model(wrapped, NF4)


# ---- tied tensors


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom"])
def test_a_tied_head_is_counted_once_and_not_quantized(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    report = quantize_model(model, NF4)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    head = report_of(report, "lm_head.weight")
    assert " = " in head.name
    assert not head.quantized
    assert head.bits == 16 * 259 * 64


@pytest.mark.parametrize("include", ["lm_head", r"^lm_head\.weight$", r"embed_tokens\.weight$"])
def test_a_tied_head_is_included_by_either_name_and_stays_tied(build_tiny: Build, include: str) -> None:
    model = build_tiny("llama", tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    report = quantize_model(model, configure(include=include))
    assert torch.equal(model.lm_head.weight, fake_quantize(before, NF4))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report_of(report, "lm_head").bits == NF4.count_bits((259, 64))


# ---- bits


def test_total_bits_equal_the_count_by_hand(build_tiny: Build) -> None:
    report = quantize_model(build_tiny("gpt2"), NF4)
    # A block has 64x192 + 64x64 + 64x256 + 256x64 = 49,152 weights in matrices, 768 blocks of 64 with a scale each,
    # and 192 + 64 + 256 + 64 biases and 4x64 norm parameters = 832. Outside: 259x64 + 256x64 embeddings, 2x64 norm.
    quantized = 2 * (49_152 * 4 + 768 * 16)
    rest = 16 * (2 * 832 + 259 * 64 + 256 * 64 + 2 * 64)
    assert report.total_bits == quantized + rest
    assert report.bits_per_param == 4.25  # 4 + 16/64
    assert report.quantized_parameters == 2 * 49_152


def test_the_baseline_changes_nothing_and_counts_16_bits(build_tiny: Build) -> None:
    model = build_tiny("gpt2")
    before = hash_weights(model)
    report = quantize_model(model, QuantSpec(bits=16))
    assert hash_weights(model) == before
    assert report.total_bits == 16 * report.parameters
    assert report.bits_per_param == 16
    assert quantized_names(report) == []
    assert report_of(report, "c_attn.weight").reason == "16-bit baseline"


def test_the_plan_of_a_meta_model_is_the_report_of_the_real_one(build_tiny: Build) -> None:
    with torch.device("meta"):
        meta = build_tiny("llama")
    assert plan_quantization(meta, NF4) == quantize_model(build_tiny("llama"), NF4)


# ---- quantizing again, restoring


def test_quantizing_twice_changes_nothing_and_says_so(build_tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = build_tiny("llama")
    report = quantize_model(model, NF4)
    once = hash_weights(model)
    with caplog.at_level(logging.WARNING, logger="kbit.models.loading"):
        assert quantize_model(model, NF4) == report
    assert hash_weights(model) == once
    assert "already quantized" in caplog.text


def test_quantizing_with_another_spec_is_refused(build_tiny: Build) -> None:
    model = build_tiny("llama")
    quantize_model(model, NF4)
    once = hash_weights(model)
    with pytest.raises(ValueError, match=r"already quantized with {'data_type': 'nf', 'bits': 4"):
        quantize_model(model, QuantSpec(bits=3, data_type="int"))
    assert hash_weights(model) == once


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_restored_weights_are_the_original_bit_for_bit(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    before = hash_weights(model)
    copies = copy_weights(model, plan_quantization(model, NF4))
    quantize_model(model, NF4)
    assert hash_weights(model) != before
    restore_weights(model, copies)
    assert hash_weights(model) == before
    quantize_model(model, QuantSpec(bits=3, data_type="int"))  # not refused: it is unquantized again


# ---- values that cannot be quantized


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_before_any_change(build_tiny: Build, bad: float) -> None:
    model = build_tiny("opt")
    name = "model.decoder.layers.1.fc2.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5:7] = bad
    before = hash_weights(model)
    with pytest.raises(ValueError, match=rf"{name} \(2 of 16384 values\)"):
        quantize_model(model, NF4)
    assert hash_weights(model) == before


def test_the_message_counts_further_bad_tensors(build_tiny: Build) -> None:
    model = build_tiny("opt")
    with torch.no_grad():
        model.get_parameter("model.decoder.layers.0.fc1.weight")[0, 0] = float("nan")
        model.get_parameter("model.decoder.layers.1.fc1.bias")[0] = float("inf")
    with pytest.raises(ValueError, match="and 1 more tensors"):
        quantize_model(model, NF4)


def test_a_block_beyond_the_scale_format_is_refused_and_named(build_tiny: Build) -> None:
    model = build_tiny("opt")
    name = "model.decoder.layers.1.fc2.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 1e5
    before = hash_weights(model)
    with pytest.raises(ValueError, match=rf"{name}: .*65504"):
        quantize_model(model, NF4)
    assert hash_weights(model) == before


def test_meta_tensors_are_refused(build_tiny: Build) -> None:
    model = build_tiny("llama").to("meta")
    with pytest.raises(ValueError, match="is a meta tensor"):
        quantize_model(model, NF4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_quantized_in_float32_and_keep_their_dtype(build_tiny: Build, dtype: torch.dtype) -> None:
    model = build_tiny("llama").to(dtype)
    before = snapshot(model)
    for name in quantized_names(quantize_model(model, NF4)):
        assert model.get_parameter(name).dtype == dtype
        assert torch.equal(model.get_parameter(name), fake_quantize(before[name].float(), NF4).to(dtype))


def test_weights_stored_as_in_out_are_blocked_along_the_input() -> None:
    experts = torch.nn.Module()
    experts.is_transposed = True  # type: ignore[assignment]
    experts.gate_up_proj = torch.nn.Parameter(torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0)))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([experts])
    before = experts.gate_up_proj.detach().clone()
    quantize_model(model, NF4)
    expected = fake_quantize(before.transpose(-1, -2), NF4).transpose(-1, -2)
    assert torch.equal(experts.gate_up_proj.detach(), expected)


def test_a_convolution_is_not_taken_for_experts() -> None:
    model = torch.nn.Module()
    block = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(8, 8, 4), "linear": torch.nn.Linear(64, 64)})
    model.layers = torch.nn.ModuleList([block])
    report = quantize_model(model, NF4)
    reasons = {t.name: t.reason for t in report.tensors}
    assert "matrix of Conv1d" in reasons["layers.0.conv.weight"]
    assert reasons["layers.0.linear.weight"] == ""


def test_quantizing_again_with_another_selection_is_refused(build_tiny: Build) -> None:
    model = build_tiny("llama")
    quantize_model(model, NF4)
    with pytest.raises(ValueError, match="already quantized"):
        quantize_model(model, configure(include="lm_head"))


def test_a_scalar_parameter_is_hashed() -> None:
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.tensor(2.0))
    assert hash_weights(model) != hash_weights(torch.nn.Module())
