"""The scripts of benchmarks/gpu: all their stages at tiny sizes on the simulator, and what runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import day
from gpu.card import Card, Report

SCRIPTS = Path(day.__file__).parent


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What check_ready.sh wrote, by stage."""
    folder = tmp_path_factory.mktemp("day")
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(SCRIPTS / "check_ready.sh"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout[done.stdout.rindex("\n\n") :]
    assert [line.split()[0] for line in table.splitlines() if line.endswith(" s  done")] == list(day.LIMITS)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in day.LIMITS}


def test_the_stages_find_nothing_wrong_on_the_simulator(records: dict[str, dict[str, Any]]) -> None:
    assert {name: record["state"] for name, record in records.items()} == dict.fromkeys(day.LIMITS, "done")
    assert all(row["wrong"] == [] for row in records["kernel_results"]["rows"])
    assert len(records["kernel_results"]["rows"]) >= 10


def test_the_stages_measure(records: dict[str, dict[str, Any]]) -> None:
    operations = [row["operation"] for row in records["kernel_speed"]["rows"]]
    fused = ["fake_quantize", "fake_quantize_absmax"]
    assert operations == ["copy", "block_extremes", "quantize", "dequantize", *fused]
    products = [row for row in records["products"]["rows"] if row["name"].startswith("kbit")]
    assert {(row["name"], row["batch"]) for row in products} == {
        (f"kbit nf4 {kind}", batch) for kind in ("kernel", "layer") for batch in (1, 2)
    }
    assert all(row["packed_bytes"] == 2 * 64 // 2 + 2 * 2 and row["error"] < 0.01 for row in products)  # 2 blocks' fp16
    compared = [row for row in records["study"]["rows"] if "difference" in row]
    assert len(compared) >= 3
    assert all(row["difference"] == 0 for row in compared)  # the CPU stands in for the card
    assert any(row["cpu"] > 1 for row in compared)  # nats
    scorers = [row for row in records["study"]["rows"] if "items_per_second" in row]
    assert [row["name"] for row in scorers] == ["kbit", "hflm 32", "hflm 128"]
    assert max(row["difference_from_kbit"] for row in scorers) < 1e-4  # nats, in float32
    assert all(0 < row["weight_rmse"] < 0.5 for row in records["models"]["rows"])


def test_a_stage_that_finds_something_wrong_is_not_done(tmp_path: Path) -> None:
    report = Report(tmp_path, "products", Card(torch.device("cpu")), lambda rows: [f"{len(rows)} rows"])
    assert day.read_state(tmp_path / "products.json")[::2] == ("stopped by its time limit", ["0 rows"])
    report.add(case="a", wrong=[])
    assert report.finish()
    report.add(case="b", wrong=["another value"])
    assert not report.finish()
    assert day.read_state(tmp_path / "products.json")[::2] == ("1 wrong", ["2 rows"])
    assert not report.finish("RuntimeError: an illegal memory access")
    lines = list(day.list_lines({"products": day.read_state(tmp_path / "products.json")}))
    assert lines[0].endswith(" s  RuntimeError: an illegal memory access")
    assert day.read_state(tmp_path / "study.json")[0] == "not started, or ended before its first record"


def test_a_stage_ends_at_its_limit_with_the_processes_that_it_started(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    child = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('.'); time.sleep(0.02)"
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    deadline = time.monotonic() + 50
    day.run_limited([sys.executable, "-c", parent], 3)
    assert time.monotonic() < deadline
    beats = beat.stat().st_size
    time.sleep(0.2)
    assert beat.stat().st_size == beats > 0


def test_other_stages_run_after_one_that_fails(tmp_path: Path) -> None:
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], sys.argv[2]).touch(); sys.exit(1)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    day.run_stages(command, ["products", "study"], time.monotonic() + 60)
    day.run_stages(command, ["models"], time.monotonic() + 1)  # too late for a start
    assert sorted(path.name for path in tmp_path.iterdir()) == ["products", "study"]
