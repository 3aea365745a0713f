"""A task's local data: found beside the task's YAML, read in memory, hashed, and located row by row.

lm-eval resolves paths against the current directory and leaves files to `datasets`. Here every path is relative to the
YAML, the content is hashed as it is read, and no cache of data sets is written that outlives the reading. JSON is read
by kbit itself, so that a row that cannot be used is named by its line. The builders of `datasets` read other kinds.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow as pa

from kbit.data.data_files import BUILDERS, parse_json
from kbit.data.text_files import read_bytes

_FILES: Final = ("data_files", "data_dir")  # the options that say where files are


@dataclass
class TaskData:
    """A task's data, read as lm-eval's custom_dataset hook asks for it.

    Attributes:
        builder: dataset_path: the kind of files, or a folder of data.
        config: dataset_name: the configuration of a folder of data.
        options: further arguments of datasets.load_dataset.
        files: the files of each split. Those of a folder have no split.
        read: the files read so far, in order.
        places: for each split the place of each row, such as "d.jsonl, line 3". A row of a folder has none.
    """

    builder: str
    config: str | None
    options: Mapping[str, Any]
    files: Mapping[str, Sequence[Path]]
    read: list[Path] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of the uncompressed content of the files read so far."""
        return self._digest.hexdigest()

    def load(self) -> datasets.DatasetDict:
        """Return the rows of each split.

        Raises:
            FileNotFoundError, ValueError: see read_bytes, parse_json.
            ValueError: a file has no rows, or rows do not fit into one table. The message has the file, and for JSON
                the line and the field.
        """
        self.read, self.places, self._digest = [], {}, hashlib.sha256()
        if self.builder == "json":
            return datasets.DatasetDict({split: self._load_json(split, files) for split, files in self.files.items()})
        for path in (path for files in self.files.values() for path in files):
            self._read(path)
        return self._load_built()

    def _read(self, path: Path) -> bytes:
        content = read_bytes(path)
        self._digest.update(content)
        self.read.append(path)
        return content

    def _load_json(self, split: str, files: Sequence[Path]) -> datasets.Dataset:
        rows, places = [], []
        for path in files:
            numbered = parse_json(self._read(path), path, self.options.get("field"))
            if not numbered:
                raise ValueError(f"{path.resolve()} has no rows")
            rows += list(numbered.values())
            places += list(numbered)
        self.places[split] = places
        return tabulate_rows(rows, places)

    def _load_built(self) -> datasets.DatasetDict:
        """Read files by the builder of `datasets`, whose cache goes with the reading."""
        options = {name: value for name, value in self.options.items() if name not in (*_FILES, "trust_remote_code")}
        if self.builder in BUILDERS:
            options["data_files"] = {split: [str(path.resolve()) for path in f] for split, f in self.files.items()}
        if self.builder == "text":
            options.setdefault("encoding", "utf-8-sig")
        named = ", ".join(str(path.resolve()) for files in self.files.values() for path in files)
        with tempfile.TemporaryDirectory(prefix="kbit-") as cache:
            try:
                loaded = datasets.load_dataset(
                    self.builder, self.config, cache_dir=cache, keep_in_memory=True, **options
                )
            except (datasets.exceptions.DatasetsError, pa.ArrowException, TypeError, ValueError) as error:
                cause = error.__cause__ or error
                raise ValueError(f"{named} cannot be read as {self.builder}: {cause}") from error
        splits = (
            loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({str(loaded.split): loaded})
        )
        for split, rows in splits.items():
            where = ", ".join(str(path.resolve()) for path in self.files.get(split, ()))
            if not len(rows):
                raise ValueError(f"{where or named} has no rows")
            self.places[split] = [f"{where}, row {number}" for number in range(1, len(rows) + 1)] if where else []
        return splits


def tabulate_rows(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> datasets.Dataset:
    """Return rows as a table with the fields of all rows. A field that a row lacks is null there.

    Raises:
        ValueError: a field has values that no column can hold together. The message has the first such row's place.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        return datasets.Dataset.from_dict(columns)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        for name, values in columns.items():
            if (odd := _find_odd(values)) is not None:
                raise ValueError(
                    f"{places[odd]}: the field {name!r} is {_shorten(values[odd])}, of another kind than in the rows "
                    "before it, or too large"
                ) from error
        raise


def _find_odd(values: Sequence[Any]) -> int | None:
    """Return the index of the first value that fits into no column with those before it, by bisection."""
    if _fits(values):
        return None
    fitting, failing = 0, len(values)  # so many values from the start on fit, so many do not
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if _fits(values[:middle]) else (fitting, middle)
    return failing - 1


def _fits(values: Sequence[Any]) -> bool:
    try:
        datasets.Dataset.from_dict({"values": list(values)})
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
