"""Check that plain values are what a dataclass' annotations say, before the dataclass is made of them.

    check_types(Result, record)

A record may be JSON and still hold a text where a number belongs. A dataclass takes any value, and the error would come
from its own checks, or much later from a table or a figure.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final, Union

_LARGEST: Final = 2**63  # tables hold whole numbers of 64 bits

_NAMES: Final[dict[Any, str]] = {
    int: "whole number", float: "number", bool: "true or false", str: "text", tuple: "list", list: "list",
    dict: "mapping of keys to values",
}  # fmt: skip

_Check = Callable[[Any, str], None]


def check_types(kind: type[Any], values: Any, name: str = "") -> None:
    """Check the values of a dataclass' fields, nested as from_json takes them. A field may be missing.

    Args:
        kind: the dataclass.
        values: the values by name.
        name: name of the whole, which messages put before that of a field.

    Raises:
        TypeError: a value is not of its field's type. The message names the field and the value.
    """
    _make_check(typing.cast(Hashable, kind))(values, name)


@functools.cache
def _make_check(kind: Hashable) -> _Check:
    """Return a function that checks a value, of which it is told the name."""
    if kind is Any:
        return _accept
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        checks = [(field.name, _make_check(hints[field.name])) for field in dataclasses.fields(kind)]
        return functools.partial(_check_fields, kind, checks)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return functools.partial(_check_optional, _make_check(inner))
    if origin is not None:  # tuple[X, ...], list[X], dict[str, X]
        return functools.partial(_check_items, origin, _make_check(arguments[-1 if origin is dict else 0]))
    return functools.partial(_check_plain, kind)


def _accept(value: Any, name: str) -> None:
    """Accept any value."""


def _check_fields(kind: type[Any], checks: list[tuple[str, _Check]], value: Any, name: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name or kind.__name__} is {_show(value)}, which is no mapping of keys to values")
    for field, check in checks:
        if field in value:
            check(value[field], f"{name}.{field}" if name else field)


def _check_optional(check: _Check, value: Any, name: str) -> None:
    if value is not None:
        check(value, name)


def _check_items(origin: type[Any], check: _Check, value: Any, name: str) -> None:
    if not isinstance(value, (list, tuple) if origin is tuple else origin):
        raise TypeError(f"{name} is {_show(value)}, which is no {_NAMES[origin]}")
    for item in value.values() if isinstance(value, dict) else value:
        check(item, name)


def _check_plain(kind: Any, value: Any, name: str) -> None:
    allowed = (int, float, types.NoneType) if kind is float else kind  # null is NaN, see from_json
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {_show(value)}, which is no {_NAMES[kind]}")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise TypeError(f"{name} is a number of more than 64 bits")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is no text, and no table takes it


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
