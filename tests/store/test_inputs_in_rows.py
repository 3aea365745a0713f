"""What a run says of its inputs in the store: groups, examples, families, and quantized checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kbit.experiments.session
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.session import Session, run_experiment
from kbit.methods.config import QuantConfig
from kbit.models.catalog import EMBEDDED
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model
from kbit.store import Store, read_results
from kbit.store.readers import leave_out_checkpoints

YAML = """
task: NAME
dataset_path: csv
dataset_kwargs: {data_files: {test: NAME.csv, train: train.csv}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: gold
metric_list: METRICS
"""
BASELINE = QuantConfig(bits=16)


def write_tasks(folder: Path, metrics: str = "[{metric: acc}]") -> str:
    folder.mkdir()
    for name in ("cats", "dogs", "train"):
        rows = [f"The {name} {word},ran,sat there,{len(word) % 2}\n" for word in ("saw it", "were", "had one")]
        (folder / f"{name}.csv").write_text("q,a,b,gold\n" + "".join(rows))
        if name != "train":
            (folder / f"{name}.yaml").write_text(YAML.replace("NAME", name).replace("METRICS", metrics))
    (folder / "g.yaml").write_text("group: pets\ntask: [cats, dogs]\naggregate_metric_list: [{metric: acc}]\n")
    return str(folder)


def test_a_groups_numbers_have_their_own_evaluation(kbit: Callable[..., Any], tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    common = ("quant.bits=16", "eval.perplexity=null", f"eval.task_path={tasks}", "eval.tasks=[pets]")
    assert kbit("run", *common).code == 0
    assert kbit("run", *common, "eval.num_fewshot=1").code == 0
    rows = read_results("results")
    by_task = rows.groupby("task")["evaluation"].unique().map(sorted)
    assert set(by_task.index) == {"cats", "dogs", "pets"}
    assert all(len(set(evaluations)) == 2 for evaluations in by_task)
    assert all("data " in text for evaluations in by_task for text in evaluations)
    assert {"1 examples" in text for text in by_task["pets"]} == {True, False}
    assert rows["key"].nunique() == 2
    (tmp_path / "tasks" / "dogs.csv").write_text("q,a,b,gold\nThe dogs,ran,sat,0\n")
    assert kbit("run", *common).code == 0
    again = read_results("results")
    assert again["key"].nunique() == 3
    assert again[again["task"] == "pets"]["evaluation"].nunique() == 3


def test_a_run_without_a_number_is_an_error(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", "[]")
    config = EvalConfig(tasks=("cats",), perplexity=None, task_path=folder)
    with pytest.raises(ValueError, match="the task 'cats' measures nothing: its metric_list is empty"):
        run_experiment(Experiment(quant=BASELINE, eval=config))


def test_two_runs_are_two_families_unless_the_user_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    config = EvalConfig(tasks=(), perplexity_windows=1)
    for run, model in (("a", "nano-neox-98k"), ("b", "nano-opt-98k")):
        shutil.copytree(EMBEDDED / model, tmp_path / "runs" / run / "checkpoint-1000")
        found = ModelConfig(str(tmp_path / "runs" / run / "checkpoint-1000"))
        store.write(run_experiment(Experiment(found, BASELINE, config)))
    named = dataclasses.replace(found, family="mine", dtype="bfloat16")
    result = run_experiment(Experiment(named, BASELINE, config))
    assert result.family == "mine"
    rows = read_results(tmp_path / "results").drop_duplicates("key")
    assert dict(zip(rows["family"], rows["architecture"], strict=True)) == {
        "runs/a": "GPTNeoXForCausalLM",
        "runs/b": "OPTForCausalLM",
    }


def test_an_older_record_of_a_local_model_has_the_family_of_its_run(tmp_path: Path) -> None:
    config = EvalConfig(tasks=(), perplexity_windows=1)
    result = run_experiment(Experiment(quant=BASELINE, eval=config))
    model = ModelConfig("/far/runs/a/checkpoint-7")
    old = dataclasses.replace(
        result, key="0" * 16, family="checkpoint-7", experiment=dataclasses.replace(result.experiment, model=model)
    )
    store = Store(tmp_path / "results")
    store.write(result)
    store.write(old)
    rows = read_results(tmp_path / "results").drop_duplicates("key").set_index("key")["family"]
    assert rows.to_dict() == {result.key: "nano-neox", old.key: "runs/a"}


def test_a_quantized_checkpoint_is_recorded_and_left_out_of_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kbit.experiments.session,
        "load_model",
        lambda *names, packed_as, **options: dataclasses.replace(
            load_model(*names, **options), checkpoint_quantization="gguf Q4_0"
        ),
    )
    experiment = Experiment(quant=BASELINE, eval=EvalConfig(tasks=(), perplexity_windows=1))
    result = Session(experiment.model).run(experiment)
    assert result.checkpoint_quantization == "gguf Q4_0"
    store = Store(tmp_path / "results")
    store.write(result)
    store.write(dataclasses.replace(result, key="0" * 16, checkpoint_quantization=""))
    rows = read_results(tmp_path / "results")
    assert set(rows["checkpoint"].dropna()) == {"gguf Q4_0"}
    with pytest.warns(UserWarning, match="1 experiments on quantized checkpoints"):
        assert set(leave_out_checkpoints(rows)["key"]) == {"0" * 16}


def test_a_model_with_parts_has_a_name_of_its_own(tmp_path: Path) -> None:
    config = EvalConfig(tasks=(), perplexity_windows=1)
    result = run_experiment(Experiment(ModelConfig(tokenizer="nano-opt-98k"), BASELINE, config))
    store = Store(tmp_path / "results")
    store.write(result)
    assert set(read_results(tmp_path / "results")["model"]) == {"nano-neox-98k tokenizer=nano-opt-98k"}
    record = json.loads(next((tmp_path / "results" / "experiments").glob("*.json")).read_text())
    assert record["experiment"]["model"]["tokenizer"] == "nano-opt-98k"
