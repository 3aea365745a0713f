"""Losses on disk by content, so that one measurement serves every budget and every later run.

A file holds what each unit loses with one choice. Its name is a hash of everything that decides the numbers: the
model's weights and configuration, the text's tokens, the objective, the units, and what the choice does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)
# The revision of the numbers. Raise it when a change of a codebook, a method or an objective changes a loss: losses of
# other revisions are not read. A version of kbit stays the same over many commits.
REVISION: Final = 1


def find_folder() -> Path:
    """Return the folder of kept losses: KBIT_CACHE, or kbit's in the user's folder of caches."""
    if own := os.environ.get("KBIT_CACHE"):
        return Path(own) / "losses"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kbit" / "losses"


def hash_content(content: Mapping[str, Any]) -> str:
    """Return the name of what was measured with this content, by this version of kbit and REVISION."""
    text = json.dumps(dict(content) | {"kbit": version("kbit"), "revision": REVISION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_losses(name: str, units: int) -> list[float] | None:
    """Return what each unit loses, or None if it was not measured or the file does not hold so many numbers."""
    try:
        values = json.loads((find_folder() / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    is_whole = isinstance(values, list) and len(values) == units and all(isinstance(value, float) for value in values)
    return values if is_whole else None


def keep_losses(name: str, values: list[float]) -> None:
    """Write what each unit loses, in one step. A folder that cannot be written to is told in the log."""
    try:
        find_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=find_folder(), suffix=".part", delete=False) as file:
            json.dump(values, file)
        Path(file.name).replace(find_folder() / f"{name}.json")
    except OSError as error:
        log.warning(f"the losses of quant.allocation are not kept and are measured again next time: {error}")
