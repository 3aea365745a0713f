"""A task's local data: found beside the task's YAML, read in memory, hashed, and located row by row.

lm-eval resolves paths against the current directory and leaves files to `datasets`. Here every path is relative to the
YAML, the content is hashed as it is read, and no cache of data sets is written that outlives the reading. JSON is read
by kbit itself, so that a row that cannot be used is named by its line. The builders of `datasets` read other kinds.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow as pa

from kbit.data.texts import decode_text, number_json_lines, read_bytes

# Builders of `datasets` that read files of one kind.
BUILDERS: Final = ("arrow", "csv", "hdf5", "json", "pandas", "parquet", "text", "xml")
_FILES: Final = ("data_files", "data_dir")  # the options that say where files are


def find_files(definition: Mapping[str, Any], folder: Path) -> dict[str, list[Path]] | None:
    """Return the local data files of each split of a task's definition, or None if its data is not in local files.

    Args:
        definition: a task's definition. dataset_path is a builder of `datasets` or a folder.
        folder: the folder of the task's YAML, to which all paths are relative.

    Raises:
        FileNotFoundError: a file is missing. The message has its absolute path.
        ValueError: data_files is not as `datasets` takes it, or dataset_path would follow the working directory.
    """
    place, options = definition.get("dataset_path"), definition.get("dataset_kwargs") or {}
    if not isinstance(place, str) or callable(definition.get("custom_dataset")):
        return None
    if place not in BUILDERS:
        if (folder / place).is_dir():
            return {"": sorted(path for path in (folder / place).rglob("*") if path.is_file())}
        if Path(place).is_dir():
            raise ValueError(f"dataset_path={place} is a folder here, but not in {folder}, to which paths are relative")
        return None
    listed = _split_files(options.get("data_files"), options.get("data_dir"))
    if any("://" in file for files in listed.values() for file in files):
        return None
    base = folder / str(options.get("data_dir") or "")
    return {split: [path for file in files for path in _find_matches(base, file)] for split, files in listed.items()}


def _find_matches(base: Path, pattern: str) -> list[Path]:
    """Return the file of a name, or the files of a pattern, in order."""
    if (base / pattern).is_file() or not set(pattern) & set("*?["):
        found = [base / pattern]
    elif Path(pattern).is_absolute():
        found = sorted(Path("/").glob(pattern[1:]))
    else:
        found = sorted(base.glob(pattern))
    found = [path for path in found if not path.is_dir()]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"no data file at {(base / pattern).resolve()}")
    return found


def _split_files(data_files: Any, data_dir: Any) -> dict[str, list[str]]:
    """Return the files of each split.

    Args:
        data_files: as `datasets` takes it: a file or a list of files (split train), or either for each split.
        data_dir: a folder, whose files are taken (split train) if data_files says nothing.
    """
    if data_files is None and data_dir is not None:
        data_files = "*"
    by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
    listed = {str(split): [files] if isinstance(files, str) else files for split, files in by_split.items()}
    if not listed or not all(
        isinstance(files, list) and files and all(isinstance(file, str) for file in files) for files in listed.values()
    ):
        raise ValueError(
            f"dataset_kwargs.data_files={data_files!r} is not a file, a list of files, or a dictionary of them"
        )
    return listed


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
            FileNotFoundError, ValueError: see read_bytes, number_json_lines.
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
            numbered = _parse_json(self._read(path), path, self.options.get("field"))
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


def _parse_json(content: bytes, path: Path, within: str | None) -> dict[str, dict[str, Any]]:
    """Return the rows of a JSON file by their places: lines, or one array, which may be a field of an object."""
    if within is None and not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return {f"{path.resolve()}, line {n}": row for n, row in number_json_lines(content, path).items()}
    try:
        value = json.loads(decode_text(content, path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.resolve()} is no JSON: {error}") from error
    if within is not None:
        value = value.get(within) if isinstance(value, dict) else None
    what = "" if within is None else f"the field {within!r} of "
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{what}{path.resolve()} is no array of objects")
    return {f"{path.resolve()}, row {number}": row for number, row in enumerate(value, start=1)}


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
