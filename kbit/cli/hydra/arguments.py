"""Checks of the arguments of `kbit run` before Hydra sees them. Hydra's own advice for an unknown key is to add it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml

from kbit.checks import KbitError, suggest
from kbit.cli.hydra.explain import find_node, find_unknown_key, list_files
from kbit.data.presets import list_presets
from kbit.models.catalog import STUDIED

_GROUPS: Final = ("quant", "eval", "train", "hydra/launcher", "hydra/sweeper", "hydra/help")
_NAME: Final = r"[A-Za-z_./][\w./-]*"
_NAMES: Final = re.compile(
    rf"(glob|choice|sort|shuffle|tag)\(.*\)|{_NAME}(\s*,\s*{_NAME})*|\[{_NAME}(\s*,\s*{_NAME})*\]"
)
# Hydra's options that take a value, which is no key=value.
_WITH_VALUE: Final = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c"),
    *("--info", "-i", "--experimental-rerun"),
)
_BITS: Final = (*"2345678", "16")
_SLURM: Final = re.compile(r"hydra/launcher=(submitit_\w+|slurm)")


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Check command-line arguments.

    Raises:
        KbitError: an argument is no key=value, a key is unknown, or Hydra would ignore one of several studies.
    """
    if {"-sc", "--shell-completion"} & set(arguments):
        raise KbitError('a shell completes keys and values after: eval "$(kbit completion bash)" (or zsh, fish)')
    words = [(a, b) for a, b in zip(["", *arguments], arguments, strict=False) if not b.startswith("-")]
    loose = [(before, word) for before, word in words if "=" not in word.lstrip("=") and before not in _WITH_VALUE]
    if loose := [(before, word) for before, word in loose if not word.startswith("~")]:  # ~KEY removes a key
        raise KbitError(_explain_word(*loose[0]))
    hints = [refuse_several_studies(arguments)]
    folders = find_config_folders(arguments)
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            hints.append(_refuse(argument, folders))
        elif "=" in argument and not find_unknown_key(argument.lstrip("-").partition("=")[0]):
            hints.append(f"{argument}: a key has no dashes: {argument.lstrip('-')}")
    if any(hints):
        raise KbitError(*filter(None, hints))


def _explain_word(before: str, word: str) -> str:
    """Return what is wrong with an argument that is no key=value, as it follows another one."""
    if "=" in before and (before.endswith(",") or word.startswith(",")):
        return f"{before} {word}: the blank at the comma divides the value: {before}{word}"
    if before.startswith("--") and not find_unknown_key(before.lstrip("-")):
        return f"{before} {word}: a key is given as {before.lstrip('-')}={word}"
    if word.startswith("=") or before.endswith("="):
        return f"{before} {word}: a key and its value are one argument, without blanks: quant.bits=4"
    if word.lstrip("+") == "sweeps" or not find_unknown_key(word):
        return f"{word} stands alone: a key and its value are one argument, without blanks: {word}=..."
    wanted = {"+sweeps": list_files("sweeps"), "quant": list(list_presets()), "model.name": list(STUDIED)}
    if meant := [f"{key}={word}" for key, names in wanted.items() if word in names]:
        return f"{word} is no KEY=VALUE; did you mean {meant[0]}?"
    return f"{word} is no KEY=VALUE, such as quant.bits=4"


def _refuse(argument: str, folders: Sequence[Path]) -> str:
    """Return what is wrong with a key and its value, or "" if Hydra may see them."""
    key, _, value = argument.partition("=")
    name = key.lstrip("+~")
    if hint := _refuse_name_of_choice(key, argument):
        return hint
    if name.startswith("sweeps") or "@" in name:
        return ""
    is_group = any((folder / name).is_dir() for folder in folders)
    if not name.startswith("hydra") and not is_group and (hint := find_unknown_key(name)):
        return hint
    if not is_group and key == f"+{name}" and find_node(name) is not None:
        return f"{argument}: {name} is there already, and is set without +: {name}={value}"
    return _refuse_no_name(name, argument) or ("" if is_group else _refuse_section(name, argument))


def _refuse_name_of_choice(key: str, argument: str) -> str:
    """Return how a study or a launcher is chosen if an argument chooses it in another way, else ""."""
    value = argument.partition("=")[2]
    if key in ("sweeps", "sweep", "+sweep") or (key == "study" and value in list_files("sweeps")):
        return f"{key}: a ready study is added, not set: +sweeps={value}"
    if key in ("launcher", "hydra.launcher"):
        return f"{argument}: did you mean hydra/launcher={value}?"
    if _SLURM.fullmatch(argument):
        return (
            f"{argument}: kbit runs on Slurm by Ray workers on the nodes of one job: `sbatch ray_on_slurm.sh "
            "+sweeps=NAME`; docs/slurm.md has the script"
        )
    return ""


def _refuse_no_name(key: str, argument: str) -> str:
    """Return which names there are if an argument chooses a file of a group by anything but names, else ""."""
    value = argument.partition("=")[2].strip("'\"")
    if key not in _GROUPS or (_NAMES.fullmatch(value) and value.lower() not in ("null", "true", "false")):
        return ""
    meant = f"did you mean quant.bits={value}? " if key == "quant" and value in _BITS else ""
    return f"{argument:.80}: {key} is given by name; {meant}{suggest(value, list_files(f'conf/{key}'))}"


def _refuse_section(key: str, argument: str) -> str:
    """Return which keys a section has if an argument sets the section itself to one value, else ""."""
    node, value = find_node(key), argument.partition("=")[2]
    if key in _GROUPS or not dataclasses.is_dataclass(node) or not value or value[0] in "{$'\"":
        return ""
    first, *others = (f"{key}.{field.name}" for field in dataclasses.fields(node))
    meant = f"did you mean {first}={value}? " if find_node(first) is str else ""
    return f"{argument}: {key} has keys of its own; {meant}they are {', '.join([first, *others])}"


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


def refuse_several_studies(arguments: Sequence[str]) -> str:
    """Return how to give several studies if the arguments give them so that Hydra keeps only the last, else ""."""
    named = [a.partition("=")[2] for a in arguments if re.match(r"\+{1,2}sweeps(@\w*)?=", a)]
    if len(named) < 2 and not any("[" in name for name in named):
        return ""
    studies = ",".join(name.strip("[]").replace(" ", "") for name in named)
    return f"{' '.join(a for a in arguments if 'sweeps' in a)}: several studies are given as +sweeps={studies}"
