"""What a user is told of a plan before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import kbit.engine.plan
from kbit.data.task_files import EMBEDDED_TASKS, list_definitions
from kbit.engine.plan import list_own_code, plan_sweep
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import RayConfig, RunConfig
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.training.config import TrainConfig

OWN_CODE = "process_docs: !function utils.process\n"


def test_code_of_ones_own_is_told_of_the_tasks_asked_for(tmp_path: Path) -> None:
    files = {
        "asked.yaml": f"task: asked\n{OWN_CODE}",
        "other.yaml": f"task: other\n{OWN_CODE}",
        "plain.yaml": "task: plain\ntag: [mine]\ninclude: base.yaml\n",
        "base.yaml": OWN_CODE,
        "group.yaml": "group: ours\ntask: [{task: asked, num_fewshot: 1}, nano_cloze, piqa]\n",
        "inner.yaml": f"group: outer\ntask: [ours, {{task: new, dataset_path: json}}]\n{OWN_CODE}",
        "by_group.yaml": "group: far\ntask: [{group: ours, num_fewshot: 1}]\n",
        "within.yaml": "group: nest\ntask:\n- {group: new, task: [plain, {group: newer, task: [{task: asked}]}]}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def told(*tasks: str) -> list[str]:
        evaluation = EvalConfig(tasks=tasks, task_path=str(tmp_path))
        return [str(Path(path).relative_to(tmp_path)) for path in list_own_code([RunConfig(eval=evaluation)])]

    assert told("nano_cloze") == []
    assert told("asked", "nano_cloze") == ["asked.yaml"]
    assert told("plain") == told("mine") == ["base.yaml"]
    assert told("ours") == ["asked.yaml"]
    assert told("outer") == ["asked.yaml", "inner.yaml"]
    assert told("far") == ["asked.yaml"]
    assert told("nest") == ["asked.yaml", "base.yaml"]
    assert list_own_code([RunConfig()]) == []
    assert list_definitions(["ours"], str(tmp_path)) == sorted(
        [
            tmp_path / "asked.yaml",
            tmp_path / "group.yaml",
            *EMBEDDED_TASKS.glob("nano_cloze.yaml"),
            EMBEDDED_TASKS / "piqa.yaml",
        ]
    )


@pytest.mark.parametrize(
    ("engine", "address", "plan_only", "is_checked"),
    [
        ("process", "local", False, True),
        ("ray", "local", False, True),
        ("process", "auto", False, True),  # no cluster is asked
        ("ray", "auto", False, False),  # its disks are others
        ("process", "local", True, False),
        ("ray", "local", True, False),
    ],
)
def test_the_disk_is_looked_at_where_models_are_downloaded_to_it(
    engine: str, address: str, plan_only: bool, is_checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(kbit.engine.plan, "check_download_space", lambda models: asked.extend(m.name for m in models))
    evaluation = EvalConfig(tasks=(), perplexity_windows=1)
    config = RunConfig(eval=evaluation, results=str(tmp_path), ray=RayConfig(address, num_workers=1))
    plan_sweep([config], engine, plan_only=plan_only)
    assert asked == (["nano-neox-98k"] if is_checked else [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant": QuantConfig(bits=8, method="llm_int8")}, r"packed=true: quant\.method=llm_int8 multiplies int8 by"),
        ({"quant": QuantConfig(bits=8, method="absmax")}, r"packed=true: quant\.method=absmax .*quant=int8_rowwise"),
        (
            {"quant": QuantConfig(rules=({"match": "mlp", "bits": 3},))},
            r"packed=true: .* has no quant\.rules",
        ),
        ({"model": ModelConfig(adapter="org/adapter")}, r"model\.adapter=org/adapter: packed=true reads plain"),
        ({"ray": RayConfig(gpus_per_worker=2)}, r"ray\.gpus_per_worker=2: packed=true reads plain"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_the_first_job(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    evaluation = EvalConfig(tasks=(), perplexity_windows=1)
    config = RunConfig(packed=True, eval=evaluation, results=str(tmp_path), **fields)
    with pytest.raises(ValueError, match=message):
        plan_sweep([RunConfig(eval=evaluation, results=str(tmp_path), ray=config.ray), config], "ray", plan_only=True)


def test_a_gguf_file_cannot_be_packed_while_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    config = RunConfig(ModelConfig(str(tmp_path)), packed=True, results=str(tmp_path / "results"))
    with pytest.raises(ValueError, match=r"model\.gguf_file=m\.gguf: packed=true reads plain safetensors"):
        plan_sweep([config], "process", plan_only=True)


def test_the_16_bit_model_of_a_packed_study_is_planned(tmp_path: Path) -> None:
    evaluation = EvalConfig(tasks=(), perplexity_windows=1)
    configs = [
        RunConfig(quant=QuantConfig(bits=bits), packed=True, eval=evaluation, results=str(tmp_path)) for bits in (16, 4)
    ]
    assert len(plan_sweep(configs, "process", plan_only=True).to_run) == 2


def test_a_rotation_that_an_architecture_does_not_allow_is_refused_before_the_first_job(tmp_path: Path) -> None:
    evaluation = EvalConfig(tasks=(), perplexity_windows=1)

    def plan(name: str, bits: int) -> int:
        quant = QuantConfig(bits=bits, rotation="residual")
        config = RunConfig(ModelConfig(name), quant, eval=evaluation, results=str(tmp_path))
        return len(plan_sweep([config], "process", plan_only=True).to_run)

    with pytest.raises(ValueError, match=r"residual is not for nano-neox-98k \(model_type 'gpt_neox'\)"):
        plan("nano-neox-98k", 4)
    assert plan("nano-stories-260k", 4) == 1
    assert plan("nano-neox-98k", 16) == 1  # nothing is rotated


def test_more_stages_than_layers_are_refused_before_the_first_job(tmp_path: Path) -> None:
    eight = dataclasses.replace(TrainConfig().stage_gradients, bits=8)

    def plan(stages: int) -> int:
        train = TrainConfig(steps=2, stages=stages, stage_gradients=eight)
        evaluation = EvalConfig(tasks=(), perplexity_windows=1)
        config = RunConfig(quant=QuantConfig(bits=16), train=train, eval=evaluation, results=str(tmp_path))
        return len(plan_sweep([config], "process", plan_only=True).to_run)

    assert plan(2) == 1
    with pytest.raises(ValueError, match=r"train.stages=3: nano-neox-98k has 2 decoder layers"):
        plan(3)
