"""Every notebook runs offline from a clean state and ends with an answer. It is shipped with what it shows."""

from __future__ import annotations

import base64
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from toy_results import fill

FOLDER: Final = Path(__file__).resolve().parents[2] / "analysis" / "notebooks"
# How many pictures and tables each one shows. Of the last, the pictures of a store with cross entropies alone.
SHOWN: Final = {
    "choose_data_type": (3, 3),
    "block_size": (1, 2),
    "scaling_laws": (1, 2),
    "reproduce_figures": (2, 3),
}
SHIPPED: Final = SHOWN | {"reproduce_figures": (3, 3)}  # of the study of `make demo`


def read_shipped(name: str) -> list[Any]:
    """Return the code cells of a notebook as it is shipped."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def list_data(cells: list[Any], kind: str) -> list[str]:
    """Return what the cells show in one format."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return ["".join(output["data"][kind]) for output in outputs if kind in output.get("data", {})]


def check_shown(cells: list[Any], pictures: int, tables: int) -> None:
    """Check the number of pictures and tables, and that no table is cut."""
    shown = [base64.b64decode(picture) for picture in list_data(cells, "image/png")]
    assert len(shown) == pictures
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in shown)
    found = list_data(cells, "text/html")
    assert len(found) == tables
    assert all(re.search(r"<t[dh]>\s*\.\.\.\s*</t[dh]>", table) is None for table in found)
    assert not [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error"]


def read_answer(cells: list[Any]) -> str:
    """Return what the last cell prints."""
    assert "".join(cells[-1]["source"]).endswith("print(answer)")
    [output] = [output for output in cells[-1]["outputs"] if output.get("name") == "stdout"]
    return "".join(output["text"])


def test_there_are_notebooks() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_shipped_with_what_it_shows(name: str) -> None:
    cells = read_shipped(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    check_shown(cells, *SHIPPED[name])
    assert len(read_answer(cells).split()) > 8
    text = json.dumps(cells)
    assert not re.search(r"(/tmp/|/home/|/work/|/root/)", text)  # of the machine that it ran on
    assert len(text) < 1_000_000


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """What finds the notebooks' store, and what executes them."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def quick_study(modules: Any) -> Any:
    return modules("quick_study")


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


def test_a_store_may_be_a_url(quick_study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("memory://of_notebooks", range(1))
    monkeypatch.setenv("KBIT_RESULTS", "memory://of_notebooks")
    assert quick_study.find_store() == "memory://of_notebooks"


@pytest.fixture(scope="module")
def executed(quick_store: str, modules: Any) -> dict[str, Any]:
    """The notebooks after one kernel has run them all on the small study."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBIT_RESULTS", quick_store)
        notebooks: dict[str, Any] = modules("execute").execute_notebooks()
        return notebooks


@pytest.mark.parametrize("name", SHOWN)
def test_it_runs_and_shows_what_it_says(name: str, executed: dict[str, Any]) -> None:
    cells = [cell for cell in executed[name].cells if cell.cell_type == "code"]
    check_shown(cells, *SHOWN[name])
    assert len(read_answer(cells).split()) > 8
    assert [cell["source"] for cell in cells] == ["".join(cell["source"]) for cell in read_shipped(name)]


def test_the_best_type_is_the_one_with_the_least_cross_entropy(executed: dict[str, Any]) -> None:
    """The answer is what the tables say: the first one's least value, level with whose interval contains 0."""
    cells = [cell for cell in executed["choose_data_type"].cells if cell.cell_type == "code"]
    values, differences, _ = (read_table(table) for table in list_data(cells, "text/html"))
    losses = {row[0]: float(row[values[0].index("cross_entropy")]) for row in values[1:] if row[0] != "16-bit"}
    best = min(losses, key=lambda name: losses[name])
    assert f" {best} loses least" in read_answer(cells)
    level = [row[0] for row in differences[1:] if float(row[2]) <= 0 and row[0] != best]
    said = re.search(r"Level with it on this text: (.*)\.", read_answer(cells))
    assert sorted(level) == sorted(said[1].split(", ") if said else [])


def read_table(text: str) -> list[list[str]]:
    """Return the rows of a table of pandas, from the column that names the row or, without one, after the numbers."""
    import io

    import pandas as pd

    [table] = pd.read_html(io.StringIO(text))
    kept = table.drop(columns=table.columns[0]) if table.columns[1] == "quantizer" else table
    return [list(map(str, kept.columns)), *([str(value) for value in row] for row in kept.to_numpy())]
