"""Which local files a task's definition names, and the rows of JSON, without loading `datasets` (it takes seconds)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kbit.data.text_files import decode_text, number_json_lines, read_bytes

# Builders of `datasets` that read files of one kind.
BUILDERS: Final = ("arrow", "csv", "hdf5", "json", "pandas", "parquet", "text", "xml")


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
    if not isinstance(place, str) or definition.get("custom_dataset") is not None:
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


def parse_json(content: bytes, path: Path, within: str | None) -> dict[str, dict[str, Any]]:
    """Return the rows of a JSON file by their places: lines, or one array, which may be a field of an object.

    Raises:
        ValueError: the file is no JSON or holds no such rows. The message has the line.
    """
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


def check_files(definition: Mapping[str, Any], folder: Path) -> None:
    """Look for a task's local data files, and whether its JSON can be parsed.

    Raises:
        FileNotFoundError, ValueError: see find_files, read_bytes and parse_json, or a file has no rows.
    """
    for path in (path for files in (find_files(definition, folder) or {}).values() for path in files):
        if definition.get("dataset_path") == "json":
            options = definition.get("dataset_kwargs") or {}
            if not parse_json(read_bytes(path), path, options.get("field")):
                raise ValueError(f"{path.resolve()} has no rows")
