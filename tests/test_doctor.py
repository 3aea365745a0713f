"""The doctor: says what is there, and counts only what the configuration asks for as missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kbit.cli import main
from kbit.config import EvalConfig, ModelConfig, RayConfig, RunConfig
from kbit.doctor import Finding, diagnose


def examine(config: RunConfig) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(config)}


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


def test_a_wrong_task_of_the_users_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n")
    found = examine(RunConfig(eval=EvalConfig(tasks=("piqa",), task_path=str(tmp_path))))
    assert not found["task piqa"].missing
    assert f"{tmp_path}/gone.jsonl" in found["task mine"].detail
    assert not found["task mine"].missing  # not configured
    found = examine(RunConfig(eval=EvalConfig(tasks=("mine",), task_path=str(tmp_path))))
    assert found["task mine"].missing


def test_the_command_takes_the_arguments_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kbit", "doctor", "eval=paper", "eval.perplexity=nowhere.txt"])
    with pytest.raises(SystemExit, match="1 of what this configuration asks for"):
        main()
    output = capsys.readouterr().out
    assert "ok      task lambada_openai     5,153 rows" in output
    assert "MISSING text nowhere.txt" in output


@pytest.mark.parametrize(("argument", "message"), [("eval.taks=1", "no key 'taks'"), ("eval=nope", "nope")])
def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, argument: str, message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kbit", "doctor", argument])
    with pytest.raises(SystemExit, match=message):
        main()
