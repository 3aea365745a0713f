"""The rule of the floors: a folder imports only from lower floors, and two on one floor do not know each other."""

from __future__ import annotations

import ast
from collections import Counter
from statistics import median

import pytest
from import_graph import ROOT, find_longest_chain, find_modules, read_imports

# From the top down; what stands on one line does not import each other.
FLOORS = [
    {"nano", "hydra_plugins"},
    {"cli", "notebook", "figures"},
    {"engine", "analysis"},
    {"costs"},
    {"store"},
    {"experiments", "lmeval"},
    {"checkpoints"},
    {"methods", "evaluation", "training"},
    {"layers", "optim"},
    {"numerics", "models"},
    {"data", "kernels", "checks", "silence", "lean_private", "version"},
]
# Files that import one another, lazily imported ones included. It was 12 until models could be packed while loaded.
LONGEST_CHAIN = 14
MOST_MODULES = 12  # of a folder
LONGEST_FUNCTION, MEDIAN_FUNCTION, LONGEST_FILE = 50, 9, 400  # lines
DOORS = ("kbit", "kbit.__main__")  # import only names for the user, on first use

MODULES = find_modules()
IMPORTS = read_imports(MODULES)


def find_floor(module: str) -> int:
    parts = module.split(".")
    part = parts[1] if parts[0] == "kbit" else parts[0]
    (floor,) = [number for number, folders in enumerate(FLOORS) if part in folders]
    return floor


def find_part(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("kbit.") else "hydra_plugins"


@pytest.mark.parametrize("module", [name for name in MODULES if name not in DOORS])
def test_a_module_imports_only_from_lower_floors_and_its_own_folder(module: str) -> None:
    wrong = [
        other
        for other in IMPORTS[module]
        if other != "kbit" and find_part(other) != find_part(module) and find_floor(other) <= find_floor(module)
    ]
    assert not wrong


def test_nobody_within_imports_through_the_front_door() -> None:
    """`from kbit import NAME` would reach any floor."""
    assert not [name for name in MODULES if name not in DOORS and "kbit" in IMPORTS[name] and name != "kbit.nano"]


def test_there_is_no_circle_and_no_long_chain() -> None:
    """Without what is imported for type checkers alone: a result's type is named where results are not made."""
    chain = find_longest_chain(read_imports(MODULES, for_types=False))
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_statistics_know_no_drawing() -> None:
    for module in MODULES:
        if module.startswith(("kbit.analysis.statistics", "kbit.analysis.curves")):
            assert not [other for other in IMPORTS[module] if other.startswith("kbit.analysis.figures")]


def test_folders_are_small() -> None:
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MOST_MODULES} == {}


def test_functions_and_files_are_short() -> None:
    lengths = {}
    for name, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= LONGEST_FILE, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name}.{node.name}:{node.lineno}"] = (node.end_lineno or 0) - node.lineno + 1
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    assert median(lengths.values()) <= MEDIAN_FUNCTION
