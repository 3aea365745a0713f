"""Reads from the sources which module of kbit imports which.

Imports in functions count, and so do imports for type checkers unless a caller leaves them out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("analysis", "kernels")  # top-level folders that are kbit.analysis and kbit.kernels by a link


def find_modules() -> dict[str, Path]:
    """Return the file of every module of kbit and of hydra_plugins, by its full name."""
    paths = [path for path in (ROOT / "kbit").rglob("*.py") if not set(path.parts) & {"conf", "sweeps", *LINKED}]
    found = {_name(path.relative_to(ROOT)): path for path in paths}
    for folder in LINKED:
        for path in (ROOT / folder).rglob("*.py"):
            if "notebooks" not in path.parts:
                found[_name(Path("kbit") / path.relative_to(ROOT))] = path
    return found | {_name(path.relative_to(ROOT)): path for path in (ROOT / "hydra_plugins").glob("*.py")}


def read_imports(modules: Mapping[str, Path], *, for_types: bool = True) -> dict[str, set[str]]:
    """Return for each module the modules of kbit that it imports.

    Args:
        modules: the files of the modules by name, as find_modules returns them.
        for_types: whether imports under `if TYPE_CHECKING:` count.
    """
    return {
        name: set(_list_imports(ast.parse(path.read_text()), modules, for_types)) - {name}
        for name, path in modules.items()
    }


def find_longest_chain(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the longest chain of modules in which each module imports the next.

    Raises:
        ValueError: the imports form a circle. The message names it.
    """
    known: dict[str, list[str]] = {}

    def follow(name: str, above: tuple[str, ...]) -> list[str]:
        if name in above:
            raise ValueError(f"a circle of imports: {' -> '.join([*above[above.index(name) :], name])}")
        if name not in known:
            chains = [follow(other, (*above, name)) for other in sorted(graph[name])]
            known[name] = [name, *max(chains, key=len, default=[])]
        return known[name]

    return max((follow(name, ()) for name in graph), key=len)


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _list_imports(node: ast.AST, modules: Mapping[str, Path], for_types: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not for_types:
            continue
        if isinstance(child, ast.ImportFrom) and child.module in modules:
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield whole if whole in modules else child.module or ""
        elif isinstance(child, ast.ImportFrom) and child.module:  # from a folder without __init__
            yield from (name for alias in child.names if (name := f"{child.module}.{alias.name}") in modules)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in modules)
        yield from _list_imports(child, modules, for_types)
