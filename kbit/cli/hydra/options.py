"""The keys of `kbit run` with their meanings, which are the docstrings of the configuration's dataclasses.

`kbit run --help` prints them. `python -m kbit.cli.hydra.options >docs/reference/options.md` writes the same as a page.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kbit.checks import KbitError
from kbit.experiments.config import RunConfig
from kbit.methods.config import QuantConfig
from kbit.numerics.spec import QuantSpec

_WORDS: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_ENTRY: Final = re.compile(r"(\w+): (.*)")
_PYTHON: Final = {"None": "null", "True": "true", "False": "false"}  # as YAML and Hydra write them
_COLUMN, _NARROW, _WIDE = 34, 72, 120  # the help's second column, and the widths between which it fits a terminal

_PAGE: Final = """\
# Every key of `kbit run`

<!-- `python -m kbit.cli.hydra.options >docs/reference/options.md` writes this page from docstrings. -->

`kbit run`, `kbit plan`, `kbit doctor` and `kbit outliers` take these keys as `key=value`. With `-m` a key takes several
values, as in `quant.bits=3,4`. `kbit run --help` prints the same text.
"""


@dataclass(frozen=True)
class Key:
    """A key that takes a value.

    Attributes:
        name: the whole name, such as quant.block_size.
        kind: the values that it takes, in words.
        meaning: what the key decides.
    """

    name: str
    kind: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys that begin alike.

    Attributes:
        name: the keys' beginning, such as quant, or "" for those without.
        title: what the section is about.
        keys: its keys, without those of the sections within it.
    """

    name: str
    title: str
    keys: tuple[Key, ...]


def list_sections(schema: Any = RunConfig, name: str = "") -> Iterator[Section]:
    """Yield the sections of a configuration, each followed by those within it.

    Raises:
        KbitError: the docstrings are gone, as under `python -OO`.
    """
    if not schema.__doc__:
        raise KbitError("the meanings of keys are docstrings, which python -OO removes")
    kinds, meanings = typing.get_type_hints(schema), _read_meanings(schema)
    prefix = f"{name}." if name else ""
    names = [field.name for field in dataclasses.fields(schema)]
    inner = [part for part in names if dataclasses.is_dataclass(kinds[part])]
    keys = tuple(Key(prefix + n, describe_kind(kinds[n]), meanings[n]) for n in names if n not in inner)
    roles = [
        key
        for part in inner
        if is_role(kinds[part])
        for key in _describe_role(prefix + part, kinds[part], meanings[part])
    ]
    yield Section(name, inspect.cleandoc(schema.__doc__).splitlines()[0].rstrip("."), (*keys, *roles))
    for part in inner:
        if not is_role(kinds[part]):
            yield from list_sections(kinds[part], prefix + part)


def is_role(kind: Any) -> bool:
    """Whether a type of a field is a quantizer that is one of several, whose keys are those of quant and few more."""
    return kind is not QuantConfig and isinstance(kind, type) and issubclass(kind, QuantSpec)


def _describe_role(name: str, kind: Any, meaning: str) -> Iterator[Key]:
    """Yield the key that stands for all keys of a quantizer that is one of several, and the keys of its own."""
    rest = f"16 bits are none. {name}.data_type and so on are as in quant, and quant@{name}=NAME takes a named one."
    yield Key(f"{name}.bits", describe_kind(int), f"{meaning} {rest}")
    shared = {field.name for field in dataclasses.fields(QuantSpec)}
    kinds, meanings = typing.get_type_hints(kind), _read_meanings(kind)
    own = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    yield from (Key(f"{name}.{part}", describe_kind(kinds[part]), meanings[part]) for part in own)


def describe_kind(kind: Any) -> str:
    """Return which values a key of this type takes, in words."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    words = [_WORDS[kind] for kind in kinds if kind in _WORDS]
    if any(typing.get_origin(kind) in (tuple, list) for kind in kinds):
        words = ["a list, such as [a,b]"]
    return " or ".join([*words, *(["null"] if types.NoneType in kinds else [])])


def write_value(value: Any) -> str:
    """Return a value as it is written on Hydra's command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(write_value, value))}]"
    return _PYTHON.get(str(value), str(value))


def write_help(values: Mapping[str, Any], width: int | None = None) -> str:
    """Return every key with its value and its meaning, for a terminal.

    Args:
        values: the composed configuration as nested mappings.
        width: the columns of the terminal. None asks it.
    """
    width = min(max(width or shutil.get_terminal_size().columns, _NARROW), _WIDE)
    lines = []
    for section in list_sections():
        lines += ["", *textwrap.wrap(f"== {section.name or 'the run'}: {section.title} ==", width)]
        for key in section.keys:
            head = f"{key.name}={write_value(_look_up(values, key.name))}"
            start = head.ljust(_COLUMN) if len(head) < _COLUMN else f"{head}\n{' ' * _COLUMN}"
            text = textwrap.wrap(key.meaning, width - _COLUMN, break_long_words=False, break_on_hyphens=False)
            lines.append(start + f"\n{' ' * _COLUMN}".join(text))
    return "\n".join(lines).strip()


def write_page() -> str:
    """Return the page of the documentation, with the defaults of the dataclasses, which are those of conf/."""
    values = dataclasses.asdict(RunConfig())
    parts = [_PAGE]
    for section in list_sections():
        parts.append(f"## {section.name or 'The run'}\n\n{section.title}.\n")
        for key in section.keys:
            default = write_value(_look_up(values, key.name))
            text = f"- **`{key.name}`** = `{default}` ({key.kind}): {key.meaning}"
            parts.append(textwrap.fill(text, _WIDE, subsequent_indent="  ", break_long_words=False))
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _look_up(values: Mapping[str, Any], name: str) -> Any:
    node: Any = values
    for part in name.split("."):
        node = node[part]
    return node


def _read_meanings(schema: Any) -> dict[str, str]:
    """Return the meaning of each field of a dataclass and of those that it inherits from, from their docstrings."""
    meanings: dict[str, str] = {}
    for part in reversed(schema.__mro__[:-1]):
        _, _, section = inspect.cleandoc(part.__doc__).partition("\nAttributes:\n")
        entries = re.split(r"\n(?=\S)", section)[0]  # up to the next heading, such as Raises
        for entry in re.split(r"\n(?=\w)", textwrap.dedent(entries)):
            if match := _ENTRY.match(" ".join(entry.split())):
                meanings[match[1]] = re.sub(r"\b(None|True|False)\b", lambda word: _PYTHON[word[0]], match[2])
    return meanings


if __name__ == "__main__":
    print(write_page(), end="")
