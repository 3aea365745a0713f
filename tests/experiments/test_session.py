"""A session outlives edits of the files that it reads: no result holds numbers of one content under another's key."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kbit.data.windows
import kbit.evaluation.perplexity
import kbit.evaluation.zero_shot
import kbit.experiments.session
from kbit.engine.worker import Worker
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import PreparedTasks
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.session import Session, run_experiment
from kbit.methods.config import QuantConfig
from kbit.models.catalog import locate_model
from kbit.models.config import ModelConfig
from kbit.store.readers import read_failures, read_results
from kbit.store.store import Store

SMALL, NF4 = ModelConfig("nano-neox-98k"), QuantConfig(bits=4, data_type="nf")
STORIES = ("Once there was a mouse who lived in a clock. " * 60, "The ship went down with all hands and no bell. " * 60)
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "The mouse ran"
doc_to_choice: [" away", " xylophone"]
doc_to_target: gold
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(SMALL)


def write_text(path: Path, story: str) -> None:
    path.write_text(json.dumps({"text": story}) + "\n")


def of_text(path: Path, kind: str = "windows") -> Experiment:
    return Experiment(SMALL, NF4, EvalConfig((), perplexity=str(path), perplexity_windows=2, perplexity_kind=kind))


def write_tasks(folder: Path, gold: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(TASK)
    (folder / "rows.jsonl").write_text(json.dumps({"gold": gold}) + "\n")


def of_tasks(folder: Path) -> Experiment:
    return Experiment(SMALL, NF4, EvalConfig(("mine",), perplexity=None, task_path=str(folder)))


def values(result: Result) -> list[float]:
    return [m.value for m in result.measurements]


@pytest.mark.parametrize("kind", ["windows", "rolling"])
def test_a_text_that_is_edited_is_measured_again(session: Session, tmp_path: Path, kind: str) -> None:
    path, results = tmp_path / "story.jsonl", []
    for story in (*STORIES, STORIES[0]):
        write_text(path, story)
        results.append(session.run(of_text(path, kind)))
    first, second, third = results
    assert first.key == third.key != second.key
    assert values(first) == values(third) != values(second)
    write_text(path, STORIES[1])
    assert values(second) == values(Session(SMALL).run(of_text(path, kind)))


def test_a_task_whose_rows_are_edited_is_asked_again(session: Session, tmp_path: Path) -> None:
    accuracies, keys = [], []
    for gold in (0, 1, 0):
        write_tasks(tmp_path, gold)
        result = session.run(of_tasks(tmp_path))
        accuracies.append(values(result))
        keys.append(result.key)
    assert accuracies == [[1.0], [0.0], [1.0]]
    assert keys[0] == keys[2] != keys[1]


def test_two_texts_of_one_content_are_each_measured_by_their_own_name(session: Session, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    for name in names:
        write_text(Path(name), STORIES[0])
    results = [session.run(of_text(Path(name))) for name in names]
    assert values(results[0]) == values(results[1])
    assert results[0].key == results[1].key
    assert [{m.task for m in result.measurements} for result in results] == [{name} for name in names]


def count_references(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The states that are computed from now on."""
    original, computed = kbit.evaluation.perplexity.compute_reference, []

    def compute(*arguments: Any) -> Any:
        states = original(*arguments)
        computed.append(weakref.ref(states))
        return states

    monkeypatch.setattr(kbit.evaluation.perplexity, "compute_reference", compute)
    return computed


def test_the_states_of_an_earlier_text_are_dropped(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are gigabytes of a temporary folder, once for each text of a study if they stay."""
    computed = count_references(monkeypatch)
    for number in range(3):
        write_text(tmp_path / f"{number}.jsonl", STORIES[0])
        session.run(of_text(tmp_path / f"{number}.jsonl"))
    assert [states() is None for states in computed] == [True, True, False]


def test_the_states_of_one_text_are_computed_once(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "once.jsonl", STORIES[0])
    computed = count_references(monkeypatch)
    for bits in (3, 4, 16):
        session.run(dataclasses.replace(of_text(tmp_path / "once.jsonl"), quant=QuantConfig(bits=bits)))
    assert len(computed) == 1


@pytest.mark.parametrize("what", ["text", "tasks"])
def test_a_file_edited_after_planning_is_an_error(session: Session, tmp_path: Path, what: str) -> None:
    path = tmp_path / "data"
    if what == "text":
        write_text(path, STORIES[0])
        experiment = of_text(path)
        planned = find_key(experiment)
        write_text(path, STORIES[1])
    else:
        write_tasks(path, 0)
        experiment = of_tasks(path)
        planned = find_key(experiment)
        write_tasks(path, 1)
    with pytest.raises(ValueError, match=f"{path}.* has changed since {planned} was planned"):
        session.run(experiment, planned)


@pytest.mark.parametrize("edited", ["rows.jsonl", "mine.yaml", "text.jsonl"])
def test_results_of_an_edited_file_are_told_apart(session: Session, tmp_path: Path, edited: str) -> None:
    write_tasks(tmp_path / "tasks", 0)
    text = tmp_path / "tasks" / "text.jsonl"
    write_text(text, STORIES[0])
    wanted = of_tasks(tmp_path / "tasks")
    wanted = dataclasses.replace(wanted, eval=dataclasses.replace(wanted.eval, perplexity=str(text)))
    store = Store(tmp_path / "results")
    store.write(session.run(wanted))
    path = tmp_path / "tasks" / edited
    path.write_text(path.read_text().replace("0}", "1}").replace("ran", "sat"))
    if edited == "text.jsonl":
        write_text(text, STORIES[1])
    store.write(session.run(dataclasses.replace(wanted)))
    ways = read_results(store.path).groupby("task")["evaluation"].nunique()
    changed = str(text) if edited == "text.jsonl" else "mine"
    assert ways.to_dict() == {"mine": 1, str(text): 1} | {changed: 2}


def edit_before(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    edit: Callable[[], None],
    *,
    after: bool = False,
    times: int = 1,
) -> None:
    """Let a file be edited just before (or after) the function has read it, the first times."""
    original, edits = getattr(module, function), iter([edit] * times)

    def edited(*arguments: Any, **more: Any) -> Any:
        if after:
            done = original(*arguments, **more)
            next(edits, lambda: None)()
            return done
        next(edits, lambda: None)()
        return original(*arguments, **more)

    monkeypatch.setattr(module, function, edited)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("windows", kbit.data.windows), ("rolling", kbit.evaluation.perplexity)],
    ids=["windows", "rolling"],
)
def test_a_text_edited_while_it_is_read_is_an_error_and_not_kept(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: Any
) -> None:
    path = tmp_path / "story.jsonl"
    write_text(path, STORIES[0])
    edit_before(monkeypatch, module, "read_documents", lambda: write_text(path, STORIES[1]))
    with pytest.raises(ValueError, match=f"{path} was changed while it was read"):
        session.run(of_text(path, kind))
    write_text(path, STORIES[0])
    assert values(session.run(of_text(path, kind))) == values(Session(SMALL).run(of_text(path, kind)))


def test_a_task_edited_while_it_is_read_is_an_error_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(SMALL)  # which has not read these rows yet
    write_tasks(tmp_path, 0)
    edit_before(monkeypatch, kbit.evaluation.zero_shot, "load_tasks", lambda: write_tasks(tmp_path, 1))
    with pytest.raises(ValueError, match=f"{tmp_path} was changed while it was read"):
        session.run(of_tasks(tmp_path))
    write_tasks(tmp_path, 0)
    assert values(session.run(of_tasks(tmp_path))) == [1.0]


def copy_model(folder: Path, name: str) -> None:
    shutil.copytree(locate_model(name), folder, dirs_exist_ok=True)


def test_a_model_whose_files_are_replaced_is_loaded_again(tmp_path: Path) -> None:
    text = EvalConfig((), perplexity_windows=1)
    folder = tmp_path / "model"
    worker = Worker(str(tmp_path / "results"), "cpu")
    for name in ("nano-neox-98k", "nano-neox-332k"):
        copy_model(folder, name)
        experiment = Experiment(ModelConfig(str(folder)), NF4, text)
        assert worker.run(experiment, find_key(experiment)).error == ""
    table = read_results(tmp_path / "results")
    assert set(table["parameters"]) == {231_168, 532_320}  # of their model cards


def test_a_session_of_a_model_whose_files_are_replaced_refuses(tmp_path: Path) -> None:
    copy_model(tmp_path / "model", "nano-neox-98k")
    model = ModelConfig(str(tmp_path / "model"))
    session = Session(model)
    copy_model(tmp_path / "model", "nano-neox-332k")
    with pytest.raises(ValueError, match="this session holds"):
        session.run(Experiment(model, NF4, EvalConfig((), perplexity_windows=1)))


def test_a_model_replaced_while_it_is_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_model(tmp_path / "model", "nano-neox-98k")
    edit_before(
        monkeypatch,
        kbit.experiments.session,
        "load_model",
        lambda: copy_model(tmp_path / "model", "nano-neox-332k"),
        after=True,
    )
    with pytest.raises(ValueError, match="model was changed while it was read"):
        Session(ModelConfig(str(tmp_path / "model")))


def test_the_reason_is_in_the_store(tmp_path: Path) -> None:
    path = tmp_path / "story.jsonl"
    write_text(path, STORIES[0])
    experiment = of_text(path)
    planned = find_key(experiment)
    write_text(path, STORIES[1])
    outcome = Worker(str(tmp_path / "results"), "cpu").run(experiment, planned)
    assert "has changed since" in outcome.error
    assert Store(tmp_path / "results").finished_keys() == set()
    assert read_failures(tmp_path / "results")["reason"].str.contains("has changed since").all()


def test_models_of_a_family_render_and_tokenize_a_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nano-stories has another tokenizer; the tasks' texts are the same for it."""
    rendered: list[int] = []
    edit_before(monkeypatch, kbit.evaluation.zero_shot, "prepare_task", lambda: rendered.append(1), times=9)
    tokenized: list[int] = []
    edit_before(monkeypatch, Scorer, "tok_encode", lambda: tokenized.append(1), times=999)
    task = EvalConfig(("nano_choice",), limit=5, perplexity=None)
    worker, counts = Worker(str(tmp_path / "results"), "cpu"), []
    names = ("nano-neox-98k", "nano-neox-332k", "nano-stories-260k", "nano-neox-98k")
    for number, name in enumerate(names):
        quant = QuantConfig(bits=4 - (number == 3))
        experiment = Experiment(ModelConfig(name), quant, task)
        assert worker.run(experiment, find_key(experiment)).error == ""
        counts.append(len(tokenized))
    assert len(rendered) == 1
    of_one = counts[0]
    assert of_one > 0
    assert counts == [of_one, of_one, 2 * of_one, 3 * of_one]
    stored = read_results(tmp_path / "results").set_index(["model", "metric"])["value"].sort_index()
    for name in names[1:3]:
        for m in run_experiment(Experiment(ModelConfig(name), QuantConfig(bits=4), task)).measurements:
            assert stored.loc[name, m.metric] == m.value


def test_unknown_tokenizers_share_nothing() -> None:
    prepared = PreparedTasks()
    prepared.tokens_of("one")[(("a", " b"),)] = []
    assert prepared.tokens_of("one")
    assert not prepared.tokens_of("")
    prepared.tokens_of("")[(("a", " b"),)] = []
    assert not prepared.tokens_of("")
    assert not prepared.tokens_of("one")
