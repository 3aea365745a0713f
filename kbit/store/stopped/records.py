"""Experiments that have not measured all items (study.until.decided): their records, which are no finished results.

results/stopped/<key>-<rounds>.json    a Result with `sampled`. The digits are the rounds of its parts

A later round, or a run without rounds, goes on from them. A new round is there before the old one is removed, so that a
killed process loses nothing. Of two records of an experiment that with more rounds counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import TYPE_CHECKING, Final, TypeVar

from kbit.evaluation.rounds.order import LAST, PARTS
from kbit.store.damage import DamagedRecord, Source, set_aside
from kbit.store.filesystem import CannotOpenError, Files
from kbit.store.records import list_finished, read_all_items, retry

if TYPE_CHECKING:
    from kbit.experiments.result import Result

T = TypeVar("T")
FOLDER: Final = "stopped"
# All that can follow a key: the rounds of one part, or of each.
_DIGITS: Final = tuple(
    "".join(map(str, rounds)) for count in range(1, len(PARTS) + 1) for rounds in product(range(LAST + 1), repeat=count)
)


def name_stopped(result: Result) -> str:
    """Return the name of the file of a result that is not finished."""
    return f"{FOLDER}/{result.key}-{''.join(str(part.rounds) for part in result.sampled)}.json"


def read_rounds(name: str) -> tuple[int, ...]:
    """Return the rounds of each part from the name of a file."""
    return tuple(int(digit) for digit in name.removesuffix(".json").rpartition("-")[2] if digit.isdecimal())


def count_all(name: str) -> int:
    """Return the sum of the rounds of all parts, by which one record of an experiment goes further than another."""
    return sum(read_rounds(name))


def list_names(files: Files) -> list[str]:
    """Return the names of all files, of each experiment that with the most rounds last."""
    return sorted(files.names(FOLDER, ".json"), key=count_all)


def find_names(files: Files, keys: Collection[str]) -> list[str]:
    """Return the names of these experiments' files, of each that with the most rounds last.

    The files of one are asked for by name, as every result that is written asks for them beside thousands of others.
    """
    if len(keys) != 1:
        wanted = set(keys)
        return [name for name in list_names(files) if find_key(name) in wanted]
    (key,) = keys
    return sorted(files.select([f"{FOLDER}/{key}-{digits}.json" for digits in _DIGITS]), key=count_all)


def list_stopped(files: Files) -> dict[str, str]:
    """Return the name of the file of each experiment that is not finished, by key."""
    if not (names := list_names(files)):  # as in most stores, whose finished experiments may be thousands
        return {}
    finished = retry(files, lambda: list_finished(files, {}))
    return {key: name for name in names if (key := find_key(name)) not in finished}


def load_stopped(files: Files, keys: Collection[str], kind: type[T]) -> dict[str, T]:
    """Return what has been measured of experiments, by key. It warns of what cannot be read, and leaves it out.

    Args:
        files: the store's files.
        keys: the experiments.
        kind: Result, or a dataclass with some of its fields.
    """
    return dict(_read(files, find_names(files, keys), kind))  # more rounds come later


def check_stopped(files: Files, kind: type[T]) -> None:
    """Read all records, and warn of those that cannot be read."""
    for _ in _read(files, list_names(files), kind):
        pass


def _read(files: Files, names: Collection[str], kind: type[T]) -> Iterator[tuple[str, T]]:
    """Yield the keys and records of files. It warns of what cannot be read, its items included."""
    for name in names:
        source = Source(files.root, name, key := find_key(name))
        try:
            with files.open(name) as file:
                record = source.parse(file.read())
            read_all_items(source, record)
            yield key, source.read(kind, record)
        except CannotOpenError as error:
            set_aside(source.refuse(f"cannot be opened: {error.strerror}", is_foreign=True))
        except FileNotFoundError:  # the next round has taken its place
            continue
        except DamagedRecord as error:
            set_aside(error)


def find_key(name: str) -> str:
    """Return the key of the experiment of a file."""
    return name.rpartition("/")[2].partition("-")[0]
