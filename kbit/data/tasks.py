"""lm-eval tasks: the shipped ones, a user's own folder of YAMLs, and (online) lm-eval's own by name.

A local task is an lm-eval YAML whose data lies in files: dataset_path is a builder of `datasets` (json, csv, parquet,
text, ...) with data_files, or a folder. Paths are relative to the YAML, where lm-eval itself resolves them against the
current directory. Such files, also compressed ones, are read and hashed by kbit (see kbit.data.task_data), so that the
same YAML works from any folder, offline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import yaml
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from kbit.data.data_files import find_files
from kbit.data.lm_eval_private import Entry, compile_templates_once, hide_progress, read_definition
from kbit.data.task_data import TaskData
from kbit.data.task_files import (
    EMBEDDED_TASKS,
    find_broken_files,
    find_local_groups,
    find_local_tags,
    find_local_tasks,
    find_mentioned,
    list_task_files,
)
from kbit.data.task_groups import LocalGroups, Member, TaskGroup, gather_groups, list_group_metrics
from kbit.data.task_rows import explain_first_row


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
        data: the task's local data. None: its data is on the hub, or made by a function of the user.
        groups: the groups and tags that the task was asked by, the outermost first. A task asked by its own name has
            none.
    """

    name: str
    task: Any
    definition: str
    version: str
    source: str
    sha256: str
    fingerprint: str
    definition_sha256: str = ""
    data: TaskData | None = None
    groups: tuple[TaskGroup, ...] = ()

    @property
    def asked(self) -> str:
        """What the task was asked by: its name, or that of the outermost group."""
        return self.groups[0].name if self.groups else self.name


def load_tasks(names: Sequence[str], task_path: str | None = None) -> list[LoadedTask]:
    """Load tasks by name: from task_path, else shipped ones, else lm-eval's own, whose data is on the hub or cached.

    A group or a tag stands for its tasks.

    Raises:
        ValueError: a name is no task or group (the message has the local names), a task is asked twice, or a definition
            is wrong (the message has its path).
        FileNotFoundError: data is missing. The message has the path or data set looked for.
    """
    hide_progress()
    compile_templates_once()
    local = find_local_tasks(task_path)
    groups = LocalGroups(find_local_groups(task_path), find_local_tags(task_path), set(local), _read_index)
    unknown = [name for name in names if name not in local and name not in groups.paths and name not in groups.tags]
    mentioned = find_mentioned(unknown)
    for name in unknown:
        if name not in mentioned or name not in _make_manager(include_defaults=True).all_tasks:
            here = sorted({*local, *groups.paths, *groups.tags})
            near = [f" did you mean {meant}?" for meant in difflib.get_close_matches(name, here, 1)]
            raise ValueError(
                f"unknown task {name!r};{''.join(near)} local tasks are {', '.join(here)}; `lm_eval ls tasks` "
                "lists lm-eval's own" + "".join(f"; {broken}" for broken in find_broken_files(task_path))
            )
    loaded: list[LoadedTask] = []
    for name in names:
        if name in groups.paths or name in groups.tags:
            loaded += _load_group(name, groups, local, task_path)
        elif name in local:
            loaded.append(_load_local(name, local[name], task_path))
        else:
            loaded += _load_hub(name, _make_manager(include_defaults=True))
    if twice := [name for name, count in Counter(task.name for task in loaded).items() if count > 1]:
        asked = [task.asked for task in loaded if task.name == twice[0]]
        raise ValueError(f"the task {twice[0]!r} is asked twice: by {' and '.join(map(repr, asked))}")
    return loaded


@functools.cache
def _make_manager(*, include_defaults: bool) -> TaskManager:
    """Index lm-eval's 14,000 definitions. It takes seconds, so it is done once, and only if one is asked for."""
    return TaskManager(include_defaults=include_defaults)


def _read_index() -> Mapping[str, Entry]:
    """Return lm-eval's own tasks, groups and tags by name."""
    index: Mapping[str, Entry] = _make_manager(include_defaults=True).task_index
    return index


def complete_definition(config: Mapping[str, Any], data: TaskData | None) -> dict[str, Any]:
    """Return a definition with its local data, lm-eval's metrics where it names none, and acc_bytes beside acc_norm.

    Papers normalise by bytes, lm-eval's acc_norm by characters.
    """
    metrics = config.get("metric_list")
    if metrics is None and "class" in config:  # a task in Python, which knows its own
        return dict(config)
    if metrics is None:
        metrics = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]]
    if any(metric.get("metric") == "acc_norm" for metric in metrics):
        metrics = [*metrics, {"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    completed = {**config, "metric_list": metrics}
    if data is not None:  # a function, as lm-eval would copy a bound method together with the data
        completed["custom_dataset"] = lambda **_: data.load()
    return completed


def find_data(config: Mapping[str, Any], folder: Path) -> TaskData | None:
    """Return the local data of a task, or None if it has none, see find_files."""
    files = find_files(config, folder)
    if files is None:
        return None
    place = str(config["dataset_path"])
    builder = str((folder / place).resolve()) if "" in files else place
    return TaskData(builder, config.get("dataset_name"), config.get("dataset_kwargs") or {}, files)


def _load_group(
    name: str, groups: LocalGroups, local: Mapping[str, Path], task_path: str | None
) -> Iterator[LoadedTask]:
    """Load the tasks of a group or tag of the user's folder."""
    with errors_named(str(groups.paths.get(name, f"tag {name!r} in {task_path}"))):
        members = groups.expand(name)
    gathered = gather_groups(members, groups.metrics)
    for member in members:
        inside = tuple(gathered[group] for group in member.groups)
        yield dataclasses.replace(_load_member(member, groups, local, task_path), groups=inside)


def _load_member(member: Member, groups: LocalGroups, local: Mapping[str, Path], task_path: str | None) -> LoadedTask:
    if member.folder is not None:
        path = next(groups.paths[group] for group in member.groups if group in groups.paths)
        return _make_task(member.name, dict(member.changes), {path}, path, task_path)
    if member.name in local:
        return _load_local(member.name, local[member.name], task_path, member.changes)
    entry = _read_index()[member.name]
    definition = read_definition(entry.yaml_path)[0] if entry.yaml_path is not None else entry.cfg or {}
    [loaded] = _load_hub(member.name, _make_manager(include_defaults=True), definition | dict(member.changes))
    return loaded


def _load_local(
    name: str, yaml_path: Path, task_path: str | None, changes: Mapping[str, Any] | None = None
) -> LoadedTask:
    """Load a task from its YAML and the files that it names, with changes of its definition."""
    with errors_named(str(yaml_path)):
        config, definitions = read_definition(yaml_path)
        _check_within(definitions, yaml_path, task_path)
    return _make_task(name, {**config, **(changes or {})}, definitions, yaml_path, task_path)


def _make_task(
    name: str, config: dict[str, Any], definitions: Iterable[Path], yaml_path: Path, task_path: str | None
) -> LoadedTask:
    """Make a task of its definition, read from these files."""
    digest = _hash_definition(definitions, yaml_path)
    with errors_named(str(yaml_path)):
        data = find_data(config, yaml_path.parent)
        config = complete_definition(config, data) | {"task": name}
    if data is None:
        [loaded] = _load_hub(name, _make_manager(include_defaults=False), config)
        return dataclasses.replace(loaded, definition_sha256=digest)
    with errors_named(str(yaml_path)):
        _check_within((path for files in data.files.values() for path in files), yaml_path, task_path)
        try:
            task = ConfigurableTask(config=config)
        except (IndexError, AttributeError, SyntaxError, AssertionError, TypeError) as error:
            if not data.read:
                raise
            explain_first_row(config, data.load(), data.places, error)
    source = ", ".join(path.name for path in data.read)
    return LoadedTask(name, task, str(yaml_path), str(task.VERSION), source, data.sha256, "", digest, data)


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


def _load_hub(name: str, manager: TaskManager, config: dict[str, Any] | None = None) -> list[LoadedTask]:
    """Load a task, or the tasks of a group or tag, by lm-eval itself.

    Args:
        name: the name in lm-eval's index.
        manager: the index.
        config: the definition of a task that is not in the index.
    """
    try:
        found = manager.load([name if config is None else config])
    except (OSError, datasets.exceptions.DatasetsError) as error:
        offline = " (HF_HUB_OFFLINE=1 is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise FileNotFoundError(f"task {name!r}: its data cannot be loaded{offline}: {error}") from error
    if config is None and name in manager.all_tags:
        members = [Member(task, {}, (name,)) for task in found["tasks"]]
    else:
        members = list(_list_hub_members(name, found, ()))
    metrics = {
        group: list_group_metrics({"group": group, "aggregate_metric_list": made.aggregate_metric_list})
        for group, made in found.get("groups", {}).items()
    }
    gathered = gather_groups(members, metrics)
    return [
        dataclasses.replace(_describe_hub(m.name, found["tasks"][m.name]), groups=tuple(gathered[g] for g in m.groups))
        for m in members
    ]


def _list_hub_members(name: str, found: Mapping[str, Any], groups: tuple[str, ...]) -> Iterator[Member]:
    """Yield the tasks below a name of what lm-eval loaded."""
    if name in found.get("group_map", {}):
        for child in found["group_map"][name]:
            yield from _list_hub_members(child, found, (*groups, name))
    else:
        yield Member(name, {}, groups)


def _describe_hub(name: str, task: Any) -> LoadedTask:
    source = f"{task.DATASET_PATH}:{task.DATASET_NAME or 'default'}"
    split = next(iter(task.dataset.values()))
    return LoadedTask(name, task, name, str(task.VERSION), source, "", str(split._fingerprint))
