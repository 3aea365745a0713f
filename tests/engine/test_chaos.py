"""A sweep whose workers and drivers are killed at random moments ends with every result, once, and the right one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chaos_driver
import psutil
import pytest

from kbit.experiments.identity import find_key
from kbit.store.records import read_records
from kbit.store.store import Store

EXPERIMENTS = 28
SEED = 20
HELPERS = Path(chaos_driver.__file__).parent


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[Callable[[int, int], subprocess.Popen[str]]]:
    """Start a driver on the store, in a session of its own: (first, last experiment)."""
    drivers: list[subprocess.Popen[str]] = []

    def start(first: int, last: int) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(HELPERS), *sys.path])
        command = [sys.executable, chaos_driver.__file__, str(tmp_path), str(first), str(last)]
        with (tmp_path / f"driver-{len(drivers)}.log").open("w") as log:
            drivers.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {"PYTHONPATH": path},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    text=True,
                )
            )
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.wait(timeout=300)


def count(folder: Path) -> int:
    """How many files a folder has, none if it is not there yet."""
    return len(list(folder.iterdir())) if folder.exists() else 0


def kill_workers(store: Path, driver: subprocess.Popen[str], results: int, kills: int, chance: random.Random) -> int:
    """Kill random workers until there are so many more results and kills; return how many."""
    killed, goal = 0, count(store / "experiments") + results
    deadline = time.monotonic() + 300
    while (killed < kills or count(store / "experiments") < goal) and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.2, 1.2))
        started = {int(path.name) for path in (store / "pids").glob("*")}
        alive = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.pid in started]
        if killed < kills and alive:
            chance.choice(alive).send_signal(signal.SIGKILL)
            killed += 1
    return killed


def test_every_result_is_there_once_after_kills_of_workers_and_drivers(
    tmp_path: Path, start_driver: Callable[[int, int], subprocess.Popen[str]]
) -> None:
    chance = random.Random(SEED)
    first = start_driver(0, EXPERIMENTS)
    killed = kill_workers(tmp_path, first, results=5, kills=3, chance=chance)
    first.kill()
    assert killed == 3
    time.sleep(2)  # the workers of a dead driver end by themselves
    done, started = count(tmp_path / "experiments"), count(tmp_path / "started")
    assert 5 <= done < EXPERIMENTS
    assert started <= done + killed + 2  # a kill loses what is in flight, and nothing else is repeated

    second, third = start_driver(0, 20), start_driver(0, EXPERIMENTS)  # at once, on overlapping grids
    assert kill_workers(tmp_path, third, results=4, kills=1, chance=chance) == 1
    second.kill()
    assert third.wait(timeout=300) == 0

    records = list(read_records(tmp_path, "experiments"))
    expected = [chaos_driver.make_record(find_key(e)) for e in chaos_driver.list_experiments(0, EXPERIMENTS)]
    assert {(r["key"], r["value"]) for r in records} == {(r.key, r.value) for r in expected}
    assert len(records) == EXPERIMENTS == len(Store(tmp_path).finished_keys())
    for left in tmp_path.glob("*/.*"):  # half a file of who was killed while writing, some time later
        os.utime(left, (0, 0))
    Store(tmp_path)
    assert list(tmp_path.glob("experiments/.*")) == []
