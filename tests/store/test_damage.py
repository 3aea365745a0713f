"""Damaged files: they are named and left out, everything else is read, and no command ends in a traceback."""

from __future__ import annotations

import copy
import errno
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow.parquet as pq
import pytest
from toy_results import fill, make_result, path_of

from kbit.engine.plan import make_plan
from kbit.evaluation.config import EvalConfig
from kbit.experiments.check_types import check_types
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.serialize import from_json
from kbit.store.damage import DamagedRecordWarning
from kbit.store.readers import read_results
from kbit.store.results import find_damaged
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
KEYS: Final = [make_result(number).key for number in range(7)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A result and a failure that stay as they are, and a result and a failure to damage."""
    store = fill(tmp_path / "results", range(2))
    for number in (8, 9):
        store.write_failure(make_result(number).key, make_result(number).experiment, "no", "Traceback")
    return store


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


def test_a_record_that_was_mended_before_the_removal_stays(store: Store) -> None:
    path, content = path_of(store, BAD), path_of(store, BAD).read_text()
    path.write_text("{")
    damaged = find_damaged(store.path)
    path.write_text(content)
    assert (len(damaged), store.delete_damaged(damaged)) == (1, 0)
    assert path.read_text() == content


def test_what_cannot_be_opened_is_named_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a link to nothing, and a file that may not be read, which a superuser would."""
    store = fill(tmp_path, range(2))
    store.compact()
    fill(tmp_path, range(2, 4))
    (part,) = (tmp_path / "compacted").iterdir()
    for name in ("compacted/folder.parquet", f"experiments/{KEYS[5]}.json"):
        (tmp_path / name).mkdir()
    for name in ("compacted/link.parquet", f"experiments/{KEYS[6]}.json"):
        (tmp_path / name).symlink_to("nowhere")
    opened = Path.open

    def refuse(path: Path, *arguments: Any) -> Any:
        if path == part:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        damaged = find_damaged(tmp_path)
        assert len(damaged) == 5
        assert {error.is_foreign for error in damaged} == {True}
        with pytest.warns(DamagedRecordWarning, match=r"cannot be opened: (a link to nowhere|Permission|Is a dir)"):
            assert set(read_results(tmp_path)["key"]) == set(KEYS[2:4])
    with pytest.warns(DamagedRecordWarning):
        assert Store(tmp_path).delete([KEYS[0], KEYS[2]]) == 2  # which once waited for its own lock
    with pytest.warns(DamagedRecordWarning):
        assert Store(tmp_path).compact() == 1
    with pytest.warns(DamagedRecordWarning):
        assert set(read_results(tmp_path)["key"]) == {KEYS[1], KEYS[3]}


def test_a_damaged_failure_is_no_crash(store: Store) -> None:
    path_of(store, 9, "failures").write_text("{")
    with pytest.warns(DamagedRecordWarning):
        plan = make_plan([make_result(number).experiment for number in (8, 9)], store.path)
    assert (plan.failed, plan.crashed, len(plan.to_run)) == (1, 0, 1)


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
