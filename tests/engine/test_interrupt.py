"""Signals: Ctrl-C in the middle of a sweep on Ray, and the end of a driver that plans."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

CONSOLE_SCRIPT = Path(sys.executable).with_name("kbit")
TRACEBACK = "Traceback (most recent call last)"


def test_ctrl_c_ends_a_sweep_soon_keeps_results_and_leaves_no_ray_process(tmp_path: Path) -> None:
    arguments = ["run", "-m", "quant.bits=range(2,9)", "eval.tasks=[]", "ray.num_workers=1"]
    arguments.append("model.name=nano-neox-332k")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    sweep = subprocess.Popen(
        [str(CONSOLE_SCRIPT), *arguments],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job, such as these tests may be, ignores the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("results/experiments/*.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        children = psutil.Process(sweep.pid).children(recursive=True)
        sweep.send_signal(signal.SIGINT)
        _, err = sweep.communicate(timeout=300)
    finally:
        sweep.kill()
    assert sweep.returncode == 130
    assert "finished results are kept" in err
    assert TRACEBACK not in err
    assert 1 <= len(list(tmp_path.glob("results/experiments/*.json"))) < 7
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# What a command does before its first job, in order: a name in a module, and how often it is called until it ends.
PHASES = {
    "arguments": ("kbit.cli.hydra.app.refuse_arguments", 1),
    "Hydra's sweeper": ("kbit.cli.hydra.compose.list_combinations", 1),
    "composition": ("kbit.cli.hydra.compose.build_config", 3),
    "requests": ("kbit.cli.run._list_notes", 1),
    "device": ("kbit.engine.plan.count_workers", 1),
    "models, tasks and texts": ("kbit.engine.plan.check_experiment", 1),
    "reading the text": ("kbit.engine.plan.read_documents", 1),
    "keys": ("kbit.engine.plan.find_key", 2),
    "the store's keys": ("kbit.engine.plan.list_keys", 1),
    "sizes": ("kbit.engine.plan.find_size", 1),
    "whether it can write": ("kbit.store.filesystem.check_writable", 1),
}


@pytest.fixture
def signals_heeded() -> Iterator[None]:
    """Signals act as in a terminal: a shell's background job, such as these tests may be, ignores some of them."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize(("phase", "number"), list(zip(PHASES, itertools.cycle(SIGNALS), strict=False)))
def test_a_driver_that_is_ended_while_it_plans_leaves_nothing(
    kbit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, number: signal.Signals
) -> None:
    """No folder here, and no temporary one. In this process, to which the signal is sent in the middle of a phase.

    What is there when the signal comes is what SIGKILL would leave, which no process can answer: nothing, too.
    """
    folders = (tmp_path / "here", tmp_path / "temporary")
    for folder in folders:
        folder.mkdir()
    there: list[str] = []
    name, calls = PHASES[phase]
    module, _, function = name.rpartition(".")
    original = getattr(importlib.import_module(module), function)
    called = 0

    def end(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called += 1
        if called == calls:
            there.extend(path.name for folder in folders for path in folder.iterdir())
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(name, end)
    before = signal.getsignal(signal.SIGTERM)
    grid = "study.grids=[{quant.bits:[3,4,5]}]"
    done = kbit("run", "-m", grid, "eval.tasks=[]", "eval.perplexity_windows=1")
    assert (done.code, called) == (128 + number, calls)
    assert signal.getsignal(signal.SIGTERM) is before
    assert there == []
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
