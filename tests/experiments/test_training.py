"""Experiments that train their model: what is measured, kept and restored, from the session to the worker."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.data.texts import read_documents
from kbit.engine.worker import Worker
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import decode_items
from kbit.experiments import training
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.session import Session
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model
from kbit.models.parameters import hash_weights
from kbit.numerics.spec import QuantSpec
from kbit.store.items import read_items
from kbit.store.readers import read_results
from kbit.store.results import load_failures, load_results
from kbit.store.store import Store
from kbit.training import loop
from kbit.training.config import TrainConfig
from kbit.training.sections import LoraConfig

NF3 = QuantSpec(bits=3)
EVAL = EvalConfig(tasks=(), perplexity_windows=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few pages, which take no time to tokenize."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text(read_documents("nano_train")[0][0][:30_000])
    return str(path)


@pytest.fixture(scope="module")
def session() -> Session:
    """One session for all experiments that end well."""
    return Session(ModelConfig())


@pytest.fixture(scope="module")
def make(text: str) -> Callable[..., Experiment]:
    """An experiment that trains for four small steps: (quantizer's bits, **fields of train)."""

    def build(bits: int = 16, **fields: Any) -> Experiment:
        small: dict[str, Any] = {
            "steps": 4,
            "text": text,
            "batch_size": 2,
            "context": 64,
            "lr": 1e-3,
            "checkpoint_every": 1,
        }
        return Experiment(quant=QuantConfig(bits=bits), eval=EVAL, train=TrainConfig(**(small | fields)))

    return build


def get_numbers(result: Result) -> dict[tuple[str, str], float]:
    return {(m.task, m.metric): m.value for m in result.measurements}


def get_weights(session: Session) -> str:
    """The hash of the weights that a session's model has now."""
    plain = Experiment(quant=QuantConfig(bits=16), eval=EVAL)
    return session.run(plain).weights_hash


@pytest.fixture(scope="module")
def aware(session: Session, make: Callable[..., Experiment]) -> Result:
    """The result of a training for 3 bits."""
    return session.run(make(3, weights=NF3))


def test_a_training_is_measured_beside_the_text(aware: Result, text: str) -> None:
    numbers = get_numbers(aware)
    assert numbers["training", "trainable"] == 231_168
    assert numbers["training", "tokens"] == 4 * 2 * 64
    assert numbers["training", "steps"] == 4
    assert aware.training_text is not None
    assert aware.training_text.sha256 == hashlib.sha256(Path(text).read_bytes()).hexdigest()
    assert numbers["training", "state_bits_per_param"] == 64
    assert numbers["training", "diverged"] == numbers["training", "loss_spikes"] == 0
    assert numbers["training", "adapter_bits"] == 0
    for task in ("nano_held_out", "training/unseen"):
        assert 2 < numbers[task, "cross_entropy"] < 6
    assert ("nano_held_out", "kl_divergence") in numbers  # to the checkpoint before the training
    assert (aware.bits_per_param, aware.quantized_parameters) == (3.25, 98_304)
    curve = next(items for items in aware.items if (items.task, items.metric) == ("training", "curve"))
    assert curve.n == 4


def test_the_session_has_its_model_back(session: Session, aware: Result) -> None:
    assert get_weights(session) == hash_weights(load_model("nano-neox-98k").model) != aware.weights_hash


def test_the_same_experiment_gives_the_same_weights(aware: Result) -> None:
    again = Session(ModelConfig()).run(aware.experiment)
    assert again.weights_hash == aware.weights_hash
    assert get_numbers(again) == get_numbers(aware)


def test_trainings_differ_by_seed_and_rounding(
    session: Session, aware: Result, make: Callable[..., Experiment]
) -> None:
    control, other = session.run(make(3)), session.run(make(3, weights=NF3, seed=1))
    assert len({aware.weights_hash, control.weights_hash, other.weights_hash}) == 3


def test_include_chooses_the_rounded_layers(session: Session, aware: Result, make: Callable[..., Experiment]) -> None:
    some = session.run(make(3, weights=NF3, include="attention"))
    assert some.weights_hash != aware.weights_hash
    with pytest.raises(ValueError, match=r"train.include='nothing' names no layer"):
        session.run(make(3, weights=NF3, include="nothing"))


def test_one_training_serves_several_precisions(
    session: Session, make: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Session(ModelConfig()).run(make(4, seed=2))
    session.run(make(16, seed=2))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", lambda *_: pytest.fail("trained again"))
        shared = session.run(make(4, seed=2))
    assert shared.weights_hash == alone.weights_hash
    assert get_numbers(shared)["training", "loss"] == get_numbers(alone)["training", "loss"]


def test_random_weights_are_compared_with_no_checkpoint(session: Session, make: Callable[..., Experiment]) -> None:
    numbers = get_numbers(session.run(make(start="random")))
    assert numbers["nano_held_out", "cross_entropy"] > 5  # ln 1024 = 6.93, and four steps
    assert ("nano_held_out", "kl_divergence") not in numbers


@pytest.mark.parametrize(
    "fields",
    [{}, {"weights": NF3, "lr": 1e9}, {"steps": 1, "lr": 1e9}],  # the last: a finite loss, and weights beyond float16
    ids=["loss", "rounded", "last_step"],
)
def test_a_diverged_training_is_a_result_without_a_loss(
    make: Callable[..., Experiment], tmp_path: Path, fields: dict[str, Any]
) -> None:
    experiment = make(3, **({"lr": 1e6, "optimizer": "sgd", "clip": None} | fields))
    worker = Worker(str(tmp_path), "cpu")
    assert worker.run(experiment, find_key(experiment)).error == ""
    (result,) = load_results(tmp_path)
    numbers = get_numbers(result)
    assert numbers["training", "diverged"] == 1
    assert {metric for _, metric in numbers} & {"cross_entropy", "loss", "perplexity"} == set()
    assert result.bits_per_param == 3.25
    table = read_results(tmp_path)
    assert set(table["training"]) == {experiment.train.label()}


@pytest.mark.parametrize("broken", ["train_model", "quantize_model", "adapters"])
def test_the_session_has_its_model_back_after_an_error(
    session: Session, make: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The training, the quantizer behind it, or the training of adapters fails, after the weights have changed."""

    def fail(model: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        raise RuntimeError("broken")

    is_adapted = broken == "adapters"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_model" if is_adapted else broken, fail)
        with pytest.raises(RuntimeError, match="broken"):
            session.run(make(3, seed=5, **({"lora": LoraConfig(rank=2)} if is_adapted else {})))
    assert get_weights(session) == hash_weights(load_model("nano-neox-98k").model)


# ---- adapters


@pytest.fixture(scope="module")
def adapted(session: Session, make: Callable[..., Experiment]) -> Result:
    """The result of adapters beside 3-bit weights."""
    return session.run(make(3, lora=LoraConfig(rank=2)))


def test_adapters_are_counted_beside_the_base(session: Session, adapted: Result) -> None:
    plain = session.run(Experiment(quant=QuantConfig(bits=3), eval=EVAL))
    assert (adapted.total_bits, adapted.bits_per_param) == (plain.total_bits, plain.bits_per_param)
    assert adapted.coverage == plain.coverage == 1
    numbers = get_numbers(adapted)
    layers = 2 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))  # of two blocks: in and out of each
    assert numbers["training", "trainable"] == 2 * layers
    assert numbers["training", "adapter_bits"] == 16 * 2 * layers
    assert get_numbers(plain)["nano_held_out", "cross_entropy"] != numbers["nano_held_out", "cross_entropy"]


def test_adapters_leave_nothing_behind(session: Session, adapted: Result) -> None:
    assert get_weights(session) == hash_weights(load_model("nano-neox-98k").model)


@pytest.mark.parametrize("bits", [3, 8])
def test_adapters_beside_packed_layers_end_as_beside_rounded_weights(
    session: Session, make: Callable[..., Experiment], bits: int
) -> None:
    rounded = make(bits, lora=LoraConfig(rank=2))
    packed = dataclasses.replace(rounded, packed=True)
    found = Session(ModelConfig(), packed_as=packed.packed_as).run(packed)
    expected = session.run(rounded)
    assert (found.key, found.total_bits, found.weights_hash) == (
        expected.key,
        expected.total_bits,
        expected.weights_hash,
    )
    numbers = get_numbers(expected)
    assert get_numbers(found) == {name: numbers[name] for name in get_numbers(found)}
    assert {metric for _, metric in set(numbers) - set(get_numbers(found))} == {"kl_divergence", "top1_agreement"}
    with pytest.raises(ValueError, match="packed=true computes with packed layers, which are not trained"):
        dataclasses.replace(packed, train=dataclasses.replace(packed.train, lora=LoraConfig()))


# ---- the worker


def test_a_killed_experiment_goes_on(aware: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C or a lost node ends it. Its checkpoint is gone once there is a result."""
    experiment, key = aware.experiment, aware.key
    take_step, steps = loop.take_step, []

    def count(state: loop.State, *arguments: Any) -> float:
        steps.append(state.step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return take_step(state, *arguments)

    monkeypatch.setattr(loop, "take_step", count)
    with pytest.raises(KeyboardInterrupt):
        Worker(str(tmp_path), "cpu").run(experiment, key)
    checkpoint = tmp_path / "training" / f"{key}.checkpoint"
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert Worker(str(tmp_path), "cpu").run(experiment, key).error == ""
    assert steps == [0, 1, 2, 2, 3]
    (result,) = load_results(tmp_path)
    assert result.weights_hash == aware.weights_hash
    assert not checkpoint.exists()
    (curve,) = (items for items in aware.items if items.metric == "curve")
    assert read_items(tmp_path, "training", "curve")[key].tolist() == decode_items(curve).tolist()


def test_a_checkpoint_of_another_training_is_a_failure(
    aware: Result, make: Callable[..., Experiment], tmp_path: Path
) -> None:
    experiment = make(3, weights=NF3, seed=7)
    key = find_key(experiment)
    worker = Worker(str(tmp_path), "cpu")
    (tmp_path / "training").mkdir()
    torch.save({"config": {"key": aware.key}}, tmp_path / "training" / f"{key}.checkpoint")
    assert f"is the checkpoint of {{'key': '{aware.key}'}}" in worker.run(experiment, key).error
    (failure,) = load_failures(tmp_path)
    assert "remove one of them" in failure.reason


def test_adapters_are_kept_in_the_store(adapted: Result, tmp_path: Path) -> None:
    worker = Worker(str(tmp_path), "cpu")
    assert worker.run(adapted.experiment, adapted.key).error == ""
    folder = tmp_path / "adapters" / adapted.key
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (2, "LORA")
    merged = load_model("nano-neox-98k", adapter=str(folder))
    assert hash_weights(merged.model) != hash_weights(load_model("nano-neox-98k").model)


# ---- tables


def test_trainings_have_columns(session: Session, aware: Result, adapted: Result, tmp_path: Path) -> None:
    store = Store(tmp_path)
    plain = session.run(Experiment(quant=QuantConfig(bits=3), eval=EVAL))
    for result in (aware, adapted, plain):
        store.write(result)
    record = json.loads((tmp_path / "experiments" / f"{plain.key}.json").read_text())
    assert sorted(record["experiment"]) == ["eval", "model", "packed", "quant"]  # as before there were trainings
    (read,) = load_results(tmp_path, {aware.key})
    assert read.experiment == aware.experiment
    rows = read_results(tmp_path).drop_duplicates("key").set_index("key")
    assert rows.loc[plain.key, ["training", "train_seed", "train_fields"]].isna().all()
    assert rows.loc[aware.key, "training"] == aware.experiment.train.label()
    assert rows.loc[aware.key, "train_seed"] == 0
    fields = json.loads(str(rows.loc[adapted.key, "train_fields"]))
    assert (fields["lora"], fields["steps"]) == ({"rank": 2}, 4)
    seeded = dataclasses.replace(
        aware,
        experiment=dataclasses.replace(aware.experiment, train=dataclasses.replace(aware.experiment.train, seed=3)),
        key="0" * 16,
    )
    store.write(seeded)
    rows = read_results(tmp_path).drop_duplicates("key").set_index("key")
    assert str(rows.loc["0" * 16, "training"]) == str(rows.loc[aware.key, "training"])
    assert rows.loc["0" * 16, "train_seed"] == 3
    ways = read_results(tmp_path).groupby("task")["evaluation"].unique()
    assert aware.training_text is not None
    digest = aware.training_text.sha256[:8]
    assert ways["training"].tolist() == [f"float32, {aware.experiment.train.text} {digest}, windows of 64 tokens"]
