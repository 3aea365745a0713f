"""Tasks: the shipped ones against lm-eval's definitions, a user's own folder, and damaged data."""

from __future__ import annotations

import gzip
import lzma
import shutil
import socket
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import datasets
import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask

import kbit.data.tasks
from kbit.data.lm_eval_private import read_definition
from kbit.data.task_files import EMBEDDED_TASKS, find_local_tasks, find_mentioned
from kbit.data.tasks import LoadedTask, load_tasks
from kbit.data.text_files import parse_json_lines, read_bytes
from kbit.evaluation.zero_shot import prepare_task
from kbit.experiments.identity import identify_tasks

SHIPPED = sorted(find_local_tasks())
LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
ITEMS = 200

YAML = """
task: my_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows/DATA
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.5}
"""
ROWS = b'{"q": "One", "choices": ["two", "three"], "gold": 0}\n{"q": "Red", "choices": ["a", "b"], "gold": 1}\n'


def write_task(folder: Path, data_name: str, data: bytes | None) -> str:
    """Write a task folder with one task and, unless it is None, its data; return the folder."""
    (folder / "rows").mkdir(parents=True)
    (folder / "my_task.yaml").write_text(YAML.replace("DATA", data_name))
    if data is not None:
        (folder / "rows" / data_name).write_bytes(data)
    return str(folder)


# ---- the shipped tasks


def test_shipped_tasks_load_from_any_folder_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a task reached for the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = load_tasks(SHIPPED)
    assert [task.name for task in loaded] == SHIPPED
    assert len(SHIPPED) == 8
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shipped() -> dict[str, LoadedTask]:
    """The shipped tasks by name, loaded once for all tests that only look at them."""
    return {task.name: task for task in load_tasks(SHIPPED)}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_records_which_data_it_has(name: str, shipped: dict[str, LoadedTask]) -> None:
    task = shipped[name]
    assert task.source == f"{name}.jsonl.xz"
    assert task.sha256 == sha256(lzma.decompress((EMBEDDED_TASKS / "data" / task.source).read_bytes())).hexdigest()
    assert task.version == "1.0"


@pytest.mark.parametrize("name", SHIPPED)
def test_acc_bytes_is_measured_where_acc_norm_is(name: str, shipped: dict[str, LoadedTask]) -> None:
    metrics = set(shipped[name].task.aggregation())
    assert ("acc_bytes" in metrics) == ("acc_norm" in metrics)
    assert "acc" in metrics


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("lambada_openai", "lambada/lambada_openai.yaml"),
        ("piqa", "piqa/piqa.yaml"),
        ("winogrande", "winogrande/default.yaml"),
        ("hellaswag", "hellaswag/hellaswag.yaml"),
    ],
)
def test_a_task_of_the_paper_asks_what_lm_evals_own_definition_asks(
    name: str, definition: str, shipped: dict[str, LoadedTask]
) -> None:
    """Only the source of the rows is replaced in lm-eval's YAML."""
    theirs_config, _ = read_definition(LM_EVAL_TASKS / definition)
    path = EMBEDDED_TASKS / "data" / f"{name}.jsonl.xz"
    rows = parse_json_lines(read_bytes(path), path)[:ITEMS]
    splits = [theirs_config[key] for key in theirs_config if key.endswith("_split") and theirs_config[key]]

    def shipped_rows(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})

    theirs = ConfigurableTask(config=theirs_config | {"custom_dataset": shipped_rows})
    theirs.set_config(key="num_fewshot", value=0)
    theirs.build_all_requests(limit=ITEMS, rank=0, world_size=1)
    loaded = shipped[name]
    mine = prepare_task(loaded, ITEMS).instances

    assert [i.arguments for i in mine] == [i.arguments for i in theirs.instances]
    assert [i.doc_id for i in mine] == [i.doc_id for i in theirs.instances]
    assert len({i.doc_id for i in mine}) == ITEMS
    pairs = list(zip(mine, theirs.instances, strict=True))
    assert [loaded.task.doc_to_target(i.doc) for i, _ in pairs] == [theirs.doc_to_target(i.doc) for _, i in pairs]
    # For WinoGrande the index of the right answer is where other tasks have their text.
    assert [loaded.task.doc_to_text(i.doc) for i, _ in pairs] == [theirs.doc_to_text(i.doc) for _, i in pairs]
    assert set(theirs.aggregation()) <= set(loaded.task.aggregation())
    assert loaded.version == str(theirs.VERSION)


def test_the_limit_takes_the_first_items() -> None:
    [loaded] = load_tasks(["nano_swap"])
    few = [(i.doc_id, i.arguments) for i in prepare_task(loaded, 3).instances]
    [again] = load_tasks(["nano_swap"])
    more = [(i.doc_id, i.arguments) for i in prepare_task(again, 5).instances]
    assert few == more[: len(few)]
    assert {doc_id for doc_id, _ in few} == {0, 1, 2}


# ---- a user's own folder


@pytest.mark.parametrize(("data_name", "compress"), [("d.jsonl", bytes), ("d.jsonl.gz", gzip.compress)])
def test_a_users_data_is_found_beside_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_name: str, compress: Callable[[bytes], bytes]
) -> None:
    folder = write_task(tmp_path / "tasks", data_name, compress(ROWS))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    [loaded] = load_tasks(["my_task"], "../tasks")
    assert [i.arguments for i in prepare_task(loaded).instances] == [
        ("One", " two"),
        ("One", " three"),
        ("Red", " a"),
        ("Red", " b"),
    ]
    assert loaded.version == "2.5"
    assert loaded.sha256 == sha256(ROWS).hexdigest()
    assert load_tasks(["my_task"], folder)[0].sha256 == loaded.sha256


def test_a_users_task_wins_over_the_shipped_one_of_its_name(tmp_path: Path) -> None:
    folder = Path(write_task(tmp_path / "tasks", "d.jsonl", ROWS))
    text = (folder / "my_task.yaml").read_text()
    (folder / "my_task.yaml").write_text(text.replace("task: my_task", "task: piqa"))
    [loaded] = load_tasks(["piqa"], str(folder))
    assert loaded.source == "d.jsonl"


def test_a_yaml_may_include_another(tmp_path: Path) -> None:
    folder = Path(write_task(tmp_path / "tasks", "d.jsonl", ROWS))
    shared_part = (folder / "my_task.yaml").read_text().replace("task: my_task\n", "")
    (folder / "_base.yaml").write_text(shared_part)
    (folder / "my_task.yaml").write_text("include: _base.yaml\ntask: my_task\n")
    assert len(prepare_task(load_tasks(["my_task"], str(folder))[0]).instances) == 4


@pytest.mark.parametrize("outside", ["data", "include", "link"])
def test_a_file_beside_the_folder_is_refused_as_no_key_would_know_it(tmp_path: Path, outside: str) -> None:
    folder = Path(write_task(tmp_path / "tasks", "d.jsonl", ROWS))
    if outside == "data":
        shutil.move(folder / "rows" / "d.jsonl", tmp_path / "d.jsonl")
        rewrite(str(folder), ("rows/d.jsonl", "../d.jsonl"))
    elif outside == "include":
        shutil.move(folder / "my_task.yaml", tmp_path / "base.yaml")
        shutil.move(folder / "rows", tmp_path / "rows")
        (folder / "my_task.yaml").write_text("include: ../base.yaml\ntask: my_task\n")
        shutil.copytree(tmp_path / "rows", folder / "rows")
    else:
        shutil.move(folder / "rows", tmp_path / "rows")
        (folder / "rows").symlink_to(tmp_path / "rows")
    with pytest.raises(ValueError, match=rf"{tmp_path}/[a-z/]*\.(jsonl|yaml) is not in eval\.task_path={folder}"):
        load_tasks(["my_task"], str(folder))


def test_a_linked_file_counts_by_its_content(tmp_path: Path) -> None:
    folder = Path(write_task(tmp_path / "tasks", "d.jsonl", None))
    (tmp_path / "far.jsonl").write_bytes(ROWS)
    (folder / "rows" / "d.jsonl").symlink_to(tmp_path / "far.jsonl")
    before = identify_tasks(["my_task"], str(folder))
    assert load_tasks(["my_task"], str(folder))[0].sha256 == sha256(ROWS).hexdigest()
    (tmp_path / "far.jsonl").write_bytes(ROWS[:-1])
    assert identify_tasks(["my_task"], str(folder)) != before


def test_missing_data_is_an_error_with_the_absolute_path(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "d.jsonl", None)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "tasks" / "rows" / "d.jsonl")):
        load_tasks(["my_task"], folder)


def test_a_folder_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"eval\.task_path: no folder at {tmp_path / 'no_tasks'}"):
        load_tasks(["piqa"], str(tmp_path / "no_tasks"))


class FewTasks:
    """Stands in for lm-eval's index, which takes seconds to build."""

    all_groups: Final = ("mmlu",)
    all_tags: Final = ("ai2_arc",)
    all_tasks: Final = ("mmlu", "ai2_arc", "arc_easy")

    def load(self, _: list[str]) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "piqqa",
            ValueError,
            r"unknown task 'piqqa'; did you mean piqa\? local tasks are hellaswag, lambada_openai, my_task, nano",
        ),
        (
            "arc_easy",
            FileNotFoundError,
            r"'arc_easy': its data cannot be loaded \(HF_HUB_OFFLINE=1 is set\): Couldn't reach",
        ),
    ],
)
def test_a_task_that_cannot_be_had_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    folder = write_task(tmp_path / "tasks", "d.jsonl", ROWS)
    monkeypatch.setattr(kbit.data.tasks, "_make_manager", lambda **_: FewTasks())
    with pytest.raises(error, match=message):
        load_tasks([name], folder)


def test_a_name_that_lm_eval_never_mentions_is_refused_without_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise AssertionError("it takes 18 seconds")

    tags_and_tasks = {"arc_challenge", "mmlu", "mmlu_stem_tasks", "ai2_arc"}
    found = find_mentioned({*tags_and_tasks, "arc_chalenge", "mmlu_ste"})
    assert found == tags_and_tasks
    monkeypatch.setattr(kbit.data.tasks, "find_mentioned", found.intersection)
    monkeypatch.setattr(kbit.data.tasks, "_make_manager", fail)
    with pytest.raises(ValueError, match="unknown task 'arc_chalenge'"):
        load_tasks(["arc_chalenge"])


# ---- a user's definition


def rewrite(folder: str, *changes: tuple[str, str]) -> str:
    path = Path(folder) / "my_task.yaml"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return folder


@pytest.mark.parametrize("line", ['task: "my_task"', "task: 'my_task'", "task: my_task  # mine", "task:   my_task"])
def test_a_name_may_be_quoted_or_commented(tmp_path: Path, line: str) -> None:
    folder = rewrite(write_task(tmp_path, "d.jsonl", ROWS), ("task: my_task", line))
    assert load_tasks(["my_task"], folder)[0].name == "my_task"


@pytest.mark.parametrize(
    ("data_files", "split", "items"),
    [
        ("data_files: rows/d.jsonl", "train", 2),  # as `datasets` reads it: the split is train
        ("data_files: [rows/d.jsonl, rows/d.jsonl]", "train", 4),
        ("data_files: {test: [rows/d.jsonl, rows/d.jsonl]}", "test", 4),
    ],
)
def test_data_files_are_given_as_datasets_takes_them(tmp_path: Path, data_files: str, split: str, items: int) -> None:
    folder = rewrite(
        write_task(tmp_path, "d.jsonl", ROWS),
        ("data_files:\n    test: rows/d.jsonl", data_files),
        ("test_split: test", f"test_split: {split}"),
    )
    assert len(load_tasks(["my_task"], folder)[0].task.eval_docs) == items


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{q}}", "{{question}}", "a template asks for a field that a row has not: 'question' is undefined"),
        ("{{choices}}", "{{options}}", "'options' is undefined"),
        (
            "doc_to_target: gold",
            "doc_to_target: answer",
            r"doc_to_target gives 'answer', which is none of \['two', 'three'\]",
        ),
        ("test_split: test", "test_split: dev", "there is no dev: a split or field"),
        ("metric: acc}", "metric: accuracy_of_mine}", "a metric of metric_list"),
        ("test: rows/d.jsonl", "test: 3", "data_files={'test': 3} is not a file"),
        ("metric_list: [", "metric_list: [[", "did not find expected"),
    ],
)
def test_a_wrong_definition_is_an_error_with_its_path(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = rewrite(write_task(tmp_path, "d.jsonl", ROWS), (old, new))
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}/my_task\.yaml: .*{message}"):
        prepare_task(load_tasks(["my_task"], folder)[0])


# ---- damaged data


@pytest.mark.parametrize(
    ("data_name", "damaged"),
    [
        ("d.jsonl.xz", lzma.compress(ROWS)[:-20]),
        ("d.jsonl.gz", gzip.compress(ROWS)[:-20]),
        ("d.jsonl.gz", gzip.compress(ROWS)[:10] + b"\xff" * 40),
        ("d.jsonl.bz2", b"not compressed at all"),
    ],
    ids=["xz cut", "gz cut", "gz garbage", "bz2 garbage"],
)
def test_a_damaged_file_is_named(tmp_path: Path, data_name: str, damaged: bytes) -> None:
    folder = write_task(tmp_path / "tasks", data_name, damaged)
    with pytest.raises(ValueError, match=rf"{tmp_path}/tasks/rows/{data_name} is damaged"):
        load_tasks(["my_task"], folder)


def test_a_damaged_copy_of_a_shipped_file_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "piqa.jsonl.xz"
    shutil.copy(EMBEDDED_TASKS / "data" / "piqa.jsonl.xz", copy)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 0xFF
    copy.write_bytes(content)
    with pytest.raises(ValueError, match=r"piqa\.jsonl\.xz is damaged"):
        read_bytes(copy)


@pytest.mark.parametrize(
    ("line", "why"), [(b'{"q": "unfinished', "Unterminated string"), (b"[1, 2]", "not a JSON object")]
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    folder = write_task(tmp_path / "tasks", "d.jsonl", ROWS + line + b"\n")
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 3: {why}"):
        load_tasks(["my_task"], folder)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": "x\u2028y\u0085z"}\r\n\n{"a": "last"}', encoding="utf-8")  # both allowed inside JSON strings
    assert parse_json_lines(read_bytes(path), path) == [{"a": "x\u2028y\u0085z"}, {"a": "last"}]


def test_a_template_is_compiled_once_for_all_items() -> None:
    """lm-eval compiles its templates anew for each item, which takes longer than to fill them in."""
    load_tasks(["nano_swap"])
    compiled = lm_eval.utils.env.from_string
    assert compiled("{{a}} once") is compiled("{{a}} once")
    assert compiled("{{a}} once").render(a=1) == "1 once"
    assert compiled("{{a}} twice").render(a=2) == "2 twice"
