"""Texts by name: the embedded ones, files, and those of the hub."""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Final

from kbit.data.hub_texts import HUB_TEXTS, load_hub_text
from kbit.data.text_files import COMPRESSED, decode_text, parse_json_lines, read_bytes

EMBEDDED_TEXTS: Final = Path(str(files("kbit"))) / "assets" / "text"

_JSON_LINES: Final = (".jsonl", ".ndjson", ".jsonlines")

# Files of these kinds would be taken for one document, markup and all.
_NO_TEXTS: Final = (
    *(".csv", ".tsv", ".json", ".parquet", ".arrow", ".npy", ".pt"),
    *(".zst", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".html", ".htm", ".xml", ".docx", ".odt", ".yaml", ".yml"),
)


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
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSED]
    if suffixes and suffixes[-1] in _NO_TEXTS:
        raise ValueError(
            f"{path.resolve()} is neither a plain text (.txt) nor JSON lines with a field 'text' "
            f"({', '.join(_JSON_LINES)}), either also as {', '.join(COMPRESSED)}"
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
