"""A user's own measure: written to a file, run, stored, read back and drawn. What is wrong with one is said first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kbit.analysis.curves.curves import precision_curves
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.panels import draw_panels
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measure import Memory
from kbit.evaluation.measurement import Measurement, NonFiniteError, check_own
from kbit.evaluation.measures import MEASURES, check_measures
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.session import Session
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.items import read_items
from kbit.store.readers import read_results
from kbit.store.records import read_records
from kbit.store.store import Store

# How much of the model's own 16-bit argmax it still says after quantization, on the windows of eval.perplexity.
AGREEMENT = '''
"""The share of tokens for which the quantized model still says what the 16-bit model said."""
from kbit.evaluation.measure import Measure, Measured, Subject
from kbit.evaluation.measurement import encode_items, measure_mean


class Words(list):
    """The 16-bit model's most likely tokens, window by window."""


def say(subject: Subject):
    tokens = subject.make_windows().tokens[:, :32]
    return subject.model(tokens).logits.argmax(-1)


class Agreement(Measure):
    name = "agreement"

    def prepare(self, subject: Subject) -> None:
        words = subject.memory.recall(Words)
        if not words:  # of the first variant: the others have the same 16-bit model
            words.extend(say(subject))

    def run(self, subject: Subject) -> Measured:
        words = subject.memory.recall(Words)
        shares = [float((now == then).double().mean()) for now, then in zip(say(subject), words)]
        task = f"{self.name}/{subject.config.perplexity}"
        return Measured(
            [measure_mean(task, "same", shares)], [encode_items(task, "same", shares)], notes={"windows": len(shares)}
        )
'''
SMALL, TASK = ModelConfig("nano-neox-98k"), "agreement/nano_held_out"


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The measure, in a file of the current directory."""
    assert len(AGREEMENT.splitlines()) < 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_agreement.py").write_text(AGREEMENT)
    return "my_agreement.py:Agreement"


def asking(*measures: str) -> EvalConfig:
    return EvalConfig(tasks=(), perplexity_windows=3, measures=measures)


def key_of(*measures: str) -> str:
    return find_key(Experiment(eval=asking(*measures)))


@pytest.mark.parametrize("asked", ["my_agreement.py:Agreement", "my_agreement:Agreement"])
def test_a_measure_from_a_file_is_run_stored_and_drawn(
    kbit: Callable[..., Any], tmp_path: Path, measure: str, asked: str
) -> None:
    text = ("eval.tasks=[]", "eval.perplexity_windows=3", f"eval.measures=[{asked}]")
    for bits in ("16", "3"):
        done = kbit("run", *text, f"quant.bits={bits}", "quant.block_size=64")
        assert done.code == 0, done.err
        assert TASK in done.out
    results = read_results(tmp_path / "results")
    ours: dict[int, Any] = results[results["task"] == TASK].set_index("bits").to_dict("index")  # type: ignore[assignment]
    low = ours[3]
    assert ours[16]["value"] == 1
    assert 0 < low["value"] < 1
    assert low["low"] <= low["value"] <= low["high"]
    way = low["evaluation"]
    assert re.fullmatch(r"float32, 3 windows of \d+ tokens, text \w{8}, measure \w{8}", way), way
    items = read_items(tmp_path / "results", TASK, "same", [low["key"]])[low["key"]]
    assert items.mean() == pytest.approx(low["value"], abs=1e-6)
    [record] = read_records(tmp_path / "results", "experiments", [low["key"]])
    assert [(m["name"], m["notes"]) for m in record["measures"]] == [("agreement", {"windows": 3})]
    curve = precision_curves(results, "same", TASK)
    assert curve["bits"].tolist() == [3, 16]
    assert curve["value"].tolist() == [low["value"], 1]
    published = pd.DataFrame(columns=["panel", "total_bits", "value"])  # none
    shown = curve.assign(panel=curve["family"], series=curve["data_type"], varied="method")
    figure = draw_panels(shown, "equal tokens", True, published, pd.DataFrame(), Page())
    lines: Any = figure.axes[0].get_lines()
    drawn = [line.get_ydata() for line in lines if len(line.get_xdata()) == 2]
    assert drawn == [pytest.approx(curve["value"])]


def test_it_is_part_of_the_key_by_its_content_only_if_it_is_asked_for(measure: str) -> None:
    key = key_of(measure)
    assert key_of("my_agreement:Agreement") == key != key_of()
    Path("elsewhere.py").write_text(AGREEMENT)
    assert key_of("elsewhere.py:Agreement") == key
    Path("my_agreement.py").write_text(AGREEMENT.replace(":, :32", ":, :31"))
    assert key_of(measure) != key


def test_an_edited_measure_is_imported_again(measure: str, tmp_path: Path) -> None:
    session, values, ways = Session(SMALL), [], []
    for task in ("agreement", "agreement_2"):
        Path("my_agreement.py").write_text(AGREEMENT.replace('"agreement"', f'"{task}"'))
        result = session.run(Experiment(SMALL, QuantConfig(bits=3), asking(measure)))
        Store(tmp_path / "results").write(result)
        values += [m.value for m in result.measurements if m.metric == "same"]
        ways += [m.task for m in result.measurements if m.metric == "same"]
    assert ways == [TASK, TASK.replace("/", "_2/")]
    assert values[0] == values[1]


def test_an_edit_after_planning_is_an_error(measure: str) -> None:
    experiment = Experiment(SMALL, QuantConfig(bits=3), asking(measure))
    planned = find_key(experiment)
    Path("my_agreement.py").write_text(AGREEMENT + "\n")
    with pytest.raises(ValueError, match=r"my_agreement\.py:Agreement has changed since"):
        Session(SMALL).run(experiment, planned)


def test_what_a_store_could_not_write_is_an_error(measure: str) -> None:
    Path("my_agreement.py").write_text(AGREEMENT.replace('{"windows": len(shares)}', '{"tokens": say(subject)}'))
    with pytest.raises(ValueError, match=r"'agreement' gave something that is no plain value: .* Tensor"):
        Session(SMALL).run(Experiment(SMALL, QuantConfig(bits=3), asking(measure)))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("my_agreemnt.py:Agreement", "there is no file at .*; did you mean my_agreement.py?"),
        ("my_agreemnt:Agreement", "there is no module 'my_agreemnt' .*; did you mean my_agreement?"),
        ("my_agreement.py:Agrement", "'Agrement' is not one of: Words, Agreement; did you mean Agreement?"),
        ("my_agreement.py:Words", "is no measure: it has no name, fields, prepare, run"),
        ("broken.py:Measure", "cannot be imported: ZeroDivisionError: division by zero"),
        ("my.missing:Agreement", "there is no module 'my.missing'"),
    ],
)
def test_what_is_wrong_is_said_when_it_is_planned(
    kbit: Callable[..., Any], measure: str, asked: str, words: str
) -> None:
    Path("broken.py").write_text("1 / 0\n")
    done = kbit("plan", f"eval.measures=[{asked}]")
    assert done.code == 1
    assert re.search(words, done.err), done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_name_without_a_class_is_refused() -> None:
    for wrong in ("my_agreement", "my_agreement:", ":Agreement"):
        with pytest.raises(ValueError, match=r"is neither my\.module:Name nor my_measure\.py:Name"):
            EvalConfig(measures=(wrong,))


def test_names_tell_measures_apart(measure: str) -> None:
    Path("other.py").write_text(AGREEMENT.replace('"agreement"', '"features"'))
    Path("twin.py").write_text(AGREEMENT + "\n")
    for asked in ((measure, "twin.py:Agreement"), ("other.py:Agreement",)):
        with pytest.raises(ValueError, match="belongs to another measure"):
            check_measures(EvalConfig(measures=asked))


def test_a_measure_returns_finite_numbers_of_its_own_task() -> None:
    own = Measurement("mine/text", "m", 1.0, 0.0, 2.0, 3)
    check_own("mine", [own, dataclasses.replace(own, metric="other")], [])
    with pytest.raises(ValueError, match="gave a number of task 'mine/text'"):
        check_own("min", [own], [])
    with pytest.raises(ValueError, match="two numbers of one task"):
        check_own("mine", [own, own], [])
    with pytest.raises(NonFiniteError, match="m of 'mine/text' is nan"):
        check_own("mine", [dataclasses.replace(own, value=float("nan"))], [])


CHANGES: dict[str, Any] = {
    "tasks": ("nano_choice",),
    "limit": 3,
    "perplexity": None,
    "perplexity_kind": "rolling",
    "perplexity_windows": 7,
    "num_fewshot": 2,
    "apply_chat_template": True,
}


def test_every_field_belongs_to_a_measure_and_to_the_key(measure: str, tmp_path: Path) -> None:
    """All but the batch size, which decides no number, and the folder of tasks, whose tasks are in the key."""
    fields = {field for measure in MEASURES for field in measure.fields}
    assert fields == {field.name for field in dataclasses.fields(EvalConfig)} - {"batch_size"}
    usual = Experiment()
    changes = CHANGES | {"measures": (measure,), "features": dataclasses.replace(usual.eval.features, measure=True)}
    changes["speed"] = dataclasses.replace(usual.eval.speed, measure=True)
    assert changes.keys() == fields - {"task_path"}
    for name, value in changes.items():
        assert find_key(Experiment(eval=dataclasses.replace(usual.eval, **{name: value}))) != find_key(usual)


def test_memory_keeps_one_object_of_each_kind() -> None:
    memory = Memory()
    memory.recall(list).append(1)
    assert memory.recall(list) == [1]
    assert memory.recall(dict) == {}
