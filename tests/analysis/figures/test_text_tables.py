"""Tables as LaTeX and Markdown, with names of any characters."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from kbit.analysis.figures.canvas.text_tables import write_latex, write_markdown
from kbit.store.tables import write_csv

TABLE = pd.DataFrame({"family": ["a_b & c", "50% <d>"], "P(best)": ["{x}|y", "97%"], "n": [1, 2]})


def test_latex_is_a_tabular_of_booktabs_with_escaped_names(tmp_path: Path) -> None:
    write_latex(tmp_path / "t.tex", ["What it shows\nin 100%."], TABLE)
    assert (tmp_path / "t.tex").read_text().splitlines() == [
        "% What it shows in 100%.",
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lll}",
        r"\toprule",
        r"family & P(best) & n \\",
        r"\midrule",
        r"a\_b \& c & \{x\}|y & 1 \\",
        r"50\% \textless{}d\textgreater{} & 97\% & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_markdown_has_the_text_and_the_table(tmp_path: Path) -> None:
    write_markdown(tmp_path / "t.md", "t", ["One.", "Two <b>."], TABLE)
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("# t\n\nOne.\n\nTwo &lt;b>.\n\n| family | P(best) | n |\n| --- | --- | --- |\n")
    assert r"| a_b & c | {x}\|y | 1 |" in text
    assert r"| 50% &lt;d> | 97% | 2 |" in text


def test_a_csv_with_notes_is_read_with_comments(tmp_path: Path) -> None:
    table = pd.DataFrame({"model": ["a#b", "=c", None], "value": [0.5, float("nan"), 2.0], "bits": [3, 4, 16]})
    write_csv(table, tmp_path / "t.csv", ["first", "second\nline"])
    assert (tmp_path / "t.csv").read_text().startswith("# first\n# second line\n")
    read = pd.read_csv(tmp_path / "t.csv", comment="#")
    pd.testing.assert_frame_equal(read, table.replace({"model": {"=c": "'=c"}}), check_dtype=False)
