"""Stored results, typed: read from the store's files one by one, or as tables of many."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa

from kbit.experiments.result import Failure, Result
from kbit.experiments.serialize import from_json
from kbit.store import parquet
from kbit.store.filesystem import Files
from kbit.store.records import parse_record, read_json, read_records
from kbit.store.rows import PART_SCHEMA, ROW_SCHEMA, ROWS_VERSION, tabulate

T = TypeVar("T")

PART_EXPERIMENTS: Final = 5000  # in one Parquet file: tens of megabytes, which compaction holds in memory


def load_results(path: str | Path, keys: Collection[str] | None = None) -> Iterator[Result]:
    """Yield the finished experiments with these keys, sorted by key. None yields all.

    Raises:
        FileNotFoundError: there is no store at path.
        ValueError: a file of the store is damaged, or was written by a newer kbit.
    """
    return (_read(Result, record) for record in read_records(path, "experiments", keys))


def load_failures(path: str | Path) -> Iterator[Failure]:
    """Yield the failed experiments, sorted by key. The errors are those of load_results."""
    return (_read(Failure, record) for record in read_records(path, "failures"))


def read_parts(files: Files, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the store's experiments as tables with ROW_SCHEMA or PART_SCHEMA. An experiment may come twice."""
    loose = files.names("experiments", ".json")  # before compacted/: see kbit.store.store
    for name in files.names("compacted", ".parquet"):
        yield read_part(files, name, schema)
    for at in range(0, len(loose), PART_EXPERIMENTS):
        records = [read_json(files, name) for name in loose[at : at + PART_EXPERIMENTS]]
        yield tabulate(_read_all(records)) if schema == ROW_SCHEMA else make_part(records)


def read_part(files: Files, name: str, schema: pa.Schema) -> pa.Table:
    """Return the experiments of a Parquet file with ROW_SCHEMA or PART_SCHEMA."""

    def remake(texts: list[str]) -> pa.Table:
        return make_part([parse_record(text, name) for text in texts])

    return parquet.read_rows(files, name, schema.names, PART_SCHEMA, remake)


def make_part(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Return records with their rows (PART_SCHEMA).

    The record stays as it was read, so that a compaction loses no entry that this kbit does not know.
    """
    texts = [json.dumps(record, separators=(",", ":")) for record in records]
    part = tabulate(_read_all(records)).append_column("record", pa.array(texts, pa.string()))
    return part.replace_schema_metadata(ROWS_VERSION)


def _read_all(records: Sequence[dict[str, Any]]) -> Iterator[Result]:
    return (_read(Result, record) for record in records)


def _read(kind: type[T], record: Mapping[str, Any]) -> T:
    """Return a record as a typed object.

    Raises:
        ValueError: a field is missing, or today's kbit does not know a name in it. The message names the record.
    """
    try:
        return from_json(kind, record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the record {record.get('key')} cannot be read: {error}") from error
