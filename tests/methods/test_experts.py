"""Fused experts [experts, out, in] get what a model gets that has a layer for each expert."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.methods.report import plan_quantization
from kbit.methods.selection.outlier_columns import choose_outliers
from kbit.methods.weight import ExpertCodes
from kbit.numerics.quantizer import fake_quantize

Build = Callable[..., Any]
# An expert has 192 x 64 or 64 x 96 weights: blocks of 40 and 7 end inside of experts. With null an expert is a block.
SHARED: list[dict[str, Any]] = [
    {"block_size": 40},
    {"block_size": 7, "scale_format": "fp8"},
    {"block_size": None, "data_type": "nf", "method": "mse"},
    {"block_size": 64, "data_type": "quantile"},
    {"block_size": 64, "data_type": "learned", "normalization": "minmax", "method": "hqq"},
    {"block_size": 32, "data_type": "nf", "scale_format": "dq8", "centering": True},
    {"block_size": 40, "layout": "row", "outlier_fraction": 0.05, "outlier_selection": "column"},
]


class Unfused(nn.Module):
    """A layer for each expert of a model, with its weights (and, for included biases, its bias)."""

    def __init__(self, fused: nn.Module, *, transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for name, parameter in fused.named_parameters():
            if parameter.ndim == 3:
                of_experts = parameter.detach().transpose(1, 2) if transposed else parameter.detach()
                biases = dict(fused.named_parameters()).get(f"{name}_bias")
                for number, values in enumerate(of_experts):
                    layer = nn.Linear(values.shape[1], values.shape[0], bias=biases is not None)
                    layer.weight.data = values.clone().contiguous()
                    if biases is not None:
                        layer.bias.data = biases.detach()[number].clone()
                    self.layers.append(layer)


@pytest.mark.parametrize(
    ("architecture", "fields"), [("mixtral", f) for f in SHARED] + [("gpt_oss", SHARED[i]) for i in (1, 5, 6)]
)
def test_the_result_is_that_of_the_unfused_model_bit_for_bit(
    build_tiny: Build, architecture: str, fields: dict[str, Any]
) -> None:
    model = build_tiny(architecture, num_hidden_layers=1)
    experts, is_transposed = model.model.layers[0].mlp.experts, architecture == "gpt_oss"
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.01, 0.02, generator=torch.Generator().manual_seed(0))
            parameter[1] *= 1000  # no other expert may see it
    unfused = Unfused(experts, transposed=is_transposed)
    config = QuantConfig(bits=3, include="bias" if is_transposed else None, **fields)
    report = quantize_model(model, config, keep_codes=True)
    expected = quantize_model(unfused, config)
    of_experts = [tensor for tensor in report.tensors if ".experts." in tensor.name]
    assert sum(tensor.bits for tensor in of_experts) == expected.total_bits
    layers = iter(unfused.layers)
    for name, parameter in experts.named_parameters():
        codes = report.codes[f"model.layers.0.mlp.experts.{name}"]
        assert isinstance(codes, ExpertCodes)
        if parameter.ndim < 3:
            continue
        assert torch.equal(codes.dequantize(), parameter.transpose(1, 2) if is_transposed else parameter)
        for number, values in enumerate(parameter.detach()):
            layer: Any = next(layers)
            assert torch.equal(values.T if is_transposed else values, layer.weight)
            if layer.bias is not None:
                assert torch.equal(experts.get_parameter(f"{name}_bias")[number], layer.bias)


class Layers(nn.ModuleList):
    """A layer for each expert, whose weights stand where a model's code looks for the fused parameter's experts."""

    def __init__(self, fused: torch.Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed, self.device = transposed, fused.device
        for values in fused.detach():
            matrix = (values.T if transposed else values).clone().contiguous()
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            layer.weight.data = matrix
            self.append(layer)

    def __getitem__(self, expert: Any) -> Any:
        weight: Any = super().__getitem__(int(expert)).weight
        return weight.T if self.transposed else weight


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("fields", [{"method": "gptq"}, {"method": "awq"}, {"method": "gptq", "layout": "row"}])
def test_calibrated_experts_are_those_of_the_unfused_model_bit_for_bit(
    build_tiny: Build, tokenizer: Any, architecture: str, fields: dict[str, Any]
) -> None:
    """The model's own code routes tokens to layers of their own, so that each sees what its expert sees."""
    model, transposed = build_tiny(architecture, vocab_size=1024, num_hidden_layers=1), "gpt" in architecture
    model.config._experts_implementation = "eager"  # the others take the whole parameter
    unfused = copy.deepcopy(model)
    experts = unfused.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        layers = Layers(experts.get_parameter(name), transposed=transposed)
        delattr(experts, name)
        experts.add_module(name, layers)
    config = QuantConfig(
        bits=3, block_size=16, calibration=CalibrationConfig(samples=8, length=32, unseen="rtn"), **fields
    )
    quantize_model(model, config, tokenizer)
    quantize_model(unfused, config, tokenizer)
    for name in ("gate_up_proj", "down_proj"):
        fused = model.get_parameter(f"model.layers.0.mlp.experts.{name}")
        for number, values in enumerate(fused.detach()):
            assert torch.equal(values, getattr(experts, name)[number])


def test_a_large_expert_leaves_the_others_as_they_are() -> None:
    x = torch.randn(4, 64, 96, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[1] *= 1000
    for block_size in (40, 7, None):
        spec = QuantConfig(bits=4, block_size=block_size)
        results = []
        for values in (x, y):
            model = nn.Module()
            model.layers = nn.ModuleList([make_experts(values)])
            quantize_model(model, spec)
            results.append(next(model.parameters()).detach())
        assert torch.equal(results[0][[0, 2, 3]], results[1][[0, 2, 3]])
        assert torch.equal(results[0][0], fake_quantize(x[0], spec))


def make_experts(values: torch.Tensor) -> nn.Module:
    class SomeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(values.clone())

    return SomeExperts()


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("time_mix_key", (1, 1, 64), "not a matrix"),  # RWKV
        ("seg_embed", (2, 4, 16), "neither a linear layer nor fused experts"),  # XLNet
        ("input_gate_weight", (4, 16, 16), "neither a linear layer nor fused experts"),  # RecurrentGemma
    ],
)
def test_three_dimensions_do_not_make_experts(name: str, shape: tuple[int, ...], reason: str) -> None:
    model, block = nn.Module(), nn.Module()
    block.linear = nn.Linear(64, 64, bias=False)
    block.register_parameter(name, nn.Parameter(torch.ones(shape)))
    model.layers = nn.ModuleList([block])
    report = plan_quantization(model, QuantConfig(bits=4))
    tensors = {tensor.name: tensor for tensor in report.tensors}
    assert tensors["layers.0.linear.weight"].quantized
    assert reason in tensors[f"layers.0.{name}"].reason
    assert report.coverage == (1 if "not a matrix" in reason else 4096 / (4096 + torch.ones(shape).numel()))


def test_towers_and_unmerged_adapters_are_left_out_and_not_covered(caplog: pytest.LogCaptureFixture) -> None:
    def make_blocks() -> nn.ModuleList:
        return nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(64, 64, bias=False)})])

    model = nn.ModuleDict({"layers": make_blocks(), "vision_tower": nn.ModuleDict({"layers": make_blocks()})})
    model["audio_tower"] = nn.ModuleDict({"layers": make_blocks()})
    block: Any = model["layers"][0]  # type: ignore[index]
    block["lora_A"] = nn.ModuleDict({"default": nn.Linear(64, 8, bias=False)})
    report = quantize_model(model, QuantConfig(bits=4, exclude="up_proj"))
    reasons = {tensor.name: tensor.reason for tensor in report.tensors}
    assert reasons == {
        "layers.0.proj.weight": "",
        "layers.0.lora_A.default.weight": "a LoRA matrix that was not merged",
        "vision_tower.layers.0.proj.weight": "part of a vision or audio tower",
        "audio_tower.layers.0.proj.weight": "part of a vision or audio tower",
    }
    assert report.coverage == 1
    assert "quant.exclude='up_proj' finds none of the model's 4 tensors" in caplog.text
    included = plan_quantization(model, QuantConfig(bits=4, include="vision_tower"))
    assert [tensor.quantized for tensor in included.tensors] == [True, False, True, False]


def test_the_tower_of_a_real_multimodal_model_is_found_by_its_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=64)
    vision = transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        report = plan_quantization(transformers.Gemma3ForConditionalGeneration(config), QuantConfig(bits=4))
    parts = {tensor.name.split(".")[1] for tensor in report.tensors if tensor.quantized}
    assert parts == {"language_model"}
    assert report.coverage == 1


def test_each_expert_draws_by_its_own_name(build_tiny: Build) -> None:
    """The name is that of its other random numbers (Weight.label): NAME[0], NAME[1], ..."""
    model = build_tiny("mixtral", num_hidden_layers=1)
    name = "model.layers.0.mlp.experts.down_proj"
    quant = QuantConfig(outlier_fraction=0.05, outlier_selection="random", seed=7)
    drawn = choose_outliers(model, [name], quant)[name]
    inputs = model.get_parameter(name).shape[-1]
    for number, columns in enumerate(drawn):
        generator = torch.Generator().manual_seed(7 + zlib.crc32(f"{name}[{number}]".encode()))
        order = torch.sort(torch.rand(inputs, generator=generator), descending=True).indices
        assert columns.tolist() == sorted(order[: round(0.05 * inputs)].tolist())
