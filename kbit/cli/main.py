"""The command line `kbit`: its commands, and the one place that prints errors and exits.

A command's module declares the command's arguments and its function. To add a command, name its module's function in
COMMANDS.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from kbit.checks import KbitError, suggest
from kbit.cli import completion, doctor, figures, models, pack, results, run
from kbit.cli.costs import bench, fit, recommend
from kbit.store.damage import DamagedRecordWarning

# Each declares one command. The modules import Hydra, torch and other large libraries only when their command runs.
COMMANDS: Final[tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...]] = (
    run.add_run,
    run.add_plan,
    figures.add_figures,
    figures.add_report,
    results.add_results,
    run.add_outliers,
    fit.add_fit,
    recommend.add_recommend,
    bench.add_bench,
    pack.add_pack,
    pack.add_export,
    models.add_models,
    doctor.add_doctor,
    completion.add_completion,
)

_QUOTES: Final = "'\""  # in which Hydra's values may stand
_SHOWN: Final = 10  # records that cannot be read and are named

_EXAMPLES: Final = """\
kbit <command> --help says more of each.

examples:
  kbit run quant.bits=3 quant.data_type=nf
  kbit run -m quant.bits=3,4,8,16 model.name=nano-neox-98k,nano-neox-332k
  kbit run +sweeps=nano/bit_level
  kbit figures --results results --out figures
"""


def main() -> None:
    """Run the command of the console script.

    If it cannot be done, print why and exit with 1. If it is done but for records that cannot be read, exit with 3.
    """
    try:
        with _ended_in_order(), _show_damage() as damaged:
            run_command(sys.argv[1:])
        if damaged:
            sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone: `kbit results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KbitError, ValueError, OSError) as error:
        reasons = error.reasons if isinstance(error, KbitError) else (str(error),)
        sys.exit("\n".join(f"kbit: error: {reason}" for reason in reasons))


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let the signals that end a process from outside raise SystemExit in the block, so that it cleans up behind it."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
        before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _show_damage() -> Iterator[Collection[str]]:
    """Yield a collection of the records that the block leaves out as they cannot be read. Print each of them once."""
    damaged: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedRecordWarning)
        show = warnings.showwarning

        def note(message: Warning | str, *where: Any, **more: Any) -> None:
            if isinstance(message, DamagedRecordWarning):
                damaged[str(message)] = None
            else:
                show(message, *where, **more)

        warnings.showwarning = note
        try:
            yield damaged
        finally:
            lines = [f"kbit: warning: {line}" for line in damaged][:_SHOWN]
            if damaged:
                more = f"{len(damaged)} left out; `kbit results --damaged` lists them, `delete --damaged` removes them"
                print("\n".join([*lines, f"kbit: warning: {more}"]), file=sys.stderr)


def run_command(arguments: Sequence[str]) -> None:
    """Run one command.

    Raises:
        KbitError: there is no such command, or it cannot be done.
        ValueError, OSError: a value is wrong, or a file cannot be had.
    """
    parser, commands = make_parser()
    if not arguments or arguments[0] == "help":
        arguments = ["--help"]
    if arguments[0] not in (*commands, "-h", "--help", "--version"):
        raise KbitError(f"unknown command {arguments[0]!r}; {suggest(arguments[0], commands)}")
    command = commands.get(arguments[0])
    if command and not command.get_default("takes_keys") and "--results" in command.format_usage():
        arguments = _name_store(arguments, command.format_usage())
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    if options.takes_keys:
        _run_composed(options, rest)
    elif rest and not options.takes_rest:
        commands[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.run(options)


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the command line and that of each command.

    A command sets these defaults: `run` is its function of the parsed options, and `words_offered` are the words that
    the shell offers for its arguments. A command with the arguments of `kbit run` sets `takes_keys` instead, `multirun`
    if it is always one, and the arguments that come `first` and `last`. It gets `--results`, the key results. A command
    sets `takes_rest` if its function takes arguments that its parser does not know, as `rest`.
    """
    parser = argparse.ArgumentParser(
        "kbit", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="<command>", dest="command", required=True)
    for declare in COMMANDS:
        declare(commands)
    for command in commands.choices.values():
        if command.get_default("takes_keys"):
            command.add_argument("--results", metavar="STORE", help="the same as results=STORE (default: results)")
    parser.set_defaults(
        takes_keys=False, takes_rest=False, multirun=False, first=[], last=[], commands=commands.choices
    )
    return parser, commands.choices


def _name_store(arguments: Sequence[str], usage: str) -> list[str]:
    """Return arguments with the store as every command of kbit takes it: results=X is --results=X.

    The value of another option stays as it is. The command's usage tells which options take one: [--out OUT].
    """
    with_value = set(re.findall(r"(--[\w-]+)\s+[^\s\]|]", usage))
    named = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, is_given, value = argument.partition("=")
        is_store = is_given and key == "results" and before not in with_value
        named.append(f"--results={value.strip(_QUOTES)}" if is_store else argument)
    return named


def _run_composed(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run a command whose arguments are keys and values, which Hydra composes to experiments."""
    from kbit.cli.hydra.app import as_multirun, compose_requests, quote_value

    if options.results is not None:
        rest = [*rest, f"results={quote_value(options.results)}"]
    given = [*options.first, *(as_multirun(rest) if options.multirun else rest), *options.last]
    for request in compose_requests(given, options.command):
        if request.examine_only:
            doctor.examine(request)
        else:
            run.run_request(request)


class _PrintVersion(argparse.Action):
    """Prints the version. argparse's own action would need it before it is asked for, which takes a moment."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from kbit.version import find_version

        print(f"kbit {find_version()}")
        parser.exit()


if __name__ == "__main__":
    main()
