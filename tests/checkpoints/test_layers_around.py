"""Packed layers within what others build: mixtures of experts, adapters of peft, models on given devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import kbit
from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.loading import pack_model
from kbit.checkpoints.packing import compute_exactly, list_packed
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.parameters import hash_weights

Build = Callable[..., Any]
TOKENS = torch.arange(40).view(2, 20)


def compute(model: Any) -> torch.Tensor:
    compute_exactly(model)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def build_experts(architecture: str, build_tiny: Build) -> Any:
    """A tiny mixture of experts. Qwen's has a router with a gate, a shared expert, and experts of their own size."""
    if architecture == "mixtral":
        return build_tiny("mixtral", num_hidden_layers=1)
    config = transformers.Qwen2MoeConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("alone", [True, False], ids=["experts alone", "all layers"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_experts_are_packed_alone_and_with_the_others(
    architecture: str, alone: bool, tmp_path: Path, build_tiny: Build
) -> None:
    exclude = r"self_attn|shared_expert|gate\." if alone else None
    quant = QuantConfig(bits=4, block_size=32, exclude=exclude, min_coverage=0)
    fake, packed = (build_experts(architecture, build_tiny) for _ in range(2))
    packed.save_pretrained(tmp_path / "plain")
    fake.config._experts_implementation = "eager"
    quantize_model(fake, quant)
    expected = compute(fake)
    pack_model(packed, quant)
    assert torch.equal(compute(packed), expected)
    assert all(".experts." in name for name in list_packed(packed)) == alone
    assert sum(".experts." in name for name in list_packed(packed)) == 2 * 4  # two matrices of four experts
    packed.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(compute(again), expected)
    again.dequantize()
    assert hash_weights(again) == hash_weights(fake)
    assert torch.equal(compute(load(tmp_path / "plain", quantization_config=KbitConfig.of(quant))), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_model_is_put_on_the_devices_that_are_asked_for(device_map: Any, tmp_path: Path, build_tiny: Build) -> None:
    plain = build_tiny("llama", num_hidden_layers=1)
    plain.save_pretrained(tmp_path / "plain")
    fake = copy.deepcopy(plain)
    quantize_model(fake, QuantConfig(bits=4))
    asked = load(tmp_path / "plain", quantization_config=KbitConfig(bits=4), device_map=device_map)
    assert torch.equal(compute(asked), compute(fake))
    asked.save_pretrained(tmp_path / "packed")
    assert torch.equal(compute(load(tmp_path / "packed", device_map=device_map)), compute(fake))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning", "ignore::FutureWarning")  # of peft
def test_adapters_learn_beside_packed_layers(build_tiny: Build) -> None:
    """The loss, and the gradients of each adapter, are those beside layers with the dequantized weights."""
    peft = pytest.importorskip("peft", reason="needs peft")
    plain, found = build_tiny("llama", num_hidden_layers=1), {}
    for name, change in (("fake", quantize_model), ("packed", pack_model)):
        model = copy.deepcopy(plain)
        change(model, QuantConfig(bits=4))
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, kbit.adapt_packed_layers(config)).train()
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in gradients)
        found[name] = (loss.detach(), gradients)
    (loss, gradients), (expected, of_fake) = found["packed"], found["fake"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_fake[name], rtol=0, atol=1e-5 * float(of_fake[name].abs().max()))
    with pytest.raises(ValueError, match=r"cannot be merged into packed codes: model\.dequantize\(\) first"):
        adapted.merge_adapter()


def test_without_being_told_peft_refuses_packed_layers(build_tiny: Build) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = build_tiny("llama", num_hidden_layers=1)
    pack_model(model, QuantConfig(bits=4))
    with pytest.raises(ValueError, match=r"QuantizedLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
