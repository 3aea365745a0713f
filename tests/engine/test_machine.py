"""What a machine gives: CPUs by affinity and control group, and GPUs, without torch and Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kbit.engine.machine import count_cpus, find_free_memory, has_driver, limit_by_memory, predict_start


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


CGROUPS = {
    "none": ({}, 64),
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "version 2, no quota": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "version 2, the parent's": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000",
            "sys/fs/cgroup/a/b/cpu.max": "max 1",
        },
        3,
    ),
    "version 2, less than one": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "version 1, no quota": (
        {
            "proc/self/cgroup": "3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        64,
    ),
    "more than there are": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000"}, 64),
}


@pytest.mark.parametrize(("files", "cpus"), CGROUPS.values(), ids=CGROUPS)
def test_cpus_are_those_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert count_cpus(write(tmp_path, files)) == cpus


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert count_cpus(tmp_path) == 1


def test_workers_are_as_many_as_memory_has_room_for(tmp_path: Path) -> None:
    gigabyte = 10**9
    assert limit_by_memory(8, 2 * gigabyte, 10 * gigabyte) == 4  # a tenth stays free
    assert limit_by_memory(8, 20 * gigabyte, 10 * gigabyte) == 1  # the user sees what comes of it
    assert limit_by_memory(2, gigabyte, 10 * gigabyte) == 2
    assert limit_by_memory(8, None, 10 * gigabyte) == limit_by_memory(8, gigabyte, None) == 8
    write(tmp_path, {"proc/meminfo": "MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:    12 kB\n"})
    assert find_free_memory(tmp_path) == 12 * 1024
    assert find_free_memory(tmp_path / "nothing") is None


@pytest.mark.parametrize("visible", ["", " ", "-1"])
def test_hidden_gpus_are_none(visible: str) -> None:
    assert not has_driver(visible)


def test_a_missing_gpu_is_refused_before_torch_and_ray_are_imported(tmp_path: Path) -> None:
    """In one process: of a single run, of a multirun, and of workers that ask for a GPU."""
    code = (
        "import sys; from hydra.core.global_hydra import GlobalHydra; from kbit.cli.main import run_command\n"
        "for given in (['device=cuda'], ['-m', 'quant.bits=3,4', 'device=cuda'], ['-m', 'ray.gpus_per_worker=1']):\n"
        "    try: run_command(['run', *given])\n"
        "    except ValueError as error: print(error)\n"
        "    GlobalHydra.instance().clear()\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    single, multirun, workers, loaded = done.stdout.splitlines()
    assert single == multirun == "device=cuda: there are 0 CUDA devices here; use device=cpu"
    assert "ray.gpus_per_worker=1 do not fit" in workers
    assert loaded == "[]"
    assert list(tmp_path.iterdir()) == []


def test_a_start_takes_longer_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    seconds = {}
    for load in (0.0, 2.0, 10.0):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        seconds[load] = predict_start("ray", 2)
        assert predict_start("process", 1) == predict_start("ray", 2, local=False) < seconds[load]
    assert seconds[0.0] == seconds[2.0] == seconds[10.0] / 3  # 12 want to run on 4 CPUs
