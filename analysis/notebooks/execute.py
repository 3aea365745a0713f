"""Runs the notebooks in one kernel and writes their outputs into them: `python analysis/notebooks/execute.py`.

They read the store that quick_study finds: set KBIT_RESULTS to choose it. The outputs that are shipped are of the study
that `make demo` runs (`make pictures`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import nbclient
import nbformat

FOLDER: Final = Path(__file__).resolve().parent
FORMAT: Final[Any] = nbformat  # has no types


def execute_notebooks() -> dict[str, Any]:
    """Return the notebooks by name, executed one after the other. Each starts without variables."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    notebooks: dict[str, Any] = {path.stem: FORMAT.read(path, as_version=4) for path in paths}
    whole = FORMAT.v4.new_notebook()
    for notebook in notebooks.values():
        whole.cells += [FORMAT.v4.new_code_cell("%reset -f"), *notebook.cells]
    nbclient.NotebookClient(whole, timeout=400, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for notebook in notebooks.values():
        for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
            cell.execution_count = number
            cell.metadata.pop("execution", None)
            cell.outputs = [_clean(output, number) for output in cell.outputs if output.get("name") != "stderr"]
    return notebooks


def _clean(output: Any, number: int) -> Any:
    """Return an output with the number of its cell, as if its notebook had been run alone."""
    if output.output_type == "execute_result":
        output.execution_count = number
    return output


if __name__ == "__main__":
    for name, notebook in execute_notebooks().items():
        FORMAT.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {sum(len(cell.get('outputs', ())) for cell in notebook.cells)} outputs")
