"""The store: a JSON file per experiment, named by its key, written whole or not at all; many of them as a Parquet file.

results/experiments/<key>.json    a finished experiment: a Result
results/compacted/<id>.parquet    many finished experiments: their records, and their rows ready for tables
results/failures/<key>.json       an experiment that failed: its reason and traceback, never a number
results/logs/<key>.log            what an experiment printed

A result moves from experiments/ to compacted/ and never back: first the Parquet file is there, whole, then the JSON
files go. So whoever lists experiments/ first misses none; who meets a result twice (a crash in between) takes one; and
who finds a file gone since it was listed looks again.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kbit.config import Experiment
from kbit.files import Files, is_url, open_files
from kbit.measurement import ItemValues, decode_items
from kbit.parts import encode_part, read_keys, read_rows, read_texts
from kbit.records import (
    PART_SCHEMA,
    ROW_SCHEMA,
    SCHEMA_VERSION,
    list_measurements,
    make_part,
    parse_record,
    tabulate,
)

if TYPE_CHECKING:  # the store is read without loading torch
    from kbit.experiment import Result

T = TypeVar("T")

PART_EXPERIMENTS: Final = 5000  # of a Parquet file: tens of megabytes, which compaction holds in memory
MANY_FILES: Final = 500  # JSON files, which take a quarter of a second to read: a sweep that leaves more compacts them
_READ_TRIES: Final = 10  # each compaction that ends in the middle of reading costs one
_NULLABLE_INTEGERS: Final = ("exponent_bits", "block_size")
_FOLDERS: Final = ("experiments", "failures", "compacted")


@dataclass(frozen=True)
class Failure:
    """An experiment without a result, and why."""

    key: str
    experiment: Experiment
    reason: str
    traceback: str
    finished: str
    label: str


class Store:
    """Results at a local path or an fsspec URL. Several processes may write at once: the first result of a key stays.

    Raises:
        OSError: the store cannot be made or written to.
        ValueError: a URL of an unknown kind.
    """

    def __init__(self, path: str | Path) -> None:
        self._files = open_files(path)
        self.root = self._files.root
        self._compacted: dict[str, set[str]] = {}  # the keys of each Parquet file, which never changes
        try:
            self._files.prepare(_FOLDERS)
        except OSError as error:
            if is_url(path):  # says so itself
                raise
            raise OSError(f"results={path}: cannot write to {self.root}: {error.strerror or error}") from error

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        return Path(self.root)

    def finished_keys(self) -> set[str]:
        """Return the keys of experiments that have a result."""
        return _retry(lambda: _list_finished(self._files, self._compacted))

    def has(self, key: str) -> bool:
        """Whether the experiment has a result."""
        if self._files.has(f"experiments/{key}.json"):  # before compacted/: see the module
            return True
        return any(key in keys for keys in _retry(lambda: _read_part_keys(self._files, self._compacted)).values())

    def log_path(self, key: str) -> Path | None:
        """Return where the output of an experiment goes; a store behind a URL keeps none."""
        return None if is_url(self.root) else self.path / "logs" / f"{key}.log"

    def write(self, result: Result) -> None:
        """Write a result and forget an earlier failure of the same experiment."""
        self._files.create(f"experiments/{result.key}.json", _encode(result))
        self._files.remove(f"failures/{result.key}.json")

    def write_failure(self, experiment: Experiment, reason: str, traceback: str) -> None:
        """Record that an experiment failed; a later failure replaces an earlier one."""
        name = f"failures/{experiment.key}.json"
        self._files.remove(name)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._files.create(
            name, _encode(Failure(experiment.key, experiment, reason, traceback, now, experiment.label()))
        )

    def compact(self, at_least: int = 0) -> int:
        """Put the JSON files of finished experiments into Parquet files; return how many.

        Readers and writers go on meanwhile; a crash at any moment loses nothing, and the next compaction ends the work.

        Args:
            at_least: do nothing if there are fewer files.
        """
        if len(self._files.names("experiments", ".json")) < at_least:
            return 0
        with self._files.lock():
            done = set().union(*_read_part_keys(self._files, self._compacted).values())
            loose = self._files.names("experiments", ".json")
            for name in [name for name in loose if Path(name).stem in done]:  # left by a crash, or finished twice
                self._files.remove(name)
            fresh = [name for name in loose if Path(name).stem not in done]
            for at in range(0, len(fresh), PART_EXPERIMENTS):
                chunk = fresh[at : at + PART_EXPERIMENTS]
                self._replace(chunk, make_part([_read_json(self._files, name) for name in chunk]))
            self._merge_small_parts()
        return len(fresh)

    def delete(self, keys: Collection[str]) -> int:
        """Delete the results of these experiments; return how many there were."""
        wanted = pa.array(sorted(keys), pa.string())
        with self._files.lock():
            deleted = self.finished_keys() & set(keys)
            for key in deleted:
                self._files.remove(f"experiments/{key}.json")
            for name, there in _read_part_keys(self._files, self._compacted).items():
                if there & deleted:
                    part = read_rows(self._files, name, PART_SCHEMA)
                    self._replace([name], part.filter(pc.invert(pc.is_in(part["key"], wanted))))
        return len(deleted)

    def delete_failures(self, keys: Collection[str]) -> int:
        """Forget that these experiments failed; return how many had."""
        deleted = sorted(set(self._files.names("failures", ".json")) & {f"failures/{key}.json" for key in keys})
        for name in deleted:
            self._files.remove(name)
        return len(deleted)

    def merge(self, path: str | Path) -> tuple[int, int]:
        """Copy another store's results and failures that this one lacks; return (results copied, had already).

        Raises:
            FileNotFoundError: there is no store at path.
        """
        other = _open_existing(path)
        mine = self.finished_keys()
        copied = had = 0
        for part in _retry(lambda: list(_read_parts(other, PART_SCHEMA))):
            fresh = part.filter(pc.invert(pc.is_in(part["key"], pa.array(sorted(mine), pa.string()))))
            mine.update(fresh["key"].to_pylist())
            copied, had = copied + len(fresh), had + len(part) - len(fresh)
            self._replace([], fresh)
        for name in other.names("failures", ".json"):
            if Path(name).stem not in mine:
                with other.open(name) as file:
                    self._files.create(name, file.read())
        return copied, had

    def _merge_small_parts(self) -> None:
        """Put the smallest Parquet files together as long as that is not too long."""
        pending: list[str] = []
        size = 0
        sizes = {name: len(keys) for name, keys in _read_part_keys(self._files, self._compacted).items()}
        for name, more in [*sorted(sizes.items(), key=lambda item: item[1]), ("", 0)]:
            if not name or size + more > PART_EXPERIMENTS:
                if len(pending) > 1:
                    parts = [read_rows(self._files, old, PART_SCHEMA) for old in pending]
                    self._replace(pending, _drop_repeated(pa.concat_tables(parts)))
                pending, size = [], 0
            pending.append(name)
            size += more

    def _replace(self, names: Collection[str], part: pa.Table) -> None:
        """Write a Parquet file, then remove the files whose results it has."""
        if len(part):
            self._files.create(f"compacted/{uuid.uuid4().hex}.parquet", encode_part(part))
        for name in names:
            self._files.remove(name)


def list_keys(path: str | Path) -> tuple[set[str], set[str]]:
    """Return the keys of finished and of failed experiments; none of either if there is no store yet."""
    files = open_files(path)
    failed = {Path(name).stem for name in files.names("failures", ".json")}
    finished = _retry(lambda: _list_finished(files, {}))
    return finished, failed - finished


def read_results(path: str | Path = "results") -> pd.DataFrame:
    """Return the store as a table, one row for each measurement of each finished experiment.

    Columns: key, model, family, architecture, parameters, quantized_parameters, dtype, the quantizer's fields
    (block_size missing: whole tensor; table as text; all missing for the 16-bit baseline), method, method_options
    (what is not at its default, as text), outlier_fraction, outlier_selection, outlier_zscore and
    activation_threshold (what stays at 16 bits), include, exclude, evaluation (values compare only where it is
    equal: dtype, items or windows, and the beginning of a hash of their content), bits_per_param, total_bits,
    weight_rmse (relative error of the quantized weights), task, metric, value, low, high (95% interval), n. The table's
    attrs["store"] is the path, for those who need the items behind a value (read_items).

    Raises:
        FileNotFoundError: there is no store at path.
        ValueError: a file of it is damaged, or of a newer kbit.
    """
    files = _open_existing(path)
    rows = _retry(lambda: pa.concat_tables([ROW_SCHEMA.empty_table(), *_read_parts(files, ROW_SCHEMA)]))
    table: pd.DataFrame = list_measurements(_drop_repeated(rows).sort_by("key")).to_pandas()
    table = table.astype(dict.fromkeys(_NULLABLE_INTEGERS, "Int64"))
    table.attrs["store"] = str(path)
    return table


def read_failures(path: str | Path = "results") -> pd.DataFrame:
    """Return the failed experiments, one a row: key, label, model, bits, data_type, block_size, reason, finished."""
    rows = [
        {
            "key": record["key"],
            "label": record.get("label", ""),  # failures from before have none
            "model": record["experiment"]["model"]["name"],
            **{name: record["experiment"]["quant"][name] for name in ("bits", "data_type", "block_size")},
            "reason": record["reason"],
            "finished": record["finished"],
        }
        for record in read_records(path, "failures")
    ]
    columns = ["key", "label", "model", "bits", "data_type", "block_size", "reason", "finished"]
    return pd.DataFrame(rows, columns=columns).astype({"block_size": "Int64"})


def read_provenance(path: str | Path = "results") -> pd.DataFrame:
    """Return where the results come from: git_commit, device, versions, experiments, first, last; one row per origin.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    rows = [
        {name: record[name] for name in ("git_commit", "device", "finished")}
        | {"versions": ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))}
        for record in read_records(path, "experiments")
    ]
    table = pd.DataFrame(rows, columns=["git_commit", "device", "versions", "finished"])
    origins = table.groupby(["git_commit", "device", "versions"], dropna=False)["finished"]
    return origins.agg(experiments="size", first="min", last="max").reset_index()


def read_items(
    path: str | Path, task: str, metric: str, keys: Collection[str] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return the value of each item [n] by experiment key, in item order: 0 or 1 for acc, nats for cross_entropy.

    Experiments without such items are left out: another task, or a store from before items were kept.

    Args:
        path: of the store.
        task, metric: as in read_results; metrics with items are acc, acc_norm, acc_bytes, and those of windows.
        keys: of the experiments to read; None is all.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    return read_items_by_task(path, metric, keys).get(task, {})


def read_items_by_task(
    path: str | Path, metric: str, keys: Collection[str] | None = None
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return what read_items does for every task that has items of a metric: {task: {key: values [n]}}.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for record in read_records(path, "experiments", keys):
        for items in record.get("items", ()):
            if items["metric"] == metric:
                found.setdefault(items["task"], {})[record["key"]] = decode_items(ItemValues(**items))
    return found


def read_features(path: str | Path, keys: Collection[str] | None = None) -> pd.DataFrame:
    """Return the hidden dimensions that are large most often, a row for each dimension, layer and input.

    Columns: key, model, dimension, is_feature, layers and positions (shares of the whole model), one_sided, layer,
    input, share (of the positions of this input), largest; see kbit.features.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    rows = []
    for record in read_records(path, "experiments", keys):
        about = {"key": record["key"], "model": record["experiment"]["model"]["name"]}
        for feature in record.get("features", ()):
            own = {name: feature[name] for name in ("dimension", "is_feature", "layers", "positions", "one_sided")}
            rows += [about | own | place for place in feature["by_layer"]]
    columns = ["key", "model", "dimension", "is_feature", "layers", "positions", "one_sided", "layer", "input"]
    return pd.DataFrame(rows, columns=[*columns, "share", "largest"])


def read_records(path: str | Path, kind: str, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the whole records of these keys that are there, by key; None: all. kind: experiments or failures."""
    files = _open_existing(path)
    if kind == "failures":
        names = files.names(kind, ".json")
        yield from (_read_json(files, name) for name in names if keys is None or Path(name).stem in keys)
        return
    texts = _retry(lambda: _read_texts(files, keys))
    for key in sorted(texts):
        yield parse_record(texts[key], f"{files.root}: {key}")


def _read_texts(files: Files, keys: Collection[str] | None) -> dict[str, bytes | str]:
    """Return the JSON of experiments' records by key."""
    loose = {Path(name).stem: name for name in files.names("experiments", ".json")}  # first: see the module
    texts: dict[str, bytes | str] = {}
    for name in files.names("compacted", ".parquet"):
        texts |= read_texts(files, name, keys)
    for key in loose.keys() - texts.keys() if keys is None else (loose.keys() & set(keys)) - texts.keys():
        with files.open(loose[key]) as file:
            texts[key] = file.read()
    return texts


def _open_existing(path: str | Path) -> Files:
    files = open_files(path)
    if not files.is_store():
        raise FileNotFoundError(f"no results at {files.root}: start with `kbit run`")
    return files


def _retry(read: Callable[[], T]) -> T:
    """Return what read returns; a file that is gone since it was listed has been compacted or deleted: again."""
    for _ in range(_READ_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def _list_finished(files: Files, known: dict[str, set[str]]) -> set[str]:
    loose = {Path(name).stem for name in files.names("experiments", ".json")}  # before compacted/: see the module
    return loose.union(*_read_part_keys(files, known).values())


def _read_part_keys(files: Files, known: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the keys in each Parquet file; remembers them in `known`."""
    names = files.names("compacted", ".parquet")
    for name in names:
        if name not in known:
            known[name] = read_keys(files, name)
    return {name: known[name] for name in names}


def _read_parts(files: Files, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the store's experiments as tables, ROW_SCHEMA or PART_SCHEMA; an experiment may come twice."""
    loose = files.names("experiments", ".json")  # before compacted/: see the module
    for name in files.names("compacted", ".parquet"):
        yield read_rows(files, name, schema)
    make = tabulate if schema == ROW_SCHEMA else make_part
    for at in range(0, len(loose), PART_EXPERIMENTS):
        yield make([_read_json(files, name) for name in loose[at : at + PART_EXPERIMENTS]])


def _read_json(files: Files, name: str) -> dict[str, Any]:
    with files.open(name) as file:
        return parse_record(file.read(), f"{files.root}/{name}")


def _drop_repeated(rows: pa.Table) -> pa.Table:
    """Keep the first of each key's rows."""
    repeated = rows["key"].to_pandas().duplicated().to_numpy()
    return rows.filter(pa.array(~repeated)) if repeated.any() else rows


def _encode(record: Any) -> bytes:
    """Return a dataclass as JSON."""
    return json.dumps(dataclasses.asdict(record) | {"schema_version": SCHEMA_VERSION}, indent=1).encode()
