"""What is wrong with a key, value, study or group that a user gave, said in the words of this program."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kbit.checks import suggest
from kbit.experiments.config import RunConfig

_WORDS: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


_STUDY: Final = "study.grids and study.exclude are lists of mappings, study.unite is a list of names"


def find_unknown_key(key: str, schema: Any = RunConfig) -> str:
    """Say which part of a dotted key the schema lacks, and what there is; empty if there is such a key."""
    node: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(node):
            return ""  # below a value that is free, such as an exclusion
        hints = typing.get_type_hints(node)
        if part not in hints:
            return f"{key}: no key {part!r}; {suggest(part, hints)}"
        node = hints[part]
    return ""


def refuse_several_studies(arguments: Sequence[str]) -> str:
    """Say how to give several studies, of which Hydra would keep the last; empty if that was not tried."""
    named = [a.partition("=")[2] for a in arguments if re.match(r"\+{1,2}sweeps(@\w*)?=", a)]
    if len(named) < 2 and not any("[" in name for name in named):
        return ""
    studies = ",".join(name.strip("[]").replace(" ", "") for name in named)
    return f"{' '.join(a for a in arguments if 'sweeps' in a)}: several studies are given as +sweeps={studies}"


def run_explained(main: Callable[[], None], program: str, schema: Any = RunConfig) -> None:
    """Run a function that hydra.main has made; exit with one line of explain if Hydra refuses the arguments.

    HYDRA_FULL_ERROR, which makes Hydra raise what it would print (its internals, and where to learn more), is set
    meanwhile. A user who sets it gets Hydra's own errors.
    """
    if os.environ.get("HYDRA_FULL_ERROR"):
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except REFUSALS as error:
        sys.exit(f"{program}: error: {explain(error, schema)}")
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def explain(error: Exception, schema: Any = RunConfig) -> str:
    """Return the message of an error of Hydra, OmegaConf or YAML without its internals, and with what is allowed."""
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
    """Say what is wrong with an override that Hydra cannot read, or takes for a sweep; empty of another error."""
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
    """Say what values a key takes."""
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
    """Say of a file of a group that is not there which there are."""
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
