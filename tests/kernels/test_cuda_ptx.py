"""CUDA kernels through NVVM and ptxas, on a machine without a driver: spills, registers, exactness, 64-bit indices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import kernels_ptx
import numba
import numpy as np
from kernels_ptx import ARCHITECTURES, VARIANTS, Compiled
from numba.cuda import compiler

from kbit.kernels import cuda_kernels

REGISTERS_PER_SM = 65536  # on every architecture here
RENEW = "the kernels changed: python benchmarks/kernels_ptx.py writes the record anew"
INDICES = {"i", "b", "n", "row", "block", "blocks", "start", "count", "first", "eight"}


def test_kernels_compile_without_driver_and_spill_nothing() -> None:
    """One variant for the oldest architecture. benchmarks/kernels_ptx.py compiles all and writes the record."""
    compiled = []
    for row, ptx in kernels_ptx.compile_kernels(ARCHITECTURES[0], VARIANTS[:1]):
        compiled.append(row)
        assert row.spilled == row.stack == 0
        assert row.registers * row.threads <= REGISTERS_PER_SM
        assert_exact(row, ptx)
    record = json.loads(kernels_ptx.RESULTS.read_text())
    if record["versions"] == kernels_ptx.find_versions():  # constraints.txt pins them: other compilers, other registers
        recorded = [row for row in record["kernels"] if row["architecture"] == compiled[0].architecture]
        assert [row for row in map(asdict, compiled) if row not in recorded] == [], RENEW


def test_the_record_is_of_these_kernels_and_none_spills() -> None:
    record = json.loads(kernels_ptx.RESULTS.read_text())
    assert record["sources"] == kernels_ptx.hash_sources(), RENEW
    assert {row["architecture"] for row in record["kernels"]} == {"sm_75", "sm_80", "sm_90", "sm_120"}
    assert {row["variant"] for row in record["kernels"]} == set(map(str, VARIANTS))
    assert {row["spilled"] for row in record["kernels"]} == {row["stack"] for row in record["kernels"]} == {0}


def assert_exact(compiled: Compiled, ptx: str) -> None:
    """No contraction but in products, approximation or flushing to zero; division where values are normalised.

    No load goes past other threads' writes: a group reads the peaks that its members wrote. Nothing is in float64,
    which numba makes of a signed and an unsigned integer, and which most cards compute slowly.
    """
    assert ".nc." not in ptx
    assert ".f64" not in ptx
    arithmetic = re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp|cvt)\.\S*f32\S*", ptx)
    refused = ("mad", "rcp") if compiled.kernel == "multiply" else ("fma", "mad", "rcp")
    assert not [word for word in arithmetic if word.startswith(refused) or "approx" in word or "ftz" in word]
    divides = any(word.startswith("div.rn.f32") for word in arithmetic)
    if compiled.kernel != "states":  # the first of its two passes finds peaks alone
        assert divides == (compiled.kernel in ("encode", "encode_decode", "absmax"))


def test_indices_are_64_bit() -> None:
    """The compiler's type of every variable that counts words or blocks."""
    for launch in kernels_ptx.list_launches(VARIANTS[2]):
        with kernels_ptx.pretend_device((8, 0)):
            compiled = compiler.compile_cuda(launch.kernel.py_func, numba.types.void, launch.signature, cc=(8, 0))
        types = {name: kind for name, kind in compiled.type_annotation.typemap.items() if name.split(".")[0] in INDICES}
        assert len(types) >= 2
        assert {str(kind) for kind in types.values()} == {"int64"}, launch.kernel


def test_offsets_beyond_2_31_words() -> None:
    """The kernels' own functions, compiled for the CPU with 64-bit arguments: nothing is allocated."""
    block_of, block_span = (compile_for_cpu(f) for f in (cuda_kernels.block_of, cuda_kernels.block_span))
    n, block = 2**33 + 40, 64
    assert block_of(n - 1, n, block, 6) == block_of(n - 1, n, block, -1) == 2**27
    assert block_span(2**27, n, n, block) == (2**33, 40)  # the last one, short
    row, rows = 2**32 + 5, 3
    per_row = 2**26 + 1
    assert block_of(2 * row + 70, row, block, -1) == 2 * per_row + 1
    assert block_span(3 * per_row - 1, rows * row, row, block) == (3 * row - 5, 5)


def compile_for_cpu(function: Any) -> Callable[..., Any]:
    """Compile a device function with int64 arguments, as which the kernels pass them."""
    compiled = numba.njit(function.py_func)
    return lambda *arguments: compiled(*map(np.int64, arguments))
