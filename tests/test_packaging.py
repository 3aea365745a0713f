"""What ships, and that the folders at the top reach users as kbit.conf, kbit.kernels, kbit.analysis and kbit.sweeps."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pandas as pd
import pytest

import kbit.kernels.cpu
from kbit.version import find_version

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("conf", "kernels", "analysis", "sweeps")
MAX_ASSET_BYTES = 60_000_000  # the wheel is installed to run on a laptop, and PyPI's limit is 100 MB


def run_python(*arguments: str, cwd: Path, python_path: Path | None = None) -> str:
    """Run Python and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {})
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def installed_major(distribution: str) -> int | None:
    """The major version of an installed distribution."""
    try:
        return int(importlib.metadata.version(distribution).partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("name", LINKED)
def test_folder_is_a_relative_link(name: str) -> None:
    link = ROOT / "kbit" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize("name", ["kernels", "analysis", "sweeps", "hydra_plugins", "tests"])
def test_folder_is_no_regular_package(name: str) -> None:
    """A regular package at the top would shadow others of that name in every process started from here."""
    assert list((ROOT / name).rglob("__init__.py")) == []


def test_real_kernels_package_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()  # stands for Hugging Face's, which transformers imports
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert run_python("-c", code, cwd=ROOT, python_path=tmp_path) == str(tmp_path / "kernels" / "__init__.py")


def test_transformers_does_not_take_the_folder_for_a_package() -> None:
    if installed_major("kernels") is not None:
        pytest.skip("Hugging Face's kernels is installed")
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python("-c", code, cwd=ROOT) == "False"


def test_modules_are_named_below_kbit() -> None:
    assert kbit.kernels.cpu.__name__ == "kbit.kernels.cpu"


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert find_version() == importlib.metadata.version("kbit")
    monkeypatch.setattr("kbit.version.version", refuse)
    assert find_version() == importlib.metadata.version("kbit") + "+source"  # the tests' kbit is this checkout's


def test_plugin_that_every_hydra_application_imports_is_light() -> None:
    code = (
        "import sys, hydra_plugins.kbit_launcher\n"
        "print([name for name in ('torch', 'ray', 'pandas', 'transformers', 'numba') if name in sys.modules])"
    )
    assert run_python("-c", code, cwd=ROOT) == "[]"


def test_plugin_leaves_the_launchers_of_other_applications_alone() -> None:
    code = (
        "from hydra.core.plugins import Plugins; from hydra.core.config_store import ConfigStore; Plugins.instance()\n"
        "print(ConfigStore.instance().load('hydra/launcher/basic.yaml').node._target_)"
    )
    assert run_python("-c", code, cwd=ROOT) == "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].values()
    wanted = {re.split(r"[\[<>=!~; ]", d)[0] for d in [*project["dependencies"], *(d for g in groups for d in g)]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    assert wanted - {pin.partition("==")[0] for pin in pins} == set()


def test_assets_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "kbit" / "assets").rglob("*") if path.is_file()]
    assert 0 < sum(sizes) < MAX_ASSET_BYTES


def is_clutter(folder: str, names: list[str]) -> list[str]:
    """What a fresh clone does not have."""
    top = {"results", "figures", "build", "dist"} if Path(folder) == ROOT else set()
    return [name for name in names if name in top or name == "__pycache__" or name.endswith(".egg-info")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist of a copy, since building writes into the folder."""
    source, out = tmp_path_factory.mktemp("source") / "kbit", tmp_path_factory.mktemp("dist")
    source.mkdir()
    shipped = ["kbit", *LINKED, "hydra_plugins", "tests", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"]
    for path in (ROOT / name for name in shipped):
        if path.is_dir():
            shutil.copytree(path, source / path.name, symlinks=True, ignore=is_clutter)
        elif path.exists():
            shutil.copy(path, source)
    # With a setuptools as pyproject.toml asks for, nothing need be downloaded.
    isolation = ["--no-isolation"] if (installed_major("setuptools") or 0) >= 77 else []
    run_python("-m", "build", *isolation, "--outdir", str(out), cwd=source)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed; its dependencies are those of the environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run_python(*pip, "--target", str(target), str(wheel), cwd=target)
    return target


def test_wheel_has_every_file_that_it_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = [path.relative_to(ROOT) for path in (ROOT / "kbit").rglob("*.py")]
    linked = [Path("kbit") / path.relative_to(ROOT) for name in LINKED for path in (ROOT / name).rglob("*")]
    assets = [path.relative_to(ROOT) for path in (ROOT / "kbit" / "assets").rglob("*")]
    files = [path for path in [*code, *linked, *assets] if (ROOT / path).is_file() and "__pycache__" not in path.parts]
    wanted = [path for path in files if path.suffix != ".ipynb"]
    wanted += [Path("kbit/py.typed"), Path("hydra_plugins/kbit_launcher.py")]
    assert [str(path) for path in wanted if str(path) not in names] == []


def test_wheel_has_nothing_else_at_its_top(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kbit", "hydra_plugins"}


def test_wheel_has_the_licences(wheel: Path) -> None:
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert {"LICENSE", "THIRD_PARTY.md"} <= names


def test_installed_package_wins_over_the_checkout(installed: Path, tmp_path: Path) -> None:
    imports = "import kbit, kbit.kernels.cpu as kernels, hydra_plugins.kbit_launcher as plugin"
    code = f"{imports}; print(kbit.__file__, kernels.__file__, plugin.__file__)"
    found = run_python("-c", code, cwd=tmp_path, python_path=installed).split()
    assert [Path(file).relative_to(installed).parts[0] for file in found] == ["kbit", "kbit", "hydra_plugins"]


def test_study_and_figures_work_from_the_wheel_in_another_folder(installed: Path, tmp_path: Path) -> None:
    kbit_script = str(installed / "bin" / "kbit")
    grid = ["model.name=nano-neox-98k,nano-neox-332k", "quant.bits=3,16", "eval.tasks=[]"]
    options = ["eval.perplexity_windows=2", "hydra/launcher=basic"]
    out = run_python(kbit_script, "run", "-m", *grid, *options, cwd=tmp_path, python_path=installed)
    assert "4 of 4 asked results" in out
    assert len(list((tmp_path / "results" / "experiments").glob("*.json"))) == 4
    draw = "import sys; from kbit.cli import main; sys.argv[1:] = ['figures', 'figure_13']; main()"
    report = "sys.argv[1:] = ['report']; main()"
    run_python("-c", f"{draw}; {report}", cwd=tmp_path, python_path=installed)
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {f"figure_13.{suffix}" for suffix in ("png", "svg", "csv", "md")}
    assert set(pd.read_csv(tmp_path / "figures" / "figure_13.csv", comment="#")["bits"]) == {3, 16}
    assert "4 experiments on 2 models of 1 family, 0 failed." in (tmp_path / "report.html").read_text()
