"""Groups and tags: the tasks that they stand for, and their numbers, beside lm-eval's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import kbit.data.tasks
from kbit.data.task_files import expand_names
from kbit.data.tasks import load_tasks
from kbit.evaluation.measurement import Measurement
from kbit.evaluation.zero_shot import evaluate
from kbit.experiments.identity import identify_tasks
from kbit.models.loading import LoadedModel, load_model

TASK = """
task: NAME
tag: [pets]
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: NAME.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GROUP = """
group: all_mine
task:
  - task: birds
    num_fewshot: 1
  - group: inner
    task: [cats, dogs]
    aggregate_metric_list: {metric: acc, weight_by_size: false}
description: "Pets.\\n"
aggregate_metric_list: [{metric: acc}]
"""
SIZES = {"cats": 6, "dogs": 3, "birds": 4}
NAMES = tuple(SIZES)
SUBJECTS = ("anatomy", "astronomy", "marketing", "philosophy", "sociology", "world_religions")  # of MMLU
WORDS = ("the", "a small", "mouse", "in the old house", "ran", "away from", "it")


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    pick = [WORDS[(seed * 5 + i * i + 3 * i) % len(WORDS)] for i in range(3 * count + 2)]
    return [
        {"q": f"Once {pick[i]} {pick[i + 1]}", "a": pick[2 * i], "b": pick[i + 2] + " then", "gold": (i + seed) % 2}
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three tasks, their tag, a group and a group within it, where lm-eval finds the data, too."""
    for number, (name, size) in enumerate(SIZES.items()):
        (tmp_path / f"{name}.yaml").write_text(TASK.replace("NAME", name))
        lines = (json.dumps(row) + "\n" for row in make_rows(size, number))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(5, 9)))
    (tmp_path / "group.yaml").write_text(GROUP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("nano-neox-98k")


def ask_lm_eval(loaded: LoadedModel, manager: TaskManager, tasks: list[str], **options: Any) -> dict[str, Any]:
    model = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=8)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False, **options
    )["results"]
    return results


def accuracies(measurements: list[Measurement]) -> dict[str, float]:
    return {m.task: m.value for m in measurements if m.metric == "acc"}


def test_a_group_of_ones_own_measures_what_lm_eval_measures(folder: Path, loaded: LoadedModel) -> None:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = ask_lm_eval(loaded, manager, ["all_mine"])
    mine = accuracies(evaluate(loaded.model, loaded.tokenizer, "all_mine", task_path=str(folder)))
    assert mine == pytest.approx({name: theirs[name]["acc,none"] for name in mine})
    assert set(mine) == {*NAMES, "all_mine", "all_mine::inner"} == set(theirs)
    assert len({round(mine[name], 6) for name in (*NAMES, "all_mine")}) > 2  # not all alike


def test_a_group_counts_once_in_the_mean(folder: Path, loaded: LoadedModel) -> None:
    measured = evaluate(loaded.model, loaded.tokenizer, ["nano_choice", "all_mine"], limit=6, task_path=str(folder))
    values = accuracies(measured)
    assert values["mean_zero_shot"] == pytest.approx((values["nano_choice"] + values["all_mine"]) / 2)
    assert measured[-1].n == 6 + sum(SIZES.values())


def test_a_tag_stands_for_its_tasks_and_has_no_number(folder: Path, loaded: LoadedModel) -> None:
    values = accuracies(evaluate(loaded.model, loaded.tokenizer, ["pets"], task_path=str(folder)))
    assert set(values) == {*NAMES, "mean_zero_shot"}
    assert values["mean_zero_shot"] == pytest.approx(sum(values[name] for name in NAMES) / 3)


def test_groups_are_in_the_key_and_known_without_lm_eval(folder: Path) -> None:
    before = identify_tasks(["all_mine", "pets", "piqa"], str(folder))
    assert [name.partition("@")[0] for name in before] == ["all_mine", "pets", "piqa"]
    assert [name for name in before if "@" not in name] == ["piqa"]
    (folder / "dogs.jsonl").write_bytes(b"{}")
    after = identify_tasks(["all_mine", "pets", "piqa"], str(folder))
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, False, True]
    assert expand_names(["pets", "piqa"], str(folder)) == ["birds", "cats", "dogs", "piqa"]
    assert expand_names(["all_mine"], str(folder)) == ["birds", "cats", "dogs"]


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (("[cats, dogs]", "[all_mine]"), ["all_mine"], r"group\.yaml: the group 'all_mine' contains itself"),
        (("[cats, dogs]", "[3]"), ["all_mine"], r"group\.yaml: task=.* is no list of the group's tasks"),
        (("", ""), ["all_mine", "cats"], "the task 'cats' is asked twice: by 'all_mine' and 'cats'"),
        (("[{metric: acc}]", "[{metric: acc, aggregation: median}]"), ["all_mine"], "'mean' is the only"),
    ],
)
def test_a_wrong_group_is_named(folder: Path, change: tuple[str, str], names: list[str], message: str) -> None:
    text = (folder / "group.yaml").read_text()
    assert change[0] in text
    (folder / "group.yaml").write_text(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_tasks(names, str(folder))


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lm-eval's own definitions of six subjects of MMLU, on a few rows of ours instead of the hub's."""
    folder = tmp_path / "subjects"
    folder.mkdir()
    default = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    for path in (*default.glob("_*"), *(default / f"mmlu_{name}.yaml" for name in SUBJECTS)):
        shutil.copy(path, folder)

    def load_rows(path: str, name: str, **_: Any) -> datasets.DatasetDict:
        assert path == "cais/mmlu"
        rows = [
            {"question": row["q"], "choices": [row["a"], row["b"], name, "none"], "answer": row["gold"]}
            for row in make_rows(2 + len(name) % 3, len(name))
        ]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("test", "dev")})

    monkeypatch.setattr(datasets, "load_dataset", load_rows)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(kbit.data.tasks, "_make_manager", lambda **_: manager)
    return folder


def test_lm_evals_group_mmlu_is_asked_by_its_name(subjects: Path, loaded: LoadedModel) -> None:
    mine = evaluate(loaded.model, loaded.tokenizer, "mmlu", num_fewshot=1, limit=2)
    manager = TaskManager(include_path=str(subjects), include_defaults=False)
    theirs = ask_lm_eval(loaded, manager, ["mmlu"], num_fewshot=1, limit=2)
    values = accuracies(mine)
    assert len(values) == len(theirs) == len(SUBJECTS) + 5
    assert values == pytest.approx({name: theirs[name]["acc,none"] for name in values})
    assert not any(m.task == "mean_zero_shot" for m in mine)  # one accuracy was asked for


def test_a_group_of_ones_own_changes_and_names_what_is_lm_evals(subjects: Path, tmp_path: Path) -> None:
    """A task with changes, a group (with a group within it) and a tag, which the group's own change reaches, too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "group.yaml").write_text(
        "group: mine\nnum_fewshot: 2\ntask:\n- {task: mmlu_anatomy, num_fewshot: 1}\n- mmlu_social_sciences\n"
        "- {task: mmlu_humanities_tasks, description: 'Think.'}\n"
    )
    loaded = {task.name: task for task in load_tasks(["mine"], str(tmp_path / "mine"))}
    human = ("mmlu_philosophy", "mmlu_world_religions")
    assert set(loaded) == {"mmlu_anatomy", "mmlu_sociology", *human}
    assert {name: task.task.config.num_fewshot for name, task in loaded.items()} == dict.fromkeys(loaded, 2) | {
        "mmlu_anatomy": 1
    }
    assert {name for name, task in loaded.items() if task.task.config.description == "Think."} == set(human)
    assert {name: [group.name for group in task.groups] for name, task in loaded.items()} == {
        "mmlu_anatomy": ["mine"],
        "mmlu_sociology": ["mine", "mmlu_social_sciences", "mmlu_social_sciences_tasks"],
    } | {name: ["mine", "mmlu_humanities_tasks"] for name in human}


@pytest.mark.parametrize("member", ["mmlu_anatomie", "{task: mmlu_anatomie, num_fewshot: 1}"])
def test_what_a_group_names_and_lm_eval_has_not_is_named(subjects: Path, tmp_path: Path, member: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "group.yaml").write_text(f"group: mine\ntask: [{member}]\n")
    with pytest.raises(ValueError, match=r"group\.yaml: group 'mine' names 'mmlu_anatomie', which is no task"):
        load_tasks(["mine"], str(tmp_path / "mine"))


def test_groups_that_name_each_other_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [{other}]\n")
    with pytest.raises(ValueError, match=r"one\.yaml: the group 'one' contains itself: one > two > one"):
        expand_names(["one"], str(tmp_path))
