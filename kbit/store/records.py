"""The records of a store: JSON objects in files of their own, or in a Parquet file.

Files move while a store is read. A reader that finds a file gone since it was listed starts again (retry).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from kbit.store.filesystem import Files, open_files
from kbit.store.parquet import read_keys, read_texts

T = TypeVar("T")
SCHEMA_VERSION: Final = 1
_READ_TRIES: Final = 10  # each compaction that ends in the middle of reading costs one


def open_existing(path: str | Path) -> Files:
    """Return the files of the store at a path.

    Raises:
        FileNotFoundError: there is no store.
    """
    files = open_files(path)
    if not files.is_store():
        raise FileNotFoundError(f"no results at {files.root}: start with `kbit run`")
    return files


def retry(read: Callable[[], T]) -> T:
    """Return what `read` returns. Call it again if a file that it listed has been compacted or deleted meanwhile."""
    for _ in range(_READ_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def list_finished(files: Files, known: dict[str, set[str]]) -> set[str]:
    """Return the keys of finished experiments, see read_part_keys for `known`."""
    loose = {Path(name).stem for name in files.names("experiments", ".json")}  # before compacted/: see kbit.store.store
    return loose.union(*read_part_keys(files, known).values())


def read_part_keys(files: Files, known: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the keys in each Parquet file. They are remembered in `known`, as a Parquet file never changes."""
    names = files.names("compacted", ".parquet")
    for name in names:
        if name not in known:
            known[name] = read_keys(files, name)
    return {name: known[name] for name in names}


def read_json(files: Files, name: str) -> dict[str, Any]:
    """Return the record in a JSON file, see parse_record."""
    with files.open(name) as file:
        return parse_record(file.read(), f"{files.root}/{name}")


def parse_record(content: bytes | str, source: str) -> dict[str, Any]:
    """Return the record that a file holds.

    Args:
        content: the record as JSON.
        source: name of the file for error messages.

    Raises:
        ValueError: the content is not JSON, or was written by a newer kbit.
    """
    try:
        record: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}; remove it to run its experiment again") from None
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(f"{source} was written by a newer kbit (schema {record['schema_version']})")
    return record


def read_records(path: str | Path, kind: str, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the whole records with these keys that are there, sorted by key.

    Args:
        path: the store.
        kind: experiments or failures.
        keys: keys of the records. None yields all.

    Raises:
        FileNotFoundError: there is no store at path.
        ValueError: see parse_record.
    """
    files = open_existing(path)
    if kind == "failures":
        names = files.names(kind, ".json")
        yield from (read_json(files, name) for name in names if keys is None or Path(name).stem in keys)
        return
    texts = retry(lambda: _read_texts(files, keys))
    for key in sorted(texts):
        yield parse_record(texts[key], f"{files.root}: {key}")


def _read_texts(files: Files, keys: Collection[str] | None) -> dict[str, bytes | str]:
    """Return the JSON of experiments' records by key."""
    loose = {Path(name).stem: name for name in files.names("experiments", ".json")}  # first: see kbit.store.store
    texts: dict[str, bytes | str] = {}
    for name in files.names("compacted", ".parquet"):
        texts |= read_texts(files, name, keys)
    for key in loose.keys() - texts.keys() if keys is None else (loose.keys() & set(keys)) - texts.keys():
        with files.open(loose[key]) as file:
            texts[key] = file.read()
    return texts
