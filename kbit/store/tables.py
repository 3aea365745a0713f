"""Tables as files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV whose texts a spreadsheet does not run, see without_formulas."""
    without_formulas(table).to_csv(path, index=False)


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
