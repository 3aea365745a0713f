"""Find local task definitions by name, without loading lm-eval (which takes seconds)."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Final

import yaml

EMBEDDED_TASKS: Final = Path(str(files("kbit"))) / "assets" / "tasks"
# A YAML parser would run code at lm-eval's tags (!function).
_TASK_NAME: Final = re.compile(r"""^task:\s*(["']?)([^"'\s#\[{]+)\1\s*(?:\#.*)?$""", re.MULTILINE)


def find_local_tasks(task_path: str | None = None) -> dict[str, Path]:
    """Return the YAML of every local task by name. The user's folder wins over the shipped one."""
    folders = [EMBEDDED_TASKS]
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise FileNotFoundError(f"eval.task_path: no folder at {Path(task_path).resolve()}")
        folders.append(Path(task_path).resolve())
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            if match := _TASK_NAME.search(path.read_text()):
                found[match.group(2)] = path
    return found


def find_broken_files(task_path: str | None) -> list[str]:
    """Say of each YAML of a user's folder that cannot be parsed why not, as its tasks may not have been found."""
    broken = []
    for path in sorted(Path(task_path).resolve().rglob("*.yaml")) if task_path is not None else ():
        try:
            for _ in yaml.parse(path.read_text(), Loader=yaml.SafeLoader):  # events only, so that no tag runs code
                pass
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            broken.append(f"{path}{where} cannot be parsed: {getattr(error, 'problem', None) or error}")
    return broken


def list_task_files(folder: str | Path) -> list[Path]:
    """Return the files that identify a folder of tasks: all files below it, but none of folders that it links to."""
    paths = (path for path in Path(folder).resolve().rglob("*") if "__pycache__" not in path.parts)
    return sorted(path for path in paths if path.is_file())
