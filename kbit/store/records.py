"""The records of a store: JSON objects in files of their own, or in a Parquet file.

Files move while a store is read. A reader that finds a file gone since it was listed starts again (retry). A record
that cannot be read is left out with a warning that names it, and all others are read (kbit.store.damage).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.measurement import ItemValues, decode_items
from kbit.store.damage import DamagedRecord, Source, set_aside
from kbit.store.filesystem import CannotOpenError, Files, open_files
from kbit.store.parquet import read_keys, read_texts

T = TypeVar("T")
_READ_TRIES: Final = 8  # each compaction that ends in the middle of reading costs one


@dataclass(frozen=True)
class _Items:
    """The field of a Result that holds its items. It is missing in results from before items were kept."""

    items: tuple[ItemValues, ...] = ()


def open_existing(path: str | Path) -> Files:
    """Return the files of the store at a path.

    Raises:
        FileNotFoundError: there is no store.
    """
    files = open_files(path)
    if not files.is_store():
        raise FileNotFoundError(f"no results at {files.root}: start with `kbit run`")
    return files


def retry(files: Files, read: Callable[[], T], *, has_lock: bool = False) -> T:
    """Return what `read` returns. Call it again if a file that it listed has been compacted or deleted meanwhile.

    Where compaction goes on and on, the last try waits for its end and keeps the next one from beginning.

    Args:
        files: the store's files.
        read: function that reads from the store.
        has_lock: whether the caller holds the store's lock. Waiting for it would then never end.
    """
    for attempt in range(_READ_TRIES):
        try:
            return read()
        except FileNotFoundError:
            time.sleep(0.001 * 2**attempt)
    with contextlib.nullcontext() if has_lock else files.lock(shared=True):
        return read()


def list_finished(files: Files, known: dict[str, set[str]]) -> set[str]:
    """Return the keys of finished experiments, see read_part_keys for `known`."""
    deleted = list_deleted(files)
    loose = {Path(name).stem for name in files.names("experiments", ".json")}  # before compacted/: see kbit.store.store
    return loose.union(*read_part_keys(files, known).values()) - deleted


def list_deleted(files: Files) -> set[str]:
    """Return the keys of deleted experiments, of which something may be left where there is no lock.

    A compaction that runs beside the deletion has read them before, and writes them once more.
    """
    return set() if files.has_lock else {Path(name).stem for name in files.names("deleted", ".json")}


def read_part_keys(files: Files, known: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the keys in each Parquet file that can be read.

    They are remembered in `known`, as a Parquet file never changes.
    """
    names = files.names("compacted", ".parquet")
    for name in names:
        if name not in known:
            try:
                known[name] = read_keys(files, name)
            except DamagedRecord as error:
                set_aside(error)
    return {name: known[name] for name in names if name in known}


def read_records(path: str | Path, kind: str, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the whole records with these keys that are there and can be read, sorted by key.

    Args:
        path: the store.
        kind: experiments or failures.
        keys: keys of the records. None yields all.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    return (record for _, record in find_records(open_existing(path), kind, keys))


def read_as(
    cls: type[T], path: str | Path, kind: str = "experiments", keys: Collection[str] | None = None
) -> Iterator[T]:
    """Yield the records of read_records as dataclasses, which may have some of the fields only."""
    for source, record in find_records(open_existing(path), kind, keys):
        try:
            value = source.read(cls, record)
        except DamagedRecord as error:
            set_aside(error)
        else:
            yield value


def find_records(files: Files, kind: str, keys: Collection[str] | None) -> Iterator[tuple[Source, dict[str, Any]]]:
    """Yield the records of read_records, each with its place in the store."""
    found = _read_failures(files, keys) if kind == "failures" else retry(files, lambda: _read_results(files, keys))
    for key in sorted(found):
        source, content = found[key]
        try:
            record = source.parse(content)
        except DamagedRecord as error:
            set_aside(error)
        else:
            yield source, record


def _read_failures(files: Files, keys: Collection[str] | None) -> dict[str, tuple[Source, bytes | str]]:
    """Return the JSON of failures by key, with its place. One that is forgotten meanwhile is none."""
    found: dict[str, tuple[Source, bytes | str]] = {}
    for name in files.names("failures", ".json"):
        key = Path(name).stem
        if keys is None or key in keys:
            try:
                found |= read_loose(files, [name])
            except FileNotFoundError:  # its experiment has been run again
                continue
    return found


def _read_results(files: Files, keys: Collection[str] | None) -> dict[str, tuple[Source, bytes | str]]:
    """Return the JSON of experiments by key, with its place."""
    deleted = list_deleted(files)
    loose = {Path(name).stem: name for name in files.names("experiments", ".json")}  # first: see kbit.store.store
    found: dict[str, tuple[Source, bytes | str]] = {}
    for name in files.names("compacted", ".parquet"):
        try:
            texts = read_texts(files, name, keys)
        except DamagedRecord as error:
            set_aside(error)
            continue
        found |= {key: (Source(files.root, name, key, is_part=True), text) for key, text in texts.items()}
    fresh = loose.keys() - found.keys() if keys is None else (loose.keys() & set(keys)) - found.keys()
    found |= read_loose(files, [loose[key] for key in fresh])
    return {key: value for key, value in found.items() if key not in deleted}


def read_loose(files: Files, names: Collection[str]) -> dict[str, tuple[Source, bytes | str]]:
    """Return the content of JSON files by key, with its place.

    Raises:
        FileNotFoundError: a file is gone.
    """
    found: dict[str, tuple[Source, bytes | str]] = {}
    for name in names:
        source = Source(files.root, name, Path(name).stem)
        try:
            with files.open(name) as file:
                found[Path(name).stem] = (source, file.read())
        except CannotOpenError as error:
            set_aside(source.refuse(f"cannot be opened: {error.strerror}", is_foreign=True))
    return found


def read_all_items(source: Source, record: Mapping[str, Any]) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Return the value of each item of a record [n] by task and metric.

    Raises:
        DamagedRecord: they cannot be read.
    """
    items = source.read(_Items, record).items
    try:
        return {(own.task, own.metric): decode_items(own) for own in items}
    except ValueError as error:
        raise source.refuse(error) from error
