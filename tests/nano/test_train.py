"""Training of the nano models: the recipe learns, is deterministic, and goes on after an interruption."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.data.texts import read_documents
from kbit.nano import train as training
from kbit.nano.architectures import FAMILIES, SIZES, build_model
from kbit.nano.train import TrainConfig, make_state, run_training, train
from kbit.training import loop
from kbit.training.batches import Tokens, tokenize_stream
from kbit.training.loop import schedule_lr, take_step

BATCH = 2 * 256  # tokens in a step of these tests


@pytest.fixture(scope="module")
def stream(tokenizer: Any) -> Tokens:
    """Tokens of the first pages of the held-out books: any text does here."""
    return tokenize_stream([read_documents("nano_held_out")[0][0][:60_000]], tokenizer)


def make_config(out: Path, **fields: Any) -> TrainConfig:
    """A training of a few small steps."""
    small: dict[str, Any] = {"out": str(out), "batch_size": 2, "tokens": 8 * BATCH, "checkpoint_every": 3}
    return TrainConfig(**(small | fields))


def weights(state: training.State) -> dict[str, torch.Tensor]:
    """The model's parameters by name."""
    return dict(state.model.state_dict())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit-equal parameters."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("family", ["neox", "opt"])  # the other two are trained below
def test_thirty_steps_lower_the_loss(family: str, stream: Tokens, tmp_path: Path) -> None:
    train(make_config(tmp_path, family=family, tokens=30 * BATCH), stream)
    with (tmp_path / f"nano-{family}-98k.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    assert [int(row["tokens"]) for row in rows] == [10 * BATCH, 20 * BATCH, 30 * BATCH]
    first, _, last = (float(row["loss"]) for row in rows)
    assert last < first - 0.3  # from near ln 1024 = 6.93; one seed, measured 0.9 to 1.2 lower


def test_the_same_seed_gives_the_same_weights(stream: Tokens, tmp_path: Path) -> None:
    first = train(make_config(tmp_path / "1"), stream)
    torch.rand(5)  # the global generator does not matter
    assert_same(weights(first), weights(train(make_config(tmp_path / "2"), stream)))
    other = train(make_config(tmp_path / "3", seed=1), stream)
    assert not torch.equal(other.model.lm_head.weight, first.model.lm_head.weight)


@pytest.mark.parametrize("family", ["bloom"])
def test_resuming_gives_the_weights_and_losses_of_an_undisturbed_run(
    stream: Tokens, tmp_path: Path, family: str
) -> None:
    config = make_config(tmp_path / "undisturbed", family=family)
    undisturbed = weights(train(config, stream))
    losses = (tmp_path / "undisturbed" / f"{config.name}.csv").read_bytes()
    for stop in (3, 4, 8):  # at a checkpoint, between two, at the end
        config = make_config(tmp_path / str(stop), family=family)
        train(config, stream, stop_at=stop)
        resumed = train(config, stream)
        assert_same(undisturbed, weights(resumed))
        assert (tmp_path / str(stop) / f"{config.name}.csv").read_bytes() == losses
        assert resumed.step == config.steps == 8


def test_a_crash_goes_on_at_the_last_checkpoint(
    stream: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(make_config(tmp_path / "1"), stream)
    calls: list[int] = []

    def crash_at_step_5(state: loop.State, *arguments: Any) -> float:
        calls.append(state.step)
        if state.step == 5:
            raise KeyboardInterrupt
        return take_step(state, *arguments)

    config = make_config(tmp_path / "2")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", crash_at_step_5)
        with pytest.raises(KeyboardInterrupt):
            train(config, stream)
    assert calls == [0, 1, 2, 3, 4, 5]
    saved = torch.load(tmp_path / "2" / f"{config.name}.checkpoint", weights_only=True)
    assert saved["step"] == 3
    assert_same(weights(undisturbed), weights(train(config, stream)))


@pytest.mark.parametrize("field", [{"seed": 1}, {"lr": 1e-3}, {"tokens": 9 * BATCH}, {"batch_size": 1}])
def test_a_checkpoint_of_another_training_is_refused(stream: Tokens, tmp_path: Path, field: dict[str, Any]) -> None:
    config = make_config(tmp_path)
    train(config, stream, stop_at=1)
    with pytest.raises(ValueError, match="is the checkpoint of"):
        train(dataclasses.replace(config, **field), stream)


def test_a_loss_that_is_not_finite_stops(stream: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(state: loop.State, *_: Any) -> float:
        state.step += 1
        return float("nan")

    monkeypatch.setattr(loop, "take_step", lose)
    with pytest.raises(ValueError, match=r"step 0 is nan.*lower lr than 0\.004"):
        train(make_config(tmp_path), stream)


def test_weight_decay_is_on_matrices_only() -> None:
    state = make_state(TrainConfig(data="unused"))
    for group in state.optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
    grouped = sum(len(group["params"]) for group in state.optimizer.param_groups)
    assert grouped == len(list(state.model.parameters()))


@pytest.mark.parametrize("steps", [1, 2, 30, 977])
def test_learning_rate_warms_up_and_falls_to_a_tenth(steps: int) -> None:
    rates = [schedule_lr(step, steps, 1.0) for step in range(steps)]
    peak = max(1, round(0.05 * steps))
    assert max(rates) == pytest.approx(1.0)
    assert rates[:peak] == pytest.approx([(i + 1) / peak for i in range(peak)])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if steps > 2:
        assert rates[-1] == pytest.approx(0.1)


def test_length_and_rate_of_the_shipped_models() -> None:
    neox, opt = TrainConfig("neox", "7m", "unused"), TrainConfig("opt", "332k", "unused")
    assert (neox.steps, neox.peak_lr) == (3907, 1e-3)  # 16 million tokens in steps of 4,096
    assert (opt.steps, opt.peak_lr) == (4883, 3e-3)  # 20 million


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"family": "llama"}, "llama.*neox, gpt2, opt, bloom"),
        ({"size": "2m"}, "2m.*98k, 332k, 1m, 3m, 7m"),
        ({"tokens": 0}, "tokens=0"),
        ({"lr": -1.0}, "lr=-1"),
        ({"threads": 0}, "threads=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 4294}, "seed=4294.*4293"),
        ({"tokens": 5_000_000_000}, "steps are more than 1000000"),
    ],
)
def test_a_wrong_value_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(data="unused", **fields)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_block_matrices_have_12_d2_l_parameters(family: str, size: str) -> None:
    model = build_model(family, size, seed=0)
    matrices = {id(p): p.numel() for n, p in model.named_parameters() if ".0." in n or ".1." in n if p.ndim == 2}
    width, layers = SIZES[size].hidden, SIZES[size].layers
    assert sum(matrices.values()) == 12 * width**2 * 2  # the first two blocks
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "neox")
    assert f"{12 * width**2 * layers / (1e6 if size.endswith('m') else 1e3):.0f}{size[-1]}" in {size, "995k"}


def test_trained_model_is_written_with_its_card(tmp_path: Path) -> None:
    for name in ("gutenberg-children/11.txt", "tinystories/train.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"text": "' + "the mouse slept under the tree. " * 100 + '"}\n')
    config = make_config(tmp_path / "out", family="opt", data=str(tmp_path), tokens=2 * BATCH)
    folder = run_training(config)
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "training.csv",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    for told in (
        "OPTForCausalLM",
        "98,304",
        "1,024 (",
        "seed | 0",
        "CPU seconds",
        "family=opt size=98k tokens=1024 batch_size=2 data",
    ):
        assert told in card
    for untold in ("Gutenberg", "children's books", "apache", "Apache"):  # the text is the user's
        assert untold not in card


def test_a_damaged_checkpoint_is_named(stream: Tokens, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    train(config, stream, stop_at=1)
    path = tmp_path / f"{config.name}.checkpoint"
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"checkpoint is damaged .*remove it"):
            train(config, stream)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data=missing"], "no training text"),
        (["familly=opt", "data=x"], "error: familly: no key 'familly'; did you mean family?"),
        (["sze=98k", "data=x"], "did you mean size?"),
        ([], "error: data=FOLDER is missing"),
        (["data=x", "size=2m"], "size='2m'"),
        (["data=x", "tokens=many"], "tokens"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kbit.nano.train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    message = capsys.readouterr().err + str(stopped.value)
    assert told in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []  # no folders of Hydra's
