"""A user's task data of every kind: read beside the YAML, part of the key, and named row by row where it is wrong."""

from __future__ import annotations

import gzip
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kbit.data.tasks import load_tasks
from kbit.evaluation.zero_shot import prepare_task
from kbit.experiments.identity import identify_tasks

YAML = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: d.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{% if hint is defined and hint %}{{hint}} {% endif %}{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: gold
"""
ROWS = [{"q": "One", "a": "two", "b": "three", "gold": 0}, {"q": "Red", "a": "x", "b": "y", "gold": 1}]
ASKED = [("One", " two"), ("One", " three"), ("Red", " x"), ("Red", " y")]


def write(folder: Path, *changes: tuple[str, str], rows: Any = ROWS) -> str:
    """Write the task with JSON lines of these rows, and change its definition."""
    text = YAML
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.yaml").write_text(text)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def ask(folder: str) -> list[Any]:
    return [i.arguments for i in prepare_task(load_tasks(["mine"], folder)[0]).instances]


def test_a_field_that_the_first_row_lacks_is_kept(tmp_path: Path) -> None:
    folder = write(tmp_path, rows=[ROWS[0], ROWS[1] | {"hint": "Colour:"}])
    assert ask(folder) == [*ASKED[:2], ("Colour: Red", " x"), ("Colour: Red", " y")]


@pytest.mark.parametrize(
    ("output_type", "metrics"),
    [("multiple_choice", {"acc", "acc_norm", "acc_bytes"}), ("loglikelihood", {"perplexity", "acc"})],
)
def test_a_definition_without_metrics_has_lm_evals(tmp_path: Path, output_type: str, metrics: set[str]) -> None:
    folder = write(tmp_path, ("output_type: multiple_choice", f"output_type: {output_type}"))
    assert set(load_tasks(["mine"], folder)[0].task.aggregation()) == metrics


def write_csv(path: Path) -> None:
    pd.DataFrame(ROWS).to_csv(path, index=False, compression=None)


def write_data(folder: Path, kind: str) -> tuple[str, bytes]:
    """Write the rows as a file of some kind, and return its name and uncompressed content."""
    name = {"array": "d.json", "within": "d.json", "marked": "d.jsonl", "folder": "data/test.csv"}.get(
        kind, f"d.{kind}"
    )
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if kind == "parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    elif kind in ("csv", "CSV", "folder"):
        write_csv(path)
    elif kind == "csv.gz":
        write_csv(folder / "plain.csv")
        path.write_bytes(gzip.compress((folder / "plain.csv").read_bytes()))
        return name, (folder / "plain.csv").read_bytes()
    elif kind == "marked":
        path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    else:
        path.write_text(json.dumps({"data": ROWS} if kind == "within" else ROWS, indent=1))
    return name, path.read_bytes()


@pytest.mark.parametrize("kind", ["csv", "CSV", "csv.gz", "parquet", "folder", "array", "within", "marked"])
def test_every_kind_of_file_is_found_beside_the_yaml_and_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    builder = {"parquet": "parquet", "folder": "data", "array": "json", "within": "json", "marked": "json"}
    write(tasks, ("dataset_path: json", f"dataset_path: {builder.get(kind, 'csv')}"))
    name, content = write_data(tasks, kind)
    source = f"dataset_kwargs: {{data_files: {{test: {name}}}{', field: data' if kind == 'within' else ''}}}"
    definition = (tasks / "mine.yaml").read_text()
    line = next(line for line in definition.splitlines() if line.startswith("dataset_kwargs"))
    (tasks / "mine.yaml").write_text(definition.replace(line, "" if kind == "folder" else source))
    monkeypatch.chdir(tmp_path)
    [loaded] = load_tasks(["mine"], "tasks")
    assert [i.arguments for i in prepare_task(loaded).instances] == ASKED
    assert (loaded.source, loaded.sha256) == (Path(name).name, sha256(content).hexdigest())
    before = identify_tasks(["mine"], "tasks")
    (tasks / name).write_bytes((tasks / name).read_bytes() + b" ")
    assert identify_tasks(["mine"], "tasks") != before


def test_a_text_without_its_byte_order_mark_makes_the_rows(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        ("dataset_path: json", "dataset_path: text"),
        ("d.jsonl", "lines.TXT"),
        ("multiple_choice", "loglikelihood"),
        ('"{% if hint is defined and hint %}{{hint}} {% endif %}{{q}}"', '""'),
        ("gold", "text"),
        ('doc_to_choice: "{{[a, b]}}"\n', ""),
    )
    (tmp_path / "lines.TXT").write_bytes("\ufeffone\ntwo\n".encode())
    assert ask(folder) == [("", "one"), ("", "two")]


def test_a_yaml_may_begin_with_a_byte_order_mark_and_have_its_suffix_in_capitals(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (tmp_path / "mine.YAML").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "mine.yaml").read_bytes().lstrip())
    (tmp_path / "mine.yaml").unlink()
    assert ask(folder) == ASKED


@pytest.mark.parametrize(
    ("builder", "file", "message"),
    [
        ("csv", "none.csv", r"no data file at {folder}/none\.csv"),
        ("parquet", "n*.parquet", r"no data file at {folder}/n\*\.parquet"),
        ("csv", "../far.csv", r"far\.csv is not in eval\.task_path"),
        ("parquet", "d.jsonl", r"{folder}/d\.jsonl cannot be read as parquet: .*magic bytes"),
        ("here", "d.jsonl", "dataset_path=here is a folder here, but not in {folder}"),
    ],
)
def test_data_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str, file: str, message: str
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "far.csv")
    write(tasks, ("dataset_path: json", f"dataset_path: {builder}"), ("d.jsonl", f'"{file}"'))
    with pytest.raises((ValueError, FileNotFoundError), match="(?s)" + message.replace("{folder}", str(tasks))):
        load_tasks(["mine"], "tasks")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gold": "one"}, "line 2: the field 'gold' is 'one', of another kind"),
        ({"gold": 2**70}, "line 2: the field 'gold' is 1180591620717411303424, of another kind.* or too large"),
        ({"gold": None}, "line 2: the field 'gold' is None"),
        ({"q": None}, "line 2: the field 'q' is None"),
        ({"a": None}, "line 2: doc_to_choice gives None among .None, 'y'., .*; the field 'a' is None"),
        ({"gold": 2}, r"line 2: doc_to_target gives 2, which is none of \['x', 'y'\]"),
        ({"a": ""}, r"line 2: doc_to_choice gives '' among \['', 'y'\]"),
        ({"a": ["x"]}, "line 2: the field 'a' is .'x'., of another kind"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, rows=[ROWS[0], ROWS[1] | row, ROWS[0]])
    with pytest.raises(ValueError, match=rf"{tmp_path}/mine\.yaml: {tmp_path}/d\.jsonl, {message}"):
        ask(folder)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("choices", [[], None, ["x", None], ["x", ""]])
def test_choices_that_are_none_are_named(tmp_path: Path, choices: Any, first: bool) -> None:
    rows = [{"q": "Red", "choices": choices, "gold": 0}, {"q": "Red", "choices": ["x", "y"], "gold": 1}]
    folder = write(tmp_path, ('"{{[a, b]}}"', "choices"), rows=rows if first else rows[::-1])
    with pytest.raises(ValueError, match=rf"d\.jsonl, line {1 if first else 2}.*choices"):
        ask(folder)


def test_a_null_that_only_a_condition_looks_at_is_no_fault(tmp_path: Path) -> None:
    assert ask(write(tmp_path, rows=[row | {"hint": None} for row in ROWS])) == ASKED
