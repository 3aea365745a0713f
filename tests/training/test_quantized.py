"""Trainings whose products or exchange are quantized: going on from a checkpoint, divergence, and what is counted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kbit.models.parameters import hash_weights
from kbit.nano.architectures import build_model
from kbit.numerics.spec import QuantSpec
from kbit.training import loop
from kbit.training.batches import split_text
from kbit.training.config import TrainConfig
from kbit.training.exchange.pipeline import find_stage_ends
from kbit.training.products.fast import block_float
from kbit.training.sections import FastConfig
from kbit.training.trainer import Trained, train_model

STREAM = torch.randint(259, (4_000,), generator=torch.Generator().manual_seed(0))
TEXT = split_text(STREAM, batch_size=2, context=32, name="noise")
STOCHASTIC = block_float(2, rounding="stochastic")
EXCHANGE = QuantSpec(bits=4, data_type="dynamic", block_size=256, scale_format="fp32", rounding="stochastic")
TRAININGS: dict[str, dict[str, Any]] = {
    "fast": {"fast": FastConfig(adapt=True)},
    "both": {
        "weights": block_float(2), "activations": STOCHASTIC, "gradients": STOCHASTIC, "replicas": 2,
        "exchange": EXCHANGE, "error_feedback": True, "exchange_form": "two_shot",
    },
    "stages": {"stages": 2, "stage_activations": EXCHANGE, "stage_gradients": EXCHANGE},
    "all": {
        "stages": 2, "stage_gradients": EXCHANGE, "gradients": STOCHASTIC, "replicas": 2, "exchange": EXCHANGE,
    },
}  # fmt: skip

Build = Callable[..., Any]


def make_config(**fields: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 7, "lr": 1e-2, "batch_size": 2, "checkpoint_every": 2} | fields))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_killed_training_ends_with_the_same_weights_and_counts(
    name: str, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers of the rounding are those of the step. Residuals and counts go on."""
    config = make_config(**TRAININGS[name])

    def train(model: Any, file: str) -> Trained:
        return train_model(model, TEXT, config, checkpoint=tmp_path / file)

    undisturbed, resumed = build_tiny("gpt_neox"), build_tiny("gpt_neox")
    expected = train(undisturbed, "1")
    take_step, calls = loop.take_step, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", lambda *given: take_step(*given) if next(calls) < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(build_tiny("gpt_neox"), "2")
    assert train(resumed, "2") == expected
    assert hash_weights(resumed) == hash_weights(undisturbed)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in resumed.modules())


def test_stages_send_bytes_of_each_token(build_tiny: Build) -> None:
    """The tiny model has 64 values for each token between its layers, in blocks of 256 that have 4 bytes of scales."""
    sent = {"stage_activations": 1 / 2 + 4 / 256, "stage_gradients": 4.0}  # the gradients are float32
    trained = train_model(build_tiny("gpt_neox"), TEXT, make_config(stages=2, stage_activations=EXCHANGE))
    assert trained.numbers == {"stage_bytes_per_token": pytest.approx(64 * sum(sent.values()), rel=1e-3)}
    exact = train_model(build_tiny("gpt_neox"), TEXT, make_config())
    assert exact.losses[0] != trained.losses[0] == pytest.approx(exact.losses[0], rel=0.1)


def test_stages_end_with_layers(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox")
    assert find_stage_ends(model, 2) == ["gpt_neox.layers.0"]
    assert find_stage_ends(model, 1) == []
    with pytest.raises(ValueError, match=r"train.stages=3 is more than the 2 decoder layers"):
        find_stage_ends(model, 3)
    assert find_stage_ends(build_model("gpt2", "1m", 0), 3) == ["transformer.h.0", "transformer.h.1"]  # of four


def test_stages_are_not_of_a_vision_tower() -> None:
    """Text and vision have as many layers here, and the vision tower comes first."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    sizes["num_attention_heads"] = 2
    text = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=64)
    vision = transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    assert find_stage_ends(model, 2) == ["model.language_model.layers.1"]


def test_a_training_that_diverges_is_no_error(build_tiny: Build) -> None:
    """Quantizers refuse NaN and Inf, which in a training are its end."""
    config = make_config(steps=20, lr=1e30, optimizer="sgd", warm_up=0, clip=None, **TRAININGS["both"])
    trained = train_model(build_tiny("gpt_neox"), TEXT, config)
    assert trained.diverged
    assert len(trained.losses) < 20


def test_replicas_in_float32_train_as_one(build_tiny: Build) -> None:
    """The mean of two halves' gradients is the batch's, but for the order of sums."""
    losses = [train_model(build_tiny("gpt_neox"), TEXT, make_config(replicas=n)).losses for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_layers_are_chosen_by_include(build_tiny: Build) -> None:
    config = make_config(steps=1, include="attention", **{"gradients": STOCHASTIC})
    trained = train_model(build_tiny("gpt_neox"), TEXT, config)
    # the forward product is of 16 bits, which are 8 chunks, and m = 2 has 1: 64, 8 and 8 passes
    assert trained.numbers == {"passes_per_mac": pytest.approx(80 / 3)}
    with pytest.raises(ValueError, match="include='nothing' and exclude=None leave no linear layer"):
        train_model(build_tiny("gpt_neox"), TEXT, dataclasses.replace(config, include="nothing"))


def test_choices_have_a_share_for_each_layer_and_period(build_tiny: Build) -> None:
    trained = train_model(build_tiny("gpt_neox"), TEXT, make_config(**TRAININGS["fast"]))
    assert set(trained.curves) == {"high_share/weights", "high_share/activations", "high_share/gradients"}
    assert {len(shares) for shares in trained.curves.values()} == {8 * 7}  # fewer steps than periods
