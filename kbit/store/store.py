"""The store of results: a JSON file for each experiment, or one Parquet file for many.

results/experiments/<key>.json    a finished experiment: a Result
results/compacted/<id>.parquet    many finished experiments: their records, and their rows for tables
results/stopped/<key>-<n>.json    an experiment that has not measured all items (kbit.store.stopped.records)
results/failures/<key>.json       a failed experiment: a Failure, with reason and traceback, never a number
results/logs/<key>.log            what an experiment printed
results/training/<key>.checkpoint a training that is not done. It is removed once there is a result
results/adapters/<key>/           LoRA adapters that were trained
results/deleted/<key>.json        a deleted experiment, behind a URL only: whatever else holds it is no result

Every file is written whole or not at all. A result moves from experiments/ to compacted/ and never back: first the
whole Parquet file is there, then the JSON files are removed. Three rules follow for readers. List experiments/ first,
and no result is missed. Take one of two results with the same key, which a crash in between leaves. Look again if a
file is gone since it was listed.
"""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pyarrow as pa

from kbit.experiments.config import Experiment
from kbit.experiments.result import FAILED, Failure, Result
from kbit.experiments.serialize import to_json, write_json
from kbit.store.damage import SCHEMA_VERSION, DamagedRecord, set_aside
from kbit.store.filesystem import is_url, open_files
from kbit.store.parquet import count_rows, encode_part, without_rows
from kbit.store.records import find_records, list_deleted, list_finished, open_existing, read_part_keys, retry
from kbit.store.results import (
    PART_EXPERIMENTS,
    find_damaged,
    find_readable,
    read_part,
    read_parts,
    rescue_part,
    tabulate_files,
    without_keys,
)
from kbit.store.rows import PART_SCHEMA, drop_repeated
from kbit.store.stopped.records import count_all, find_key, find_names, list_stopped, load_stopped, name_stopped
from kbit.training.files import TrainingFiles

MANY_FILES: Final = 500  # JSON files, which take a quarter of a second to read. A sweep that leaves more compacts them
_FOLDERS: Final = ("experiments", "failures", "compacted", "stopped")


class Store:
    """Results at a local path or an fsspec URL. Several processes may write at once. The first result of a key stays.

    Raises:
        OSError: the store cannot be made or written to.
        ValueError: the URL has an unknown protocol.
    """

    def __init__(self, path: str | Path) -> None:
        self._files = open_files(path)
        self.root = self._files.root
        self._compacted: dict[str, set[str]] = {}  # the keys of each Parquet file, which never changes
        try:
            self._files.prepare(_FOLDERS)
        except OSError as error:
            if is_url(path):  # whose error names the store already
                raise
            raise OSError(f"results={path}: cannot write to {self.root}: {error.strerror or error}") from error

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        return Path(self.root)

    def finished_keys(self) -> set[str]:
        """Return the keys of experiments that have a result."""
        return self._list_finished()

    def _list_finished(self, *, has_lock: bool = False) -> set[str]:
        return retry(self._files, lambda: list_finished(self._files, self._compacted), has_lock=has_lock)

    def has(self, key: str) -> bool:
        """Whether the experiment has a result."""
        if not self._files.has_lock and self._files.has(f"deleted/{key}.json"):
            return False
        if self._files.has(f"experiments/{key}.json"):  # before compacted/: see the module
            return True
        parts = retry(self._files, lambda: read_part_keys(self._files, self._compacted))
        return any(key in keys for keys in parts.values())

    def log_path(self, key: str) -> Path | None:
        """Return where the output of an experiment goes. A store behind a URL keeps none."""
        return None if is_url(self.root) else self.path / "logs" / f"{key}.log"

    def training_files(self, key: str) -> TrainingFiles | None:
        """Return where an experiment's training is kept. A store behind a URL keeps none."""
        if is_url(self.root):
            return None
        return TrainingFiles(self.path / "training" / f"{key}.checkpoint", self.path / "adapters" / key)

    def forget_training(self, key: str) -> None:
        """Remove the checkpoint of a training of which there is a result."""
        if (files := self.training_files(key)) is not None:
            files.checkpoint.unlink(missing_ok=True)

    def _remove_trainings(self, keys: Collection[str]) -> None:
        """Remove the checkpoints and adapters of these experiments."""
        for key in keys:
            if (files := self.training_files(key)) is not None:
                files.checkpoint.unlink(missing_ok=True)
                shutil.rmtree(files.adapters, ignore_errors=True)

    def _copy_adapters(self, root: str, keys: Collection[str]) -> None:
        """Copy the adapters of these experiments from another local store, if there are some."""
        for key in () if is_url(root) else keys:
            source, files = Path(root) / "adapters" / key, self.training_files(key)
            if files is not None and source.is_dir():
                part = files.adapters.with_name(f"{key}.{uuid.uuid4().hex}.part")
                shutil.copytree(source, part)
                shutil.rmtree(files.adapters, ignore_errors=True)
                part.replace(files.adapters)

    def write(self, result: Result) -> None:
        """Write a result, and forget an earlier failure of the same experiment, and its earlier rounds.

        Rounds of a record that goes as far, or further, stay, and the result is then not written.
        """
        self._forget_deletion([result.key])
        name = name_stopped(result) if result.sampled else f"experiments/{result.key}.json"
        if not result.sampled:
            self._files.create(name, _encode(result))
        else:
            there = self.find_stopped(result.key)
            if there is not None and count_all(name_stopped(there)) >= count_all(name):
                return
            self._files.replace(name, _encode(result))  # what has this name already cannot be read
        self._files.remove(f"failures/{result.key}.json")
        self._remove_stopped([result.key], but=name)

    def find_stopped(self, key: str) -> Result | None:
        """Return what earlier rounds measured of an experiment that is not finished, if anything."""
        return load_stopped(self._files, [key], Result).get(key)

    def stopped_keys(self) -> set[str]:
        """Return the keys of experiments that have measured a part of their items."""
        return set(list_stopped(self._files))

    def list_rounds(self, keys: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Return the rounds that each part of these experiments has been measured in, by key.

        Those are left out that are finished, that have no rounds, or whose record cannot be read.
        """
        found = load_stopped(self._files, set(keys) - self.finished_keys(), Result)
        return {key: tuple(part.rounds for part in result.sampled) for key, result in found.items()}

    def _remove_stopped(self, keys: Collection[str], but: str = "") -> None:
        """Remove the rounds of these experiments but for one file."""
        for name in find_names(self._files, keys):
            if name != but:
                self._files.remove(name)

    def write_failure(self, key: str, experiment: Experiment, reason: str, traceback: str, state: str = FAILED) -> None:
        """Record that an experiment failed or crashed (see Failure), in place of an earlier failure."""
        name = f"failures/{key}.json"
        self._files.remove(name)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._files.create(name, _encode(Failure(key, experiment, reason, traceback, now, experiment.label(), state)))

    def compact(self, at_least: int = 0) -> int:
        """Put the JSON files of finished experiments into Parquet files and return the number of experiments.

        Readers and writers go on meanwhile. A crash at any moment loses nothing, and the next compaction ends the work.
        What cannot be read stays as it is.

        Args:
            at_least: number of files below which nothing is done.
        """
        if len(self._files.names("experiments", ".json")) < at_least:
            return 0
        with self._files.lock():
            deleted = list_deleted(self._files)
            done: set[str] = set().union(*read_part_keys(self._files, self._compacted).values())
            loose = self._files.names("experiments", ".json")
            twice = self._find_readable(done & {Path(name).stem for name in loose})
            for name in [name for name in loose if Path(name).stem in twice]:  # left by a crash, or finished twice
                self._files.remove(name)
            fresh = [name for name in loose if Path(name).stem not in done | deleted]
            compacted = 0
            for at in range(0, len(fresh), PART_EXPERIMENTS):
                part = tabulate_files(self._files, fresh[at : at + PART_EXPERIMENTS], PART_SCHEMA)
                self._replace([f"experiments/{key}.json" for key in part["key"].to_pylist()], part)
                compacted += len(part)
            self._merge_small_parts()
            self._remove_from_parts(list_deleted(self._files))
        return compacted

    def delete(self, keys: Collection[str]) -> int:
        """Delete the results of these experiments, with their adapters, or their rounds, and return their number.

        Those in a file from which nothing can be taken stay, with a warning that names the file.
        """
        with self._files.lock():
            deleted = self._list_finished(has_lock=True) & set(keys)
            stopped = set(map(find_key, find_names(self._files, set(keys) - deleted)))
            for key in () if self._files.has_lock else deleted:
                self._files.create(f"deleted/{key}.json", b"{}")
            self._remove_results(deleted)
            left = self._list_finished(has_lock=True)
            self._remove_trainings(deleted - left)
            self._remove_stopped(set(keys) - left)
        return len((deleted | stopped) - left)

    def delete_damaged(self, damaged: Iterable[DamagedRecord]) -> int:
        """Remove records that cannot be read (kbit.store.results.find_damaged) and return their number.

        Those that may be whole for another kbit stay, and those that can be read by now. Of a Parquet file with a
        damaged column the records stay.
        """
        with self._files.lock():
            now = {(error.name, error.key) for error in find_damaged(self.root) if not error.is_foreign}
            removed = [error for error in damaged if (error.name, error.key) in now]
            rows: dict[str, set[str]] = {error.name: set() for error in removed}
            for error in removed:
                rows[error.name] |= set() if error.key is None else {error.key}
            whole = {error.name for error in removed if error.key is None}
            for name, keys in rows.items():
                if name in whole:
                    rescued = rescue_part(self._files, name) if name.startswith("compacted/") else None
                    self._replace([name], None if rescued is None else without_keys(rescued, keys))
                else:
                    self._remove_rows(name, keys)
        return len(removed)

    def delete_failures(self, keys: Collection[str]) -> int:
        """Forget the failures of these experiments, and trainings that did not end. Return the number of failures."""
        deleted = sorted(set(self._files.names("failures", ".json")) & {f"failures/{key}.json" for key in keys})
        for name in deleted:
            self._files.remove(name)
        self._remove_trainings({Path(name).stem for name in deleted} - self.finished_keys())
        return len(deleted)

    def merge(self, path: str | Path) -> tuple[int, int]:
        """Copy the results, with their adapters, and failures of another store that this one lacks.

        Returns:
            The number of copied results, and the number of results that this store had already.

        Raises:
            FileNotFoundError: there is no store at path.
        """
        other = open_existing(path)
        mine = self.finished_keys()
        copied = had = 0
        for part in retry(other, lambda: list(read_parts(other, PART_SCHEMA))):
            fresh = without_keys(part, mine)
            self._forget_deletion(fresh["key"].to_pylist())
            mine.update(fresh["key"].to_pylist())
            copied, had = copied + len(fresh), had + len(part) - len(fresh)
            self._copy_adapters(other.root, fresh["key"].to_pylist())
            self._replace([], fresh)
        further = self._merge_rounds(load_stopped(other, list_stopped(other).keys() - mine, Result))
        for _, record in find_records(other, "failures", None):
            if record["key"] not in mine | further:
                self._files.create(f"failures/{record['key']}.json", write_json(record, indent=1).encode())
        return copied, had

    def _merge_rounds(self, rounds: Mapping[str, Result]) -> set[str]:
        """Take over the rounds of another store by key, and return the keys of which this store has more of them."""
        own = self.list_rounds(self.stopped_keys())
        for result in rounds.values():
            self.write(result)
        theirs = {key: sum(part.rounds for part in result.sampled) for key, result in rounds.items()}
        return {key for key, parts in own.items() if sum(parts) > theirs.get(key, 0)}

    def _merge_small_parts(self) -> None:
        """Join the smallest Parquet files as long as the joined file has at most PART_EXPERIMENTS experiments."""
        pending: list[str] = []
        size = 0
        sizes = self._size_whole_parts()
        for name, more in [*sorted(sizes.items(), key=lambda item: item[1]), ("", 0)]:
            if not name or size + more > PART_EXPERIMENTS:
                if len(pending) > 1:
                    read = {old: self._read_whole(old, sizes[old]) for old in pending}
                    parts = {old: part for old, part in read.items() if part is not None}
                    if len(parts) > 1:
                        self._replace(parts, drop_repeated(pa.concat_tables(list(parts.values()))))
                pending, size = [], 0
            pending.append(name)
            size += more

    def _read_whole(self, name: str, experiments: int) -> pa.Table | None:
        """Return a Parquet file with PART_SCHEMA, or None if not all of its experiments can be read."""
        try:
            part = read_part(self._files, name, PART_SCHEMA)
        except DamagedRecord as error:
            set_aside(error)
            return None
        return part if len(part) == experiments else None

    def _find_readable(self, keys: set[str]) -> set[str]:
        """Return which of these experiments have a whole record in a Parquet file."""
        found: set[str] = set()
        for name, there in read_part_keys(self._files, self._compacted).items() if keys else ():
            if there & keys:
                found |= find_readable(self._files, name, there & keys)
        return found

    def _size_whole_parts(self) -> dict[str, int]:
        """Return the number of experiments in each Parquet file of which every record can be read."""
        sizes = {name: len(keys) for name, keys in read_part_keys(self._files, self._compacted).items()}
        return {name: size for name, size in sizes.items() if size == count_rows(self._files, name)}

    def _remove_results(self, keys: Collection[str]) -> None:
        """Remove all files and rows of these experiments."""
        for key in keys:
            self._files.remove(f"experiments/{key}.json")
        self._remove_from_parts(set(keys))

    def _remove_from_parts(self, keys: set[str]) -> None:
        """Remove all rows of these experiments."""
        if keys:
            for name, there in read_part_keys(self._files, self._compacted).items():
                if there & keys:
                    self._remove_rows(name, keys)

    def _forget_deletion(self, keys: Collection[str]) -> None:
        """Let these experiments have a new result, once nothing is left of a deleted one."""
        again = list_deleted(self._files) & set(keys)
        self._remove_results(again)
        for key in again:
            self._files.remove(f"deleted/{key}.json")

    def _remove_rows(self, name: str, keys: Collection[str]) -> None:
        """Take the records of these keys out of a Parquet file. All others stay as they are."""
        try:
            content = without_rows(self._files, name, keys)
        except DamagedRecord as error:
            set_aside(error)
            if (rescued := rescue_part(self._files, name)) is not None:
                self._replace([name], without_keys(rescued, keys))
            return
        if content is not None:
            self._files.create(f"compacted/{uuid.uuid4().hex}.parquet", content)
        self._files.remove(name)

    def _replace(self, names: Collection[str], part: pa.Table | None) -> None:
        """Write a Parquet file, if there is something to write, then remove the files whose results are in it."""
        if part is not None and len(part):
            self._files.create(f"compacted/{uuid.uuid4().hex}.parquet", encode_part(part))
        for name in names:
            self._files.remove(name)


def _encode(record: Result | Failure) -> bytes:
    """Return a record as JSON. Without a training, or rounds, it is what it was before there were any."""
    values = dataclasses.asdict(record)
    if not record.experiment.train.steps:
        del values["experiment"]["train"]
    if not values.get("sampled", True):
        del values["sampled"]
    return to_json(values, schema_version=SCHEMA_VERSION)
