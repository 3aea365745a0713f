"""Compiled kernels are kept on disk only as long as every file that they were compiled from is the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from kbit.kernels import cpu_chunks

PROGRAM = """
import numpy as np
from kbit.kernels import cpu
print(cpu.unpack(np.array([0x12], np.uint8), 4, 2).tolist(), sum(cpu._unpack.stats.cache_hits.values()))
"""


def run_program(root: Path) -> str:
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_a_change_in_a_function_that_a_kernel_calls_recompiles_it(tmp_path: Path) -> None:
    kernels = tmp_path / "kbit" / "kernels"
    kernels.mkdir(parents=True)
    (tmp_path / "kbit" / "__init__.py").touch()  # so that this kbit is the one that is imported
    folder = Path(cpu_chunks.__file__).parent
    for path in [*folder.glob("cpu*.py"), folder / "simd.py"]:
        shutil.copy(path, kernels)
    shutil.copytree(folder / "vectors", kernels / "vectors")
    assert run_program(tmp_path) == "[1, 2] 0"
    assert run_program(tmp_path) == "[1, 2] 1"  # from the disk
    chunks = kernels / "cpu_chunks.py"
    source, called = chunks.read_text(), "    word &= eights\n"
    assert source.count(called) == 1
    chunks.write_text(source.replace(called, "    word &= eights >> np.uint64(8)\n"))  # a fault, to be seen
    assert run_program(tmp_path) != "[1, 2] 1"
