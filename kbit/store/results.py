"""Stored results, typed: read from the store's files one by one, or as tables of many."""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from kbit.experiments.result import Failure, Result
from kbit.experiments.serialize import write_json
from kbit.store import parquet
from kbit.store.damage import DamagedRecord, DamagedRecordWarning, Source, set_aside
from kbit.store.filesystem import Files
from kbit.store.records import find_records, list_deleted, open_existing, read_all_items, read_as, read_loose, retry
from kbit.store.rows import PART_SCHEMA, ROW_SCHEMA, make_row
from kbit.store.stopped.records import check_stopped

PART_EXPERIMENTS: Final = 5000  # in one Parquet file: tens of megabytes, which compaction holds in memory


def load_results(path: str | Path, keys: Collection[str] | None = None) -> Iterator[Result]:
    """Yield the finished experiments with these keys that can be read, sorted by key. None yields all.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    return read_as(Result, path, "experiments", keys)


def load_failures(path: str | Path, keys: Collection[str] | None = None) -> Iterator[Failure]:
    """Yield the failed experiments with these keys, see load_results."""
    return read_as(Failure, path, "failures", keys)


def read_parts(files: Files, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the store's experiments as tables with ROW_SCHEMA or PART_SCHEMA. An experiment may come twice."""
    deleted = list_deleted(files)
    loose = files.names("experiments", ".json")  # before compacted/: see kbit.store.store
    for name in files.names("compacted", ".parquet"):
        try:
            part = read_part(files, name, schema)
        except DamagedRecord as error:
            set_aside(error)
        else:
            yield without_keys(part, deleted)
    loose = [name for name in loose if Path(name).stem not in deleted]
    for at in range(0, len(loose), PART_EXPERIMENTS):
        yield tabulate_files(files, loose[at : at + PART_EXPERIMENTS], schema)


def find_damaged(path: str | Path) -> list[DamagedRecord]:
    """Read all of a store and return what cannot be read, by name.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    files = open_existing(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedRecordWarning)
        retry(files, lambda: [len(part) for part in read_parts(files, ROW_SCHEMA)])
        collections.deque(load_failures(path), maxlen=0)
        check_stopped(files, Result)
        for source, record in find_records(files, "experiments", None):  # tables need not parse them
            try:
                source.read(Result, record)
                read_all_items(source, record)
            except DamagedRecord as error:
                set_aside(error)
    errors = [w.message.error for w in caught if isinstance(w.message, DamagedRecordWarning)]
    return sorted({(error.name, error.key): error for error in errors}.values(), key=str)


def without_keys(part: pa.Table, keys: Collection[str]) -> pa.Table:
    """Return a table of experiments without those of these keys."""
    return part.filter(pc.invert(pc.is_in(part["key"], pa.array(sorted(keys), pa.string())))) if keys else part


def tabulate_files(files: Files, names: Collection[str], schema: pa.Schema) -> pa.Table:
    """Return the experiments of JSON files as a table with ROW_SCHEMA or PART_SCHEMA."""
    return tabulate(read_loose(files, names).values(), schema)


def read_part(files: Files, name: str, schema: pa.Schema) -> pa.Table:
    """Return the experiments of a Parquet file with ROW_SCHEMA or PART_SCHEMA.

    Raises:
        DamagedRecord: the file cannot be read.
    """

    def remake(texts: Mapping[str, str]) -> pa.Table:
        return _tabulate_texts(files, name, texts, PART_SCHEMA)

    return parquet.read_rows(files, name, schema.names, PART_SCHEMA, remake)


def rescue_part(files: Files, name: str) -> pa.Table | None:
    """Return what can be read of a damaged Parquet file, or None if that is nothing.

    A table with PART_SCHEMA is made again from the records. If one of them cannot be read by this kbit, the table has
    keys and records alone, which is a file of the store as well and loses none of them.
    """
    try:
        found = parquet.read_records_alone(files, name)
    except DamagedRecord:
        return None
    pairs = zip(found["key"].to_pylist(), found["record"].to_pylist(), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedRecordWarning)  # none is left out
        whole = _tabulate_texts(files, name, dict(pairs), PART_SCHEMA)
    return (whole if len(whole) == len(found) else found) if len(found) else None


def find_readable(files: Files, name: str, keys: Collection[str]) -> set[str]:
    """Return which of these experiments a Parquet file holds whole records of."""
    try:
        texts = parquet.read_texts(files, name, keys)
    except DamagedRecord as error:
        set_aside(error)
        return set()
    return set(_tabulate_texts(files, name, texts, ROW_SCHEMA)["key"].to_pylist())


def _tabulate_texts(files: Files, name: str, texts: Mapping[str, str], schema: pa.Schema) -> pa.Table:
    """Return the experiments of a Parquet file's records (JSON) by key as a table."""
    return tabulate([(Source(files.root, name, key, is_part=True), text) for key, text in texts.items()], schema)


def tabulate(found: Iterable[tuple[Source, bytes | str]], schema: pa.Schema) -> pa.Table:
    """Return the rows of the records that can be read, with ROW_SCHEMA or PART_SCHEMA.

    The record stays as it was read, so that a compaction loses no entry that this kbit does not know.
    """
    rows = []
    for source, content in found:
        try:
            rows.append(_read_row(source, content, with_record=schema != ROW_SCHEMA))
        except DamagedRecord as error:
            set_aside(error)
    return pa.Table.from_pylist(rows, schema=schema)


def _read_row(source: Source, content: bytes | str, *, with_record: bool) -> dict[str, Any]:
    """Return a record as a row. The dataclasses have checked its values one by one, but not all of them together."""
    record = source.parse(content)
    result = source.read(Result, record)
    if not all(math.isfinite(measurement.value) for measurement in result.measurements):
        raise source.refuse("a measured value is not a finite number")
    try:
        return make_row(result) | ({"record": write_json(record, separators=(",", ":"))} if with_record else {})
    except Exception as error:  # values that do not go together, in whatever function meets them first
        raise source.refuse(error) from error
