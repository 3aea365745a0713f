"""The example of the guide between processes that torchrun starts: it ends, and a process that dies ends it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch.distributed as dist

GUIDE: Final = Path(__file__).parents[2] / "docs" / "guides" / "products.md"
LIMIT: Final = 120  # s, while it takes 8 on an idle machine
BYTES: Final = 10 * (4 * 256 + 4 + 4 * (4 + 1))  # steps x (a byte for each of weights and biases, 5 float32 scales)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")


def run_example(folder: Path, change: tuple[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the guide's file by two processes, with its output in a file: a pipe stays open while a process lives."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "init_process_group" in block)
    if change is not None:
        assert change[0] in code
        code = code.replace(*change)
    script = folder / "train.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    torchrun += ["--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "out").open("wb") as out, (folder / "errors").open("wb") as errors:
        return subprocess.run(torchrun, stdout=out, stderr=errors, env=environment, timeout=LIMIT, check=False)


def test_torchrun_runs_the_guides_example(tmp_path: Path) -> None:
    done = run_example(tmp_path)
    assert done.returncode == 0, (tmp_path / "errors").read_text()
    lines = (tmp_path / "out").read_text().splitlines()
    assert sorted(line for line in lines if line.endswith(f" {BYTES}")) == [f"{rank} {BYTES}" for rank in (0, 1)]


def test_a_process_that_dies_ends_the_job_by_name(tmp_path: Path) -> None:
    dying = "    for step in range(10):\n        if step == 3 and dist.get_rank() == 1:\n            os.abort()\n"
    done = run_example(tmp_path, ("    for _ in range(10):\n", f"    import os\n\n{dying}"))
    assert done.returncode == 1
    told = (tmp_path / "errors").read_text()
    assert "local_rank: 1" in told
    assert "SIGABRT" in told
