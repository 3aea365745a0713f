"""Dataclasses as plain values and back: Hydra's configurations, and the records of a store.

The conversion is generic: the types of a dataclass' fields say how its values are read. Nested dataclasses are built
from dictionaries, and tuples from lists, as JSON has no tuples.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

T = TypeVar("T")

Values = dict[str, Any]  # nested: the values of a dataclass' fields by name

_Convert = Callable[[Any], Any]


def to_json(value: Any, **about: Any) -> bytes:
    """Return a dataclass, or the values of its fields, as JSON, with further entries such as schema_version."""
    values = value if isinstance(value, dict) else dataclasses.asdict(value)
    return write_json(values | about, indent=1).encode()


def write_json(values: Values, **layout: Any) -> str:
    """Return values as JSON, which has no NaN and no infinity: they become null. from_json reads null as NaN.

    Args:
        values: nested dictionaries, lists and tuples of plain values.
        layout: indent and separators as json.dumps takes them.
    """
    try:
        return json.dumps(values, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_without_nan(values), allow_nan=False, **layout)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass, nested ones included, from the values of its fields. Its own checks then see the values.

    A field that is missing, as in a record of an earlier kbit, takes its default. An entry that is no field is ignored.
    A number that is null is NaN, see write_json. Types are not checked here but by check_types.

    Raises:
        TypeError: a field without a default is missing.
        ValueError: a value that the dataclass refuses.
    """
    read = _find_reader(typing.cast(Any, cls))
    return read(values)  # type: ignore[no-any-return]


@functools.cache
def _find_reader(cls: type[Any]) -> _Convert:
    """Return the function that makes a dataclass of its values. The types are looked up once for each class."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    conversions = {name: convert for name in names if (convert := _find_conversion(hints[name])) is not None}
    plain = [name for name in names if name not in conversions]

    def read(values: Mapping[str, Any]) -> Any:
        found = {name: values[name] for name in plain if name in values}
        for name, convert in conversions.items():
            if name in values:
                found[name] = convert(values[name])
        return cls(**found)

    return read


def _find_conversion(kind: Any) -> _Convert | None:
    """Return the function that makes a value of this type of its plain value. None means that nothing is to do."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _find_reader(kind)
    if kind is float:
        return _read_number
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (Union, types.UnionType):  # X | None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        convert = _find_conversion(inner)
        return None if convert is None else functools.partial(_convert_optional, convert)
    if typing.get_origin(kind) is tuple:  # tuple[X, ...]
        convert = _find_conversion(arguments[0])
        return _make_tuple if convert is None else functools.partial(_convert_each, convert)
    return None


def _convert_optional(convert: _Convert, value: Any) -> Any:
    return None if value is None else convert(value)


def _read_number(value: Any) -> Any:
    return math.nan if value is None else value


def _convert_each(convert: _Convert, values: list[Any]) -> tuple[Any, ...]:
    return tuple([convert(value) for value in values])


def _make_tuple(values: Any) -> Any:
    """Return a list as a tuple. Any other value is left to the dataclass' own checks."""
    return tuple(values) if isinstance(values, list) else values
