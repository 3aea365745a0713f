"""Evaluation of a model in memory: what is asked, what is refused, and what a broken model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.data.tasks import load_tasks
from kbit.evaluation.measurement import NonFiniteError, decode_items
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import evaluate, prepare_task, score_tasks
from kbit.models.loading import load_model

ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""


TWO_FILTERS = """
task: sum
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["!"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: number, filter: [{function: regex, regex_pattern: "[0-9]+"}, {function: take_first}]}
"""


class Talker(Scorer):
    """Answers with some words before the number."""

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [f"it is {i}" for i in range(len(requests))]


class Oracle(Scorer):
    """Prefers the first choice of each item, or the last."""

    prefers = -1.0

    def score_tokens(self, requests: Any) -> list[tuple[float, bool]]:
        return [(self.prefers * i, False) for i in range(len(requests))]


def test_one_task_may_be_a_string() -> None:
    loaded = load_model("nano-neox-98k")
    one = evaluate(loaded.model, loaded.tokenizer, "nano_choice", limit=3)
    assert one == evaluate(loaded.model, loaded.tokenizer, ["nano_choice"], limit=3)
    assert [m.metric for m in one] == ["acc", "acc_norm", "acc_bytes"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    [loaded] = load_tasks(["nano_choice"])
    with pytest.raises(ValueError, match=f"limit={limit} is not >= 1"):
        prepare_task(loaded, limit)


@pytest.mark.parametrize("tasks", ["nano_choice", "hellaswag", "nano_cloze"])
def test_a_nan_weight_gives_an_error_and_no_accuracy(
    build_tiny: Callable[..., Any], tokenizer: Any, tasks: str
) -> None:
    model = build_tiny("gpt_neox", vocab_size=1024)
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[3] = float("nan")
    with pytest.raises(NonFiniteError, match="log-likelihood nan"):
        evaluate(model, tokenizer, tasks, limit=2)


@pytest.mark.parametrize("task", ["nano_cloze", "rolling"])
def test_a_perplexity_beyond_float64_costs_no_other_number(tmp_path: Path, task: str) -> None:
    loaded = load_model("nano-neox-98k")
    (tmp_path / "rolling.yaml").write_text(ROLLING)
    (tmp_path / "text.jsonl").write_text('{"text": "one mouse"}\n{"text": "two mice"}\n')
    oracle = Oracle(loaded.model, loaded.tokenizer)
    oracle.prefers = -6000.0  # nats, of the second request
    [prepared] = [prepare_task(one, 2) for one in load_tasks([task], str(tmp_path))]
    metrics = {m.metric for m in score_tasks(oracle, [prepared]).measurements}
    assert metrics == ({"acc"} if task == "nano_cloze" else {"byte_perplexity"})


@pytest.mark.parametrize(("prefers", "accuracy"), [(-1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("limit", [1, 12])
def test_accuracies_of_exactly_0_and_1_have_intervals(prefers: float, accuracy: float, limit: int) -> None:
    loaded = load_model("nano-neox-98k")
    [task] = load_tasks(["nano_choice"])
    rows = task.task.dataset["test"]
    task.task.dataset["test"] = rows.select([i for i in range(100) if task.task.doc_to_target(rows[i]) == 0][:12])
    oracle = Oracle(loaded.model, loaded.tokenizer)
    oracle.prefers = prefers
    scores = score_tasks(oracle, [prepare_task(task, limit)])
    acc = next(m for m in scores.measurements if m.metric == "acc")
    assert (acc.value, acc.n) == (accuracy, limit)
    assert 0 <= acc.low < acc.high <= 1
    assert decode_items(scores.items[0]).tolist() == [accuracy] * limit


def test_every_filter_of_a_task_is_measured_and_only_accuracies_are_averaged(tmp_path: Path) -> None:
    loaded = load_model("nano-neox-98k")
    (tmp_path / "sum.yaml").write_text(TWO_FILTERS)
    (tmp_path / "rows.jsonl").write_text('{"text": "0?", "gold": "0"}\n{"text": "2?", "gold": "2"}\n')
    [task] = load_tasks(["sum"], str(tmp_path))
    scores = score_tasks(Talker(loaded.model, loaded.tokenizer), [prepare_task(task)])
    measured = {(m.task, m.metric): (m.value, m.n) for m in scores.measurements}
    assert measured == {("sum", "exact_match"): (0.0, 2), ("sum", "exact_match,number"): (0.5, 2)}
    both = [prepare_task(one, 2) for one in load_tasks(["sum", "nano_choice", "nano_cloze"], str(tmp_path))]
    *_, mean = score_tasks(Talker(loaded.model, loaded.tokenizer), both).measurements
    assert (mean.task, mean.n) == ("mean_zero_shot", 4)  # of the two tasks that have an accuracy
