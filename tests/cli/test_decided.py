"""A study that stops when it knows, from the command line: rounds, verdicts, figures, and the way on to all items."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kbit.analysis.statistics.verdicts import tabulate_verdicts
from kbit.store.readers import list_keys, read_results

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py

GRID = (
    *("-m", "model.name=nano-gpt2-98k,nano-gpt2-332k", "quant.bits=3,4", "quant.data_type=nf"),
    *("eval.tasks=[]", "hydra/launcher=basic"),
)
UNTIL = "study.until.decided=true"


def test_a_study_stops_when_it_knows_and_goes_on_when_asked(kbit: Kbit, tmp_path: Path) -> None:
    """256 windows of two small models at two precisions, of which 3 bits are known to be worse early."""
    done = kbit("plan", *GRID, UNTIL)
    assert "until decided: 32.8 thousand tokens at least, 262 thousand at most, in up to 4 rounds" in done.out

    done = kbit("run", *GRID, UNTIL)
    assert done.code == 0, done.err
    assert "round 1 of 4, an eighth of the items: 4 of 4 experiments" in done.err
    assert "4 of 4 asked results are in" in done.out
    assert "nano-gpt2, nf block 64, cross entropy: 4-bit is best, known from" in done.out
    stopped = sorted(path.stem for path in (tmp_path / "results" / "stopped").iterdir())
    assert stopped
    assert list_keys(tmp_path / "results")[0].isdisjoint(name[:16] for name in stopped)
    before = {name: json.loads((tmp_path / "results" / "stopped" / f"{name}.json").read_text()) for name in stopped}
    early = tabulate_verdicts(read_results(tmp_path / "results", stopped=True))

    again = kbit("run", *GRID, UNTIL)
    assert "round" not in again.err  # nothing is measured twice
    assert again.out.splitlines()[-3:] == done.out.splitlines()[-3:]

    figures = kbit("figures", "figure_13", "--format", "svg", "--caption", "full")
    assert figures.code == 0, figures.err
    caption = (tmp_path / "figures" / "figure_13.md").read_text()
    assert f"Hollow: {len(stopped)} of 4 points stopped early." in caption
    assert "stopped early (study.until.decided), after" in caption

    whole = kbit("run", *GRID)
    assert whole.code == 0, whole.err
    assert list((tmp_path / "results" / "stopped").iterdir()) == []
    table = read_results(tmp_path / "results")
    assert table["key"].nunique() == 4
    assert set(table.loc[table["metric"] == "cross_entropy", "n"]) == {256}
    late = tabulate_verdicts(table)
    assert early[["bits", "grade"]].equals(late[["bits", "grade"]])
    assert late["grade"].tolist() == ["holds"]
    (one, record), *_ = before.items()
    final = json.loads((tmp_path / "results" / "experiments" / f"{one[:16]}.json").read_text())
    assert final["tokens"] == 256 * 256
    assert final["weights_hash"] == record["weights_hash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GRID, UNTIL, "eval.features.measure=true"), "eval.features.measure is no mean over them"),
        ((*GRID[:1], "model.name=nano-gpt2-98k", "quant.bits=3,4", UNTIL), "two sizes of a model, not 2 and 1"),
        (("quant.bits=3", UNTIL), "a study is a multirun"),
        ((*GRID, UNTIL, "study.until.claims=[best]"), "study.until.claims='best' is not one of"),
    ],
)
def test_what_cannot_be_decided_is_refused(kbit: Kbit, arguments: tuple[str, ...], message: str) -> None:
    done = kbit("run", *arguments)
    assert done.code != 0
    assert message in done.err
