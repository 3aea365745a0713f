"""Private parts of lm-eval and transformers are used in one file a library, so that an upgrade breaks one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_graph import find_modules

LIBRARIES = ("lm_eval", "transformers")
# These gather what is private. The others name private parts of libraries that are not asked about here: torch's
# product of int8 matrices, the fingerprint of a data set, Hydra's, and argparse's type of sub-commands, which has no
# other name.
GATHERED = (
    *("kbit.data.lm_eval_private", "kbit.models.hflm_private", "kbit.models.transformers_private"),
    "kbit.layers.peft_private",
)
OF_OTHER_LIBRARIES = (
    *("_int_mm", "_fingerprint", "_hf_hook", "_set_flag", "_get_node", "_SubParsersAction"),
    "_worker_logs_enabled",  # Ray's
    "_version",  # torch's count of writes to a tensor
)

MODULES = {name: path for name, path in find_modules().items() if not name.startswith("kbit.kernels")}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def list_own_names(tree: ast.AST) -> Iterator[str]:
    """The names that kbit itself defines: functions, fields, and what is assigned to self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def list_private_parts(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {name}" for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
            yield from (name for name in names if names[0] in LIBRARIES and is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield f"{ast.unparse(node)}, line {node.lineno}"


OWN = {name for module in MODULES if module not in GATHERED for name in list_own_names(TREES[module])}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in GATHERED])
def test_nothing_private_of_a_library_is_used_elsewhere(module: str) -> None:
    assert not list(list_private_parts(TREES[module], OWN | set(OF_OTHER_LIBRARIES)))


def test_the_test_sees_what_it_looks_for() -> None:
    for module in GATHERED:
        assert list(list_private_parts(TREES[module], set())), Path(MODULES[module])
