"""Damaged Parquet files: what can still be read of them, and what a removal and a compaction keep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_results import fill, make_result

from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.store.damage import DamagedRecordWarning
from kbit.store.readers import read_results
from kbit.store.results import find_damaged
from kbit.store.store import Store

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py, which starts in tmp_path


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
    codes = [kbit("results", *flag).code for flag in ([], ["--failures"], ["--damaged"])]
    assert codes == [3 if rows < 8 else 0, 0, 0]
    assert [(error.name, error.is_foreign) for error in find_damaged("results")] == damaged * [
        (f"compacted/{part.name}", False)
    ]
    assert kbit("results", "delete", "--damaged", "--yes").code == 0
    assert find_damaged("results") == []
    assert kbit(*export).out == f"{left + 2} rows written to out.csv\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda table: pa.table({"a": [1]}),
        lambda table: table.drop_columns("key"),
        lambda table: table.set_column(0, "key", pa.array(range(4))),
        lambda table: table.drop_columns("record"),
    ],
    ids=["other columns", "no key", "keys are numbers", "no records"],
)
def test_a_parquet_file_of_an_unknown_layout_is_named_and_kept(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    """A later kbit may have written it."""
    store = fill(tmp_path, range(4))
    store.compact()
    (part,) = (store.path / "compacted").iterdir()
    pq.write_table(change(pq.read_table(part)), part)
    content = part.read_bytes()
    (error,) = find_damaged(tmp_path)
    assert (error.name, error.is_foreign) == (f"compacted/{part.name}", True)
    assert store.delete_damaged([error]) == 0
    assert part.read_bytes() == content


def spoil_column(part: Path, column: str) -> None:
    """Overwrite what a Parquet file holds of a column. All other columns stay."""
    group = pq.ParquetFile(part).metadata.row_group(0)
    (chunk,) = (group.column(at) for at in range(group.num_columns) if group.column(at).path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(part.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    part.write_bytes(content)


def compact_and_spoil(path: Path, column: str) -> Path:
    """A Parquet file of four experiments with a column that cannot be read."""
    fill(path, range(4)).compact()
    (part,) = (path / "compacted").iterdir()
    spoil_column(part, column)
    return part


KEYS: Final = [make_result(number).key for number in range(7)]


def test_a_removal_keeps_the_records_of_a_file_with_a_damaged_column(kbit: Kbit, tmp_path: Path) -> None:
    whole = read_results(fill(tmp_path / "whole", range(4)).path)
    part = compact_and_spoil(tmp_path / "results", "family")
    with pytest.warns(DamagedRecordWarning, match="is damaged"):
        assert read_results("results").empty
    asked = kbit("results", "delete", "--damaged")
    assert f"compacted/{part.name} (4 experiments)" in asked.out + asked.err
    assert kbit("results", "delete", "--damaged", "--yes").code == 0
    assert find_damaged("results") == []
    pd.testing.assert_frame_equal(read_results("results"), whole)
    assert not part.exists()


def test_a_removal_keeps_records_of_a_newer_kbit_in_a_file_with_a_damaged_column(tmp_path: Path) -> None:
    store = fill(tmp_path, range(4))
    store.compact()
    (part,) = (store.path / "compacted").iterdir()
    table = pq.read_table(part)
    newer, broken, *others = table["record"].to_pylist()
    newer = json.dumps(json.loads(newer) | {"schema_version": 2})
    at = table.schema.get_field_index("record")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array([newer, broken[:50], *others])), part)
    spoil_column(part, "family")
    assert Store(tmp_path).delete_damaged(find_damaged(tmp_path)) == 2  # the column and the broken record
    (error,) = find_damaged(tmp_path)
    assert (error.key, error.is_foreign) == (min(KEYS[:4]), True)
    with pytest.warns(DamagedRecordWarning, match="newer kbit"):
        assert len(read_results(tmp_path)) == 2 * 2
    (part,) = (store.path / "compacted").iterdir()
    assert newer in pq.read_table(part)["record"].to_pylist()


def test_a_damaged_column_stops_no_compaction_and_no_deletion(tmp_path: Path) -> None:
    part = compact_and_spoil(tmp_path, "family")
    for number in (4, 5):
        store = fill(tmp_path, range(number, number + 1))
        with pytest.warns(DamagedRecordWarning, match="is damaged"):
            assert store.compact() == 1
    assert len(list(part.parent.iterdir())) == 2  # the two whole ones are one
    with pytest.warns(DamagedRecordWarning, match="is damaged"):
        assert store.delete([KEYS[0], KEYS[4]]) == 2
    assert set(read_results(tmp_path)["key"]) == {KEYS[number] for number in (1, 2, 3, 5)}


def test_a_file_whose_records_cannot_be_read_stays_when_one_is_deleted(tmp_path: Path) -> None:
    part = compact_and_spoil(tmp_path, "record")
    store = fill(tmp_path, range(4, 5))
    with pytest.warns(DamagedRecordWarning, match="is damaged"):
        assert store.delete([KEYS[0], KEYS[4]]) == 1
    assert part.exists()


def test_an_unreadable_record_keeps_no_other_file_from_being_joined(tmp_path: Path) -> None:
    """The file is of another version, so that its rows are made again."""
    store = fill(tmp_path, range(2))
    store.compact()
    (old,) = (tmp_path / "compacted").iterdir()
    pq.write_table(break_record(pq.read_table(old).drop_columns("layout")), old)
    for number in (2, 3):
        store = fill(tmp_path, range(number, number + 1))
        with pytest.warns(DamagedRecordWarning):
            store.compact()
    assert old.exists()
    assert len(list(old.parent.iterdir())) == 2


def test_a_compaction_keeps_the_only_whole_copy(tmp_path: Path) -> None:
    fill(tmp_path, range(2)).compact()
    (part,) = (tmp_path / "compacted").iterdir()
    pq.write_table(break_record(pq.read_table(part)), part)
    store = fill(tmp_path, range(2))
    broken = max(KEYS[:2])
    with pytest.warns(DamagedRecordWarning, match=broken):
        assert store.compact() == 0
    assert [path.stem for path in (tmp_path / "experiments").iterdir()] == [broken]


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


def test_a_run_whose_one_result_cannot_be_read_from_its_parquet_file(kbit: Kbit, tmp_path: Path) -> None:
    """Its key can be read, so that the experiment counts as done."""
    experiment = Experiment(eval=EvalConfig(tasks=()))
    store = Store(tmp_path / "results")
    store.write(dataclasses.replace(make_result(0), key=find_key(experiment), experiment=experiment))
    store.compact()
    (part,) = (store.path / "compacted").iterdir()
    spoil_column(part, "family")
    done = kbit("run", "eval.tasks=[]")
    assert (done.code, "its record cannot be read" in done.err) == (1, True)
    assert "1 of 1 asked results are missing" in done.err
