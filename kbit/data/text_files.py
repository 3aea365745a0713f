"""Text and JSON-lines files, plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

# How files are read whose names end so.
COMPRESSED: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
}


def read_bytes(path: Path) -> bytes:
    """Return the file's content, decompressed by its suffix (.xz, .gz, .bz2).

    Raises:
        FileNotFoundError: there is no such file. The message has its absolute path.
        ValueError: the compressed file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path.resolve()}")
    content = path.read_bytes()
    decompress = COMPRESSED.get(path.suffix.lower())
    if decompress is None:
        return content
    try:
        return decompress(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:  # each module raises its own
        raise ValueError(f"{path.resolve()} is damaged: {error}") from error


def parse_json_lines(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Return one dictionary for each non-empty line of what was read from a file.

    Raises:
        ValueError: a line is no JSON object, and the message has its number, or the content is not UTF-8.
    """
    return list(number_json_lines(content, path).values())


def number_json_lines(content: bytes, path: Path) -> dict[int, dict[str, Any]]:
    """Return the dictionary of each non-empty line by the line's number, which begins with 1.

    Raises:
        ValueError: see parse_json_lines.
    """
    rows = {}
    # str.splitlines would take U+2028 and other characters for line ends, which JSON strings may hold.
    for number, line in enumerate(decode_text(content, path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path.resolve()}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path.resolve()}, line {number}: not a JSON object")
            rows[number] = row
    return rows


def decode_text(content: bytes, path: Path) -> str:
    """Return a file's content as text, without the byte order mark that some editors begin a file with.

    Raises:
        ValueError: the content is not UTF-8. The message has the path.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.resolve()} is not a text in UTF-8: {error}") from None
