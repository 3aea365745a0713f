"""`kbit figures` and `kbit report`: draw what a store allows, write the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kbit.cli.results import select_rows


def draw_figures(arguments: list[str]) -> None:
    """Draw figures from a store: `kbit figures`."""
    parser = argparse.ArgumentParser("kbit figures", description="Draw the figures that the results allow.")
    parser.add_argument("names", nargs="*", help="figures to draw (default: all that the results allow)")
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--where", help="draw these rows only: a pandas query, such as \"data_type == 'nf'\"")
    parser.add_argument("--out", default="figures", type=Path, help="folder for PNG, SVG and CSV (default: figures)")
    options = parser.parse_args(arguments)
    from kbit.analysis.figures.registry import save_figures
    from kbit.analysis.statistics.findings import finding
    from kbit.store.readers import read_results

    try:
        results = read_results(options.results)
        if options.where:
            results = select_rows(results, options.where)
            if results.empty:
                raise ValueError(f"--where {options.where!r} finds none of the rows of {options.results}")
        figures = save_figures(results, options.out, options.names or None)
        for figure in figures:
            shown = f"not drawn: {figure.skipped}" if figure.skipped else f"{figure.paths[0]}\n    {figure.verdict}"
            print(f"{figure.name}: {shown}")
        if not any(figure.paths for figure in figures):
            which = f"none of the figures {' '.join(options.names)}" if options.names else "no figure"
            sys.exit(f"kbit: error: these results allow {which}")
        print(f"the same as SVG, and what is drawn as CSV, in {options.out.absolute()}")
        print(f"\n{finding(results)}")
        missing = [figure.name for figure in figures if figure.skipped]
        if options.names and missing:
            sys.exit(f"kbit: error: not drawn: {' '.join(missing)}")
    except (ValueError, OSError) as error:
        sys.exit(f"kbit: error: {error}")


def make_report(arguments: list[str]) -> None:
    """Write the report of a store: `kbit report`."""
    parser = argparse.ArgumentParser("kbit report", description="Write one page with every experiment of a store.")
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--out", default="report.html", type=Path, help="the page (default: report.html)")
    options = parser.parse_args(arguments)
    from kbit.analysis.report.page import write_report

    try:
        write_report(options.results, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"kbit: error: {error}")
    print(f"{options.out.absolute()}: open it in a browser, no network is needed")
