"""The store's Parquet files. Each holds the records of many experiments, sorted by key, and their rows for tables.

A few records are found by the row groups' least and largest keys. pyarrow's read_table(filters=...) does the same, but
takes 7.5 instead of 5.5 ms for 4 of 3,000 records, and reads with threads, which _open must not have.
"""

from __future__ import annotations

import bisect
import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kbit.store.damage import DamagedRecord, set_aside
from kbit.store.filesystem import CannotOpenError, Files

GROUP_EXPERIMENTS: Final = 500  # in a row group: few, so that a few experiments are found without reading all


def encode_part(rows: pa.Table) -> bytes:
    """Return a table (rows.PART_SCHEMA) as the content of a Parquet file."""
    content = io.BytesIO()
    pq.write_table(rows.sort_by("key"), content, compression="zstd", row_group_size=GROUP_EXPERIMENTS)
    return content.getvalue()


def read_keys(files: Files, name: str) -> set[str]:
    """Return the keys of a file's experiments.

    Raises:
        DamagedRecord: the file cannot be read, as of every function here that opens one.
    """
    with _open(files, name) as part:
        return set(part.read(columns=["key"], use_threads=False)["key"].drop_null().to_pylist())


def without_rows(files: Files, name: str, keys: Collection[str]) -> bytes | None:
    """Return a file without the rows of these keys, or None if no row is left. The key "" stands for a missing one.

    All other rows stay as they are, those included that this kbit cannot read.
    """
    with _open(files, name) as part:
        table = part.read(use_threads=False)
    left = table.filter(pc.invert(pc.is_in(pc.fill_null(table["key"], ""), pa.array(sorted(keys), pa.string()))))
    return encode_part(left) if len(left) else None


def read_records_alone(files: Files, name: str) -> pa.Table:
    """Return the keys and records of a file of which another column cannot be read. Rows without a key are left out."""
    with _open(files, name) as part:
        table = part.read(columns=["key", "record"], use_threads=False)
    return table.filter(pc.is_valid(table["key"]))


def count_rows(files: Files, name: str) -> int:
    """Return the number of a file's rows, those included that cannot be read."""
    with _open(files, name) as part:
        return int(part.metadata.num_rows)


def read_texts(files: Files, name: str, keys: Collection[str] | None) -> dict[str, str]:
    """Return the JSON of a file's experiments by key. Keys that are not in the file are left out, None returns all."""
    columns, wanted = ["key", "record"], None if keys is None else sorted(keys)
    with _open(files, name) as part:
        if wanted is None:
            table = part.read(columns=columns, use_threads=False)
        else:
            table = part.read_row_groups(_find_groups(part, wanted), columns=columns, use_threads=False)
            table = table.filter(pc.is_in(table["key"], pa.array(wanted, pa.string())))
    return _pair_texts(table)


def read_rows(
    files: Files, name: str, columns: Sequence[str], whole: pa.Schema, remake: Callable[[Mapping[str, str]], pa.Table]
) -> pa.Table:
    """Return columns of a file, key among them. The rows of another kbit's file are made again from its records.

    Args:
        files: the store's files.
        name: name of the file in the store.
        columns: columns to return.
        whole: schema of a file that this kbit writes.
        remake: function that makes a table with that schema from records (JSON) by key.
    """
    with _open(files, name) as part:
        found = part.schema_arrow  # whose fields also carry the numbers that Parquet gives them
        if found.equals(whole) and found.metadata == whole.metadata:
            is_whole, table = True, part.read(columns=list(columns), use_threads=False).select(list(columns))
        else:
            is_whole, table = False, part.read(columns=["key", "record"], use_threads=False)
    if missing := table["key"].null_count:
        set_aside(DamagedRecord(files.root, name, f"{missing} of {len(table)} records have none", key=""))
        table = table.filter(pc.is_valid(table["key"]))
    return table if is_whole else remake(_pair_texts(table)).select(list(columns))


def _pair_texts(table: pa.Table) -> dict[str, str]:
    """Return the records of a table by key. Those without a key are left out."""
    pairs = zip(table["key"].to_pylist(), table["record"].to_pylist(), strict=True)
    return {key: text for key, text in pairs if key is not None}


@contextlib.contextmanager
def _open(files: Files, name: str) -> Iterator[pq.ParquetFile]:
    """Open a file to be read without threads. It raises DamagedRecord if that fails, or if what is done with it fails.

    A thread of pyarrow's that reads from a Python file needs the interpreter. A thread that still reads when the
    interpreter ends brings the process down with exit code 134, after the work was done.
    """
    try:
        opened = files.open(name)
    except CannotOpenError as error:
        raise DamagedRecord(files.root, name, f"cannot be opened: {error.strerror}", is_foreign=True) from error
    experiments = None
    with opened as file:
        try:
            part = pq.ParquetFile(file, pre_buffer=False)
            experiments = int(part.metadata.num_rows)
            _check_layout(files, name, part)
            yield part
        except DamagedRecord:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's: it says nothing of the content
                raise
            raise DamagedRecord(files.root, name, str(error), experiments=experiments) from error


def _check_layout(files: Files, name: str, part: pq.ParquetFile) -> None:
    """Raise DamagedRecord if a file has not the two columns that every kbit so far has written."""
    for column in ("key", "record"):
        at = part.schema_arrow.get_field_index(column)
        if at < 0 or part.schema_arrow.field(at).type not in (pa.string(), pa.large_string()):
            reason = f"cannot be read by this kbit: it has no column {column!r} of texts"
            raise DamagedRecord(files.root, name, reason, is_foreign=True)


def _find_groups(part: pq.ParquetFile, keys: list[str]) -> list[int]:
    """Return the row groups that may hold one of the sorted keys."""
    found = []
    for group in range(part.num_row_groups):
        column = part.metadata.row_group(group).column(0)  # the key, the first of PART_SCHEMA
        bounds: Any = column.statistics if column.path_in_schema == "key" else None
        at = bisect.bisect_left(keys, bounds.min) if bounds is not None and bounds.has_min_max else None
        if at is None or (at < len(keys) and keys[at] <= bounds.max):
            found.append(group)
    return found
