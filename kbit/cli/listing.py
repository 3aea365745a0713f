"""Which rows and columns of a store `kbit results` prints, and in which order."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pandas as pd

QUANTIZER: Final = ["model", "bits", "data_type", "block_size"]
_MEASURED: Final = ["total_bits", "task", "metric", "value", "low", "high", "n"]
_WIDE: Final = ["label", "bits_per_param", "total_bits"]

# Settings that are shown where the quantized models differ in them.
_SETTINGS: Final = [
    "dtype", "exponent_bits", "float_bias", "table", "layout", "normalization", "centering", "scale_format", "rounding",
    "seed", "method", "method_options", "outlier_fraction", "outlier_selection", "outlier_zscore",
    "activation_threshold", "include", "exclude", "rules", "allocation", "activations", "kv_cache", "rotation",
]  # fmt: skip


def note_stopped(path: str) -> None:
    """Say that experiments of a store are left out which have not measured all items."""
    from kbit.store.filesystem import open_files
    from kbit.store.stopped.records import list_stopped

    if count := len(list_stopped(open_files(path))):
        where = "`kbit figures` and `kbit report` show them"
        print(f"kbit: note: {count} experiments stopped early (study.until.decided): {where}", file=sys.stderr)


def add_arrangement(parser: argparse.ArgumentParser) -> None:
    """Declare the options that arrange a listing."""
    parser.add_argument("--wide", action="store_true", help="one row for each experiment, a column for each measure")
    order = "columns to sort by, --sort=-COLUMN from the largest (default: model, bits, data type, block size)"
    parser.add_argument("--sort", metavar="COLUMN,...", help=order)
    shown = "the columns to print or write, in this order (default: those that tell rows apart; files have all)"
    parser.add_argument("--columns", metavar="COLUMN,...", help=shown)


def arrange(table: pd.DataFrame, options: argparse.Namespace, *, is_file: bool) -> pd.DataFrame:
    """Return the rows of a table of results in the order, and with the columns, that the options ask for.

    Raises:
        ValueError: an option names no column of the table.
    """
    from kbit.store.wide import sort_experiments, widen, write_words

    if options.wide:
        table = widen(table, options.results)
    table = sort_experiments(table, _split("--sort", options.sort, table))
    columns = _split("--columns", options.columns, table)
    if is_file:
        return table[columns] if columns else table
    columns = columns or (_choose_wide_columns(table) if options.wide else choose_columns(table))
    return write_words(table)[columns]


def choose_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns that tell the rows of a table of results apart, and those that say what was measured.

    The exponent bits of floats, for example, are shown if there are several. That other data types have none is no
    difference.
    """
    quantized = table[table["data_type"].notna()]
    of_types = ("exponent_bits", "float_bias", "table")
    settings = [name for name in _SETTINGS if quantized[name].nunique(dropna=name in of_types) > 1]
    # Models of 16 bits are trained, too. That other models have no training is a difference, and no seed is none.
    trainings = [name for name in ("training", "train_seed") if table[name].nunique(dropna=name != "training") > 1]
    ways = table.groupby(["task", "metric"])["evaluation"].nunique()
    evaluation = ["evaluation"] if (ways > 1).any() else []
    return [*QUANTIZER, *settings, *trainings, *evaluation, *_MEASURED]


def show_failures(failures: pd.DataFrame, width: int) -> str:
    """Return failed experiments as text for a terminal of this width. Below each experiment stands its reason."""
    blocks = []
    rows: Any = failures.itertuples()
    for row in rows:
        head = f"{row.key}  {row.state:<7}  {row.label}  {row.finished}"
        reason = textwrap.fill(
            str(row.reason), max(width, 40), initial_indent="    ", subsequent_indent="    ", break_long_words=False
        )
        blocks.append(f"{head}\n{reason}")
    return "\n".join(blocks)


def _choose_wide_columns(table: pd.DataFrame) -> list[str]:
    """Return the label, the sizes, each measure's value without its interval, and the seconds."""
    measures = [name.removesuffix(" low") for name in table.columns if name.endswith(" low")]
    return [*_WIDE, *measures, "seconds"]


def _split(option: str, names: str | None, table: pd.DataFrame) -> list[str]:
    """Return the columns that an option names.

    Raises:
        ValueError: a name is no column of the table.
    """
    from kbit.checks import check_choice

    columns = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in columns:
        is_falling = option == "--sort" and name.startswith("-")
        check_choice(option, name.removeprefix("-") if is_falling else name, tuple(table.columns))
    return columns
