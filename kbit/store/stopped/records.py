"""Experiments that have not measured all items (study.until.decided): their records, which are no finished results.

results/stopped/<key>-<rounds>.json    a Result with `sampled`. The digits are the rounds of its parts

A later round, or a run without rounds, goes on from them. A new round is there before the old one is removed, so that a
killed process loses nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from kbit.store.damage import DamagedRecord, Source, set_aside
from kbit.store.filesystem import CannotOpenError, Files
from kbit.store.records import list_finished, retry

if TYPE_CHECKING:
    from kbit.experiments.result import Result

T = TypeVar("T")
FOLDER: Final = "stopped"


def name_stopped(result: Result) -> str:
    """Return the name of the file of a result that is not finished."""
    return f"{FOLDER}/{result.key}-{''.join(str(part.rounds) for part in result.sampled)}.json"


def read_rounds(name: str) -> tuple[int, ...]:
    """Return the rounds of each part from the name of a file."""
    return tuple(int(digit) for digit in Path(name).stem.partition("-")[2])


def list_names(files: Files, key: str | None = None) -> list[str]:
    """Return the names of all files, or those of one experiment, that with the most rounds last."""
    names = files.names(FOLDER, ".json")
    return names if key is None else [name for name in names if _find_key(name) == key]


def list_stopped(files: Files) -> dict[str, str]:
    """Return the name of the file of each experiment that is not finished, by key."""
    finished = retry(files, lambda: list_finished(files, {}))
    return {key: name for name in list_names(files) if (key := _find_key(name)) not in finished}


def load_stopped(files: Files, keys: Collection[str], kind: type[T]) -> dict[str, T]:
    """Return what has been measured of experiments, by key. It warns of what cannot be read, and leaves it out.

    Args:
        files: the store's files.
        keys: the experiments.
        kind: Result, or a dataclass with some of its fields.
    """
    found: dict[str, T] = {}
    for name in list_names(files):  # more rounds come later
        if (key := _find_key(name)) in keys:
            source = Source(files.root, name, key)
            try:
                with files.open(name) as file:
                    found[key] = source.read(kind, source.parse(file.read()))
            except CannotOpenError as error:
                set_aside(source.refuse(f"cannot be opened: {error.strerror}", is_foreign=True))
            except FileNotFoundError:  # the next round has taken its place
                continue
            except DamagedRecord as error:
                set_aside(error)
    return found


def _find_key(name: str) -> str:
    return Path(name).stem.partition("-")[0]
