"""The section train: what is refused, what decides a key, and how it is chosen on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra_state import config_store_kept

from kbit.checks import KbitError
from kbit.cli.hydra.app import compose_requests
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RunConfig
from kbit.experiments.identity import check_texts, find_key
from kbit.experiments.serialize import from_json, write_json
from kbit.methods.config import ActivationConfig, QuantConfig
from kbit.numerics.spec import QuantSpec
from kbit.training.config import TrainConfig, find_idle_keys
from kbit.training.sections import FastConfig, LoraConfig

INT3 = QuantSpec(bits=3, data_type="int")
NF4 = QuantSpec(bits=4)
DYNAMIC4 = dataclasses.replace(TrainConfig().exchange, bits=4)
UNSIGNED4 = dataclasses.replace(TrainConfig().variance, bits=4)


@pytest.fixture
def config_store() -> Iterator[None]:
    """Hydra as a command finds it and leaves it."""
    instance, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    with config_store_kept():
        yield
    GlobalHydra.instance().hydra = instance


def find_train_key(**fields: Any) -> str:
    """The key of the 16-bit default model after a training of five steps with other fields."""
    train = TrainConfig(**({"steps": 5} | fields))
    return find_key(Experiment(quant=QuantConfig(bits=16), train=train))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"steps": -1}, "train.steps=-1 is not in 0..1e"),
        ({"lr": 0.0}, "train.lr=0 is not a finite"),
        ({"clip": float("nan")}, "train.clip=nan"),
        ({"beta1": 1.0}, r"train.beta1=1 is not in \[0, 1\)"),
        ({"warm_up": 1.5}, "train.warm_up=1.5 is not in 0..1"),
        ({"context": 0}, "train.context=0 is not >= 1"),
        ({"optimizer": "adamww"}, "did you mean adamw"),
        ({"start": "scratch"}, "train.start='scratch' is not one of: checkpoint, random"),
        ({"include": "("}, "train.include=.* is not a regular expression"),
        ({"replicas": 3}, "train.batch_size=8 is not a multiple of train.replicas=3"),
        (
            {"optimizer": "sgd", "variance": UNSIGNED4},
            "sgd keeps no variance",
        ),
        ({"momentum": UNSIGNED4}, "train.momentum.signed=false"),
        ({"gradients": NF4}, "train.gradients: scale_format=fp16 ends at 6e-8"),
        ({"activations": QuantSpec(data_type="quantile")}, "train.activations: data_type=quantile is fitted"),
        ({"momentum": dataclasses.replace(NF4, layout="row")}, "train.momentum has layout=row"),
        ({"momentum": QuantSpec(data_type="quantile")}, "train.momentum has data_type=quantile"),
        ({"weights": dataclasses.replace(NF4, rounding="stochastic")}, "train.weights.rounding=stochastic"),
        ({"exchange": INT3, "replicas": 2}, "train.exchange: scale_format=fp16"),
        ({"exchange": dataclasses.replace(INT3, scale_format="fp32")}, "train.exchange.bits=3 .*replicas=1 exchanges"),
        ({"stages": 0}, "train.stages=0 is not >= 1"),
        ({"stage_gradients": DYNAMIC4}, "train.stage_gradients.bits=4 .* train.stages=1 sends nothing"),
        ({"stage_gradients": INT3, "stages": 2}, "train.stage_gradients: scale_format=fp16"),
        ({"stage_activations": QuantSpec(data_type="quantile"), "stages": 2}, "train.stage_activations: data_type="),
        ({"stage_activations": dataclasses.replace(DYNAMIC4, signed=False), "stages": 2}, "signed=false"),
        ({"exchange_form": "ring"}, "train.exchange_form='ring' is not one of: all_gather, two_shot"),
        ({"lora": LoraConfig(rank=2), "weights": NF4}, "train.lora.rank=2 .* frozen base"),
        ({"lora": LoraConfig(rank=2), "start": "random"}, "train.lora.rank=2 .* train.start=random"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_a_wrong_value_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(**({"steps": 5} | fields))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LoraConfig(rank=-1), "train.lora.rank=-1"),
        (lambda: LoraConfig(alpha=0), "train.lora.alpha=0"),
        (lambda: LoraConfig(targets="["), "train.lora.targets"),
        (lambda: FastConfig(low=4), "train.fast.low=4"),
        (lambda: FastConfig(alpha=float("inf")), "train.fast.alpha=inf"),
    ],
    ids=range(5),
)
def test_a_wrong_value_of_a_part_is_refused(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_without_steps_nothing_of_train_counts() -> None:
    trained = TrainConfig(lr=1.0, weights=INT3, text="nowhere.txt", optimizer="sgd")
    assert find_key(Experiment(train=trained)) == find_key(Experiment())
    assert Experiment(train=trained).label() == Experiment().label()


def test_pinned_keys() -> None:
    """Keys never change: these are the first ones of trainings."""
    assert find_key(Experiment()) == PINNED["none"]
    assert find_train_key() == PINNED["plain"]
    aware = Experiment(quant=QuantConfig(bits=3), train=TrainConfig(steps=300, weights=QuantSpec(bits=3)))
    assert find_key(aware) == PINNED["qat"]


PINNED = {"none": "a65235a083bf1e94", "plain": "52aed18d3026d461", "qat": "039e7103222941e2"}


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint_every": 7},
        {"min_size": 5},
        {"embedding_states": "32"},
        {"include": "attention"},
        {"error_feedback": True},
        {"exchange_form": "two_shot"},
        {"stages": 2},
        {"weights": QuantSpec(bits=16, data_type="int")},
        {"lora": LoraConfig(alpha=3)},
        {"fast": FastConfig(alpha=0.3)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_without_effect_is_no_part_of_the_key(fields: dict[str, Any]) -> None:
    assert find_train_key(**fields) == find_train_key()


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 6}, {"start": "random"}, {"text": "nano_calibration"}, {"batch_size": 4}, {"context": 128},
        {"lr": 1e-3}, {"warm_up": 0.1}, {"last_lr": 0.2}, {"optimizer": "sgd"}, {"beta1": 0.8}, {"beta2": 0.9},
        {"eps": 1e-6}, {"weight_decay": 0.1}, {"clip": None}, {"seed": 1}, {"dtype": "bfloat16"},
        {"stable_embedding": True, "start": "random"}, {"weights": NF4}, {"activations": NF4},
        {"gradients": dataclasses.replace(NF4, scale_format="fp32")},
        {"replicas": 2, "exchange": dataclasses.replace(TrainConfig().exchange, bits=8)},
        {"momentum": dataclasses.replace(TrainConfig().momentum, bits=8)},
        {"variance": dataclasses.replace(TrainConfig().variance, bits=8)},
        {"stages": 2, "stage_activations": DYNAMIC4}, {"stages": 2, "stage_gradients": DYNAMIC4},
        {"replicas": 2}, {"lora": LoraConfig(rank=2)}, {"fast": FastConfig(adapt=True)},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_a_field_that_decides_the_weights_is_part_of_the_key(fields: dict[str, Any]) -> None:
    assert find_train_key(**fields) != find_train_key()


def test_adam_and_adamw_are_one_without_weight_decay() -> None:
    assert find_train_key(optimizer="adam") == find_train_key()
    assert find_train_key(optimizer="adam", weight_decay=0.1) != find_train_key(weight_decay=0.1)


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        ([{"weights": INT3}], ["weights.bits", "weights.data_type"]),
        ([{"lr": 1e-3}, {"lr": 1e-3, "steps": 9}], []),
        ([{"steps": 9, "checkpoint_every": 7, "weights": INT3}], []),
        ([{"steps": 9, "lora": LoraConfig(alpha=3), "fast": FastConfig(low=1)}], ["fast.low", "lora.alpha"]),
        ([{"steps": 9, "optimizer": "sgd", "eps": 1e-6, "beta2": 0.5}], ["beta2", "eps"]),
        ([{"steps": 9, "error_feedback": True}], ["error_feedback"]),
        ([{"steps": 9, "stages": 2}], ["stages"]),
        ([{"steps": 9, "stages": 2}, {"steps": 9, "stages": 2, "stage_gradients": DYNAMIC4}], []),
    ],
    ids=range(8),
)
def test_keys_without_an_effect_are_found(fields: list[dict[str, Any]], idle: list[str]) -> None:
    assert find_idle_keys(TrainConfig(**one) for one in fields) == idle


def test_the_roles_have_the_canonical_form_of_a_quantizer() -> None:
    assert find_train_key(weights=INT3) == find_train_key(weights=dataclasses.replace(INT3, exponent_bits=1))
    assert find_train_key(optimizer="sgd", beta2=0.5) == find_train_key(optimizer="sgd")
    assert find_train_key(optimizer="lion", beta2=0.5) != find_train_key(optimizer="lion")


def test_a_text_counts_by_its_content(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("The same words in two files. " * 50)
    keys = {find_train_key(text=str(tmp_path / name)) for name in ("a.txt", "b.txt")}
    assert len(keys) == 1
    (tmp_path / "b.txt").write_text("Other words. " * 50)
    assert find_train_key(text=str(tmp_path / "b.txt")) not in keys


def test_the_measured_text_is_not_trained_on() -> None:
    train = TrainConfig(steps=5, text="nano_held_out")
    with pytest.raises(ValueError, match=r"train\.text='nano_held_out' is the text that is measured"):
        check_texts(Experiment(train=train))
    check_texts(Experiment(train=train, eval=EvalConfig(perplexity=None)))


def test_a_record_gives_the_same_training_again() -> None:
    table = QuantSpec(bits=2, data_type="table", table=(-1.0, 0.0, 1.0))
    train = TrainConfig(steps=5, activations=table, lora=LoraConfig(targets="q"), clip=None)
    assert from_json(TrainConfig, json.loads(write_json(dataclasses.asdict(train)))) == train
    assert from_json(Experiment, {"model": {"name": "nano-neox-98k"}}).train == TrainConfig()  # of an earlier kbit


def test_trained_for_one_quantizer_and_rounded_by_another_is_refused() -> None:
    aware = TrainConfig(steps=5, weights=INT3)
    with pytest.raises(ValueError, match=r"train.weights \(int3\) and quant \(nf4\) differ"):
        Experiment(train=aware)
    assert Experiment(train=aware, quant=QuantConfig(bits=16)).train is aware
    assert Experiment(train=aware, quant=QuantConfig(bits=3, data_type="int", method="gptq")).train is aware
    both = dataclasses.replace(aware, activations=INT3)  # no QAT: the products are what is studied
    assert Experiment(train=both).train is both
    with pytest.raises(ValueError, match=r"neither with quant.rules nor with quant.outlier_"):
        Experiment(train=aware, quant=QuantConfig(bits=3, data_type="int", outlier_fraction=0.1))
    rotated = QuantConfig(bits=3, data_type="int", rotation="hadamard")
    with pytest.raises(ValueError, match=r"quant\.rotation=hadamard would round in a rotation"):
        Experiment(train=aware, quant=rotated)
    for bits in (3, 16):
        inputs = QuantConfig(bits=bits, data_type="int", activations=ActivationConfig(bits=8))
        with pytest.raises(ValueError, match=r"quant\.activations\.bits=8 would round inputs"):
            Experiment(train=aware, quant=inputs)
    assert Experiment(train=TrainConfig(steps=5), quant=rotated).quant is rotated  # rounded after the training alone
    with pytest.raises(ValueError, match="packed=true"):
        Experiment(train=TrainConfig(steps=5), packed=True)
    adapters = TrainConfig(steps=5, lora=LoraConfig(rank=2), activations=INT3)
    with pytest.raises(ValueError, match="packed=true computes with packed layers, whose products are not quantized"):
        Experiment(train=adapters, packed=True)


def test_labels_tell_trainings_apart() -> None:
    variance = dataclasses.replace(TrainConfig().variance, bits=4, block_size=2048)
    trains = [
        TrainConfig(steps=5),
        TrainConfig(steps=5, seed=1),
        TrainConfig(steps=5, text="nano_calibration"),
        TrainConfig(steps=5, variance=variance),
        TrainConfig(steps=5, lora=LoraConfig(rank=2)),
    ]
    labels = [train.label() for train in trains]
    assert labels == [
        "trained 5 steps",
        "trained 5 steps seed=1",
        "trained 5 steps text=nano_calibration",
        "trained 5 steps variance=udynamic4-nonzero(block_size=2048)",
        "trained 5 steps lora.rank=2",
    ]


def compose_all(*arguments: str) -> list[RunConfig]:
    """The configurations that arguments of `kbit run` ask for."""
    return [config for request in compose_requests(arguments) for config in request.configs]


def test_the_quantizer_follows_the_trained_weights(config_store: None) -> None:
    configs = compose_all("-m", "train=qat", "train.weights.bits=2,3,4")
    assert [(c.quant.bits, c.train.weights.bits, c.train.steps) for c in configs] == [(b, b, 300) for b in (2, 3, 4)]
    (control,) = compose_all("train=qat", "train.weights.bits=16", "quant.bits=3")
    assert (control.quant.label(), control.train.weights.is_baseline) == ("nf3", True)
    (table,) = compose_all(
        "train=qat", "train.weights.bits=2", "train.weights.data_type=table", "train.weights.table=[-1,0,1]"
    )
    assert table.quant.table == (-1.0, 0.0, 1.0)


def test_each_role_takes_a_named_quantizer(config_store: None) -> None:
    (config,) = compose_all("quant@train.variance=int4", "train.steps=5")
    variance = config.train.variance
    assert (variance.bits, variance.data_type, variance.signed, variance.zero) == (4, "int", False, False)
    swept = compose_all("-m", "train=qat", "quant@train.weights=nf4,int4,mxfp4")
    assert [config.quant.label() for config in swept] == ["nf4", "int4", "float4-e2m1"]
    assert [config.quant.spec for config in swept] == [config.train.weights for config in swept]


@pytest.mark.parametrize(
    ("role", "fields"),
    [
        ("momentum", {"data_type": "nf", "block_size": 256, "scale_format": "fp32", "bits": 4}),
        ("exchange", {"data_type": "nf", "block_size": 256, "scale_format": "fp32", "bits": 4}),
        ("activations", {"data_type": "nf", "layout": "row", "scale_format": "fp32", "bits": 4}),
        ("weights", {"data_type": "nf", "bits": 4}),  # the key leaves out blocks of 64
    ],
)
def test_a_named_quantizer_without_blocks_keeps_its_key(role: str, fields: dict[str, Any], config_store: None) -> None:
    """Blocks are the role's own. A preset that named a size would no longer find old results."""
    (config,) = compose_all(f"quant@train.{role}=nf4", "train.steps=5", "train.replicas=2", "quant.bits=16")
    assert config.train.identity_fields[role] == fields


def test_inputs_and_caches_take_the_blocks_of_named_quantizers(config_store: None) -> None:
    """NormalFloat's are those of weights. What is given besides goes first, wherever it stands."""
    swept = compose_all("-m", "quant@quant.activations=nf4,int4,mxfp4", "quant@quant.kv_cache=nf3")
    assert [config.quant.activations.block_size for config in swept] == [64, 64, 32]
    assert {config.quant.kv_cache.block_size for config in swept} == {64}
    (own,) = compose_all("quant.activations.block_size=16", "quant@quant.activations=nf4")
    assert (own.quant.activations.block_size, own.quant.activations.data_type) == (16, "nf")
    (bare,) = compose_all("quant.activations.bits=4", "quant.activations.data_type=nf")
    assert bare.quant.activations.block_size is None


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("train=qta", "there is no train/qta; did you mean qat"),
        ("train.weights.bitz=3", "no key 'bitz'; did you mean bits"),
        ("train.stepz=3", "no key 'stepz'; did you mean steps"),
        ("train=3", "train is given by name"),
        ("train.weights=4", "train.weights has keys of its own"),
    ],
)
def test_a_wrong_key_or_name_is_explained(argument: str, told: str, config_store: None) -> None:
    with pytest.raises(KbitError, match=told):
        compose_requests([argument])
