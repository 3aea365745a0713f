"""All of lm-eval's private parts that need no model, so that a new version of lm-eval breaks this file only.

pyproject.toml pins lm-eval's version for their sake. The private parts of its models are in kbit.models.hflm_private.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.utils
import tqdm
from lm_eval.tasks._index import Entry as Entry
from lm_eval.tasks._index import Kind as Kind
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml


def read_definition(path: Path) -> tuple[dict[str, Any], set[Path]]:
    """Return a task's definition, with what it includes, and the files that were read beside its own."""
    files: set[Path] = set()
    definition: dict[str, Any] = load_yaml(path, _seen=files)
    return definition, files


def apply_filters(task: Any, instances: list[Any]) -> None:
    """Filter the answers to some of a task's requests. task.apply_filters() would want an answer to all of them."""
    for ensemble in getattr(task, "_filters", ()):
        ensemble.apply(instances)


def hide_progress() -> None:
    """Turn off the progress bar of lm-eval's rendering of prompts, which has no switch."""
    lm_eval.api.task.tqdm = functools.partial(tqdm.tqdm, disable=True)


def compile_templates_once() -> None:
    """Let lm-eval remember the templates that it has compiled. By itself it compiles one for each prompt."""
    environment: Any = lm_eval.utils.env
    if not hasattr(environment.from_string, "cache_info"):
        environment.from_string = functools.lru_cache(maxsize=1024)(environment.from_string)


def add_tasks(define: Callable[[], dict[str, dict[str, Any]]]) -> None:
    """Let every index of tasks that lm-eval makes from now on have more tasks. One that it has already wins.

    Args:
        define: returns the definitions by name, whenever an index is made.
    """
    build = TaskIndex.build

    def build_with_more(*arguments: Any, **options: Any) -> dict[str, Entry]:
        index: dict[str, Entry] = build(*arguments, **options)
        for name, definition in define().items():
            index.setdefault(name, Entry(name, Kind.TASK, yaml_path=None, cfg=definition))
        return index

    TaskIndex.build = staticmethod(build_with_more)
