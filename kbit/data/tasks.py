"""lm-eval tasks: the shipped ones, a user's own folder of YAMLs, and (online) lm-eval's own by name.

A local task is an lm-eval YAML with `dataset_path: json` whose data_files are relative to the YAML, where lm-eval
itself resolves them against the current directory. kbit reads such files (.jsonl, also .xz, .gz, .bz2) itself, in
memory. Nothing is written to a dataset cache, and the same YAML works from any folder, offline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from kbit.data.lm_eval_private import hide_progress, read_definition
from kbit.data.task_files import EMBEDDED_TASKS, find_broken_files, find_local_tasks, list_task_files
from kbit.data.texts import parse_json_lines, read_bytes


@dataclass(frozen=True)
class LoadedTask:
    """An lm-eval task with the identity of its data.

    Attributes:
        name: the task's name, as asked for.
        task: lm-eval's Task object.
        definition: the path of the task's YAML, or the name of a task of lm-eval's own.
        version: the version of the task's definition.
        source: the data's file name, or the hub data set.
        sha256: the hash of the uncompressed data files. It is empty for a hub data set.
        fingerprint: what `datasets` computes from the loaded rows of a hub data set. It is empty for local files.
        definition_sha256: the hash of the YAML of a user's own task, with what it includes. It is empty for other
            tasks, whose version tells as much.
    """

    name: str
    task: Any
    definition: str
    version: str
    source: str
    sha256: str
    fingerprint: str
    definition_sha256: str = ""


def load_tasks(names: Sequence[str], task_path: str | None = None) -> list[LoadedTask]:
    """Load tasks by name: from task_path, else shipped ones, else lm-eval's own, whose data is on the hub or cached.

    Raises:
        ValueError: a name is no task (the message has the local names) or a group of tasks, or a definition is wrong
            (the message has its path).
        FileNotFoundError: data is missing. The message has the path or data set looked for.
    """
    hide_progress()
    local = find_local_tasks(task_path)
    unknown = [name for name in names if name not in local]
    manager = _make_manager(include_defaults=bool(unknown))
    for name in unknown:
        if name in manager.all_groups or name in manager.all_tags:
            raise ValueError(f"{name!r} is a group of lm-eval tasks: name its tasks, so that each is measured")
        if name not in manager.all_tasks:
            here = ", ".join(sorted(local))
            raise ValueError(
                f"unknown task {name!r}; local tasks are {here}; `lm_eval ls tasks` lists lm-eval's own"
                + "".join(f"; {broken}" for broken in find_broken_files(task_path))
            )
    return [
        _load_local(name, local[name], task_path) if name in local else _load_hub(name, manager, name) for name in names
    ]


@functools.cache
def _make_manager(*, include_defaults: bool) -> TaskManager:
    """Index lm-eval's 14,000 definitions. It takes seconds, so it is done once, and only if one is asked for."""
    return TaskManager(include_defaults=include_defaults)


class JsonFiles:
    """A task's JSON data, read as lm-eval's custom_dataset hook asks for it.

    Attributes:
        read: the files read so far, in order.
        digest: the hash of their uncompressed content.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.read: list[Path] = []
        self.digest = hashlib.sha256()

    def load(self, *, data_files: Any = None, **_: Any) -> datasets.DatasetDict:  # lm-eval passes metadata too
        """Return the rows of each split.

        Raises:
            FileNotFoundError, ValueError: see read_bytes, read_json_lines.
            ValueError: a file has no rows.
        """
        splits = {}
        for split, files in _split_files(data_files).items():
            rows = []
            for path in (self._folder / file for file in files):
                content = read_bytes(path)
                self.digest.update(content)
                self.read.append(path)
                here = parse_json_lines(content, path)
                if not here:
                    raise ValueError(f"{path.resolve()} has no rows")
                rows += here
            splits[split] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)


def complete_definition(config: dict[str, Any], data: JsonFiles) -> dict[str, Any]:
    """Return a local task's definition with its data, and acc_bytes where it has acc_norm.

    Papers normalise by bytes, lm-eval's acc_norm by characters.
    """
    metrics = config.get("metric_list", [])
    if any(metric["metric"] == "acc_norm" for metric in metrics):
        metrics = [*metrics, {"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    # This is a function, as lm-eval would copy a bound method together with the data.
    return config | {"custom_dataset": lambda **arguments: data.load(**arguments), "metric_list": metrics}


def _load_local(name: str, yaml_path: Path, task_path: str | None) -> LoadedTask:
    """Load a task from its YAML and the JSON files that it names."""
    with errors_named(str(yaml_path)):
        config, definitions = read_definition(yaml_path)
        _check_within(definitions, yaml_path, task_path)
    if config.get("dataset_path") != "json":
        loaded = _load_hub(name, _make_manager(include_defaults=False), config)
        return dataclasses.replace(loaded, definition_sha256=_hash_definition(definitions, yaml_path))
    data = JsonFiles(yaml_path.parent)
    with errors_named(str(yaml_path)):
        task = ConfigurableTask(config=complete_definition(config, data))
        _check_within(data.read, yaml_path, task_path)
    source = ", ".join(path.name for path in data.read)
    return LoadedTask(
        name,
        task,
        str(yaml_path),
        str(task.VERSION),
        source,
        data.digest.hexdigest(),
        "",
        _hash_definition(definitions, yaml_path),
    )


def _hash_definition(files: Iterable[Path], yaml_path: Path) -> str:
    """Return the hash of a definition's files, in an order that does not depend on where they lie."""
    if EMBEDDED_TASKS in yaml_path.parents:
        return ""
    contents = sorted(path.read_bytes() for path in {*files, yaml_path.resolve()})
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def _check_within(read: Iterable[Path], yaml_path: Path, task_path: str | None) -> None:
    """Raise ValueError if a user's task reads a file outside its folder, by whose content results are known."""
    if task_path is None or EMBEDDED_TASKS in yaml_path.parents:
        return
    known = {path.resolve() for path in list_task_files(task_path)}
    if outside := sorted({path.resolve() for path in read} - known):
        raise ValueError(
            f"{outside[0]} is not in eval.task_path={task_path}, where alone a change is noticed: copy it there"
        )


def _split_files(data_files: Any) -> dict[str, list[str]]:
    """Return the files of each split.

    Args:
        data_files: as `datasets` takes it: a file or a list of files (split train), or either for each split.
    """
    by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
    listed = {split: [files] if isinstance(files, str) else files for split, files in by_split.items()}
    if not all(isinstance(files, list) and files for files in listed.values()) or not listed:
        raise ValueError(
            f"dataset_kwargs.data_files={data_files!r} is not a file, a list of files, or a dictionary of them"
        )
    return listed


@contextlib.contextmanager
def errors_named(definition: str) -> Iterator[None]:
    """Turn what lm-eval raises for a wrong definition, or for rows that do not fit, into a ValueError with its path."""
    try:
        yield
    except jinja2.UndefinedError as error:
        raise ValueError(f"{definition}: a template asks for a field that a row has not: {error}") from error
    except KeyError as error:
        what = "a split or field of this name" if error.args[0] else "a metric of metric_list in lm-eval"
        raise ValueError(f"{definition}: there is no {error.args[0] or 'such thing'}: {what}") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{definition}: {str(error) or type(error).__name__ + ' in lm-eval'}") from error


def _load_hub(name: str, manager: TaskManager, spec: str | dict[str, Any]) -> LoadedTask:
    try:
        task = manager.load([spec])["tasks"][name]
    except (OSError, datasets.exceptions.DatasetsError) as error:
        offline = " (HF_HUB_OFFLINE=1 is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise FileNotFoundError(f"task {name!r}: its data cannot be loaded{offline}: {error}") from error
    source = f"{task.DATASET_PATH}:{task.DATASET_NAME or 'default'}"
    split = next(iter(task.dataset.values()))
    return LoadedTask(name, task, name, str(task.VERSION), source, "", str(split._fingerprint))
