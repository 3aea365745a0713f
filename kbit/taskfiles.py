"""Find local task definitions by name, without loading lm-eval (which takes seconds)."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Final

EMBEDDED_TASKS: Final = Path(str(files("kbit"))) / "assets" / "tasks"


def find_local_tasks(task_path: str | None = None) -> dict[str, Path]:
    """Return the YAML of every local task by name; the user's folder wins over the shipped one."""
    folders = [EMBEDDED_TASKS]
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise FileNotFoundError(f"eval.task_path: no folder at {Path(task_path).resolve()}")
        folders.append(Path(task_path).resolve())
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            if match := re.search(r"^task:\s*([\w-]+)\s*$", path.read_text(), flags=re.MULTILINE):
                found[match.group(1)] = path
    return found
