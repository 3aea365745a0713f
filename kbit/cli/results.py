"""`kbit results`: list, filter and export a store, delete from it, compact it, and merge others into it."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.cli.export import add_tracker, export_results
from kbit.cli.listing import QUANTIZER, add_arrangement, arrange, note_stopped, show_failures

if TYPE_CHECKING:
    import pandas as pd

    from kbit.store.damage import DamagedRecord
    from kbit.store.store import Store

# The options that say how a listing looks, and where else it goes, which no other action has.
_ARRANGEMENT = ("wide", "sort", "columns")
_LISTING = ("csv", "parquet", "to", "project", *_ARRANGEMENT)


def add_results(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit results` and its actions. Without an action it lists.

    An option that is given before the action counts for the action too, whose own options have no defaults.
    """
    parser = commands.add_parser(
        "results",
        help="print, export, delete, compact or merge results",
        description="Print or export the results, or do what an action says: `kbit results ACTION --help`.",
    )
    _add_listing(parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action")
    for declare in (_declare_list, _declare_delete, _declare_compact, _declare_merge):
        declare(actions)
    parser.set_defaults(results="results", run=run_results, act=_list, refused=(), commands=actions.choices)


def run_results(options: argparse.Namespace) -> None:
    """Run an action of `kbit results`.

    Raises:
        ValueError, OSError: an option is not one of the action's, or the action cannot be done.
    """
    if given := [f"--{name}" for name in options.refused if getattr(options, name)]:
        raise ValueError(f"kbit results {options.action} has no {' '.join(given)}")
    options.act(options)


def _declare_list(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "print or export the results, as without an action"
    parser = actions.add_parser(
        "list", help=text, description="Print or export the results.", argument_default=argparse.SUPPRESS
    )
    _add_listing(parser)


def _declare_delete(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "delete",
        help="delete what a condition finds",
        description="Delete the experiments that have a row which a condition finds, with all of their rows.",
        argument_default=argparse.SUPPRESS,
    )
    _add_store(parser)
    _add_condition(parser)
    parser.add_argument("--failures", action="store_true", help="forget failed experiments instead")
    parser.add_argument("--damaged", action="store_true", help="remove the records that cannot be read instead")
    parser.add_argument("--yes", action="store_true", default=False, help="do not ask")
    parser.set_defaults(act=_delete, refused=_LISTING)


def _declare_compact(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "compact",
        help="put many small files together",
        description="Put many small files together, so that reading is fast; sweeps do, too.",
        argument_default=argparse.SUPPRESS,
    )
    _add_store(parser)
    parser.set_defaults(act=_compact, refused=("where", "failures", "damaged", *_LISTING))


def _declare_merge(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "merge",
        help="take over the results of other stores",
        description="Copy the results and failures that a store lacks from others.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("others", nargs="+", metavar="OTHER", help="a store to copy from, which stays as it is")
    parser.add_argument("--results", help="the store to copy to (default: results)")
    parser.set_defaults(act=_merge, refused=("where", "failures", "damaged", *_LISTING))


def _add_listing(parser: argparse.ArgumentParser) -> None:
    _add_store(parser)
    _add_condition(parser)
    add_arrangement(parser)
    parser.add_argument("--csv", type=Path, help="write the rows, with all columns unless --columns, to this file")
    parser.add_argument("--parquet", type=Path, help="the same, as Parquet")
    add_tracker(parser)
    parser.add_argument("--failures", action="store_true", help="show the failed and crashed experiments and why")
    parser.add_argument("--damaged", action="store_true", help="show the records that cannot be read and why")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", help="the store: a folder or URL (default: results)")


def _add_condition(parser: argparse.ArgumentParser) -> None:
    text = "a condition on the columns, such as \"bits == 4 and metric in ['acc', 'acc_norm']\""
    parser.add_argument("--where", help=text)


def _list(options: argparse.Namespace) -> None:
    """Print the results or the failures of a store, or write them to files."""
    if options.damaged:
        _list_damaged(options)
        return
    from kbit.store.tables import write_csv, write_parquet

    given = [f"--{name}" for name in _ARRANGEMENT if getattr(options, name)]
    if given and (options.failures or options.to):
        raise ValueError(f"{'--failures' if options.failures else '--to'} goes without {' '.join(given)}")
    table = _read(options)
    if options.to or options.project:
        export_results(options, set(table["key"]))
        return
    if not (options.failures or table.empty):
        table = arrange(table, options, is_file=bool(options.csv or options.parquet))
    if options.csv or options.parquet:
        for path in (options.csv, options.parquet):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        if options.csv:
            write_csv(table, options.csv)
        if options.parquet:
            write_parquet(table, options.parquet)
        print(f"{len(table)} rows written to {' and '.join(str(p) for p in (options.csv, options.parquet) if p)}")
    elif table.empty:
        print(_describe_emptiness(options))
    elif options.failures:
        print(show_failures(table, shutil.get_terminal_size().columns))
    else:
        print(table.replace("none", "-").to_string(index=False, na_rep="-"))


def _delete(options: argparse.Namespace) -> None:
    """Delete the experiments that a condition finds, after asking.

    Raises:
        ValueError: there is no condition, or nobody agrees.
    """
    if options.damaged:
        _delete_damaged(options)
        return
    if not options.where:
        raise ValueError('delete needs --where, such as "model == \'nano-neox-1m\'"; "bits > 0" finds everything')
    from kbit.store.store import Store

    table = _read(options)
    keys = sorted(set(table["key"]))
    if not keys:
        print(_describe_emptiness(options))
        return
    what = f"{len(keys)} {'failed ' if options.failures else ''}experiment{'s' if len(keys) > 1 else ''}"
    shown = table.drop_duplicates("key")[["key", *QUANTIZER]]
    print(shown.to_string(index=False, na_rep="-", max_rows=20))
    if not options.yes and not _ask(f"delete {what} of {options.results}?"):
        raise ValueError("nothing was deleted")
    store = Store(options.results)
    deleted = store.delete_failures(keys) if options.failures else store.delete(keys)
    print(f"deleted {deleted} of {what}")


def _list_damaged(options: argparse.Namespace) -> list[DamagedRecord]:
    """Print the records of a store that cannot be read, and return them.

    Raises:
        ValueError: an option asks for rows, of which these records have none.
    """
    from kbit.store.results import find_damaged

    if given := [f"--{name}" for name in ("where", "failures", *_LISTING) if getattr(options, name)]:
        raise ValueError(f"--damaged goes without {' '.join(given)}")
    damaged = find_damaged(options.results)
    print("\n".join(map(str, damaged)) or f"every record of {options.results} can be read")
    return damaged


def _delete_damaged(options: argparse.Namespace) -> None:
    """Remove the records that cannot be read, after asking. Those that another kbit may read stay.

    Raises:
        ValueError: nobody agrees.
    """
    from kbit.store.store import Store

    damaged = _list_damaged(options)
    removed = [error for error in damaged if not error.is_foreign]
    if removed:
        sized = [f"{error.name} ({error.experiments} experiments)" for error in removed if error.experiments]
        rescued = f"; records that can be read stay: {', '.join(sized)}" if sized else ""
        if not options.yes and not _ask(f"remove {len(removed)} of these from {options.results}{rescued}?"):
            raise ValueError("nothing was removed")
        print(f"removed {Store(options.results).delete_damaged(removed)} damaged records")
    if kept := len(damaged) - len(removed):
        print(f"kept {kept}, which another version of kbit or a registered extension may read")


def _compact(options: argparse.Namespace) -> None:
    """Put the small files of a store together."""
    print(f"{_open(options.results).compact()} experiments compacted in {options.results}")


def _merge(options: argparse.Namespace) -> None:
    """Copy to a store what it lacks of others.

    Raises:
        ValueError: one of the others is the store itself.
        OSError: one of the others is no store.
    """
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


def _read(options: argparse.Namespace) -> pd.DataFrame:
    from kbit.store.readers import read_failures, read_results

    with_stopped = options.action == "delete"  # where a listing leaves them out
    table = read_failures(options.results) if options.failures else read_results(options.results, stopped=with_stopped)
    if not (options.failures or with_stopped):
        note_stopped(options.results)
    if not options.where:
        return table
    from kbit.store.conditions import count_undecided, select_rows

    if undecided := count_undecided(table, options.where):
        print(
            f"kbit: note: {undecided} rows of 16-bit baselines are left out, which have no quantizer's settings: "
            f"`({options.where}) or bits == 16` takes them in",
            file=sys.stderr,
        )
    return select_rows(table, options.where)


def _open(path: str) -> Store:
    """Return a store, which must be there already."""
    from kbit.store.readers import read_failures
    from kbit.store.store import Store

    read_failures(path)
    return Store(path)


def _is_same(path: str, other: str) -> bool:
    """Return whether two local paths lead to one folder, by whatever links."""
    return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def _describe_emptiness(options: argparse.Namespace) -> str:
    from kbit.store.readers import read_failures

    what = "failed experiments" if options.failures else "results"
    empty = f"no {what} in {options.results}" + (f" with {options.where}" if options.where else "")
    if options.failures or options.where:
        return empty
    states = read_failures(options.results)["state"].value_counts().to_dict()
    if not states:
        return empty
    counts = " and ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{empty}; it has {counts} experiments: kbit results --failures --results {options.results}"


def _ask(question: str) -> bool:
    """Return whether the user agrees. It raises ValueError if there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ValueError(f"{question} There is no terminal to ask on: --yes agrees")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
