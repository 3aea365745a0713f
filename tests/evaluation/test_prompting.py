"""Examples before a question and chat templates: the same prompts and numbers as lm-eval's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kbit.data.tasks import load_tasks
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import evaluate, prepare_task, score_tasks
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.models.loading import load_model

YAML = """
task: pets
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
description: "Pets.\\n"
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: gold
"""
TEMPLATE = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)
ANIMALS = ("cat", "dog", "mouse", "hen", "old goat", "bee", "little owl", "horse")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "pets.yaml").write_text(YAML)
    rows = [
        {"q": f"The {a} saw a", "a": b, "b": f"{a} and", "gold": len(a) % 2}
        for a, b in zip(ANIMALS, ANIMALS[::-1], strict=True)
    ]
    for name, part in (("train", rows[:4]), ("test", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(tmp_path)


@pytest.mark.parametrize(("shots", "chat"), [(2, False), (3, True)])
def test_prompts_and_numbers_are_lm_evals(folder: str, shots: int, chat: bool) -> None:
    loaded = load_model("nano-neox-98k")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = TEMPLATE
    [task] = load_tasks(["pets"], folder)
    theirs: Any = lm_eval.simple_evaluate(
        HFLM(loaded.model, tokenizer=tokenizer, batch_size=8),
        tasks=[copy.deepcopy(task.task)],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=shots,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
    )
    scorer = Scorer(loaded.model, tokenizer)
    prepared = prepare_task(task, None, shots, scorer if chat else None)
    asked = [i.arguments for i in prepared.instances]
    assert asked == [tuple(arguments) for s in theirs["samples"]["pets"] for arguments in s["arguments"]]
    assert asked[0][0].count("saw a") == 1 + shots
    assert asked[0][0].count("<user>") == (1 + shots if chat else 0)
    for m in score_tasks(scorer, [prepared]).measurements:
        assert m.value == pytest.approx(theirs["results"]["pets"][f"{m.metric},none"])
    assert score_tasks(scorer, [prepared]).measurements == evaluate(
        loaded.model, tokenizer, "pets", task_path=folder, num_fewshot=shots, apply_chat_template=chat
    )


def test_a_tokenizer_without_a_chat_template_is_refused(folder: str) -> None:
    loaded = load_model("nano-neox-98k")
    with pytest.raises(ValueError, match=r"eval\.apply_chat_template: the tokenizer of .*98k has no chat template"):
        evaluate(loaded.model, loaded.tokenizer, "pets", task_path=folder, apply_chat_template=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("training_split: train\n", ""), "'pets' has no examples .*and its items would be among their own"),
        (("doc_to_target: gold", "doc_to_target: gold\nnum_fewshot: 0"), "'pets' says num_fewshot: 0"),
        (("", ""), "'pets' has 4 examples to draw from"),
    ],
)
def test_examples_that_are_not_there_are_refused(folder: str, change: tuple[str, str], message: str) -> None:
    path = Path(folder) / "pets.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=f"eval.num_fewshot=4: the task {message}"):
        prepare_task(load_tasks(["pets"], folder)[0], None, 4)


def test_how_tasks_are_asked_is_in_the_key_when_set() -> None:
    plain = find_key(Experiment())
    asked = [EvalConfig(num_fewshot=0), EvalConfig(num_fewshot=5), EvalConfig(apply_chat_template=True)]
    assert len({plain, *(find_key(Experiment(eval=config)) for config in asked)}) == 4
    without = EvalConfig(tasks=(), num_fewshot=5, apply_chat_template=True)
    assert find_key(Experiment(eval=without)) == find_key(Experiment(eval=EvalConfig(tasks=())))


def test_a_tokenizer_without_a_token_to_begin_with_is_named(folder: str) -> None:
    loaded = load_model("nano-neox-98k")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer of .*98k has neither a BOS nor an EOS token.*model\.tokenizer"):
        evaluate(loaded.model, tokenizer, "pets", task_path=folder)


def test_a_token_that_the_model_lacks_is_named(folder: str) -> None:
    loaded = load_model("nano-neox-98k")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [" saw"]})
    with pytest.raises(ValueError, match="the token ' saw' of id 1024, and the model's embedding has 1024 rows"):
        evaluate(loaded.model, tokenizer, "pets", task_path=folder)
