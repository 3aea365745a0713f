"""The page's tables of text: readable heads, numbers with few digits, everything escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any, Final

import pandas as pd

from kbit.analysis.curves.settings import is_missing, name_variant
from kbit.analysis.curves.units import format_bits
from kbit.analysis.statistics.verdicts import NOT_TRIED

LAW_HEADS: Final = {
    "family": "family", "law": "law", "panel": "data", "points": "points", "r2": "R²", "rmse": "error",
    "worst": "largest error", "held_out": "held out", "held_out_rmse": "its error", "inside": "inside its interval",
    "naive_rmse": "error of no law", "parameters": "parameters", "reason": "no law because",
}  # fmt: skip
FAILURE_HEADS: Final = {
    "label": "experiment", "model": "model", "bits": "bits", "data_type": "data type", "block_size": "block size",
    "reason": "reason", "state": "state", "finished": "finished", "key": "key",
}  # fmt: skip
PROVENANCE_HEADS: Final = {
    "git_commit": "commit", "device": "device", "experiments": "experiments", "first": "first", "last": "last",
    "versions": "versions",
}  # fmt: skip


def write_verdicts(table: pd.DataFrame) -> str:
    """Return the table of verdicts (verdicts.tabulate_verdicts) as HTML, and below it what it leaves out."""
    is_tried = table["grade"] != NOT_TRIED
    is_ambiguous = table["lowest"].isna()  # of which the grade is the reason
    reasons = table.loc[is_ambiguous, "grade"].drop_duplicates()
    rows = [
        {
            "family": row["family"],
            "variant": name_variant(row["data_type"], row["block_size"]),
            "measure": row["measure"],
            "precisions": row["precisions"],
            "best bits": row["bits"],
            "of the budgets": format_share(row["share"]),
            "lead": row["gap"],
            "95% interval": format_interval(row["low"], row["high"]),
            "over": None if is_missing(row["rival"]) else f"{row['rival']}-bit",
            "probability": format_share(row["chance"]),
            "grade": row["grade"],
            "4 bits": row["four_bit"],
            "budgets": f"{format_bits(row['lowest'])} to {format_bits(row['highest'])}",
            "intervals": row["source"],
        }
        for row in table[is_tried & ~is_ambiguous].to_dict("records")
    ]
    shown = format_table(pd.DataFrame(rows, dtype=object), "No two precisions meet at equal total bits.")
    untried = f"{(~is_tried).sum():,} rows of {len(table):,} were {NOT_TRIED}"
    return shown + write_reasons([*reasons, *([] if is_tried.all() else [untried])])


def write_laws(laws: pd.DataFrame, left_out: Iterable[str]) -> str:
    """Return the table of scaling laws (law_table.compare_laws) as HTML, and below it why families are left out."""
    return format_table(rename(laws, LAW_HEADS), "No cross entropy was measured.") + write_reasons(left_out)


def write_failures(failures: pd.DataFrame) -> str:
    """Return the table of failed experiments (kbit.store's read_failures) as HTML."""
    return format_table(rename(failures, FAILURE_HEADS), "None: every experiment that was run has a result.")


def write_provenance(provenance: pd.DataFrame) -> str:
    """Return the table of origins (kbit.store's read_provenance) as HTML."""
    return format_table(rename(provenance, PROVENANCE_HEADS), "Not recorded.")


def write_reasons(reasons: Iterable[str]) -> str:
    """Return what is left out of a table as HTML, a paragraph for each reason."""
    return "".join(f"<p>{html.escape(f'Left out: {reason}')}</p>" for reason in reasons)


def rename(table: pd.DataFrame, heads: dict[str, str]) -> pd.DataFrame:
    """Return the columns that have a head, in the heads' order and under these heads."""
    return table[[name for name in heads if name in table]].rename(columns=heads)


def format_share(share: Any) -> str | None:
    """Return for example "71%". The ends stay free for what is certain: 0.999 is "> 99%"."""
    if is_missing(share):
        return None
    percent = round(100 * share)
    if share not in (0, 1) and percent in (0, 100):
        return "< 1%" if percent == 0 else "> 99%"
    return f"{percent}%"


def format_interval(low: Any, high: Any) -> str | None:
    """Return for example "+0.0047 to +0.0075"."""
    return None if is_missing(low) or is_missing(high) else f"{low:+.3g} to {high:+.3g}"


def format_table(table: pd.DataFrame, empty: str) -> str:
    """Return an HTML table of escaped text, with numbers to four significant digits, or `empty` if it has no rows."""
    if table.empty:
        return f"<p>{html.escape(empty)}</p>"
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in table)
    rows = "".join(f"<tr>{''.join(map(write_cell, row))}</tr>" for row in table.itertuples(index=False))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def write_cell(cell: Any) -> str:
    """Return a cell as HTML, a missing one as a dash."""
    if is_missing(cell):
        return "<td>-</td>"
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return f"<td>{html.escape(text)}</td>"
