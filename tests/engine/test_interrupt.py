"""Ctrl-C in the middle of a sweep on Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

CONSOLE_SCRIPT = Path(sys.executable).with_name("kbit")
TRACEBACK = "Traceback (most recent call last)"


def test_ctrl_c_ends_a_sweep_soon_keeps_results_and_leaves_no_ray_process(tmp_path: Path) -> None:
    arguments = ["run", "-m", "quant.bits=3,4,5,6", "eval.tasks=[]", "ray.num_workers=1", "model.name=nano-neox-1m"]
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
    assert 1 <= len(list(tmp_path.glob("results/experiments/*.json"))) < 4
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
