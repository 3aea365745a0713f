"""The store's Parquet files. Each holds the records of many experiments, sorted by key, and their rows for tables.

A few records are found by the row groups' least and largest keys. pyarrow's read_table(filters=...) does the same, but
takes 7.5 instead of 5.5 ms for 4 of 3,000 records, and reads with threads, which _open must not have.
"""

from __future__ import annotations

import bisect
import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kbit.store.filesystem import Files

GROUP_EXPERIMENTS: Final = 500  # in a row group: few, so that a few experiments are found without reading all


def encode_part(rows: pa.Table) -> bytes:
    """Return a table (rows.PART_SCHEMA) as the content of a Parquet file."""
    content = io.BytesIO()
    pq.write_table(rows.sort_by("key"), content, compression="zstd", row_group_size=GROUP_EXPERIMENTS)
    return content.getvalue()


def read_keys(files: Files, name: str) -> set[str]:
    """Return the keys of a file's experiments."""
    with _open(files, name) as part:
        return set(part.read(columns=["key"], use_threads=False)["key"].to_pylist())


def read_texts(files: Files, name: str, keys: Collection[str] | None) -> dict[str, str]:
    """Return the JSON of a file's experiments by key. Keys that are not in the file are left out, None returns all."""
    columns, wanted = ["key", "record"], None if keys is None else sorted(keys)
    with _open(files, name) as part:
        if wanted is None:
            table = part.read(columns=columns, use_threads=False)
        else:
            table = part.read_row_groups(_find_groups(part, wanted), columns=columns, use_threads=False)
            table = table.filter(pc.is_in(table["key"], pa.array(wanted, pa.string())))
    return dict(zip(table["key"].to_pylist(), table["record"].to_pylist(), strict=True))


def read_rows(
    files: Files, name: str, columns: Sequence[str], whole: pa.Schema, remake: Callable[[list[str]], pa.Table]
) -> pa.Table:
    """Return columns of a file. The rows of another kbit's file are made again from its records.

    Args:
        files: the store's files.
        name: name of the file in the store.
        columns: columns to return.
        whole: schema of a file that this kbit writes.
        remake: function that makes a table with that schema from records (JSON).
    """
    with _open(files, name) as part:
        found = part.schema_arrow  # whose fields also carry the numbers that Parquet gives them
        if found.equals(whole) and found.metadata == whole.metadata:
            return part.read(columns=list(columns), use_threads=False).select(list(columns))
        texts = part.read(columns=["record"], use_threads=False)["record"]
    return remake(texts.to_pylist()).select(list(columns))


@contextlib.contextmanager
def _open(files: Files, name: str) -> Iterator[pq.ParquetFile]:
    """Open a file to be read without threads.

    A thread of pyarrow's that reads from a Python file needs the interpreter. A thread that still reads when the
    interpreter ends brings the process down with exit code 134, after the work was done.
    """
    with files.open(name) as file:
        yield pq.ParquetFile(file, pre_buffer=False)


def _find_groups(part: pq.ParquetFile, keys: list[str]) -> list[int]:
    """Return the row groups that may hold one of the sorted keys."""
    found = []
    for group in range(part.num_row_groups):
        bounds = part.metadata.row_group(group).column(0).statistics  # column 0 is the key, the first of PART_SCHEMA
        at = bisect.bisect_left(keys, bounds.min)
        if at < len(keys) and keys[at] <= bounds.max:
            found.append(group)
    return found
