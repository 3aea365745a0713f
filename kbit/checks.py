"""What every floor needs towards its user: checks of values, the error of what cannot be done, and small tables."""

from __future__ import annotations

import dataclasses
import difflib
import html
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final


class KbitError(Exception):
    """What a user asked for cannot be done.

    The command line prints each reason on a line of its own and exits with 1. It does the same with the message of a
    ValueError or an OSError, which functions raise for a wrong value or a file that cannot be had.

    Args:
        reasons: why it cannot be done.
    """

    def __init__(self, *reasons: str) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons


_LONG: Final = 200  # characters of a list behind which the nearest word would not be found


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the allowed words. The message names the nearest one, if any."""
    if value not in allowed:
        near, listed = ask_for_nearest(str(value), allowed), ", ".join(allowed)
        if near and len(listed) > _LONG:
            raise ValueError(f"{name}={value!r}: {near} It is not one of: {listed}")
        raise ValueError(f"{name}={value!r} is not one of: {listed}{f'; {near}' if near else ''}")


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return a sentence that lists the allowed words, after the nearest one if any is near."""
    names = list(allowed)
    return f"{ask_for_nearest(word, names)} allowed are {', '.join(names)}".lstrip()


def ask_for_nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "did you mean WORD?" with the nearest of the allowed words, or "" if none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"did you mean {near[0]}?" if near else ""


_AMOUNT: Final = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt])(i?)b", re.IGNORECASE)
_POWERS: Final = {"k": 1, "m": 2, "g": 3, "t": 4}


def read_bytes(text: str) -> float | None:
    """Return an amount of memory in bytes: "6GB" and "6 gb" are 6 x 10^9, "6GiB" 6 x 2^30. None: it is no amount."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        return None
    return float(found[1]) * float((1024 if found[3] else 1000) ** _POWERS[found[2].lower()])


def non_defaults(value: Any, default: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from those of the default."""
    mine, theirs = dataclasses.asdict(value), dataclasses.asdict(default)
    return {name: mine[name] for name in mine if mine[name] != theirs[name]}


def tabulate_html(rows: Mapping[str, object]) -> str:
    """Return names and values as a table in HTML, which a notebook shows in place of a long repr."""
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"
