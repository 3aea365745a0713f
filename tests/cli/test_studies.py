"""Studies on the command line: several as one sweep, a user's own, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py


def test_several_studies_are_one_sweep(kbit: Kbit) -> None:
    done = kbit("plan", "+sweeps=nano/bit_level,nano/bit_level", "model.name=nano-neox-98k")
    assert (done.code, done.out.splitlines()[0]) == (0, "12 asked, 6 distinct, 0 done, 6 to run")


def test_studies_that_bring_a_sweeper_of_their_own_cannot_be_swept(kbit: Kbit, tmp_path: Path) -> None:
    """Hydra would ignore it; one such study alone is Hydra's usual way."""
    (tmp_path / "mine" / "sweeps").mkdir(parents=True)
    text = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {quant.bits: '3,4'}}}\n"
    (tmp_path / "mine" / "sweeps" / "own.yaml").write_text(text)
    alone = kbit("plan", "--config-dir", "mine", "+sweeps=own")
    assert (alone.code, alone.out.splitlines()[0]) == (0, "2 asked, 2 distinct, 0 done, 2 to run")
    swept = kbit("plan", "--config-dir", "mine", "+sweeps=own,nano/quick")
    assert swept.code == 1
    assert "a swept choice brings a sweeper or launcher of its own" in swept.err


def test_a_study_without_a_point_is_refused(kbit: Kbit) -> None:
    done = kbit("plan", "+sweeps=nano/quick", "study.exclude=[{quant.bits:[3,4,5,6,8,16]}]")
    assert (done.code, done.err) == (
        1, "kbit: error: no experiment is left: study.exclude leaves out every point of the grids\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("+sweep=nano/quick", "a ready study is added, not set: +sweeps=nano/quick"),
        ("+quant.foo=1", "allowed are"),
        ("++foo=1", "allowed are"),
    ],
)
def test_an_added_key_that_the_schema_lacks_is_refused(kbit: Kbit, argument: str, words: str) -> None:
    for command in ("run", "plan"):
        done = kbit(command, argument)
        assert (done.code, words in done.err) == (1, True)


def test_a_launcher_cannot_be_swept(kbit: Kbit) -> None:
    done = kbit("plan", "hydra/launcher=basic,kbit")
    assert done.code == 1
    assert "hydra/launcher=basic" in done.err
