"""What a user gave wrong is said in this program's words, with what is allowed; studies of files are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
HEAD = "# @package _global_\nhydra: {mode: MULTIRUN}\nstudy:\n"
NOISE = ("HYDRA_FULL_ERROR", "Traceback", "full_key", "object_type", "search path")

STUDIES: list[tuple[str, list[str]]] = [
    (HEAD + "  grids: [{quant.bitz: [3]}]\n", ["no key 'bitz'", "did you mean bits?"]),
    (HEAD + "  grids: [{quant.bits: []}]\n", ["quant.bits has no values"]),
    (HEAD + "  grids: [{quant.bits: {a: 3}}]\n", ["neither a value nor a list"]),
    (HEAD + "  grids: [{}]\n", ["maps no keys to values"]),
    (HEAD + "  grids: {quant.bits: [3]}\n", ["study.grids and study.exclude are lists"]),
    (HEAD + "  grids: [{quant.bits: [3, four]}]\n", ["quant.bits=four", "a whole number"]),
    (HEAD + "  grid: [{quant.bits: [3]}]\n", ["no key 'grid'", "did you mean grids?"]),
    (HEAD + "  grids: [{quant.bits: [3,4}]\n", ["own.yaml, line 4, column"]),
    (HEAD + "  unite: [nano/quik]\n", ["no sweeps/nano/quik", "did you mean nano/quick?"]),
    ("study:\n  grids: [{quant.bits: [3]}]\n", ["first line must be: # @package _global_"]),
]


def write_study(folder: Path, text: str) -> list[str]:
    """The arguments that name a user's own study."""
    (folder / "mine" / "sweeps").mkdir(parents=True)
    (folder / "mine" / "sweeps" / "own.yaml").write_text(text)
    return ["--config-dir", "mine", "+sweeps=own"]


@pytest.mark.parametrize(("text", "words"), STUDIES, ids=[words[0] for _, words in STUDIES])
def test_a_study_that_is_not_well_formed_is_refused(kbit: Kbit, tmp_path: Path, text: str, words: list[str]) -> None:
    done = kbit("plan", *write_study(tmp_path, text))
    assert (done.code, done.out) == (1, "")
    assert [word for word in words if word not in done.err] == []
    assert [noise for noise in NOISE if noise in done.err] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quant.bitz=3"], ["did you mean bits?"]),
        (["quant.bits=four"], ["quant.bits=four", "a whole number"]),
        (["ray.num_workers=x"], ["a whole number or null"]),
        (["fail_fast=maybe"], ["true or false"]),
        (["eval.tasks=piqa"], ["a list, such as [a,b]"]),
        (["quant=int9"], ["no quant/int9", "did you mean int"]),
        (["+sweeps=nano/quik"], ["did you mean nano/quick?"]),
        (["+sweeps=[nano/quick,nano/all]"], ["+sweeps=nano/quick,nano/all"]),
        (["+sweeps=nano/quick", "+sweeps=nano/all"], ["+sweeps=nano/quick,nano/all"]),
        (["results=/proc/x"], ["cannot write to /proc"]),
        (["device=cuda", "ray.gpus_per_worker=0"], ["device=cuda", "ray.gpus_per_worker"]),
    ],
    ids=lambda value: value[0],
)
def test_a_plan_refuses_with_what_is_allowed(kbit: Kbit, arguments: list[str], words: list[str]) -> None:
    done = kbit("plan", *arguments)
    assert done.code == 1
    assert [word for word in words if word not in done.err] == []
    assert [noise for noise in NOISE if noise in done.err] == []


def test_an_unknown_option_names_the_command(kbit: Kbit) -> None:
    assert "kbit plan: error: unrecognized arguments: --foo" in kbit("plan", "--foo").err
    assert "short name" in kbit("models", "--help").out


def test_an_exclusion_without_effect_is_a_warning(kbit: Kbit, tmp_path: Path) -> None:
    study = write_study(
        tmp_path, HEAD + "  grids: [{quant.bits: [3, 4]}]\n  exclude: [{quant.bits: 3}, {quant.bits: 7}]\n"
    )
    done = kbit("plan", *study)
    assert done.out.startswith("1 asked, 1 distinct, 0 done, 1 to run\n")
    assert done.err == "kbit: warning: study.exclude={'quant.bits': 7} leaves out no point of the grids\n"
    assert kbit("plan", *study, "quant.bits=4").err == ""  # what was not asked for cannot be left out


def test_a_study_is_not_run_as_one_experiment(kbit: Kbit, tmp_path: Path) -> None:
    text = "# @package _global_\nstudy:\n  grids: [{quant.bits: [3, 4]}]\n"
    done = kbit("run", *write_study(tmp_path, text))
    assert (done.code, "add -m" in done.err) == (1, True)
    assert not (tmp_path / "results").exists()
