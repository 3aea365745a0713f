"""The named quantizers of conf/quant: the names that `quant=nf4_dq` takes on the command line."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml


def list_presets() -> dict[str, Path]:
    """Return the file of every named quantizer by its name, sorted."""
    folder = Path(str(files("kbit"))) / "conf" / "quant"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_preset(name: str) -> dict[str, Any]:
    """Return the fields that a named quantizer sets."""
    fields: dict[str, Any] = yaml.safe_load(list_presets()[name].read_text())
    return fields
