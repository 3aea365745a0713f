"""Messages about a wrong key, value, study or group, in the words of this program instead of Hydra's."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kbit.checks import KbitError, suggest
from kbit.experiments.config import RunConfig

_WORDS: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_STUDY: Final = "study.grids and study.exclude are lists of mappings, study.unite is a list of names"


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Check command-line arguments before Hydra sees them. Hydra's own advice for an unknown key is to add it.

    Raises:
        KbitError: a key is unknown, or Hydra would ignore one of several studies.
    """
    hints = [refuse_several_studies(arguments)]
    for argument in arguments:
        key, is_override, _ = argument.partition("=")
        name = key.lstrip("+~")
        if key == "sweeps":
            hints.append(f"{key}: a ready study is added, not set: +{argument}")
        elif is_override and not key.startswith("-") and not name.startswith(("hydra", "sweeps")) and "@" not in name:
            hints.append(find_unknown_key(name))
    if any(hints):
        raise KbitError(*filter(None, hints))


def find_unknown_key(key: str, schema: Any = RunConfig) -> str:
    """Return which part of a dotted key the schema lacks, and which keys there are, or "" if it lacks none."""
    node: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(node):
            return ""  # the key lies below a free value, such as an exclusion
        hints = typing.get_type_hints(node)
        if part not in hints:
            return f"{key}: no key {part!r}; {suggest(part, hints)}"
        node = hints[part]
    return ""


def refuse_several_studies(arguments: Sequence[str]) -> str:
    """Return how to give several studies if the arguments give them so that Hydra keeps only the last, else ""."""
    named = [a.partition("=")[2] for a in arguments if re.match(r"\+{1,2}sweeps(@\w*)?=", a)]
    if len(named) < 2 and not any("[" in name for name in named):
        return ""
    studies = ",".join(name.strip("[]").replace(" ", "") for name in named)
    return f"{' '.join(a for a in arguments if 'sweeps' in a)}: several studies are given as +sweeps={studies}"


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
        return f"{match[1]}: {reason}; values are written a,b or [a,b], special characters in quotes"
    return ""


def _explain_value(text: str, key: str, reason: str, cause: Any, schema: Any) -> str:
    if isinstance(cause, ConfigKeyError) or "not in '" in reason:
        if key == "sweeps":
            return "a study's first line must be: # @package _global_"
        if hint := find_unknown_key(key, schema):
            return hint
    if "merge DictConfig with ListConfig" in reason or "ListConfig with DictConfig" in reason:
        return f"{reason}; {_STUDY}"
    given = re.match(r"Error merging override (.*)", text)
    allowed = _describe_type(key, schema)
    return f"{given.group(1) if given else key}: {reason}{f'; {key} is {allowed}' if allowed else ''}"


def _describe_type(key: str, schema: Any) -> str:
    """Return which values a key takes, or "" if there is no such key."""
    node: Any = schema
    for part in key.split("."):
        node = typing.get_type_hints(node).get(part) if dataclasses.is_dataclass(node) else None
    if node is None:
        return ""
    kinds = typing.get_args(node) if isinstance(node, types.UnionType) else (node,)
    if any(typing.get_origin(kind) in (tuple, list) for kind in kinds):
        words = ["a list, such as [a,b]"]
    else:
        words = [_WORDS[kind] for kind in kinds if kind in _WORDS]
    return " or ".join([*words, *(["null"] if types.NoneType in kinds else [])])


def _explain_missing(error: MissingConfigException) -> str:
    """Return the message about a missing file of a group, with the files that the group has."""
    match = re.search(r"Could not find '([^']*)'", str(error))
    group, _, name = (match.group(1) if match else str(error.missing_cfg_file)).partition("/")
    there = sorted({*(error.options or ()), *list_files(group if group == "sweeps" else f"conf/{group}")})
    if not there:
        return str(error).splitlines()[0]
    return f"{group}={name}: there is no {group}/{name}; {suggest(name, there)}"


def list_files(folder: str) -> list[str]:
    """Return the names of the YAML files of one of kbit's folders."""
    root = Path(str(files("kbit"))) / folder
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def check_grid(grid: Any) -> None:
    """Raise ValueError if a grid of a study is not a mapping of keys to one value or more."""
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"study.grids: {grid!r} maps no keys to values; {_STUDY}")
    for key, value in grid.items():
        if isinstance(value, dict):
            raise ValueError(f"study.grids: {key}: {value!r} is neither a value nor a list of values")
        if value in ([], ""):
            raise ValueError(f"study.grids: {key} has no values")
        group = str(key).removeprefix("/").partition("@")[0]
        if group not in ("quant", "eval") and (hint := find_unknown_key(str(key))):
            raise ValueError(f"study.grids: {hint}")


REFUSALS: Final = (HydraException, OmegaConfBaseException, yaml.YAMLError)
