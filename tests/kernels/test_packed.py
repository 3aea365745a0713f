"""Kernels of packed products for each kind of CPU, in processes whose kernels are compiled for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

PROGRAM = Path(__file__).with_name("packed_cases.py")
FEATURES = {name for name, has in llvm.get_host_cpu_features().items() if has}


@pytest.mark.parametrize(
    ("kind", "needed"),
    [("generic", set()), ("avx2", {"avx2", "fma"}), ("avx512-emulated", {"avx2", "fma"}), ("avx512", {"avx512bw"})],
)
def test_products_equal_the_twin_s_dequantized_matrix(kind: str, needed: set[str]) -> None:
    if needed - FEATURES:
        pytest.skip(f"this CPU lacks {', '.join(sorted(needed - FEATURES))}")
    done = subprocess.run([sys.executable, str(PROGRAM), kind], capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr[-2000:]
