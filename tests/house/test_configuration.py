"""Configuration is data: a module of dataclasses opens no file, and importing it loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys

import hypothesis
import pytest
from import_graph import find_modules, read_imports

CONFIGURATIONS = (
    *("kbit.experiments.config", "kbit.methods.config", "kbit.evaluation.config", "kbit.models.config"),
    "kbit.training.config",
)
READERS = ("kbit.data", "kbit.models.catalog", "kbit.store")  # modules of kbit that read files
ALLOWED = {"kbit.data.presets"}  # installed files, and only when a name is asked for
LIBRARIES = {"pathlib", "os", "io", "shutil", "glob", "importlib", "hashlib", "huggingface_hub", "datasets", "torch"}

MODULES = find_modules()
IMPORTS = read_imports(MODULES)


def find_all_imports(module: str) -> set[str]:
    """The modules of kbit that a module imports, and those that these import."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("module", CONFIGURATIONS)
def test_a_configuration_imports_nothing_that_reads_files(module: str) -> None:
    assert [other for other in sorted(find_all_imports(module) - ALLOWED) if other.startswith(READERS)] == []
    tree = ast.parse(MODULES[module].read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} & LIBRARIES == set()
    assert "open" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_configuration_does_not_load_torch() -> None:
    code = f"import sys, {', '.join(CONFIGURATIONS)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_example_of_hypothesis_has_a_deadline() -> None:
    assert hypothesis.settings().deadline is None
