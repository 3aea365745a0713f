"""Which studies can stop when they know. All is said before anything is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import RunConfig, StudyConfig, UntilConfig
from kbit.experiments.decidable import check_decidable
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig

MODELS = ("nano-neox-98k", "nano-neox-332k")
TWO = ("nano_cloze", "nano_choice")


def make_study(
    *evaluations: EvalConfig, quants: tuple[QuantConfig, ...] = (), until: UntilConfig | None = None
) -> list[RunConfig]:
    """A study of two sizes, at 3 and 4 bits unless it says otherwise. The second one may be measured in another way."""
    study = StudyConfig(until=until or UntilConfig(decided=True))
    quants = quants or (QuantConfig(bits=3), QuantConfig(bits=4))
    pairs = zip(MODELS, (evaluations * 2)[:2], strict=True)
    return [
        RunConfig(model=ModelConfig(model), quant=quant, eval=evaluation, study=study)
        for model, evaluation in pairs
        for quant in quants
    ]


def wait_for(*metrics: str, **fields: Any) -> UntilConfig:
    return UntilConfig(decided=True, metrics=metrics, **fields)


@pytest.mark.parametrize(
    ("evaluation", "until", "message"),
    [
        (EvalConfig(tasks=("nano_cloze",)), wait_for(), r"\[nano_cloze\] has 1.*metrics=\[cross_entropy\]"),
        (EvalConfig(tasks=("nano_cloze",), perplexity=None), wait_for(), r"has 1.*or study\.until\.decided=false"),
        (EvalConfig(tasks=()), wait_for("acc"), r"eval\.tasks=\[\] has 0"),
        (EvalConfig(tasks=TWO, perplexity=None), wait_for("cross_entropy"), r"eval\.perplexity=null has none"),
    ],
)
def test_a_verdict_that_no_value_is_measured_for_is_refused(
    evaluation: EvalConfig, until: UntilConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_decidable(make_study(evaluation, until=until))


@pytest.mark.parametrize(
    ("evaluation", "until"),
    [
        (EvalConfig(tasks=("nano_cloze",)), wait_for("cross_entropy")),
        (EvalConfig(tasks=()), wait_for()),
        (EvalConfig(tasks=TWO, perplexity=None), wait_for("acc")),
    ],
)
def test_what_has_its_values_is_taken(evaluation: EvalConfig, until: UntilConfig) -> None:
    check_decidable(make_study(evaluation, until=until))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 8}, r"nano-neox have eval\.limit=None and 8"),
        ({"perplexity_windows": 8}, r"eval\.perplexity_windows=256 and 8"),
        ({"tasks": (*TWO, "nano_swap")}, r"eval\.tasks="),
    ],
)
def test_one_family_is_measured_in_one_way(changes: dict[str, Any], message: str) -> None:
    evaluation = EvalConfig(tasks=TWO)
    check_decidable(make_study(evaluation, dataclasses.replace(evaluation, batch_size=2)))
    with pytest.raises(ValueError, match=message):
        check_decidable(make_study(evaluation, dataclasses.replace(evaluation, **changes)))


TYPES = (QuantConfig(bits=4, data_type="nf"), QuantConfig(bits=4, data_type="int"))


@pytest.mark.parametrize(
    ("quants", "claims", "competes"),
    [
        ((QuantConfig(bits=3), QuantConfig(bits=4)), ("precision",), True),
        ((QuantConfig(bits=3), QuantConfig(bits=4)), ("setting",), False),
        (TYPES, ("precision",), False),
        (TYPES, ("setting",), True),
        ((QuantConfig(bits=16), QuantConfig(bits=4)), ("precision", "setting"), False),
        ((QuantConfig(bits=16), QuantConfig(bits=4)), ("frontier",), True),
        (
            (QuantConfig(bits=3, data_type="float", exponent_bits=2), QuantConfig(bits=5, data_type="float")),
            ("precision",),
            True,
        ),
    ],
)
def test_something_competes(quants: tuple[QuantConfig, ...], claims: tuple[str, ...], *, competes: bool) -> None:
    study = make_study(EvalConfig(tasks=TWO), quants=quants, until=wait_for(claims=claims))
    if competes:
        check_decidable(study)
        return
    with pytest.raises(ValueError, match="nothing competes"):
        check_decidable(study)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("multiple_choice", "metric_list: [{metric: acc}, {metric: f1}]", "f1 of the task 'mine' is no mean"),
        ("loglikelihood_rolling", "", "word_perplexity of the task 'mine' is no mean"),
        ("multiple_choice", "tag: several", "the group 'several' has a mean of its own"),
    ],
)
def test_tasks_that_need_all_items_are_refused(tmp_path: Path, kind: str, more: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine", kind=kind, more=more))
    asked = "several" if "several" in message else "mine"
    evaluation = EvalConfig(tasks=(*TWO, asked), task_path=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        check_decidable(make_study(evaluation))
