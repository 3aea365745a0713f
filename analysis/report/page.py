"""One self-contained page with every experiment of a store: chart, table, filters, key figures, verdicts, failures.

The page opens from the file system without a network: the data, the pictures and the page's own scripts are inside it.
points.js chooses and orders, chart.js draws on a canvas, page.js joins both to the document.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

import pandas as pd

from kbit.analysis.curves.curves import AmbiguousResults, split_families
from kbit.analysis.curves.families import leave_out_ambiguous
from kbit.analysis.curves.run_time import leave_out_rounded
from kbit.analysis.curves.stopped import describe_stopped
from kbit.analysis.curves.trainings import leave_out_trained
from kbit.analysis.figures.drawing import PaperFigure, count_things
from kbit.analysis.figures.law_table import compare_laws
from kbit.analysis.report.pictures import write_pictures
from kbit.analysis.report.points import collect_data
from kbit.analysis.report.tables import write_failures, write_laws, write_provenance, write_verdicts
from kbit.analysis.statistics.findings import describe_family
from kbit.analysis.statistics.verdicts import tabulate_verdicts
from kbit.store.filesystem import replace_file
from kbit.store.readers import leave_out_checkpoints, read_failures, read_provenance

FOLDER: Final = Path(str(files("kbit"))) / "analysis" / "report"
Figures = Mapping[str, Callable[[pd.DataFrame], PaperFigure]]
SCRIPTS: Final = ("points.js", "chart.js", "page.js")


def write_report(
    results: pd.DataFrame, store: str | Path, out: Path, figures: Figures, where: str | None = None
) -> None:
    """Write the report to one HTML file, which is replaced in one step.

    Args:
        results: the store's results (kbit.read_results), or a choice of them.
        store: the store, for its failures and the origins of its results.
        out: the page.
        figures: the functions that draw, by the figures' names (registry.FIGURES). It draws the key figures.
        where: the condition that chose the results, which the page names.

    Raises:
        ValueError: there is no result with a value.
    """
    if results["value"].isna().all():
        raise ValueError(f"{Path(store).absolute()} has no finished experiment: nothing to report")
    page = build_page(results, read_failures(store), read_provenance(store), figures, where)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda path: path.write_text(page, encoding="utf-8"))


def build_page(
    results: pd.DataFrame, failures: pd.DataFrame, provenance: pd.DataFrame, figures: Figures, where: str | None = None
) -> str:
    """Return the page's HTML.

    Args:
        results, failures, provenance: from kbit.store's read_results, read_failures, read_provenance. Checkpoints that
            were quantized before are in the chart and the table alone.
        figures: see write_report.
        where: the condition that chose the results.
    """
    everything = split_families(results)
    results = leave_out_checkpoints(everything)
    plain = leave_out_rounded(leave_out_trained(results))
    template = Template((FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        summary=html.escape(summarize(everything, failures, where)),
        findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in list_findings(plain)),
        figures=write_pictures(results, figures),
        verdicts=write_verdicts(tabulate_verdicts(plain)),
        laws=compare_all_laws(plain),
        failures=write_failures(failures),
        provenance=write_provenance(provenance),
        data=embed_json(collect_data(everything)),
        script="\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS),
    )


def summarize(results: pd.DataFrame, failures: pd.DataFrame, where: str | None) -> str:
    """Return the page's first sentence: how much it shows."""
    experiments = count_things(results["key"].nunique(), "experiment") + (f" with {where}" if where else "")
    families = results["family"].nunique()
    named = "1 family" if families == 1 else f"{families:,} families"
    count = f"{experiments} on {count_things(results['model'].nunique(), 'model')} of {named}"
    early = describe_stopped(results)
    return f"{count}, {len(failures):,} failed{' in the whole store' if where else ''}.{early and f' Hollow: {early}'}"


def list_findings(results: pd.DataFrame) -> list[str]:
    """Return a sentence for each family: its best precision at equal total bits."""
    families = sorted(results["family"].unique())
    return [describe_family(results[results["family"] == family], str(family)) for family in families]


def compare_all_laws(results: pd.DataFrame) -> str:
    """Return the table of scaling laws as HTML, or the reason why no family allows it."""
    try:
        laws, left_out = leave_out_ambiguous(compare_laws, results)
        return write_laws(laws, left_out.values())
    except AmbiguousResults as error:
        return f"<p>{html.escape(f'Not computed: {error}')}</p>"


def embed_json(data: Any) -> str:
    """Return JSON that may stand inside a script element: without "<", no text in it ends or opens an element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
