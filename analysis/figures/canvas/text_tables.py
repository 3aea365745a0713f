"""Tables as text for papers: LaTeX (booktabs) and Markdown, with what they show in front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pandas as pd

# pandas escapes the other characters of LaTeX. These two are other signs in its oldest fonts.
SIGNS: Final = {"<": r"\textless{}", ">": r"\textgreater{}"}


def write_latex(path: Path, paragraphs: Sequence[str], table: pd.DataFrame) -> None:
    r"""Write a table as a tabular of booktabs, to be read with \input, with paragraphs as comments in front."""
    text = table.astype(str).to_latex(index=False, escape=True)
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    notes = "".join(f"% {' '.join(paragraph.split())}\n" for paragraph in paragraphs)
    path.write_text(f"{notes}% needs \\usepackage{{booktabs}}\n{text}", encoding="utf-8")


def write_markdown(path: Path, name: str, paragraphs: Sequence[str], table: pd.DataFrame | None) -> None:
    """Write paragraphs below a heading, and a table if there is one."""
    parts = [f"# {name}", *map(escape_markup, paragraphs)]
    if table is not None:
        head = [str(column) for column in table]
        rows = [head, ["---"] * len(head), *table.astype(str).to_numpy().tolist()]
        parts.append("\n".join(f"| {' | '.join(map(escape_cell, row))} |" for row in rows))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def escape_cell(cell: str) -> str:
    """Return a cell whose bars do not end it."""
    return escape_markup(cell).replace("|", "\\|")


def escape_markup(text: str) -> str:
    """Return a text on one line that opens no element of HTML."""
    return " ".join(text.replace("<", "&lt;").split())
