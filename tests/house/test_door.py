"""The door: only the command line prints and exits, and a kernel is eight modules away from it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT, find_modules

from kbit.kernels import cpu

# Functions beside kbit/cli that are command lines of their own.
OTHER_DOORS = {("kbit.nano.train", "main"), ("kbit.nano.tasks", "main"), ("kbit.lmeval", "main")}
HEAVY = ("torch", "ray", "pandas", "transformers", "numba", "hydra")
MOST_MODULES = 8  # between the console and a kernel, both included

INNER = {name: path for name, path in find_modules().items() if not name.startswith("kbit.cli")}


def list_exits(module: str, node: ast.AST) -> Iterator[str]:
    """Where a module prints or exits, but for the functions that are doors of their own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and (module, child.name) in OTHER_DOORS:
            continue
        is_exit = isinstance(child, ast.Name | ast.Attribute) and ast.unparse(child) in ("sys.exit", "SystemExit")
        if is_exit or (isinstance(child, ast.Call) and ast.unparse(child.func) == "print"):
            yield f"{module}, line {getattr(child, 'lineno', 0)}: {ast.unparse(child)}"
        yield from list_exits(module, child)


@pytest.mark.parametrize("module", INNER)
def test_nothing_below_the_command_line_prints_or_exits(module: str) -> None:
    assert list(list_exits(module, ast.parse(INNER[module].read_text()))) == []


def test_help_loads_no_large_library() -> None:
    code = (
        "import sys; sys.argv = ['kbit', '--help']\n"
        "from kbit.cli import main\n"
        "try: main()\n"
        f"finally: print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "loaded: []")


def test_the_console_is_few_modules_away_from_a_kernel(
    kbit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []
    kernel = cpu.quantize

    def record(*arguments: Any) -> Any:
        frame, names = sys._getframe(), [cpu.__name__]
        while frame := frame.f_back:  # type: ignore[assignment]
            names.append(frame.f_globals["__name__"])
        stacks.append([name for name in dict.fromkeys(reversed(names)) if name.startswith("kbit.")])
        return kernel(*arguments)

    monkeypatch.setattr(cpu, "quantize", record)
    done = kbit("run", "quant.bits=4", "quant.data_type=int", "eval.tasks=[]", "eval.perplexity_windows=1")
    assert done.code == 0, done.err
    assert stacks
    longest = max(stacks, key=len)
    assert longest[0] == "kbit.cli.main"
    assert len(longest) <= MOST_MODULES, " -> ".join(longest)
