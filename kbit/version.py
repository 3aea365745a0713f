"""kbit's own version, also where it runs from a checkout that is not installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def find_version() -> str:
    """Return the installed version. In a checkout that is not installed, it is pyproject.toml's with "+source"."""
    try:
        return version("kbit")
    except PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        return f"{project['version']}+source"
