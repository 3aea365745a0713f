"""Text and JSON-lines files, plain or compressed, and texts by name."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from kbit.data.hub_texts import HUB_TEXTS, load_hub_text

EMBEDDED_TEXTS: Final = Path(str(files("kbit"))) / "assets" / "text"

_DECOMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
}

_JSON_LINES: Final = (".jsonl", ".ndjson", ".jsonlines")

# Files of these kinds would be taken for one document, markup and all.
_NO_TEXTS: Final = (
    *(".csv", ".tsv", ".json", ".parquet", ".arrow", ".npy", ".pt"),
    *(".zst", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".html", ".htm", ".xml", ".docx", ".odt", ".yaml", ".yml"),
)


def read_bytes(path: Path) -> bytes:
    """Return the file's content, decompressed by its suffix (.xz, .gz, .bz2).

    Raises:
        FileNotFoundError: there is no such file. The message has its absolute path.
        ValueError: the compressed file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path.resolve()}")
    content = path.read_bytes()
    decompress = _DECOMPRESS.get(path.suffix.lower())
    if decompress is None:
        return content
    try:
        return decompress(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:  # each module raises its own
        raise ValueError(f"{path.resolve()} is damaged: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return one dictionary for each non-empty line of a file.

    Raises:
        ValueError: a line is no JSON object. The message has its number.
    """
    return parse_json_lines(read_bytes(path), path)


def parse_json_lines(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Return one dictionary for each non-empty line of what was read from a file.

    Raises:
        ValueError: see read_json_lines.
    """
    return list(number_json_lines(content, path).values())


def number_json_lines(content: bytes, path: Path) -> dict[int, dict[str, Any]]:
    """Return the dictionary of each non-empty line by the line's number, which begins with 1.

    Raises:
        ValueError: see read_json_lines, or the content is not UTF-8.
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


def read_documents(name: str) -> tuple[list[str], str]:
    """Return the documents of a text and the sha256 of its uncompressed content.

    Args:
        name: an embedded text (nano_held_out), the path of a file, or a text of the hub (wikitext2, c4, pile_cc, and
            wikitext2_train and c4_train to calibrate on). A file holds JSON lines (.jsonl, .ndjson, .jsonlines) with a
            field "text", one document a line, or a plain text (.txt), which is one document. Either may be compressed
            (.xz, .gz, .bz2). Suffixes count in any case, and a byte order mark is no part of a text.

    Raises:
        FileNotFoundError: the name is none of these. The message has the path and the texts there are.
        ValueError: a JSON line has no "text", or the file is not UTF-8, has no text at all, or has the name of
            something else (check_suffix).
    """
    path = locate_text(name)
    if path is None:
        documents = list(load_hub_text(name))
        return documents, hashlib.sha256("\n".join(documents).encode()).hexdigest()
    check_suffix(path)
    content = read_bytes(path)  # read once, so that the hash belongs to what is returned
    digest = hashlib.sha256(content).hexdigest()
    documents = _split_documents(content, path)
    if not any(documents):
        raise ValueError(f"{path.resolve()} has no text")
    return documents, digest


def check_suffix(path: Path) -> None:
    """Raise ValueError if a file's name says that it is neither plain text nor JSON lines, such as a table's."""
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in _DECOMPRESS]
    if suffixes and suffixes[-1] in _NO_TEXTS:
        raise ValueError(
            f"{path.resolve()} is neither a plain text (.txt) nor JSON lines with a field 'text' "
            f"({', '.join(_JSON_LINES)}), either also as {', '.join(_DECOMPRESS)}"
        )


def is_json_lines(path: Path) -> bool:
    """Whether a file's name says that it holds JSON lines."""
    return any(suffix.lower() in _JSON_LINES for suffix in path.suffixes)


def _split_documents(content: bytes, path: Path) -> list[str]:
    if not is_json_lines(path):
        return [decode_text(content, path)]
    rows = parse_json_lines(content, path)
    if missing := [number for number, row in enumerate(rows, start=1) if not isinstance(row.get("text"), str)]:
        raise ValueError(f"{path.resolve()}: record {missing[0]} has no field 'text'")
    return [row["text"] for row in rows]


def list_embedded_texts() -> dict[str, Path]:
    """Return the file of each embedded text by its name."""
    return {path.name.partition(".")[0]: path for path in EMBEDDED_TEXTS.iterdir() if is_json_lines(path)}


def locate_text(name: str) -> Path | None:
    """Return the file of an embedded text or of a path, or None for a text of the hub.

    A path wins over the hub: a file named c4 is that file.

    Raises:
        FileNotFoundError: the name is none of these.
    """
    embedded = list_embedded_texts()
    path = embedded.get(name, Path(name))
    if path.is_file():
        return path
    if name not in HUB_TEXTS:
        raise FileNotFoundError(
            f"text {name!r} is neither embedded ({', '.join(sorted(embedded))}) nor on the hub "
            f"({', '.join(sorted(HUB_TEXTS))}) nor a file at {path.resolve()}"
        )
    return None


def check_text(name: str) -> None:
    """Raise the error that a text which cannot be had would give later, quickly and so without a download.

    Raises:
        FileNotFoundError: see locate_text. Offline, also if a text of the hub is not in the local cache.
    """
    if locate_text(name) is None and os.environ.get("HF_HUB_OFFLINE") == "1":
        load_hub_text(name)
