"""Messages about a wrong key, value, study or group, in the words of this program instead of Hydra's."""

from __future__ import annotations

import dataclasses
import errno
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
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kbit.checks import KbitError, suggest
from kbit.experiments.config import RunConfig

_WORDS: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_GROUPS: Final = ("quant", "eval", "hydra/launcher", "hydra/sweeper", "hydra/help")
_NAME: Final = r"[A-Za-z_./][\w./-]*"
_NAMES: Final = re.compile(
    rf"(glob|choice|sort|shuffle|tag)\(.*\)|{_NAME}(\s*,\s*{_NAME})*|\[{_NAME}(\s*,\s*{_NAME})*\]"
)
STUDY_HINT: Final = "study.grids and study.exclude are lists of mappings, study.unite is a list of names"


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Check command-line arguments before Hydra sees them. Hydra's own advice for an unknown key is to add it.

    Raises:
        KbitError: a key is unknown, or Hydra would ignore one of several studies.
    """
    hints = [refuse_several_studies(arguments)]
    folders = find_config_folders(arguments)
    for argument in arguments:
        key, is_override, _ = argument.partition("=")
        name = key.lstrip("+~")
        if key == "sweeps":
            hints.append(f"{key}: a ready study is added, not set: +{argument}")
        elif is_override and not key.startswith("-") and not name.startswith("sweeps") and "@" not in name:
            is_known = name.startswith("hydra") or any((folder / name).is_dir() for folder in folders)
            hints.append("" if is_known else find_unknown_key(name))
            hints.append(_refuse_no_name(name, argument))
    if any(hints):
        raise KbitError(*filter(None, hints))


def _refuse_no_name(key: str, argument: str) -> str:
    """Return which names there are if an argument chooses a file of a group by anything but names, else ""."""
    value = argument.partition("=")[2].strip("'\"")
    if key not in _GROUPS or (_NAMES.fullmatch(value) and value.lower() not in ("null", "true", "false")):
        return ""
    return f"{argument:.80}: {key} is given by name; {suggest(value, list_files(f'conf/{key}'))}"


def find_config_folders(arguments: Sequence[str]) -> list[Path]:
    """Return the user's own folders of configurations, which --config-dir names."""
    folders = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, is_joined, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            folders.append(Path(value if is_joined else following))
    return folders


def find_launchers(arguments: Sequence[str]) -> dict[str, str]:
    """Return the launcher that each chosen study (or other file that is added with +GROUP=NAME) asks for, by file.

    kbit's own choice of a launcher stands in the first file that Hydra reads, and of several choices Hydra takes the
    first. A study's `override /hydra/launcher: NAME` would have no effect.

    Raises:
        KbitError: a file asks for another sweeper.
    """
    folders = [*find_config_folders(arguments), Path(str(files("kbit")))]
    chosen = [match for a in arguments if (match := re.fullmatch(r"\+{1,2}([^=@]+)(?:@\w+)?=([\w/,.-]+)", a))]
    waiting = [(match[1], name) for match in chosen for name in match[2].split(",")]
    found: dict[str, str] = {}
    seen = set()
    while waiting:
        group, name = waiting.pop()
        path = next((p for folder in folders if (p := folder / group / f"{name}.yaml").is_file()), None)
        if path is None or path in seen:
            continue  # Hydra names what is not there
        seen.add(path)
        with path.open(encoding="utf-8-sig") as file:  # a stream has the name that an error of its content tells
            content = yaml.safe_load(file)
        study = content.get("study") if isinstance(content, dict) else None
        if isinstance(study, dict) and isinstance(study.get("unite"), list):
            waiting += [("sweeps", str(other)) for other in study["unite"]]
        for key, choice in _list_overrides(content):
            if key == "hydra/sweeper" and choice != "kbit":
                raise KbitError(
                    f"{path}: override /hydra/sweeper: {choice} has no effect: kbit has a sweeper of its own"
                )
            found |= {str(path): choice} if key == "hydra/launcher" else {}
    return found


def _list_overrides(content: Any) -> Iterator[tuple[str, str]]:
    """Yield each group that a file's defaults list overrides, and the choice."""
    defaults = content.get("defaults") if isinstance(content, dict) else None
    for entry in defaults if isinstance(defaults, list) else ():
        for key, choice in entry.items() if isinstance(entry, dict) else ():
            if match := re.fullmatch(r"override\s+/?(.*)", str(key)):
                yield match[1], str(choice)


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
        return f"{match[1]}: {reason}; values are written a,b or [a,b], special characters in quotes"
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
        raise ValueError(f"study.grids: {grid!r} maps no keys to values; {STUDY_HINT}")
    for key, value in grid.items():
        if isinstance(value, dict):
            raise ValueError(f"study.grids: {key}: {value!r} is neither a value nor a list of values")
        if value in ([], ""):
            raise ValueError(f"study.grids: {key} has no values")
        group = str(key).removeprefix("/").partition("@")[0]
        if group not in ("quant", "eval") and (hint := find_unknown_key(str(key))):
            raise ValueError(f"study.grids: {hint}")


REFUSALS: Final = (HydraException, OmegaConfBaseException, yaml.YAMLError)
