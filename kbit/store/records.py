"""The files of a store's results: found, read, and read again where one has gone meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa

from kbit.store import parquet
from kbit.store.filesystem import Files, open_files
from kbit.store.parquet import read_keys
from kbit.store.rows import PART_SCHEMA, ROW_SCHEMA, make_part, tabulate

T = TypeVar("T")


PART_EXPERIMENTS: Final = 5000  # of a Parquet file: tens of megabytes, which compaction holds in memory


_READ_TRIES: Final = 10  # each compaction that ends in the middle of reading costs one


def open_existing(path: str | Path) -> Files:
    files = open_files(path)
    if not files.is_store():
        raise FileNotFoundError(f"no results at {files.root}: start with `kbit run`")
    return files


def retry(read: Callable[[], T]) -> T:
    """Return what read returns; a file that is gone since it was listed has been compacted or deleted: again."""
    for _ in range(_READ_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def list_finished(files: Files, known: dict[str, set[str]]) -> set[str]:
    loose = {Path(name).stem for name in files.names("experiments", ".json")}  # before compacted/: see the module
    return loose.union(*read_part_keys(files, known).values())


def read_part_keys(files: Files, known: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the keys in each Parquet file; remembers them in `known`."""
    names = files.names("compacted", ".parquet")
    for name in names:
        if name not in known:
            known[name] = read_keys(files, name)
    return {name: known[name] for name in names}


def read_parts(files: Files, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the store's experiments as tables, ROW_SCHEMA or PART_SCHEMA; an experiment may come twice."""
    loose = files.names("experiments", ".json")  # before compacted/: see the module
    for name in files.names("compacted", ".parquet"):
        yield read_rows(files, name, schema)
    make = tabulate if schema == ROW_SCHEMA else make_part
    for at in range(0, len(loose), PART_EXPERIMENTS):
        yield make([read_json(files, name) for name in loose[at : at + PART_EXPERIMENTS]])


def read_rows(files: Files, name: str, schema: pa.Schema) -> pa.Table:
    """Return the rows of a Parquet file, ROW_SCHEMA or PART_SCHEMA."""
    return parquet.read_rows(
        files, name, schema.names, PART_SCHEMA, lambda texts: make_part([parse_record(text, name) for text in texts])
    )


def read_json(files: Files, name: str) -> dict[str, Any]:
    with files.open(name) as file:
        return parse_record(file.read(), f"{files.root}/{name}")


def drop_repeated(rows: pa.Table) -> pa.Table:
    """Keep the first of each key's rows."""
    repeated = rows["key"].to_pandas().duplicated().to_numpy()
    return rows.filter(pa.array(~repeated)) if repeated.any() else rows


SCHEMA_VERSION: Final = 1


def parse_record(content: bytes | str, source: str) -> dict[str, Any]:
    """Return the record that a file holds.

    Args:
        content: JSON.
        source: what to call it in an error.

    Raises:
        ValueError: it is not JSON, or of a newer kbit.
    """
    try:
        record: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}; remove it to run its experiment again") from None
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(f"{source} was written by a newer kbit (schema {record['schema_version']})")
    return record
