"""One self-contained page with every experiment of a store: filters, hover, Pareto frontier, verdicts, failures.

The page opens from the file system without a network: plotly's script, the data and the page's own script
(page.js) are inside it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

import pandas as pd
from plotly.offline import get_plotlyjs

from kbit.analysis.curves.curves import AmbiguousResults, leave_out_ambiguous, split_families
from kbit.analysis.curves.settings import is_missing, make_labels
from kbit.analysis.figures.canvas.styles import LINE_STYLES
from kbit.analysis.figures.law_table import compare_laws
from kbit.analysis.statistics.findings import finding
from kbit.analysis.statistics.verdicts import tabulate_verdicts
from kbit.store.filesystem import replace_file
from kbit.store.readers import leave_out_checkpoints, read_failures, read_provenance, read_results

FOLDER: Final = Path(str(files("kbit"))) / "analysis" / "report"
# Which measurements can be shown, in the order of the menu. Higher is better for all but the last two.
METRICS: Final = ("acc", "top1_agreement", "cross_entropy", "kl_divergence")
LOSSES: Final = METRICS[2:]

# plotly's names of the markers of styles.LINE_STYLES
SYMBOLS: Final = {
    "P": "cross", "v": "triangle-down", "o": "circle", "^": "triangle-up", "D": "diamond", "X": "x", "s": "square",
    "*": "star",
}  # fmt: skip


def write_report(store: str | Path, out: Path) -> None:
    """Write the report of a store to one HTML file, which is replaced in one step.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store has no result.
    """
    results = leave_out_checkpoints(read_results(store))
    if results.empty:
        raise ValueError(f"{Path(store).absolute()} has no finished experiment: nothing to report")
    page = build_page(results, read_failures(store), read_provenance(store))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda path: path.write_text(page, encoding="utf-8"))


def build_page(results: pd.DataFrame, failures: pd.DataFrame, provenance: pd.DataFrame) -> str:
    """Return the page's HTML.

    Args:
        results, failures, provenance: from kbit.store's read_results, read_failures, read_provenance.
    """
    results = split_families(results)
    data = {"measures": list_measures(results), "points": collect_columns(results), "styles": list_styles()}
    template = Template((FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        finding=html.escape(finding(results)),
        experiments=results["key"].nunique(),
        failed=len(failures),
        verdicts=format_table(drop_keys(tabulate_verdicts(results)), "No two precisions meet at equal total bits."),
        laws=format_made(compare_laws, results, "No cross entropy was measured."),
        failures=format_table(failures, "None: every experiment that was run has a result."),
        provenance=format_table(provenance, "-"),
        data=embed_json(data),
        plotly=get_plotlyjs(),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
    )


def embed_json(data: Any) -> str:
    """Return JSON that may stand inside a script element: without "<", no text in it ends or opens an element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def drop_keys(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the experiments' keys, which are long."""
    return table.drop(columns="keys", errors="ignore")


def format_made(make: Callable[[pd.DataFrame], pd.DataFrame], results: pd.DataFrame, empty: str) -> str:
    """Return a table of the analysis as HTML, and below it which families it leaves out, and why."""
    try:
        table, left_out = leave_out_ambiguous(make, results)
    except AmbiguousResults as error:
        table, left_out = pd.DataFrame({"not computed": [str(error)]}), []
    notes = "".join(f"<p>{html.escape(f'Left out: {reason}')}</p>" for reason in left_out)
    return format_table(drop_keys(table), empty) + notes


def list_measures(results: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the measurements that can be shown: metric, task, label, lower (whether lower is better)."""
    distinct = results[["metric", "task"]].drop_duplicates()
    pairs = zip(distinct["metric"].astype(str), distinct["task"].astype(str), strict=True)
    shown = [pair for pair in pairs if pair[0] in METRICS]
    ordered = sorted(shown, key=lambda pair: (METRICS.index(pair[0]), pair[1] != "mean_zero_shot", pair[1]))
    return [
        {"metric": metric, "task": task, "label": f"{metric}: {task}", "lower": metric in LOSSES}
        for metric, task in ordered
    ]


def collect_columns(results: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the measurements to show, a list for each column: what hovering, filters and axes need."""
    rows = results[results["metric"].isin(METRICS)]
    labels = make_labels(rows)
    table = pd.DataFrame(
        {
            "measure": rows["metric"] + ": " + rows["task"],
            **{name: rows[name] for name in ("family", "model", "key", "evaluation") if name in rows},
            "bits": rows["bits"].astype(int),
            "data_type": [str(label) if not is_missing(label) else "unquantized" for label in labels],
            "block_size": [name_block_size(*pair) for pair in zip(rows["block_size"], rows["bits"], strict=True)],
            "method": rows["method"].astype("string").fillna("none"),
            **{name: rows[name].astype(float) for name in ("total_bits", "bits_per_param", "value", "low", "high")},
        }
    )
    columns = {str(name): cells for name, cells in table.to_dict("list").items()}
    return {name: [None if is_missing(cell) else cell for cell in cells] for name, cells in columns.items()}


def name_block_size(block_size: Any, bits: int) -> str:
    """Return the block size as the filter shows it."""
    if bits == 16:
        return "unquantized"
    return "whole tensor" if is_missing(block_size) else str(block_size)


def list_styles() -> dict[str, dict[str, str]]:
    """Return colour and symbol of each precision: the same as in the figures."""
    return {str(bits): {"color": s.color, "symbol": SYMBOLS[s.marker]} for bits, s in LINE_STYLES.items()}


def format_table(table: pd.DataFrame, empty: str) -> str:
    """Return an HTML table of escaped text, with numbers to four significant digits, or `empty` if it has no rows."""
    if table.empty:
        return f"<p>{html.escape(empty)}</p>"
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in table)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(format_cell(cell))}</td>' for cell in row)}</tr>"
        for row in table.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def format_cell(cell: Any) -> str:
    """Return a cell as text, a missing one as a dash."""
    if is_missing(cell):
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
