"""Damaged files: they are named and left out, everything else is read, and no command ends in a traceback."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_results import fill, make_result

from kbit.evaluation.config import EvalConfig
from kbit.experiments.check_types import check_types
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.serialize import from_json
from kbit.store.readers import find_damaged, read_results
from kbit.store.store import Store

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py, which starts in tmp_path

DEEP: Final = "[" * 100_000
MUTANTS: Final[tuple[Any, ...]] = (
    *("text", "", "\ud800", [], [1], {}, None, 2**70, -1, 0.5, 1e400, True, {"a": [{}]}),
    "MISSING",
)
MUTATIONS: Final = 20
SEED: Final = 5
GOOD, BAD = 0, 1  # numbers of toy results


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A result and a failure that stay as they are, and a result and a failure to damage."""
    store = fill(tmp_path / "results", range(2))
    for number in (8, 9):
        store.write_failure(make_result(number).key, make_result(number).experiment, "no", "Traceback")
    return store


def path_of(store: Store, number: int, kind: str = "experiments") -> Path:
    """The file of a toy result."""
    return store.path / kind / f"{make_result(number).key}.json"


def list_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of nested dictionaries and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in entries:
        yield (*place, name)
        yield from list_places(item, (*place, name))


def mutate(record: Any, chance: random.Random) -> Any:
    """The record with one value changed or taken out."""
    changed, (*way, last) = copy.deepcopy(record), chance.choice(list(list_places(record)))
    node = changed
    for part in way:
        node = node[part]
    mutant = chance.choice(MUTANTS)
    if mutant == "MISSING":
        del node[last]
    else:
        node[last] = mutant
    return changed


WHOLE_FILES: Final = {
    "cut": '{"key": "0123',
    "list": "[1, 2]",
    "empty object": "{}",
    "null": "null",
    "too deep": DEEP,
    "nothing": "",
    "bytes": "\udcff\udcfe",
    "text version": '{"schema_version": "1", "key": "a"}',
    "no version": '{"key": "a"}',
    "no field but the key": f'{{"schema_version": 1, "key": "{make_result(BAD).key}"}}',
}


@pytest.mark.parametrize("content", WHOLE_FILES.values(), ids=WHOLE_FILES)
def test_a_damaged_file_is_named_and_all_others_are_read(kbit: Kbit, store: Store, content: str) -> None:
    path_of(store, BAD).write_text(content, errors="surrogateescape")
    done = kbit("results", "--csv", "out.csv")
    assert (done.code, done.out) == (3, "2 rows written to out.csv\n")
    assert set(pd.read_csv("out.csv")["key"]) == {make_result(GOOD).key}
    assert f"kbit: warning: {path_of(store, BAD)} is damaged: " in done.err
    assert "kbit: warning: 1 left out" in done.err


KINDS: Final = {"experiments": BAD, "failures": 9}
COMMANDS: Final = (
    ("results", "--csv", "before.csv"),
    ("results",),
    ("results", "--failures"),
    ("results", "--damaged"),
    ("results", "delete", "--where", "bits == 7", "--yes"),
    ("results", "compact"),
    ("results", "merge", "other"),
    ("results", "--csv", "after.csv"),
)


def test_mutated_records_stop_no_command(kbit: Kbit, store: Store) -> None:
    """Each is left out or read. The others are read, before and after a compaction."""
    fill(Path("other"), range(2, 3))
    chance = random.Random(SEED)
    files = {path_of(store, number, kind): kind for kind, number in KINDS.items()}
    records = {file: json.loads(file.read_text()) for file in files}
    good = path_of(store, GOOD)
    content, good_rows = good.read_text(), read_results("results").query("model == 'toy-0'").to_csv(index=False)
    left_out = 0
    for _ in range(MUTATIONS):
        good.write_text(content)
        for file, record in records.items():
            file.write_text(json.dumps(mutate(record, chance)))
        codes = {command: kbit(*command).code for command in COMMANDS}
        assert set(codes.values()) <= {0, 3}, codes
        left_out += codes[COMMANDS[0]]
        for exported in ("before.csv", "after.csv"):
            rows = Path(exported).read_text().splitlines(keepends=True)
            assert "".join([rows[0], *(row for row in rows if make_result(GOOD).key in row)]) == good_rows
        for part in (store.path / "compacted").iterdir():
            part.unlink()
    assert left_out > 0
    for command in (("plan", "eval.tasks=[]"), ("report",)):
        good.write_text(content)
        for file, record in records.items():
            file.write_text(json.dumps(record | {"parameters": "many"}))
        assert kbit(*command).code == 3


def break_record(table: pa.Table) -> pa.Table:
    """The last record without its second half."""
    *texts, last = table["record"].to_pylist()
    return table.set_column(table.schema.get_field_index("record"), "record", pa.array([*texts, last[:50]]))


def take_key(table: pa.Table) -> pa.Table:
    """The first experiment without its key."""
    return table.set_column(0, "key", pa.array([None, *table["key"].to_pylist()[1:]]))


# What is done to a file of four experiments, with two rows each: rows read, damaged records, rows after their removal.
PARTS: Final[dict[str, tuple[Callable[[pa.Table], pa.Table], int, int, int]]] = {
    "as it was": (lambda table: table, 8, 0, 8),
    "other columns": (lambda table: pa.table({"a": [1]}), 0, 1, 0),
    "no key": (lambda table: table.drop_columns("key"), 0, 1, 0),
    "keys are numbers": (lambda table: table.set_column(0, "key", pa.array(range(4))), 0, 1, 0),
    "no records": (lambda table: table.drop_columns("record"), 0, 1, 0),
    "a null key": (take_key, 6, 1, 6),
    "a null key, another version": (lambda table: take_key(table.drop_columns("layout")), 6, 1, 6),
    "a broken record": (break_record, 8, 1, 6),  # whose row is whole
    "a broken record, another version": (lambda table: break_record(table.drop_columns("layout")), 6, 1, 6),
}


@pytest.mark.parametrize(("change", "rows", "damaged", "left"), PARTS.values(), ids=PARTS)
def test_damaged_parquet_files_are_named_and_removed(
    kbit: Kbit, tmp_path: Path, change: Callable[[pa.Table], pa.Table], rows: int, damaged: int, left: int
) -> None:
    store = fill(tmp_path / "results", range(4))
    store.compact()
    (part,) = (store.path / "compacted").iterdir()
    pq.write_table(change(pq.read_table(part)), part)
    fill(store.path, range(4, 5))
    export = ("results", "--csv", "out.csv")
    assert kbit(*export).out == f"{rows + 2} rows written to out.csv\n"
    assert [kbit(*command).code for command in COMMANDS[1:4]] == [3 if rows < 8 else 0, 0, 0]
    assert [(error.name, error.is_foreign) for error in find_damaged("results")] == damaged * [
        (f"compacted/{part.name}", False)
    ]
    assert kbit("results", "delete", "--damaged", "--yes").code == 0
    assert find_damaged("results") == []
    assert kbit(*export).out == f"{left + 2} rows written to out.csv\n"


def test_a_cut_parquet_file_is_named(kbit: Kbit, tmp_path: Path) -> None:
    fill(tmp_path / "results", range(4)).compact()
    (part,) = (tmp_path / "results" / "compacted").iterdir()
    content = part.read_bytes()
    fill(tmp_path / "results", range(4, 5))
    for cut in (content[:-9], content[:20], b"", content[:200] + b"\0" * 200 + content[400:]):
        part.write_bytes(cut)
        done = kbit("results", "--csv", "a.csv")
        assert (done.code, f"{part} is damaged: " in done.err) == (3, True)
        assert set(pd.read_csv("a.csv")["key"]) == {make_result(4).key}


def test_removal_leaves_what_another_kbit_may_read(kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer record, and one of a data type that is registered elsewhere."""
    fill(store.path, range(2, 4))
    for number, change in ((1, {"schema_version": 2}), (2, {"key": "another"}), (3, {"parameters": "1000"})):
        path = path_of(store, number)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    path = path_of(store, 9, "failures")
    path.write_text(path.read_text().replace('"data_type": "float"', '"data_type": "cubic"'))
    shown = kbit("results", "--damaged")
    assert (shown.code, len(shown.out.splitlines())) == (0, 4)
    assert "parameters is '1000', which is no whole number" in shown.out
    assert "data_type='cubic' is not one of" in shown.out
    refused = kbit("results", "delete", "--damaged")
    assert (refused.code, "--yes" in refused.err) == (1, True)
    done = kbit("results", "delete", "--damaged", "--yes")
    assert done.out.endswith(
        "removed 2 damaged records\nkept 2, which another version of kbit or a registered extension may read\n"
    )
    assert [path_of(store, number).exists() for number in range(4)] == [True, True, False, False]
    assert path.exists()


def test_a_run_says_that_the_asked_record_is_damaged(kbit: Kbit, tmp_path: Path) -> None:
    file = tmp_path / "results" / "experiments" / f"{find_key(Experiment(eval=EvalConfig(tasks=())))}.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    done = kbit("run", "eval.tasks=[]")
    assert (done.code, "its record cannot be read" in done.err) == (1, True)
    assert f"{file} is damaged" in done.err


def test_a_record_without_nan(tmp_path: Path) -> None:
    """NaN is no JSON, though Python writes it."""
    store = fill(tmp_path, range(1))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(path_of(store, 0).read_text(), parse_constant=refuse)
    assert record["measurements"][1]["low"] is None
    assert math.isnan(from_json(Result, record).measurements[1].low)
    (tmp_path / "experiments" / path_of(store, 0).name).write_text(
        json.dumps(record).replace('"low": null', '"low": NaN')
    )
    store.compact()
    (part,) = (tmp_path / "compacted").iterdir()
    json.loads(pq.read_table(part)["record"][0].as_py(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": True}, "^parameters is True, which is no whole number$"),
        ({"coverage": "1"}, "^coverage is '1', which is no number$"),
        ({"total_bits": 2**63}, "^total_bits is a number of more than 64 bits$"),
        ({"experiment": []}, r"^experiment is \[\], which is no mapping"),
        ({"experiment": {"quant": {"gptq": None}}}, r"^experiment.quant.gptq is None, which is no mapping"),
        ({"versions": {"kbit": 1}}, "^versions is 1, which is no text$"),
        ({"measurements": [{"task": 2}]}, "^measurements.task is 2, which is no text$"),
        ({"measurements": {}}, "^measurements is {}, which is no list$"),
        ({"skipped": [["a", [1], "b"]]}, "^skipped is .*, which is no mapping"),
    ],
)
def test_types_are_checked(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    record = json.loads(path_of(fill(tmp_path, range(1)), 0).read_text())
    check_types(Result, record)
    with pytest.raises(TypeError, match=words):
        check_types(Result, record | change)
