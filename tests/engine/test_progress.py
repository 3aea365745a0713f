"""The bar of a sweep as a terminal shows it: its clock runs, and nothing else stands in its line."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from kbit.engine.estimate import Estimator
from kbit.engine.outcome import Outcome
from kbit.engine.plan import make_plan
from kbit.engine.progress import Progress
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.methods.config import QuantConfig


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def show(self) -> list[str]:
        """The lines of the screen: what follows a carriage return is written over what is there."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@contextmanager
def shown() -> Iterator[Terminal]:
    """A terminal as standard output and error."""
    with redirect_stdout(Terminal()) as terminal, redirect_stderr(terminal):
        yield terminal


@pytest.fixture
def experiments(tmp_path: Path) -> tuple[Experiment, ...]:
    """Two of them."""
    few = EvalConfig(tasks=(), perplexity_windows=4)
    return make_plan([Experiment(quant=QuantConfig(bits=bits), eval=few) for bits in (3, 4)], tmp_path).to_run


def test_the_clock_runs_while_nothing_ends(experiments: tuple[Experiment, ...]) -> None:
    with shown() as terminal, closing(Progress(experiments, Estimator(), expected="about 3 min")) as progress:
        progress.show("starting Ray")
        time.sleep(2.5)
        [line] = terminal.show()
        assert line.startswith("  0%|")
        assert any(f"| 0/2 [00:0{seconds}, about 3 min, starting Ray]" in line for seconds in range(2, 9)), line
    ended = terminal.getvalue()
    time.sleep(1.2)
    assert terminal.getvalue() == ended


def test_what_is_printed_stands_above_the_bar(experiments: tuple[Experiment, ...]) -> None:
    with shown() as terminal, closing(Progress(experiments, Estimator())) as progress:
        print("from a library")
        print("a warning", "in parts", file=sys.stderr)
        progress.say("joined a cluster")
        progress.take(Outcome(experiments[0], "it failed", seconds=1.0))
    *above, bar, _ = terminal.show()
    assert above == [
        "from a library",
        "a warning in parts",
        "joined a cluster",
        f"[1/2] {experiments[0].label()}: it failed",
    ]
    assert bar.startswith(" 50%|")


def test_a_log_file_has_lines(capsys: pytest.CaptureFixture[str], experiments: tuple[Experiment, ...]) -> None:
    with closing(Progress(experiments, Estimator(), expected="about 3 min")) as progress:
        progress.show("starting Ray")
        print("to standard output")
    assert capsys.readouterr() == ("to standard output\n", "starting Ray\n")


def test_a_round_takes_its_share_of_the_time(experiments: tuple[Experiment, ...]) -> None:
    """An eighth of an experiment took 10 seconds, so that all of it would take 80, and a half 40."""
    estimator = Estimator()
    with redirect_stderr(io.StringIO()) as log, closing(Progress([], estimator)) as progress:
        progress.begin(experiments, "round 1 of 4", 0.125)
        progress.take(Outcome(experiments[0], "", seconds=10.0))
        assert estimator.predict_seconds(estimator.classify(experiments[1])) == 80.0
        progress.take(Outcome(experiments[1], "", seconds=10.0))
        progress.begin(experiments, "round 3 of 4", 0.5)
        progress.take(Outcome(experiments[0], "", seconds=40.0))
    ends = [line.rpartition(": ")[2] for line in log.getvalue().splitlines()]
    assert ends == ["round 1 of 4", "done, about 10 s left", "done", "round 3 of 4", "done, about 40 s left"]
