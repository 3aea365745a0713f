"""Tables as files for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


QUOTE_FEW: Final = 0  # csv.QUOTE_MINIMAL, as pandas' types want it
QUOTE_TEXTS: Final = 2  # csv.QUOTE_NONNUMERIC


def write_csv(table: pd.DataFrame, path: Path, notes: Sequence[str] = ()) -> None:
    """Write a table as CSV whose texts a spreadsheet does not run, see without_formulas.

    Args:
        table: the table.
        path: the file.
        notes: lines in front, each behind "# ". Texts are then quoted, so that pandas.read_csv(path, comment="#") reads
            all of a text that has a # in it.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {' '.join(note.split())}\n" for note in notes)
        quoting: Literal[0, 2] = QUOTE_TEXTS if notes else QUOTE_FEW
        without_formulas(table).to_csv(file, index=False, quoting=quoting, lineterminator="\n")


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet. A column that has numbers and words, as in a wide table, becomes texts."""
    mixed = [name for name in table.columns if pd.api.types.infer_dtype(table[name]).startswith("mixed")]
    table.astype(dict.fromkeys(mixed, str)).to_parquet(path, index=False)


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts are no formulas: one that begins like a formula gets a ' in front.

    A model's or task's name may come from anywhere. Numbers stay numbers.
    """
    safe = table.copy()
    for name in table.columns:
        if table[name].dtype == object or pd.api.types.is_string_dtype(table[name].dtype):
            safe[name] = table[name].map(_neutralise)
    return safe


def _neutralise(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
