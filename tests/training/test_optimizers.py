"""The optimizer that a training's configuration asks for, and trainings with states of few bits by the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.models.parameters import hash_weights
from kbit.numerics.spec import QuantSpec
from kbit.optim import SGD, Adam, AdamW, Lion, StableEmbedding, embedding_stable
from kbit.optim.states import read_states
from kbit.store.readers import read_results
from kbit.training.config import TrainConfig
from kbit.training.optimizers import count_state_bits, make_optimizer

FOUR = QuantSpec(4, "dynamic", block_size=256, scale_format="fp32")


def configure(**fields: Any) -> TrainConfig:
    return TrainConfig(steps=1, start="random", **fields)


@pytest.mark.parametrize(
    ("name", "exact", "coded"),
    [("adamw", torch.optim.AdamW, AdamW), ("adam", torch.optim.Adam, Adam), ("sgd", torch.optim.SGD, SGD)],
)
def test_exact_states_are_torchs_and_others_kbits(name: str, exact: type, coded: type, build_tiny: Any) -> None:
    model = build_tiny("gpt_neox")
    assert type(make_optimizer(configure(optimizer=name), model)) is exact
    optimizer = make_optimizer(configure(optimizer=name, momentum=FOUR, weight_decay=0.1, beta1=0.8), model)
    assert type(optimizer) is coded
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    states = read_states(optimizer.param_groups[0]["state"])
    assert (states.momentum, states.variance) == (FOUR, None)
    assert type(make_optimizer(configure(optimizer="lion"), model)) is Lion


def test_embeddings_keep_32_bits_where_they_are_asked_to(build_tiny: Any) -> None:
    model = build_tiny("gpt_neox")
    for fields in ({"embedding_states": "32"}, {"stable_embedding": True}):
        with embedding_stable(model) as layer:
            optimizer = make_optimizer(configure(momentum=FOUR, **fields), model)
            model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
            optimizer.step()
            assert set(optimizer.state[layer.weight]) == {"step", "momentum", "variance"}
            assert set(optimizer.state[layer.norm.weight]) == {"step", "momentum", "variance"}
        assert not isinstance(model.get_input_embeddings(), StableEmbedding)
        body = model.gpt_neox.layers[0].attention.dense.weight
        assert "momentum_codes" in optimizer.state[body]
        sizes = {p: p.numel() for p in model.parameters()}
        sizes |= {layer.weight: layer.weight.numel(), layer.norm.weight: 64, layer.norm.bias: 64}
        coded = [n for p, n in sizes.items() if p in optimizer.state and "momentum_codes" in optimizer.state[p]]
        others = [n for p, n in sizes.items() if p in optimizer.state and "momentum_codes" not in optimizer.state[p]]
        expected = sum(FOUR.count_bits((n,)) + 32 * n for n in coded) + sum(64 * n for n in others)
        assert count_state_bits(optimizer) == expected


def test_a_named_quantizer_has_float32_scales_as_a_state() -> None:
    """conf/quant has float16 scales, for weights. Both ways to say it are one training."""
    named = configure(variance=QuantSpec(4, "int", block_size=64, signed=False, zero=False))
    plain = configure(variance=QuantSpec(4, "int", block_size=64, signed=False, zero=False, scale_format="fp32"))
    assert named.find_state("variance") == plain.variance
    assert named.identity_fields == plain.identity_fields
    assert named.find_state("momentum") is None
    assert named.find_state("weights") is None


def test_a_stable_embedding_needs_random_weights() -> None:
    with pytest.raises(ValueError, match=re.escape("train.stable_embedding=true puts a layer norm into the model")):
        TrainConfig(steps=1, stable_embedding=True)


def test_states_that_cannot_be_are_refused_by_name(build_tiny: Any) -> None:
    model = build_tiny("gpt_neox")
    for fields, message in (
        ({"momentum": QuantSpec(4, "float", scale_format="e8m0")}, "momentum has scale_format=e8m0"),
        ({"momentum": QuantSpec(2, "table", table=(-1.0, -0.5, 0.5, 1.0))}, "whose table has no 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_optimizer(configure(**fields), model)


def test_trainings_with_states_of_few_bits_run_and_record_them(kbit: Callable[..., Any], tmp_path: Path) -> None:
    small: tuple[str, ...] = (
        "train.steps=3",
        "train.batch_size=1",
        "train.context=32",
        "train.dtype=float32",
        "quant.bits=16",
    )
    small = (*small, "eval.tasks=[]", "eval.perplexity_windows=1")
    done = kbit("run", "train=adamw8bit", "train.stable_embedding=true", *small)
    assert done.code == 0, done.err
    four = ("train.momentum.bits=4", "quant@train.variance=int4")
    done = kbit("run", "train=adamw8bit", *four, *small)
    assert done.code == 0, done.err
    results = read_results(tmp_path / "results")
    bits = results[results["metric"] == "state_bits_per_param"].set_index("train_fields")["value"]
    assert len(bits) == 2
    for cell, value in bits.items():
        fields = json.loads(str(cell))
        if fields["momentum"]["bits"] == 4:
            assert fields["variance"] == {
                "bits": 4, "data_type": "int", "scale_format": "fp32", "signed": False, "zero": False,
            }  # fmt: skip
            assert 8 + 32 / 256 + 32 / 64 < value < 10  # small parameters have 32 bits
        else:
            assert 29 < value < 32  # the embedding, 28% of the parameters, has 64
    losses = results[(results["task"] == "nano_held_out") & (results["metric"] == "cross_entropy")]
    assert losses["value"].between(5, 9).all()


@pytest.mark.parametrize("fields", [{}, {"momentum": FOUR}], ids=["exact", "coded"])
def test_adam_and_adamw_are_one_without_weight_decay(fields: dict[str, Any], build_tiny: Any) -> None:
    """Which is why both have one key."""
    hashes = set()
    for name in ("adam", "adamw"):
        model = build_tiny("gpt_neox")
        optimizer = make_optimizer(configure(optimizer=name, **fields), model)
        for _ in range(2):
            model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
            optimizer.step()
        hashes.add(hash_weights(model))
    assert len(hashes) == 1
