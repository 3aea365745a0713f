"""What is wrong with an experiment's files is said before it runs, without torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.requirements import check_download_space, check_lengths, check_model_files, check_tasks
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.models.catalog import EMBEDDED
from kbit.models.config import ModelConfig
from kbit.training.config import TrainConfig
from kbit.training.held_out import count_held, count_needed

YAML = """
task: mine
dataset_path: BUILDER
dataset_kwargs: {data_files: {test: d.csv}}
test_split: test
doc_to_text: !function mine.ask
"""


@pytest.mark.parametrize(
    ("builder", "content", "message"),
    [
        ("csv", None, r"no data file at .*tasks/d\.csv"),
        ("json", "{", r"mine\.yaml: .*d\.csv, line 1: "),
        ("json", "\n", r"mine\.yaml: .*d\.csv has no rows"),
    ],
)
def test_a_tasks_data_is_looked_for(
    kbit: Callable[..., Any], tmp_path: Path, builder: str, content: str | None, message: str
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(YAML.replace("BUILDER", builder))
    (tasks / "group.yaml").write_text("group: ours\ntask: [mine, piqa]\n")
    (tasks / "far.yaml").write_text("group: far\ntask: [{group: ours, num_fewshot: 1}]\n")
    (tasks / "nest.yaml").write_text("group: nest\ntask: [{group: new, task: [{task: mine}]}]\n")
    if content is not None:
        (tasks / "d.csv").write_text(content)
    for name in ("mine", "ours", "far", "nest"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_tasks(Experiment(eval=EvalConfig(tasks=(name,), task_path=str(tasks))))
    done = kbit("plan", "eval.tasks=[ours]", f"eval.task_path={tasks}")
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert "d.csv" in done.err


def test_data_that_was_mended_is_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(YAML.replace("BUILDER", "json"))
    (tmp_path / "d.csv").write_text("[]")
    experiment = Experiment(eval=EvalConfig(tasks=("mine",), task_path=str(tmp_path)))
    with pytest.raises(ValueError, match="has no rows"):
        check_tasks(experiment)
    (tmp_path / "d.csv").write_text('[{"a": 1}]')
    check_tasks(experiment)


def test_a_chat_template_is_looked_for(tmp_path: Path) -> None:
    experiment = Experiment(eval=EvalConfig(apply_chat_template=True))
    with pytest.raises(ValueError, match=r"eval\.apply_chat_template: the tokenizer of .* has no chat template"):
        check_tasks(experiment)
    shutil.copytree(EMBEDDED / "nano-neox-98k", tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("mine")
    check_tasks(dataclasses.replace(experiment, model=ModelConfig(str(tmp_path / "m"))))


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a b " * 100)
    context = json.loads((EMBEDDED / "nano-neox-98k" / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(ValueError, match=rf"short\.txt' has 20\d tokens, less than one window of {context}"):
        check_lengths(Experiment(eval=EvalConfig(perplexity=str(path))))
    check_lengths(Experiment(eval=EvalConfig(perplexity=str(path), perplexity_kind="rolling")))
    check_lengths(Experiment(ModelConfig("org/unknown"), eval=EvalConfig(perplexity=str(path))))
    path.write_text("a b " * context)
    check_lengths(Experiment(eval=EvalConfig(perplexity=str(path))))


def test_a_calibration_window_beyond_the_context_is_refused() -> None:
    quant = QuantConfig(bits=4, data_type="int", method="gptq", calibration=CalibrationConfig(length=99_999))
    with pytest.raises(ValueError, match=r"calibration\.length=99999 is beyond the model's context of \d+"):
        check_lengths(Experiment(quant=quant))
    check_lengths(Experiment(quant=dataclasses.replace(quant, method="rtn")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": "nano-neox-98"}, r"model\.tokenizer='nano-neox-98' is neither"),
        ({"adapter": "none"}, r"model\.adapter='none' is neither"),
        ({"revision": "v1"}, r"model\.revision=v1"),
        ({"gguf_file": "m.gguf"}, r"model\.gguf_file: no file"),
    ],
)
def test_parts_of_a_model_are_looked_for(fields: dict[str, str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_model_files(ModelConfig(**fields))


def test_a_text_with_too_few_calibration_windows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a b " * 1000)  # 2,000 tokens and one for the document
    calibration = CalibrationConfig(text=str(path), length=100, samples=20)
    quant = QuantConfig(bits=4, data_type="int", method="gptq", calibration=calibration)
    check_lengths(Experiment(quant=quant))
    more = dataclasses.replace(quant, calibration=dataclasses.replace(calibration, samples=21))
    with pytest.raises(ValueError, match=r"short\.txt' has 20 windows of 100 tokens, less than .*samples=21"):
        check_lengths(Experiment(quant=more))


def test_a_text_without_a_batch_beside_what_is_held_back_is_refused(tmp_path: Path) -> None:
    """Of 64 windows 4 are held back, so that a batch has 60 at most."""
    path = tmp_path / "short.txt"
    path.write_text("a b " * 320)  # 640 tokens and one for the document: 64 windows of 10
    train = TrainConfig(steps=1, text=str(path), context=10, batch_size=60)
    check_lengths(Experiment(train=train))
    with pytest.raises(ValueError, match=r"short\.txt' has 64 windows of 10 tokens, less than .*held-back windows=65"):
        check_lengths(Experiment(train=dataclasses.replace(train, batch_size=61)))


@pytest.mark.parametrize(("batch_size", "windows"), [(1, 2), (30, 31), (31, 33), (60, 63), (61, 65), (2000, 2064)])
def test_the_least_text_of_a_batch(batch_size: int, windows: int) -> None:
    assert count_needed(batch_size) == windows
    assert windows - count_held(windows) >= batch_size > windows - 1 - count_held(windows - 1)


def test_a_download_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none" / "hub"))
    usage = shutil.disk_usage(tmp_path)._replace(free=30 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    here, small, large = ModelConfig("nano-neox-98k"), ModelConfig("pythia-1.4b-v0"), ModelConfig("opt-13b")
    check_download_space([here, small, small, ModelConfig("org/unknown"), ModelConfig("org/large-70b-4bit")])
    usage = usage._replace(free=28 * 10**9)
    with pytest.raises(OSError, match=r"pythia-1\.4b-v0, opt-13b: .* are 28\.8 GB at least, and 28\.0 GB are free at"):
        check_download_space([here, small, large, large])
    check_download_space([here, large])
    with pytest.raises(OSError, match=r"EleutherAI/gpt-neox-20b: "):
        check_download_space([ModelConfig("EleutherAI/gpt-neox-20b")])
