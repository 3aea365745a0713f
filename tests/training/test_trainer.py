"""Trainings: straight-through rounding, going on from a checkpoint, divergence, and adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kbit.methods.quantize_model import quantize_model
from kbit.methods.report import plan_quantization
from kbit.models.loading import load_model
from kbit.models.parameters import hash_weights
from kbit.nano.architectures import build_model
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.training import loop
from kbit.training.adapters import adapters_in, list_targets, save_adapters
from kbit.training.batches import split_text
from kbit.training.config import TrainConfig
from kbit.training.rounding import rounded_weights
from kbit.training.sections import LoraConfig
from kbit.training.trainer import Trained, randomize, train_model

NF3 = QuantSpec(bits=3)
STREAM = torch.randint(259, (4_000,), generator=torch.Generator().manual_seed(0))
TEXT = split_text(STREAM, batch_size=2, context=32, name="noise")

Build = Callable[..., Any]


def list_rounded(model: nn.Module) -> list[str]:
    return [tensor.name for tensor in plan_quantization(model, NF3).tensors if tensor.quantized]


def copy_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# ---- the text


def test_windows_at_the_end_are_held_back() -> None:
    assert TEXT.held.shape == (7, 32)  # a sixteenth of 125 windows
    assert torch.equal(torch.cat([TEXT.stream, TEXT.held.flatten()]), STREAM)
    assert split_text(torch.zeros(2**20, dtype=torch.int64), batch_size=1, context=256, name="x").held.shape[0] == 64


def test_a_text_shorter_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.text='noise' has 4000 tokens.*one batch of 200 windows of 32"):
        split_text(STREAM, batch_size=200, context=32, name="noise")


# ---- rounding


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "mixtral"])
def test_layers_compute_with_what_quantize_model_writes(architecture: str, build_tiny: Build) -> None:
    model, quantized = build_tiny(architecture), build_tiny(architecture)
    quantize_model(quantized, NF3)
    tokens = TEXT.held[:2]
    before, kinds = copy_values(model), [type(module) for module in model.modules()]
    with torch.no_grad(), rounded_weights(model, NF3, list_rounded(model)):
        assert torch.equal(model(tokens).logits, quantized(tokens).logits)
    assert kinds == [type(module) for module in model.modules()]
    assert {name: bool(torch.equal(value, before[name])) for name, value in model.named_parameters()} == dict.fromkeys(
        before, True
    )


def test_gradients_go_straight_through_the_rounding() -> None:
    layer = nn.Sequential(nn.Linear(64, 16, bias=False))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    down = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with rounded_weights(layer, NF3, ["0.weight"]):
        layer(x).backward(down)
    weight = layer.get_parameter("0.weight")
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, down @ fake_quantize(weight.detach(), NF3))
    torch.testing.assert_close(weight.grad, down.T @ x.detach())


def test_weights_are_back_after_an_error(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyboardInterrupt), rounded_weights(model, NF3, list_rounded(model)):
        raise KeyboardInterrupt
    assert names == [name for name, _ in model.named_parameters()]


def test_random_numbers_that_repeat_are_refused(build_tiny: Build) -> None:
    stochastic = QuantSpec(bits=3, rounding="stochastic")
    with pytest.raises(ValueError, match=r"train\.weights\.rounding"), rounded_weights(None, stochastic, []):  # type: ignore[arg-type]
        pass


# ---- going on


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_training_ends_with_the_same_weights(
    optimizer: str, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 has dropout, whose random numbers must be those of the step."""
    config = TrainConfig(steps=7, lr=1e-2, optimizer=optimizer, batch_size=2, checkpoint_every=2, weights=NF3, seed=3)
    rounded = list_rounded(build_tiny("gpt2"))

    def train(model: Any, folder: str) -> Trained:
        return train_model(model, TEXT, config, rounded=rounded, checkpoint=tmp_path / folder, content={"key": "a"})

    undisturbed, killed = build_tiny("gpt2"), build_tiny("gpt2")
    expected = train(undisturbed, "1")
    take_step = loop.take_step

    def crash(state: loop.State, *arguments: Any) -> float:
        if state.step == 5:
            raise KeyboardInterrupt
        return take_step(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train(killed, "2")
    assert torch.load(tmp_path / "2", weights_only=True)["step"] == 4
    torch.rand(5)  # the global generator does not matter
    resumed = build_tiny("gpt2")
    assert train(resumed, "2").losses == expected.losses
    assert hash_weights(resumed) == hash_weights(undisturbed) != hash_weights(build_tiny("gpt2"))
    with pytest.raises(ValueError, match=r"is the checkpoint of \{'key': 'a'\}, not of \{'key': 'b'\}"):
        train_model(resumed, TEXT, config, checkpoint=tmp_path / "2", content={"key": "b"})


# ---- how a training went


def test_what_is_told_of_losses() -> None:
    flat = Trained((2.0,) * 20 + (2.21, 2.4, 2.7), False, 0, 1, 0)
    assert flat.spikes == 2  # 2.21 is above 1.1 x 2, and 2.7 above 1.1 x 2.4
    assert flat.last == (2.7,)
    assert Trained(tuple(map(float, range(60))), False, 0, 1, 0).last == (57.0, 58.0, 59.0)
    curve = Trained(tuple(map(float, range(100))), False, 0, 1, 0).curve
    assert curve == [2 * part + 0.5 for part in range(50)]
    assert Trained((1.0, 2.0, 3.0), False, 0, 1, 0).curve == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_training_that_diverges_ends(lr: float, build_tiny: Build) -> None:
    config = TrainConfig(steps=20, lr=lr, optimizer="sgd", batch_size=2, warm_up=0, clip=None)
    trained = train_model(build_tiny("gpt_neox"), TEXT, config)
    assert trained.diverged
    assert len(trained.losses) < 20
    assert not trained.losses[-1] <= 3 * math.log(259)


def test_states_are_counted(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox")
    trained = train_model(model, TEXT, TrainConfig(steps=1, batch_size=2))
    assert trained.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert trained.state_bits == 64 * trained.trainable
    assert trained.tokens == 2 * 32


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stable_embedding": True}, "stable_embedding"),
    ],
)
def test_what_is_not_there_is_refused(fields: dict[str, Any], named: str, build_tiny: Build) -> None:
    with pytest.raises(ValueError, match=named):
        train_model(build_tiny("gpt_neox"), TEXT, TrainConfig(steps=1, batch_size=2, **fields))


def test_random_weights_are_those_of_the_nano_recipe() -> None:
    model = load_model("nano-neox-98k").model
    randomize(model, 5)
    assert hash_weights(model) == hash_weights(build_model("neox", "98k", 5))


# ---- adapters


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom"])
def test_untrained_adapters_change_no_number_and_leave_no_trace(
    architecture: str, build_tiny: Build, tmp_path: Path
) -> None:
    model = build_tiny(architecture)
    before, kinds, tokens = hash_weights(model), [type(m) for m in model.modules()], TEXT.held[:2]
    with torch.no_grad():
        logits = model(tokens).logits
        with adapters_in(model, LoraConfig(rank=2), seed=0):
            assert torch.equal(model(tokens).logits, logits)
            trained = [name for name, value in model.named_parameters() if value.requires_grad]
            assert trained
            assert all("lora_" in name for name in trained)
            save_adapters(model, tmp_path)
    assert (hash_weights(model), [type(m) for m in model.modules()]) == (before, kinds)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


def test_training_adapters_leaves_the_base_alone(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox")
    before = copy_values(model)
    config = TrainConfig(steps=3, lr=1e-2, batch_size=2, lora=LoraConfig(rank=2))
    with adapters_in(model, config.lora, seed=0):
        trained = train_model(model, TEXT, config)
        adapters = {name: value for name, value in model.named_parameters() if "lora_B" in name}
        assert all(bool(value.detach().any()) for value in adapters.values())  # they began at 0
    assert trained.trainable == sum(2 * sum(before[name].shape) for name in before if name in list_weights(model))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def list_weights(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name in list_targets(model, None)]


def test_targets_choose_layers_by_name(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox")
    assert len(list_targets(model, None)) == 8
    assert len(list_targets(model, "attention")) == 4
    with pytest.raises(ValueError, match=r"targets='q_proj'.*attention\.query_key_value.*mlp\.dense_4h_to_h"):
        list_targets(model, "q_proj")
