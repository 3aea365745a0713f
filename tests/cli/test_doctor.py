"""The doctor: says what is there, and counts only what the configuration asks for as missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kbit.cli.doctor import Finding, diagnose
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import RayConfig, RunConfig
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.models.config import ModelConfig


def examine(config: RunConfig) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose([config])}


def test_the_default_configuration_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = examine(RunConfig())
    assert not any(finding.missing for finding in findings.values())
    assert findings["task nano_cloze"].detail.startswith("643 rows of nano_cloze.jsonl.xz, sha256 7923c6f769ed")
    assert findings["text nano_held_out"].detail.startswith("4 documents, 883,276 characters")
    assert "(not configured)" in findings["task hellaswag"].detail
    assert "offline (HF_HUB_OFFLINE=1)" in findings["hub"].detail
    assert not any(tmp_path.iterdir())  # it looks, and makes nothing


def test_what_is_asked_for_and_cannot_be_had_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = RunConfig(
        model=ModelConfig("pythia-70m-v0"),
        eval=EvalConfig(tasks=("piqa", "mine"), perplexity="c4", task_path=str(tmp_path / "tasks")),
        device="cuda",
        ray=RayConfig(address="localhost:1"),
    )
    missing = {subject for subject, finding in examine(config).items() if finding.missing}
    # the folder of tasks is not there: no task can be told to be the shipped one
    wanted = {"device cuda", "ray", "model pythia-70m-v0", "task piqa", "task mine", "text c4"}
    assert missing == wanted


def test_the_text_of_a_calibrated_method_is_looked_at() -> None:
    calibration = CalibrationConfig(text="nowhere.txt")
    found = examine(RunConfig(quant=QuantConfig(method="gptq", calibration=calibration)))
    assert found["text nowhere.txt"].missing
    assert "text nowhere.txt" not in examine(RunConfig(quant=QuantConfig(calibration=calibration)))


def test_a_wrong_task_of_the_users_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n")
    found = examine(RunConfig(eval=EvalConfig(tasks=("piqa",), task_path=str(tmp_path))))
    assert not found["task piqa"].missing
    assert f"{tmp_path}/gone.jsonl" in found["task mine"].detail
    assert not found["task mine"].missing  # not configured
    found = examine(RunConfig(eval=EvalConfig(tasks=("mine",), task_path=str(tmp_path))))
    assert found["task mine"].missing


def test_the_command_takes_the_arguments_of_run(kbit: Callable[..., Any]) -> None:
    done = kbit("doctor", "eval=paper", "eval.perplexity=nowhere.txt")
    assert done.code == 1
    assert "1 of what these arguments ask for cannot be had here" in done.err
    assert "ok      task lambada_openai     5,153 rows" in done.out
    assert "MISSING text nowhere.txt" in done.out


def test_every_model_of_a_grid_is_looked_at(kbit: Callable[..., Any]) -> None:
    done = kbit("doctor", "-m", "model.name=nano-neox-98k,no/such-model,nano-gpt2-98k", "quant.bits=3,4")
    lines = [line for line in done.out.splitlines() if "model " in line]
    assert [line.split()[:3] for line in lines] == [
        ["ok", "model", "nano-neox-98k"],
        ["MISSING", "model", "no/such-model"],
        ["ok", "model", "nano-gpt2-98k"],
    ]
    assert done.code == 1


def test_every_model_task_and_text_of_a_study_is_looked_at(kbit: Callable[..., Any]) -> None:
    done = kbit("doctor", "+sweeps=nano/quick")
    assert done.code == 0, done.err
    for model in ("nano-neox-98k", "nano-neox-332k", "nano-neox-1m", "nano-neox-3m"):
        assert f"ok      model {model}" in done.out
    assert "ok      text nano_held_out" in done.out
    assert not Path("results").exists()


def test_a_study_of_hub_models_lacks_them_offline(kbit: Callable[..., Any]) -> None:
    done = kbit("doctor", "+sweeps=paper/figure_12")
    missing = {line.split()[2] for line in done.out.splitlines() if line.startswith("MISSING model")}
    assert len(missing) > 1
    assert f"{len(missing)} of what" in done.err
    assert "nano-neox-98k" not in done.out  # the default, which this study does not ask for


def test_what_configurations_share_is_looked_at_once() -> None:
    configs = [
        RunConfig(model=ModelConfig(name), quant=QuantConfig(bits=bits))
        for name in ("nano-neox-98k", "nano-gpt2-98k")
        for bits in (3, 4)
    ]
    subjects = [finding.subject for finding in diagnose(configs)]
    assert len(subjects) == len(set(subjects))
    assert {"model nano-neox-98k", "model nano-gpt2-98k", "task nano_swap", "text nano_held_out"} <= set(subjects)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_its_own(kbit: Callable[..., Any], flag: str) -> None:
    done = kbit("doctor", flag)
    assert done.code == 0
    assert done.out.startswith("usage: kbit doctor [arguments of run]")
    assert done.err == ""


@pytest.mark.parametrize(("argument", "message"), [("eval.taks=1", "no key 'taks'"), ("eval=nope", "nope")])
def test_wrong_arguments_are_refused(kbit: Callable[..., Any], argument: str, message: str) -> None:
    done = kbit("doctor", argument)
    assert done.code == 1
    assert message in done.err
