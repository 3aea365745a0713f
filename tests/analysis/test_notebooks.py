"""Every notebook runs offline from a clean state, ends with an answer, and is kept without outputs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "analysis" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"compare_datatypes", "scaling_laws", "reproduce_figures", "one_model"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.fixture(scope="module")
def quick_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store that a notebook makes where there is none, made once."""
    sys.path.insert(0, str(FOLDER))
    try:
        module: Any = importlib.import_module("quick_study")
    finally:
        sys.path.remove(str(FOLDER))
    return str(module.run_quick_study(str(tmp_path_factory.mktemp("quick"))))


@pytest.fixture(scope="module")
def executed(quick_store: str) -> dict[str, list[Any]]:
    """The cells of each notebook after one kernel has run them all, with its variables deleted before each notebook."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = {path.stem: nbformat.read(path, as_version=4).cells for path in NOTEBOOKS}
    whole = nbformat.v4.new_notebook()
    for own in cells.values():
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *own]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBIT_RESULTS", quick_store)
        patch.setenv("MPLBACKEND", "agg")
        nbclient.NotebookClient(whole, timeout=400, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_answers(path: Path, executed: dict[str, list[Any]]) -> None:
    cells = executed[path.stem]
    assert cells[-1].source.endswith("print(answer)")
    (output,) = [output for output in cells[-1].outputs if output.get("name") == "stdout"]
    assert len(output.text.split()) > 8
    assert not [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
