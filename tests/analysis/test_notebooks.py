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
def quick_study() -> Any:
    """The module that finds the notebooks' store."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("quick_study")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def quick_store(tmp_path_factory: pytest.TempPathFactory, quick_study: Any) -> str:
    """The store that a notebook makes where there is none, made once."""
    return str(quick_study.run_quick_study(str(tmp_path_factory.mktemp("quick"))))


def test_a_store_that_is_asked_for_and_not_there_is_an_error(
    quick_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another study would answer in its place."""
    monkeypatch.setattr(quick_study, "run_quick_study", lambda path: path)
    monkeypatch.setattr(quick_study, "TOP", tmp_path)
    monkeypatch.setenv("KBIT_RESULTS", str(tmp_path / "reslts"))
    with pytest.raises(FileNotFoundError, match=r"no results at .*reslts"):
        quick_study.find_store()
    (tmp_path / "reslts" / "experiments").mkdir(parents=True)
    assert quick_study.find_store() == str(tmp_path / "reslts")
    monkeypatch.delenv("KBIT_RESULTS")
    assert "kbit-quick-study-" in quick_study.find_store()


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
