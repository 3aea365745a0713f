"""Groups and tags of tasks: the user's own, and lm-eval's.

A group is a YAML with `group` and a list `task`. Its members are tasks, groups and tags by name, dictionaries with
changes of one, or definitions within the group. What else the YAML says changes every member. A tag is a word of tasks'
definitions. Both stand for their tasks, and a group with aggregate_metric_list also has numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lm_eval.config.group import GroupConfig

from kbit.data.lm_eval_private import Entry, Kind, read_definition
from kbit.data.task_files import defines_group, list_members, name_member

_SOURCES: Final = (
    "dataset_path",
    "custom_dataset",
    "class",
    "include",
)  # where a definition of a task within a group has its data
_GROUP_FIELDS: Final = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include")


@dataclass(frozen=True)
class TaskGroup:
    """A group of tasks.

    Attributes:
        name: the group's name.
        tasks: the names of its tasks, those of groups within it included.
        metrics: the metrics whose mean over the tasks is measured: (metric, whether a task weighs as much as it has
            items, else every task weighs the same).
    """

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Member:
    """A task of a group.

    Attributes:
        name: the task's name.
        changes: fields of the task's definition that its groups change.
        groups: the names of the groups that it is in, the outermost first.
        folder: the folder to which the paths of a definition within a group are relative. None: the task has a YAML.
    """

    name: str
    changes: Mapping[str, Any]
    groups: tuple[str, ...]
    folder: Path | None = None


@dataclass
class LocalGroups:
    """The user's own groups and tags, which may name lm-eval's tasks, groups and tags.

    Attributes:
        paths: the YAML of each group by name.
        tags: the tasks' names of each tag by name.
        tasks: the names of the local tasks.
        read_index: a function that returns lm-eval's own tasks, groups and tags by name. It takes seconds, and is
            called for a name that is not local.
        metrics: see TaskGroup: the metrics of each group that was expanded.
    """

    paths: Mapping[str, Path]
    tags: Mapping[str, list[str]]
    tasks: set[str]
    read_index: Callable[[], Mapping[str, Entry]]
    metrics: dict[str, tuple[tuple[str, bool], ...]] = field(default_factory=dict)

    def expand(self, name: str) -> list[Member]:
        """Return the tasks of a group or tag.

        Raises:
            ValueError: a group contains itself, has no list of tasks, or aggregates in a way that is no mean.
        """
        return list(self._expand(name, {}, ()))

    def _expand(self, name: str, changes: Mapping[str, Any], groups: tuple[str, ...]) -> Iterator[Member]:
        if name in groups:
            raise ValueError(f"the group {name!r} contains itself: {' > '.join((*groups, name))}")
        if name in self.paths:
            path = self.paths[name]
            yield from self._expand_definition(name, read_definition(path)[0], changes, groups, path.parent)
        elif name in self.tags:
            yield from (Member(task, changes, (*groups, name)) for task in self.tags[name])
        elif name in self.tasks:
            yield Member(name, changes, groups)
        else:
            yield from self._expand_foreign(name, changes, groups)

    def _expand_foreign(self, name: str, changes: Mapping[str, Any], groups: tuple[str, ...]) -> Iterator[Member]:
        """Yield the tasks of a name of lm-eval's own."""
        entry = self.read_index().get(name)
        if entry is None:
            raise ValueError(f"group {groups[-1]!r} names {name!r}, which is no task")
        if entry.kind is Kind.TAG:
            yield from (Member(task, changes, (*groups, name)) for task in sorted(entry.tags))
        elif entry.kind is Kind.GROUP and entry.yaml_path is not None:
            definition = read_definition(entry.yaml_path)[0]
            yield from self._expand_definition(name, definition, changes, groups, entry.yaml_path.parent)
        else:
            yield Member(name, changes, groups)

    def _expand_definition(
        self,
        name: str,
        definition: Mapping[str, Any],
        outer: Mapping[str, Any],
        groups: tuple[str, ...],
        folder: Path,
    ) -> Iterator[Member]:
        """Yield the tasks of a group's definition. What is asked from outside wins over the group's own changes."""
        self.metrics[name] = list_group_metrics({**definition, "group": name})
        changes = {key: value for key, value in definition.items() if key not in _GROUP_FIELDS} | dict(outer)
        inside = (*groups, name)
        for member in list_members(definition):
            if isinstance(member, str):
                yield from self._expand(member, changes, inside)
            elif defines_group(member, self.paths):
                yield from self._expand_definition(f"{name}::{member['group']}", member, changes, inside, folder)
            else:
                asked = name_member(member)
                mine = changes | {key: value for key, value in member.items() if key not in ("group", "task")}
                if self._is_defined(asked, mine):
                    yield from self._expand(asked, mine, inside)
                elif mine.keys() & set(_SOURCES):
                    yield Member(f"{name}::{asked}", mine, inside, folder)
                else:
                    raise ValueError(f"group {name!r} names {asked!r}, which is no task and has no dataset_path")

    def _is_defined(self, name: str, changes: Mapping[str, Any]) -> bool:
        """Return whether a name within a group is one of elsewhere with changes, and no definition of a new task."""
        is_local = name in self.paths or name in self.tags or name in self.tasks
        return is_local or (not changes.keys() & set(_SOURCES) and name in self.read_index())


def list_group_metrics(definition: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    """Return the metrics that a group aggregates, see TaskGroup.

    Raises:
        ValueError: lm-eval refuses them, or one is no mean.
    """
    known = {name: definition[name] for name in ("group", "aggregate_metric_list") if name in definition}
    metrics: list[Any] = GroupConfig(**known).aggregate_metric_list or []
    if wrong := [metric for metric in metrics if metric.aggregation != "mean"]:
        raise ValueError(f"group {definition['group']!r}: {wrong[0].metric} is aggregated by a function, not by mean")
    return tuple((metric.metric, bool(metric.weight_by_size)) for metric in metrics)


def gather_groups(members: list[Member], metrics: Mapping[str, tuple[tuple[str, bool], ...]]) -> dict[str, TaskGroup]:
    """Return the groups of these tasks by name, in the order in which they are met."""
    names = dict.fromkeys(group for member in members for group in member.groups)
    return {
        name: TaskGroup(name, tuple(m.name for m in members if name in m.groups), metrics.get(name, ()))
        for name in names
    }
