"""Trainings whose products or exchange are quantized: going on from a checkpoint, divergence, and what is counted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.models.parameters import hash_weights
from kbit.numerics.spec import QuantSpec
from kbit.training import loop
from kbit.training.batches import split_text
from kbit.training.config import FastConfig, TrainConfig
from kbit.training.products.fast import block_float
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
    assert all("forward" not in vars(module) for module in resumed.modules())


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
