"""Compaction: a store is the same before and after it, while others read and write, and after a crash at any step."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_results import fill, make_result, write_and_compact

from kbit.engine.plan import make_plan
from kbit.experiments.identity import find_key
from kbit.models.config import ModelConfig
from kbit.store.damage import DamagedRecordWarning
from kbit.store.filesystem import LocalFiles
from kbit.store.items import read_items
from kbit.store.readers import list_keys, read_provenance, read_results
from kbit.store.rows import PART_SCHEMA
from kbit.store.store import Store


def describe(path: Path) -> list[Any]:
    """All that a store's readers get."""
    items = {key: values.tolist() for key, values in read_items(path, "nano_cloze", "acc").items()}
    return [read_results(path).to_csv(), read_provenance(path).to_csv(), items, list_keys(path)]


def files_of(path: Path) -> dict[str, int]:
    """How many files each folder of results has."""
    return {name: len(list((path / name).iterdir())) for name in ("experiments", "compacted")}


def test_a_compacted_store_reads_as_before(tmp_path: Path) -> None:
    store = fill(tmp_path, range(20))
    before, types = describe(tmp_path), read_results(tmp_path).dtypes
    assert store.compact() == 20
    assert files_of(tmp_path) == {"experiments": 0, "compacted": 1}
    assert describe(tmp_path) == before
    pd.testing.assert_series_equal(read_results(tmp_path).dtypes, types)
    some = sorted(store.finished_keys())[5:7]
    assert set(read_items(tmp_path, "nano_cloze", "acc", keys=some)) == set(some)


def test_no_field_of_a_record_is_lost(tmp_path: Path) -> None:
    store = fill(tmp_path, range(4))
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "experiments").iterdir())]
    store.compact()
    (part,) = (tmp_path / "compacted").iterdir()
    stored = [json.loads(text) for text in pq.read_table(part)["record"].to_pylist()]
    assert json.dumps(stored) == json.dumps(records)  # as text, since NaN is not NaN


def test_compacting_again_and_again_keeps_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.store.store.PART_EXPERIMENTS", 10)
    for start in range(0, 40, 4):
        store = fill(tmp_path, range(start, start + 4))
        assert store.compact() == 4
    assert files_of(tmp_path)["compacted"] <= 8  # any two of them have more than 10
    assert len(read_results(tmp_path)) == 80
    assert store.compact() == 0


def test_a_plan_counts_compacted_results(tmp_path: Path) -> None:
    store = fill(tmp_path, range(3))
    store.compact()
    plan = make_plan([make_result(number).experiment for number in range(5)], tmp_path)
    assert (plan.done, len(plan.to_run)) == (3, 2)
    assert store.has(make_result(0).key)
    assert not store.has(make_result(9).key)


def test_the_first_result_of_a_key_stays_when_it_is_compacted(tmp_path: Path) -> None:
    store = fill(tmp_path, range(1))
    store.compact()
    store.write(make_result(0, value=0.9))
    assert read_results(tmp_path)["value"].tolist() == [0.5, 3.0]
    assert store.compact() == 0
    assert files_of(tmp_path)["experiments"] == 0


@pytest.mark.parametrize("steps", range(6))
def test_a_crash_at_any_step_of_compaction_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Steps are files created and removed: two results beside a Parquet file make 2 + 1 + 2 of them."""
    fill(tmp_path, range(3)).compact()
    store = fill(tmp_path, range(3, 5))
    before = describe(tmp_path)
    left = iter(range(steps))

    def crash_or(step: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step(*arguments)

        return run

    with monkeypatch.context() as patched:
        for name in ("create", "remove"):
            patched.setattr(LocalFiles, name, crash_or(getattr(LocalFiles, name)))
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert describe(tmp_path) == before
    Store(tmp_path).compact()
    assert describe(tmp_path) == before
    assert files_of(tmp_path) == {"experiments": 0, "compacted": 1}


def test_a_part_of_another_version_is_read_from_its_records(tmp_path: Path) -> None:
    fill(tmp_path, range(8)).compact()
    before = describe(tmp_path)
    (part,) = (tmp_path / "compacted").iterdir()
    table = pq.read_table(part)
    assert table.schema.equals(PART_SCHEMA)
    assert table.schema.metadata == PART_SCHEMA.metadata  # else each reading would make it again
    pq.write_table(table.drop_columns(["scale_format", "layout"]), part)
    assert describe(tmp_path) == before
    lists = [
        [measured | {"evaluation": "as it was called once"} for measured in row]
        for row in table["measurements"].to_pylist()
    ]
    at = table.schema.get_field_index("measurements")
    older = table.set_column(at, table.schema.field(at), pa.array(lists, table.schema.field(at).type))
    pq.write_table(older.replace_schema_metadata(None), part)
    assert describe(tmp_path) == before
    assert "as it was called once" not in set(read_results(tmp_path)["evaluation"])


def test_results_of_a_newer_version_stay_as_they_are(tmp_path: Path) -> None:
    store = fill(tmp_path, range(2))
    file = tmp_path / "experiments" / f"{make_result(0).key}.json"
    newer = json.dumps(json.loads(file.read_text()) | {"schema_version": 99})
    file.write_text(newer)
    with pytest.warns(DamagedRecordWarning, match="written by a newer kbit: it has schema 99"):
        assert store.compact() == 1
    assert files_of(tmp_path) == {"experiments": 1, "compacted": 1}
    assert file.read_text() == newer


def test_a_part_is_read_without_threads_that_outlive_the_interpreter(tmp_path: Path) -> None:
    """Threads of pyarrow's that came back to a dead interpreter aborted 14 of 60 short commands."""
    fill(tmp_path, range(4)).compact()
    code = (
        "import os, sys; from kbit.store.filesystem import open_files; from kbit.store import parquet\n"
        "from kbit.store.results import read_part; from kbit.store.rows import ROW_SCHEMA\n"
        "files, threads = open_files(sys.argv[1]), len(os.listdir('/proc/self/task'))\n"
        "[name] = files.names('compacted', '.parquet'); keys = parquet.read_keys(files, name)\n"
        "texts, rows = parquet.read_texts(files, name, list(keys)[:3]), read_part(files, name, ROW_SCHEMA)\n"
        "print(len(keys), len(texts), len(rows), len(os.listdir('/proc/self/task')) - threads)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "4 3 4 0\n"


def test_deleting_leaves_the_others(tmp_path: Path) -> None:
    fill(tmp_path, range(6)).compact()
    store = fill(tmp_path, range(6, 8))
    gone = {make_result(number).key for number in (0, 5, 7)}
    assert store.delete({*gone, "not there"}) == 3
    assert store.finished_keys() == {make_result(number).key for number in (1, 2, 3, 4, 6)}
    assert set(read_results(tmp_path)["key"]) == store.finished_keys()
    store.write(make_result(0, value=0.7))
    assert store.has(make_result(0).key)


def test_merging_copies_what_is_missing(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(4)).compact()
    fill(tmp_path / "b", range(2, 5)).compact()
    other = fill(tmp_path / "b", range(5, 7))
    other.write_failure(make_result(9).key, make_result(9).experiment, "no", "")
    other.write_failure(make_result(0).key, make_result(0).experiment, "no", "")
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    store = Store(tmp_path / "a")
    assert store.merge(tmp_path / "b") == (3, 2)
    assert store.merge(tmp_path / "b") == (0, 5)
    assert list_keys(tmp_path / "a") == ({make_result(n).key for n in range(7)}, {make_result(9).key})
    assert describe(tmp_path / "b") == describe(tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="no results at"):
        store.merge(tmp_path / "none")


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[Any]]:
    """Two processes that write overlapping results and compact."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can wait for ever
    processes = [context.Process(target=write_and_compact, args=(tmp_path, start)) for start in (0, 30)]
    yield processes
    for process in processes:
        process.kill()


def test_readers_miss_nothing_while_two_write_and_compact(tmp_path: Path, writers: list[Any]) -> None:
    Store(tmp_path)
    for writer in writers:
        writer.start()
    seen: set[str] = set()
    while any(writer.is_alive() for writer in writers):
        table = read_results(tmp_path)
        now = set(table["key"])
        assert seen <= now  # what was there once does not go away
        assert len(table) == 2 * len(now)
        assert seen <= list_keys(tmp_path)[0]
        seen = now
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert set(read_results(tmp_path)["key"]) == {make_result(number).key for number in range(90)}


def test_a_failure_is_no_result(tmp_path: Path) -> None:
    store = fill(tmp_path, range(2))
    store.compact()
    other = dataclasses.replace(make_result(0).experiment, model=ModelConfig("other"))
    store.write_failure(find_key(other), other, "no", "")
    assert store.delete_failures(list_keys(tmp_path)[1]) == 1
    assert list_keys(tmp_path)[1] == set()


def keep_training(store: Store, key: str) -> tuple[Path, Path]:
    """Leave a checkpoint and adapters as a training does, and return where they are."""
    files = store.training_files(key)
    assert files is not None
    files.checkpoint.parent.mkdir(exist_ok=True)
    files.checkpoint.write_text("weights")
    files.adapters.mkdir(parents=True)
    (files.adapters / "adapter_config.json").write_text(key)
    return files.checkpoint, files.adapters


def test_what_a_training_left_goes_with_its_record(tmp_path: Path) -> None:
    store = fill(tmp_path, range(2))
    kept, gone = (keep_training(store, make_result(number).key) for number in range(2))
    failed = make_result(3)
    store.write_failure(failed.key, failed.experiment, "no", "")
    forgotten = keep_training(store, failed.key)
    assert store.delete([make_result(1).key]) == 1
    assert [path.exists() for path in (*kept, *gone, *forgotten)] == [True, True, False, False, True, True]
    assert store.delete_failures([failed.key]) == 1
    assert [path.exists() for path in (*kept, *forgotten)] == [True, True, False, False]


def test_merging_copies_adapters(tmp_path: Path) -> None:
    other, store = fill(tmp_path / "b", range(2)), fill(tmp_path / "a", range(1))
    for number in range(2):
        keep_training(other, make_result(number).key)
    assert store.merge(tmp_path / "b") == (1, 1)
    key = make_result(1).key
    assert [path.name for path in (tmp_path / "a" / "adapters").iterdir()] == [key]
    assert (tmp_path / "a" / "adapters" / key / "adapter_config.json").read_text() == key
