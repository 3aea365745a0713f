"""The store is named in two ways by every command that has one, and the version in three."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from toy_results import fill

import kbit as package
from kbit.cli.main import make_parser

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
WITHOUT = {"fit", "bench", "pack", "export", "models", "completion"}  # these have no store, or name it in another way
READERS = [
    ["results"],
    ["results", "list"],
    ["results", "compact"],
    ["results", "delete", "--yes", "--where", "bits == 99"],
    ["figures", "figure_16"],
    ["report"],
    ["recommend", "--memory", "1GB"],
]
RUNNERS = [["run", "hydra.launcher.plan_only=true", "-m"], ["plan"], ["outliers", "-m"], ["doctor"]]


def test_every_command_is_tested_here() -> None:
    assert {command for command, *_ in READERS + RUNNERS} | WITHOUT == make_parser()[1].keys()


@pytest.mark.parametrize(
    "store", [["results=a b"], ["results='a b'"], ["--results", "a b"], ["--results=a b"]], ids=str
)
@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_command_reads_the_named_store(kbit: Kbit, tmp_path: Path, command: list[str], store: list[str]) -> None:
    fill(tmp_path / "other", range(1))
    done = kbit(*command, *store)
    assert done.code == 1
    assert f"kbit: error: no results at {tmp_path / 'a b'}: start with `kbit run`" in done.err


@pytest.mark.parametrize("store", [["results=a b"], ["--results", "a b"]], ids=str)
def test_merge_writes_to_the_named_store(kbit: Kbit, tmp_path: Path, store: list[str]) -> None:
    fill(tmp_path / "other", range(1))
    assert kbit("results", "merge", "other", *store).out.startswith("other: 1 experiments copied to a b, ")
    assert (tmp_path / "a b" / "experiments").is_dir()


def test_a_word_of_another_option_is_left_alone(kbit: Kbit, tmp_path: Path) -> None:
    fill(tmp_path / "results", range(1))
    assert kbit("results", "--csv", "results=x").out == "2 rows written to results=x\n"
    assert (tmp_path / "results=x").is_file()
    done = kbit("figures", "figure_16", "--out", "results=f", "results=none")
    assert f"no results at {tmp_path / 'none'}" in done.err
    assert "no results at" in kbit("results", "--failures", "results=none").err  # an option without a value


@pytest.mark.parametrize("store", [["results=/proc/a"], ["--results", "/proc/a"], ["--results=/proc/a"]], ids=str)
@pytest.mark.parametrize("command", RUNNERS, ids=lambda command: command[0])
def test_a_command_with_keys_has_the_named_store(kbit: Kbit, command: list[str], store: list[str]) -> None:
    done = kbit(*command, *store, "eval.tasks=[]", "eval.perplexity_windows=1")
    assert done.code == 1
    assert "results=/proc/a: cannot write to /proc" in done.err + done.out


def test_a_store_of_signs_that_mean_something_to_hydra(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("run", "--results", "a,b [1]", "eval.tasks=[]", "eval.perplexity_windows=1", "quant.bits=16")
    assert done.code == 0, done.err
    assert (tmp_path / "a,b [1]" / "experiments").is_dir()


def test_the_version_is_that_of_the_package(kbit: Kbit) -> None:
    assert package.__version__ == version("kbit")
    assert kbit("--version").out == f"kbit {version('kbit')}\n"
