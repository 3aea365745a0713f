"""`kbit results`: list, filter and export a store; delete from it, compact it, merge another into it."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from kbit.store.store import Store

_QUANTIZER = ["model", "bits", "data_type", "block_size"]


_MEASURED = ["total_bits", "task", "metric", "value", "low", "high", "n"]


# Shown where not all quantized models have the same.
_SETTINGS = [
    "dtype", "exponent_bits", "float_bias", "table", "layout", "normalization", "centering", "scale_format", "rounding",
    "seed", "method", "method_options", "outlier_fraction", "outlier_selection", "outlier_zscore",
    "activation_threshold", "include", "exclude",
]  # fmt: skip


def run_results(arguments: list[str]) -> None:
    """Run `kbit results ...`; exits with the reason if that cannot be."""
    action = arguments[0] if arguments and arguments[0] in _ACTIONS else "list"
    run = _ACTIONS[action]
    try:
        run(arguments[1:] if arguments[:1] == [action] else arguments)
    except BrokenPipeError:  # the reader of our output has gone, which is no error
        raise
    except (ValueError, OSError) as error:
        sys.exit(f"kbit: error: {error}")


def select_rows(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the rows that a condition on the columns, a pandas query, finds.

    Raises:
        ValueError: it is not a condition, or names no column.
    """
    columns = ", ".join(table.columns)
    try:
        found: Any = table.eval(where)
    except Exception as error:  # eval raises whatever the expression does
        raise ValueError(f"--where {where!r}: {error}; the columns are {columns}") from None
    if getattr(found, "shape", None) != (len(table),) or found.dtype not in ("bool", "boolean"):
        raise ValueError(f'--where {where!r} is no condition, such as "bits == 4"; the columns are {columns}')
    holds: pd.Series[bool] = found.fillna(False).astype(bool)  # a condition on a missing value does not
    return table[holds]


def choose_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns that tell the rows of a table of results apart, and what was measured.

    A float's exponent bits, say, are shown if there are several; what only some types have is no difference.
    """
    quantized = table[table["data_type"].notna()]
    of_types = ("exponent_bits", "float_bias", "table")
    settings = [name for name in _SETTINGS if quantized[name].nunique(dropna=name in of_types) > 1]
    ways = table.groupby(["task", "metric"])["evaluation"].nunique()
    evaluation = ["evaluation"] if (ways > 1).any() else []
    return [*_QUANTIZER, *settings, *evaluation, *_MEASURED]


def show_failures(failures: pd.DataFrame, width: int) -> str:
    """Return failed experiments as text for a terminal of this width: what failed, and below it why."""
    blocks = []
    rows: Any = failures.itertuples()
    for row in rows:
        head = f"{row.key}  {row.label or f'{row.model} {row.bits}-bit {row.data_type}'}  {row.finished}"
        reason = textwrap.fill(
            str(row.reason), max(width, 40), initial_indent="    ", subsequent_indent="    ", break_long_words=False
        )
        blocks.append(f"{head}\n{reason}")
    return "\n".join(blocks)


def _list(arguments: list[str]) -> None:
    parser = _make_parser(
        "Print or export the results. `kbit results delete|compact|merge --help` says more of what else there is: "
        "delete what a condition finds, put many small files together, take over another store's results."
    )
    parser.add_argument("--csv", type=Path, help="write the rows, with all columns, to this file")
    parser.add_argument("--parquet", type=Path, help="the same, as Parquet")
    parser.add_argument("--failures", action="store_true", help="show the failed experiments and why")
    options = parser.parse_args(arguments)
    table = _read(options)
    if options.csv or options.parquet:
        for path in (options.csv, options.parquet):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        if options.csv:
            table.to_csv(options.csv, index=False)
        if options.parquet:
            table.to_parquet(options.parquet, index=False)
        print(f"{len(table)} rows written to {' and '.join(str(p) for p in (options.csv, options.parquet) if p)}")
    elif table.empty:
        print(_say_nothing(options))
    elif options.failures:
        print(show_failures(table, shutil.get_terminal_size().columns))
    else:
        print(table[choose_columns(table)].to_string(index=False, na_rep="-"))


def _delete(arguments: list[str]) -> None:
    parser = _make_parser("Delete the experiments that have a row which a condition finds, with all of their rows.")
    parser.add_argument("--failures", action="store_true", help="forget failed experiments instead")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    if not options.where:
        raise ValueError('delete needs --where, such as "model == \'nano-neox-1m\'"; "bits > 0" finds everything')
    from kbit.store.store import Store

    table = _read(options)
    keys = sorted(set(table["key"]))
    if not keys:
        print(_say_nothing(options))
        return
    what = f"{len(keys)} {'failed ' if options.failures else ''}experiment{'s' if len(keys) > 1 else ''}"
    shown = table.drop_duplicates("key")[["key", *_QUANTIZER]]
    print(shown.to_string(index=False, na_rep="-", max_rows=20))
    if not options.yes and not _ask(f"delete {what} of {options.results}?"):
        raise ValueError("nothing was deleted")
    store = Store(options.results)
    deleted = store.delete_failures(keys) if options.failures else store.delete(keys)
    print(f"deleted {deleted} of {what}")


def _compact(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "kbit results compact", description="Put many small files together, so that reading is fast; sweeps do, too."
    )
    parser.add_argument("--results", default="results", help="the store: a folder or URL (default: results)")
    options = parser.parse_args(arguments)
    print(f"{_open(options.results).compact()} experiments compacted in {options.results}")


def _merge(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "kbit results merge", description="Copy the results and failures that a store lacks from others."
    )
    parser.add_argument("others", nargs="+", metavar="OTHER", help="a store to copy from, which stays as it is")
    parser.add_argument("--results", default="results", help="the store to copy to (default: results)")
    options = parser.parse_args(arguments)
    from kbit.store.filesystem import open_files
    from kbit.store.readers import read_results
    from kbit.store.store import Store

    for other in options.others:
        if open_files(other).root == open_files(options.results).root or _is_same(other, options.results):
            raise ValueError(f"{other} is {options.results} itself: nothing to merge")
        read_results(other)  # refuses what is no store before anything is copied
    store = Store(options.results)
    for other in options.others:
        copied, had = store.merge(other)
        print(f"{other}: {copied} experiments copied to {options.results}, which had {had} of its experiments already")


_ACTIONS = {"list": _list, "delete": _delete, "compact": _compact, "merge": _merge}


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("kbit results", description=description)
    parser.add_argument("--results", default="results", help="the store: a folder or URL (default: results)")
    parser.add_argument(
        "--where", help="a condition on the columns (pandas' query), such as \"bits == 4 and metric == 'acc'\""
    )
    return parser


def _read(options: argparse.Namespace) -> pd.DataFrame:
    from kbit.store.readers import read_failures, read_results

    table = (read_failures if options.failures else read_results)(options.results)
    return select_rows(table, options.where) if options.where else table


def _open(path: str) -> Store:
    """Return a store that is there already."""
    from kbit.store.readers import read_failures
    from kbit.store.store import Store

    read_failures(path)
    return Store(path)


def _is_same(path: str, other: str) -> bool:
    """Whether two local paths lead to one folder, by whatever links."""
    return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def _say_nothing(options: argparse.Namespace) -> str:
    what = "failed experiments" if options.failures else "results"
    return f"no {what} in {options.results}" + (f" with {options.where}" if options.where else "")


def _ask(question: str) -> bool:
    """Whether the user agrees; without anyone to ask, no."""
    if not sys.stdin.isatty():
        raise ValueError(f"{question} There is no terminal to ask on: --yes agrees")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
