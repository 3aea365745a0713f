"""Measures how the docstrings and comments read.

The measures are semicolons per 100 words, and entries of Attributes, Args or Returns that begin with "of".

python tests/helpers/english.py [FOLDER ...]     names what a reader would stumble over, by file and line
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kbit", "kernels", "analysis", "hydra_plugins", "benchmarks")
# An entry of Attributes:, Args: or Returns: "name, other: of the model."
_ENTRY = re.compile(r"^\s+[a-z_*][\w, *]*: of\b", re.MULTILINE)
_CODE = re.compile(r"`[^`]*`")


@dataclass(frozen=True)
class Text:
    """A docstring or a comment.

    Attributes:
        path: the file.
        line: where the text begins.
        text: the text without quotes or number signs.
    """

    path: Path
    line: int
    text: str

    @property
    def words(self) -> int:
        """The number of words."""
        return len(self.text.split())

    @property
    def semicolons(self) -> int:
        """The number of semicolons outside of code."""
        return _CODE.sub("", self.text).count(";")

    @property
    def entries_with_of(self) -> list[str]:
        """The entries whose text begins with "of"."""
        return [found.strip() for found in _ENTRY.findall(self.text)]


def read_texts(*folders: str) -> Iterator[Text]:
    """Yield the docstrings and comments of all Python files below these folders of the repository."""
    for folder in folders or FOLDERS:
        top = ROOT / folder
        for path in sorted([top] if top.is_file() else top.rglob("*.py")):
            yield from _read_docstrings(path)
            yield from _read_comments(path)


def _read_docstrings(path: Path) -> Iterator[Text]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield Text(path, node.body[0].lineno, text)


def _read_comments(path: Path) -> Iterator[Text]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt:")):
            yield Text(path, token.start[0], token.string.lstrip("# "))


def main() -> None:
    """Print each text with a semicolon or an entry that begins with "of", and the rate of semicolons."""
    texts = list(read_texts(*sys.argv[1:]))
    for text in texts:
        if text.semicolons or text.entries_with_of:
            print(
                f"{text.path.relative_to(ROOT)}:{text.line}: {text.semicolons} semicolons {text.entries_with_of or ''}"
            )
    semicolons, words = sum(text.semicolons for text in texts), sum(text.words for text in texts)
    print(f"{semicolons} semicolons in {words} words: {100 * semicolons / max(words, 1):.2f} per 100")


if __name__ == "__main__":
    main()
