"""Messages about a wrong key, value, study or group, in the words of this program instead of Hydra's."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kbit.checks import KbitError, ask_for_nearest, suggest
from kbit.cli.hydra.options import describe_kind, is_role
from kbit.data.task_files import find_local_tasks
from kbit.experiments.config import RunConfig
from kbit.methods.config import METHODS
from kbit.numerics.data_types import DATA_TYPES

_WRITING: Final = "values are written a,b or [a,b], special characters in quotes"
STUDY_HINT: Final = "study.grids and study.exclude are lists of mappings, study.unite is a list of names"


def find_unknown_key(key: str, schema: Any = RunConfig) -> str:
    """Return which part of a dotted key the schema lacks, and which keys there are, or "" if it lacks none."""
    node: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(node):
            return ""  # the key lies below a free value, such as an exclusion
        hints = typing.get_type_hints(node)
        if part not in hints:
            places = _find_places(key.rpartition(".")[2], schema, hints)
            meant = f"did you mean {' or '.join(places)}? allowed are {', '.join(hints)}" if places else ""
            return f"{key}: no key {part!r}; {meant or suggest(part, hints)}"
        node = hints[part]
    return ""


def find_node(key: str, schema: Any = RunConfig) -> Any:
    """Return the type of the value of a dotted key, or None if there is no such key."""
    node: Any = schema
    for part in key.split("."):
        node = typing.get_type_hints(node).get(part) if dataclasses.is_dataclass(node) else None
    return node


def _find_places(name: str, schema: Any, beside: Iterable[str]) -> list[str]:
    """Return the keys that end in a name, such as quant.bits for bits, or in one like it if none beside it is."""
    keys = [key for key in _list_keys(schema) if "." in key]
    if exact := [key for key in keys if key.rpartition(".")[2] == name]:
        return exact
    near = "" if ask_for_nearest(name, beside) else ask_for_nearest(name, (key.rpartition(".")[2] for key in keys))
    return [key for key in keys if near == f"did you mean {key.rpartition('.')[2]}?"]


def _list_keys(schema: Any, within: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of a configuration that takes a value."""
    for part, node in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(node):
            if not is_role(node):  # a role of a training has the keys that quant has
                yield from _list_keys(node, f"{within}{part}.")
        else:
            yield within + part


@contextmanager
def explained(schema: Any = RunConfig) -> Iterator[None]:
    """Turn Hydra's refusal of arguments within the block into a KbitError with the message of explain.

    Hydra prints its internals and exits unless HYDRA_FULL_ERROR is set, so that it is set within the block. A user who
    sets it gets Hydra's own errors.

    Args:
        schema: the dataclass that the configuration is checked against.
    """
    if os.environ.get("HYDRA_FULL_ERROR"):
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except REFUSALS as error:
        raise KbitError(explain(error, schema)) from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise KbitError(f"{Path(str(error.filename)).name[:60]}... is too long for the name of a file") from None
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def explain(error: Exception, schema: Any = RunConfig) -> str:
    """Return what an error of Hydra, OmegaConf or YAML says, without its internals and with the allowed values."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a file"
        return f"{where}: {error.problem}"
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, KbitError | ValueError):
        return str(error.__cause__)  # of kbit's own sweeper or launcher
    if shown := _explain_override(str(error)):
        return shown
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__  # Hydra raises some of its errors without "from"
    text = str(error).strip()
    if cause is None:
        return text.split("\nSee https://hydra.cc")[0]
    source = match.group() if (match := re.search(r"'sweeps/[^']*'", text)) else ""
    reason = str(cause.msg or cause).splitlines()[0]
    key = cause.full_key or ""
    return f"{source + ': ' if source else ''}{_explain_value(text, key, reason, cause, schema)}"


def _explain_override(text: str) -> str:
    """Return what is wrong with an override that Hydra cannot read or takes for a sweep, or "" for another error."""
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = match[1].partition("=")
        return f"{match[1]}: several values are a multirun: add -m (one value that is a list is {key}=[{value}])"
    if match := re.match(r"Error parsing override '(.*)'\n(.*)", text):
        near = re.search(r"(?:extraneous|mismatched) input '(.*?)' expecting|(?:at|near:?) '(.*?)'", match[2])
        place = near and (near[1] or near[2] or "").replace("<EOF>", "")
        reason = f"cannot be read at {place!r}" if place else "cannot be read"
        return f"{match[1]}: {reason}; {_WRITING}"
    if match := re.match(r"LexerNoViableAltException: (.*)|no viable alternative at input '(.*)'", text):
        return f"{match[1] or match[2]}: cannot be read; {_WRITING}"
    return ""


def _explain_value(text: str, key: str, reason: str, cause: Any, schema: Any) -> str:
    if isinstance(cause, ConfigKeyError) or "not in '" in reason:
        if key == "sweeps":
            return "a study's first line must be: # @package _global_"
        if hint := find_unknown_key(key, schema):
            return hint
    if "merge DictConfig with ListConfig" in reason or "ListConfig with DictConfig" in reason:
        return f"{reason}; {STUDY_HINT}"
    given = re.match(r"Error merging override (.*)", text)
    allowed = _describe_type(key, schema)
    if given and "is not a ListConfig" in reason:
        return f"{given[1]}: {key} is {allowed}; did you mean {key}=[{given[1].partition('=')[2]}]?"
    return f"{given.group(1) if given else key}: {reason}{f'; {key} is {allowed}' if allowed else ''}"


def _describe_type(key: str, schema: Any) -> str:
    """Return which values a key takes, or "" if there is no such key."""
    node = find_node(key, schema)
    return "" if node is None else describe_kind(node)


def _explain_missing(error: MissingConfigException) -> str:
    """Return the message about a missing file of a group, with the files that the group has."""
    match = re.search(r"Could not find '([^']*)'", str(error))
    whole = match.group(1) if match else str(error.missing_cfg_file)
    group, _, name = whole.rpartition("/") if whole.startswith("hydra/") else whole.partition("/")
    there = sorted({*(error.options or ()), *list_files(group if group == "sweeps" else f"conf/{group}")})
    if not there:
        return str(error).splitlines()[0]
    return f"{group}={name}: there is no {group}/{name}; {_find_meant(group, name, there) or suggest(name, there)}"


def _find_meant(group: str, name: str, there: Sequence[str]) -> str:
    """Return what may be meant by a name that is of no file of a group, but of a value, else ""."""
    meant = []
    if group == "quant":
        meant += [f"quant={name}4 (with 4 bits)"] if f"{name}4" in there else []
        meant += [f"quant.data_type={name}"] if name in DATA_TYPES else []
        meant += [f"quant.method={name}"] if name in METHODS else []
    elif group == "eval" and name in find_local_tasks():
        meant = [f"eval.tasks=[{name}]"]
    elif (group, name) == ("hydra/launcher", "ray"):
        meant = ["hydra/launcher=kbit (Ray workers, the default)"]
    return f"did you mean {' or '.join(meant)}? allowed are {', '.join(there)}" if meant else ""


def list_files(folder: str) -> list[str]:
    """Return the names of the YAML files of one of kbit's folders."""
    root = Path(str(files("kbit"))) / folder
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def check_grid(grid: Any) -> None:
    """Raise ValueError if a grid of a study is not a mapping of keys to one value or more."""
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"study.grids: {grid!r} maps no keys to values; {STUDY_HINT}")
    for key, value in grid.items():
        if isinstance(value, dict):
            raise ValueError(f"study.grids: {key}: {value!r} is neither a value nor a list of values")
        if value in ([], ""):
            raise ValueError(f"study.grids: {key} has no values")
        group = str(key).removeprefix("/").partition("@")[0]
        if group not in ("quant", "eval", "train") and (hint := find_unknown_key(str(key))):
            raise ValueError(f"study.grids: {hint}")


REFUSALS: Final = (HydraException, OmegaConfBaseException, yaml.YAMLError)
