"""`kbit figures` and `kbit report`: draw what a store allows, and write it as a page."""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kbit.checks import KbitError, check_choice

if TYPE_CHECKING:
    import pandas as pd

    from kbit.analysis.figures.canvas.page import Page
    from kbit.analysis.figures.saving import Files

# The names of kbit.analysis.figures.registry.FIGURES for the shell, which cannot wait for matplotlib. A test compares.
FIGURE_NAMES: Final = (
    "figure_1", "figure_2", "figure_3", "figure_4", "outliers", "figure_5", "figure_7", "figure_8", "figure_9",
    "figure_10", "figure_11", "figure_12", "figure_13", "figure_14", "figure_15", "methods", "figure_16", "table_1",
    "table_2", "verdicts", "frontier", "laws", "data_types_map", "perplexity_accuracy", "kl_accuracy",
    "error_accuracy", "error_loss", "sensitivity", "allocation", "int8_methods", "features", "cost_accuracy",
    "cost_loss", "time_per_token", "time_by_bits", "anchors",
    "qat", "qlora", "optimizer_ablation", "states", "training_curves", "fast_precision", "exchange",
    "training_law",
    "activations_map", "cache_bits", "rotation", "bit_laws",
)  # fmt: skip


def add_figures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit figures`."""
    parser = commands.add_parser(
        "figures",
        help="draw the figures that the results allow",
        description="Draw the figures that the results allow.",
    )
    parser.add_argument("names", nargs="*", help="figures to draw (default: all that the results allow)")
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--where", help="draw these rows only: a condition, such as \"data_type == 'nf'\"")
    parser.add_argument("--measure", metavar="TASK/METRIC", help="what curves show, such as nano_cloze/acc")
    parser.add_argument("--lower-is-better", action="store_true", help="of --measure, as of a loss")
    parser.add_argument("--out", default="figures", type=Path, help="folder for the files (default: figures)")
    parser.add_argument("--format", default="png,svg", metavar="png,svg,pdf", help="pictures (default: png,svg)")
    parser.add_argument("--width", metavar="3.3in", help="width, in in, cm, mm or pt (tables keep theirs)")
    parser.add_argument("--height", metavar="2.5in", help="height, with the caption, as --width (default: it follows)")
    parser.add_argument("--dpi", default=150, type=float, help="dots per inch of a PNG (default: 150)")
    parser.add_argument("--caption", default="short", help="none, short (claim and verdict) or full (default: short)")
    parser.add_argument("--style", metavar="FILE", help="a style of matplotlib, by file or name; it beats kbit's own")
    parser.set_defaults(run=draw_figures, words_offered=FIGURE_NAMES)


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit report`."""
    parser = commands.add_parser(
        "report",
        help="write one page with every experiment, to open in a browser",
        description="Write one page with every experiment of a store.",
    )
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--where", help="show these rows only: a condition, such as \"data_type == 'nf'\"")
    parser.add_argument("--out", default="report.html", type=Path, help="the page (default: report.html)")
    parser.set_defaults(run=make_report)


def draw_figures(options: argparse.Namespace) -> None:
    """Draw figures from a store, and print where each is or why there is none, as soon as that is known.

    Raises:
        KbitError: the results allow no figure or not all of those that were named, or a figure failed.
        ValueError, OSError: there is no store, or an argument is wrong.
    """
    _use_one_thread()
    from kbit.analysis.figures.curve_figures import choose_measure
    from kbit.analysis.figures.registry import save_figures
    from kbit.analysis.statistics.findings import finding
    from kbit.store.readers import leave_out_checkpoints, read_results

    page, files = _read_page(options), _read_files(options)
    results = leave_out_checkpoints(read_results(options.results, stopped=True))
    if options.where:
        results = _select(results, options)
    measure = choose_measure(results, options.measure, lower_is_better=options.lower_is_better)
    if measure is not None:
        print(f"{options.measure}: {'higher' if measure.higher_is_better else 'lower'} values are better")
    figures = []
    for figure in save_figures(results, options.out, options.names or None, measure, page, files):
        figures.append(figure)
        if figure.lacks and not options.names:
            continue  # listed below, as nobody asked for it
        shown = f"not drawn: {figure.skipped}" if figure.skipped else f"{figure.paths[0]}\n    {figure.verdict}"
        print(f"{figure.name}: {shown}", flush=True)
    if not any(figure.paths for figure in figures):
        which = f"none of the figures {' '.join(options.names)}" if options.names else "no figure"
        raise KbitError(f"these results allow {which}")
    print(
        f"{options.out.absolute()} has each as {', '.join(files.formats)}, what is drawn as CSV, its whole caption as"
    )
    print("Markdown, and tables as LaTeX")
    lacking = ", ".join(figure.name for figure in figures if figure.lacks)
    if lacking and not options.names:
        print(
            "\nNot drawn, as these results lack what they show (`kbit figures NAME` says what, and which study has it):"
        )
        print(textwrap.fill(lacking, 100, initial_indent="  ", subsequent_indent="  "))
    print(f"\n{finding(results)}")
    missing = [figure.name for figure in figures if figure.failed or (options.names and figure.skipped)]
    if missing:
        raise KbitError(f"not drawn: {' '.join(missing)}")


def _use_one_thread() -> None:
    """Let NumPy multiply in one thread, unless the user says how many. It has to be imported afterwards.

    The matrices of fits and draws are small: with two threads they take as long, and twice the CPU time.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _read_page(options: argparse.Namespace) -> Page:
    """Return the page that the arguments describe.

    Raises:
        ValueError: a length or a style is wrong.
    """
    from kbit.analysis.figures.canvas.page import Page, parse_length, read_style

    width, height = (size and parse_length(size) for size in (options.width, options.height))
    if options.style is not None:
        read_style(options.style)  # refused before anything is drawn
    return Page(width, height, options.style)


def _read_files(options: argparse.Namespace) -> Files:
    """Return which files the arguments ask for.

    Raises:
        ValueError: a format, a caption or a resolution is wrong.
    """
    from kbit.analysis.figures.canvas.page import WRITTEN_AS
    from kbit.analysis.figures.drawing import CAPTIONS
    from kbit.analysis.figures.saving import Files

    formats = tuple(dict.fromkeys(name.strip() for name in options.format.split(",")))
    for name in formats:
        check_choice("--format", name, tuple(WRITTEN_AS))
    check_choice("--caption", options.caption, CAPTIONS)
    if not 10 <= options.dpi <= 2400:
        raise ValueError(f"--dpi {options.dpi:g} is not between 10 and 2400")
    return Files(formats, options.dpi, options.caption)


def _select(results: pd.DataFrame, options: argparse.Namespace) -> pd.DataFrame:
    """Return the rows that a condition finds, with the 16-bit baselines to compare them with, and print their number.

    Raises:
        ValueError: the text is no condition, or finds no row.
    """
    from kbit.store.conditions import is_baseline, select_rows

    if select_rows(results, options.where).empty:
        raise ValueError(f"--where {options.where!r} finds none of the rows of {options.results}")
    kept = select_rows(results, options.where, keep_baseline=True)
    baselines, dropped = is_baseline(kept).sum(), len(results) - len(kept)
    print(f"--where keeps {len(kept)} rows, {baselines} of them of 16-bit baselines, and drops {dropped}")
    return kept


def make_report(options: argparse.Namespace) -> None:
    """Write the report of a store."""
    _use_one_thread()
    from kbit.analysis.figures.registry import FIGURES
    from kbit.analysis.report.page import write_report
    from kbit.store.readers import read_results

    results = read_results(options.results, stopped=True)
    if options.where:
        results = _select(results, options)
    write_report(results, options.results, options.out, FIGURES, options.where)
    print(f"{options.out.absolute()}: open it in a browser, no network is needed")
