"""Values against what is allowed, with the nearest word where one is near."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, with the nearest word if one is near, unless the value is one of the allowed words."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of: {', '.join(allowed)}{hint}")


def non_defaults(value: Any, default: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their default."""
    mine, theirs = dataclasses.asdict(value), dataclasses.asdict(default)
    return {name: mine[name] for name in mine if mine[name] != theirs[name]}


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return what is allowed, the nearest first if one is near."""
    names = list(allowed)
    near = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"allowed are {', '.join(names)}"
