"""Registers and spills of the CUDA kernels on four architectures, without a GPU: compiled by NVVM, assembled by ptxas.

    python benchmarks/kernels_ptx.py

Needs the extra kbit[dev]. Compiles what each function of kbit.kernels.cuda launches for a set of inputs that covers the
kernels' constants, prints a table and writes benchmarks/results/cuda_registers.json. The tests compile one variant for
one architecture and compare it with the record, and see by the sources' hash that the rest of the record is of these
kernels. Exit code 1: a kernel spills registers or uses a stack.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numba
import numpy as np
from numba.cuda import compiler

from kbit.kernels import cpu_states, cuda_linear, cuda_states
from kbit.kernels import cuda as kernels
from kbit.kernels import cuda_arrays as arrays
from kbit.kernels.cpu_chunks import FLOAT16, FLOAT32
from kbit.kernels.cpu_linear import ABSENT, BATCHES, CODED, Blocks, Constants, Matrix
from kbit.numerics.codebooks import decision_thresholds
from kbit.numerics.data_types import make_codebook
from kbit.numerics.spec import QuantSpec

RESULTS = Path(__file__).parent / "results" / "cuda_registers.json"
ARCHITECTURES = ((7, 5), (8, 0), (9, 0), (12, 0))  # Turing, Ampere, Hopper, Blackwell: the oldest of CUDA 13 on
COMPILERS = ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvcc")  # these decide the registers


@dataclass(frozen=True)
class Variant:
    """An input: dtype, bits and block select a kernel's constants; unaligned, words of one value."""

    dtype: str
    bits: int
    block_size: int
    unaligned: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}, {self.bits} bits, block {self.block_size}" + ", unaligned" * self.unaligned


VARIANTS = (
    Variant("float32", 4, 64),
    Variant("float16", 3, 64),
    Variant("bfloat16", 4, 4096),
    Variant("float16", 8, 4096, unaligned=True),
)

numba_any: Any = numba  # partly annotated


class Launch(NamedTuple):
    """A kernel, the threads of its blocks, and its arguments."""

    kernel: Any
    threads: int
    arguments: tuple[Any, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        """The arguments' numba types."""
        return tuple(numba_any.typeof(argument) for argument in self.arguments)


@dataclass(frozen=True)
class Compiled:
    """What ptxas reports of a kernel."""

    architecture: str
    kernel: str
    variant: str
    threads: int
    registers: int
    spilled: int  # bytes
    stack: int  # bytes


def list_launches(variant: Variant) -> list[Launch]:
    """Return what each function of kbit.kernels.cuda launches for this input; nothing is started."""
    recorded: list[Launch] = []

    def record(kernel: Any, tasks: int, *arguments: Any, threads: int | None = None) -> None:
        recorded.append(Launch(kernel, threads or arrays.THREADS_PER_BLOCK, arguments))

    with (
        patch.multiple(arrays, SIMULATED=True, launch=record, thread_count=lambda: arrays.THREADS_PER_BLOCK),
        patch.object(kernels, "launch", record),
        patch.multiple(cuda_linear, launch=record, thread_count=lambda: arrays.THREADS_PER_BLOCK),
    ):
        _call_all(variant)
    return recorded


def _call_all(variant: Variant) -> None:
    """Call each function once, on values whose content does not matter."""
    skip, dtype = int(variant.unaligned), "uint16" if variant.dtype == "bfloat16" else variant.dtype
    x = np.zeros(3 * variant.block_size + skip, dtype)[skip:]
    codebook = make_codebook("int", variant.bits)
    tables, shape, ones = (codebook, decision_thresholds(codebook)), (x.size, variant.block_size), np.ones(3, "float32")
    kernels.block_extremes(x, *shape)
    codes = kernels.quantize(x, ones, ones, *tables, *shape, None)
    kernels.quantize(x, ones, ones, *tables, *shape, 1)
    kernels.dequantize(codes, ones, ones, codebook, *shape, x)
    kernels.fake_quantize(x, ones, ones, *tables, *shape, None, x)
    kernels.fake_quantize(x, ones, ones, *tables, *shape, 1, x)
    kernels.fake_quantize_absmax(x, *tables, *shape, "fp16", x, np.zeros(1, np.uint8))
    kernels.fake_quantize_absmax(x, *tables, x.size, kernels.MAX_FUSED_BLOCK + 1, "fp16", x, np.zeros(1, np.uint8))
    packed = kernels.pack(codes, variant.bits)
    kernels.unpack(packed, variant.bits, x.size)
    _multiply(packed, codebook, variant)
    _step(x, variant)


def _step(x: Any, variant: Variant) -> None:
    """Take an optimizer's step in one pass, and in two."""
    spec = QuantSpec(variant.bits, "int", scale_format="fp32")
    codebook = spec.make_codebook()
    for block_size in (64, x.size):
        state = cpu_states.make_state(variant.bits, block_size, codebook, spec.make_thresholds(codebook))
        state = state._replace(codes=np.zeros(x.size, np.uint8), scales=np.ones(x.size, np.float32))
        rule = cpu_states.Rule._make([cpu_states.ADAM, *np.ones(9, np.float32), False])
        cuda_states.take_step(x, x, state, state, rule)


def _multiply(packed: Any, codebook: Any, variant: Variant) -> None:
    """Multiply the largest batch by a matrix, whose constants are of every kind among the variants."""
    columns, padded = variant.block_size, np.ones(256, np.float32)
    padded[: codebook.size] = codebook
    stored = np.zeros(16, np.uint8)
    coded = Constants(CODED, stored, values=padded, second=padded if variant.unaligned else padded[:0])
    scales = Constants(FLOAT16, stored) if variant.dtype == "float32" else coded
    offsets = Constants(FLOAT32 if variant.dtype == "bfloat16" else ABSENT, stored)
    matrix = Matrix(packed, variant.bits, padded, scales, offsets, 3, Blocks(columns, 0, columns))
    cuda_linear.multiply(np.zeros(BATCHES[-1] * columns, np.float32), matrix)


@contextmanager
def pretend_device(architecture: tuple[int, int]) -> Iterator[None]:
    """Tell numba the architecture, for which it asks the device when it compiles a device function."""
    device = SimpleNamespace(compute_capability=architecture)
    with patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        yield


def compile_ptx(launch: Launch, architecture: tuple[int, int]) -> str:
    """Compile a kernel for the types of the arguments that it was to be started with."""
    (ptx,) = _translate(launch.kernel, launch.signature).get_asm_strs(cc=architecture)
    return str(ptx)


@functools.cache
def _translate(kernel: Any, signature: tuple[Any, ...]) -> Any:
    """Return numba's library of a kernel: LLVM code, from which NVVM compiles each architecture's PTX.

    This is the half of numba.cuda.compile that the architecture does not change, and two thirds of its time.
    """
    compile_with_fixup: Any = compiler._compile_pyfunc_with_fixup  # type: ignore[attr-defined,unused-ignore]
    with pretend_device(ARCHITECTURES[0]):
        library, _ = compile_with_fixup(kernel.py_func, signature, device=False, abi="numba", cc=ARCHITECTURES[0])
    return library


def assemble(ptx: str, architecture: str) -> tuple[int, int, int]:
    """Return registers, bytes spilled and bytes of stack, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [find_ptxas(), "-v", f"-arch={architecture}", "-o", str(source.with_suffix(".cubin")), str(source)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if numbers is None or registers is None:
        raise RuntimeError(f"ptxas reports neither spills nor registers: {report}")
    stack, stores, loads = map(int, numbers.groups())
    return int(registers[1]), stores + loads, stack


def find_ptxas() -> str:
    """Return the path of ptxas in the wheel nvidia-cuda-nvcc."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in package.submodule_search_locations or []] if package else []
    found = [path for folder in folders for path in folder.glob("**/bin/ptxas")]
    if not found:
        raise FileNotFoundError("ptxas (wheel nvidia-cuda-nvcc) is not installed: pip install 'kbit[dev]'")
    return str(found[0])


def compile_kernels(
    architecture: tuple[int, int], variants: Sequence[Variant] = VARIANTS
) -> Iterator[tuple[Compiled, str]]:
    """Compile each kernel of each variant once; yield ptxas' report and the PTX."""
    name, seen = f"sm_{architecture[0]}{architecture[1]}", set()
    for variant in variants:
        for launch in list_launches(variant):
            if (launch.kernel, launch.signature, launch.threads) in seen:  # pack and unpack do not depend on the input
                continue
            seen.add((launch.kernel, launch.signature, launch.threads))
            ptx = compile_ptx(launch, architecture)
            kernel = launch.kernel.py_func.__name__
            yield Compiled(name, kernel, str(variant), launch.threads, *assemble(ptx, name)), ptx


def find_versions() -> dict[str, str]:
    """Return the versions of the compilers."""
    return {package: importlib.metadata.version(package) for package in COMPILERS}


def hash_sources() -> str:
    """Return a hash of what decides the kernels: their files, and this one with its inputs."""
    files = [*sorted(Path(kernels.__file__).parent.glob("cuda*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> int:
    rows = [row for architecture in ARCHITECTURES for row, _ in compile_kernels(architecture)]
    for row in rows:
        print(
            f"{row.architecture:7}{row.kernel:15}{row.variant:40}{row.registers:4} registers{row.threads:5} threads"
            f"{row.spilled:4} bytes spilled"
        )
    record = {"versions": find_versions(), "sources": hash_sources(), "kernels": [asdict(row) for row in rows]}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {RESULTS}")
    return int(any(row.spilled or row.stack for row in rows))


if __name__ == "__main__":
    sys.exit(main())
