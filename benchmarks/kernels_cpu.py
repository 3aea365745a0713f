"""CPU quantizers side by side: kbit, bitsandbytes, torchao, HQQ, optimum-quanto and torch's copy, in one run.

    python benchmarks/kernels_cpu.py [--size 4096] [--repeats 7]

Each is called as its users call it: a weight in, the packed tensor or the weight out. (fake_quantize_ writes into the
weight itself, as kbit does when it quantizes a model.) GB/s is bytes of the float weight divided by the median time;
every library takes its turn in each round, so that a busy machine slows all alike. A library that is not installed is
skipped. Where memory for the result comes from decides as much as the arithmetic, so all is measured twice: "fresh",
each result in pages that the kernel has to clear first, which is what glibc does with large results; and "warm", in
memory of the process that is used again. Prints ratios and writes benchmarks/results/kernels_cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kbit import QuantSpec, dequantize, fake_quantize, quantize
from kbit.numerics.quantizer import fake_quantize_

RESULTS = Path(__file__).parent / "results" / "kernels_cpu.json"
BITS = (3, 4, 5, 6, 8)
BLOCK_SIZES = (64, 4096)
DTYPES = (torch.float32, torch.bfloat16)
PEERS = ("bitsandbytes", "torchao", "hqq", "optimum-quanto")

# glibc reads these at the start of a process; set, they also keep it from changing its mind on the way.
MEMORY = {
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
    "warm": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)},
}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One quantizer of one library: how it is called, and what for."""

    library: str
    name: str
    operation: str
    call: Call


@dataclass(frozen=True)
class Row:
    """One measured operation; block_size 0 where there are no blocks."""

    memory: str
    library: str
    name: str
    operation: str
    dtype: str
    block_size: int
    milliseconds: float
    gigabytes_per_second: float


def kbit_cases(x: torch.Tensor, block_size: int) -> Iterator[Case]:
    specs = [QuantSpec(bits=bits, data_type="nf", block_size=block_size) for bits in BITS]
    specs += [QuantSpec(bits=4, data_type=t, block_size=block_size) for t in ("int", "float", "dynamic", "quantile")]
    specs += [QuantSpec(bits=8, data_type=t, block_size=block_size) for t in ("int", "dynamic")]
    own = x.clone()
    for spec in specs:
        name, q = f"{spec.data_type}{spec.bits}", quantize(x, spec)
        yield Case("kbit", name, "quantize", lambda spec=spec: quantize(x, spec))
        yield Case("kbit", name, "dequantize", lambda q=q: dequantize(q))
        yield Case("kbit", name, "fake_quantize", lambda spec=spec: fake_quantize(x, spec))
        yield Case("kbit", name, "fake_quantize_", lambda spec=spec: fake_quantize_(own, spec))


def bitsandbytes_cases(x: torch.Tensor, block_size: int) -> Iterator[Case]:
    import bitsandbytes.functional as bnb

    for kind in ("nf4", "fp4"):
        four = bnb.quantize_4bit(x, blocksize=block_size, quant_type=kind)
        yield Case(
            "bitsandbytes",
            kind,
            "quantize",
            lambda kind=kind: bnb.quantize_4bit(x, blocksize=block_size, quant_type=kind),
        )
        yield Case("bitsandbytes", kind, "dequantize", lambda four=four: bnb.dequantize_4bit(*four))
    eight = bnb.quantize_blockwise(x, blocksize=block_size)
    yield Case("bitsandbytes", "dynamic8", "quantize", lambda: bnb.quantize_blockwise(x, blocksize=block_size))
    yield Case("bitsandbytes", "dynamic8", "dequantize", lambda: bnb.dequantize_blockwise(*eight))


def torchao_cases(x: torch.Tensor, block_size: int) -> Iterator[Case]:
    from torchao.quantization import quant_primitives as ao

    block, limits = (1, block_size), (-8, 7)

    def quantize_int4() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, zero = ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, block, torch.int8, *limits)
        return ao.quantize_affine(x, block, scale, zero, torch.int8, *limits), scale, zero

    q, scale, zero = quantize_int4()
    yield Case("torchao", "int4", "quantize", quantize_int4)
    yield Case(
        "torchao", "int4", "dequantize",
        lambda: ao.dequantize_affine(q, block, scale, zero, torch.int8, *limits, output_dtype=x.dtype),
    )  # fmt: skip


def hqq_cases(x: torch.Tensor, block_size: int) -> Iterator[Case]:
    from hqq.core.quantize import Quantizer

    def quantize_int4() -> Any:
        return Quantizer.quantize(
            x, nbits=4, group_size=block_size, optimize=False, device="cpu", compute_dtype=x.dtype
        )

    q = quantize_int4()
    yield Case("hqq", "int4", "quantize", quantize_int4)
    yield Case("hqq", "int4", "dequantize", lambda: Quantizer.dequantize(*q))


def quanto_cases(x: torch.Tensor, block_size: int) -> Iterator[Case]:
    from optimum.quanto import MaxOptimizer, qint4
    from optimum.quanto.tensor.weights.quantization import quantize_weight

    def quantize_int4() -> Any:
        scale, shift = MaxOptimizer()(x, qint4, axis=0, group_size=block_size)
        return quantize_weight(x, qint4, axis=0, scale=scale, shift=shift, group_size=block_size)

    q = quantize_int4()
    yield Case("optimum-quanto", "int4", "quantize", quantize_int4)
    yield Case("optimum-quanto", "int4", "dequantize", q.dequantize)


CASES: dict[str, Callable[[torch.Tensor, int], Iterator[Case]]] = {
    "kbit": kbit_cases,
    "bitsandbytes": bitsandbytes_cases,
    "torchao": torchao_cases,
    "hqq": hqq_cases,
    "optimum-quanto": quanto_cases,
}


def copy_cases(x: torch.Tensor) -> Iterator[Case]:
    target = x.clone()
    yield Case("torch", "copy_", "copy", lambda: target.copy_(x))
    yield Case("torch", "clone", "copy", x.clone)


def list_cases(x: torch.Tensor, block_size: int, libraries: list[str]) -> list[Case]:
    cases = list(copy_cases(x))
    for library in libraries:
        cases += CASES[library](x, block_size)
    return cases


def measure(cases: list[Case], repeats: int) -> list[float]:
    """Return the median milliseconds of each case; all take one turn in each round."""
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(repeats + 1):
        for case, taken in zip(cases, times, strict=True):
            start = time.perf_counter()
            case.call()
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]  # the first round compiles and warms up


def list_rows(memory: str, size: int, repeats: int, libraries: list[str]) -> Iterator[Row]:
    for dtype in DTYPES:
        for block_size in BLOCK_SIZES:
            x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
            cases = list_cases(x, block_size, libraries)
            for case, milliseconds in zip(cases, measure(cases, repeats), strict=True):
                speed = x.nbytes / milliseconds / 1e6
                name = str(dtype).removeprefix("torch.")
                block = 0 if case.library == "torch" else block_size
                yield Row(memory, case.library, case.name, case.operation, name, block, milliseconds, speed)


def measure_peak_memory() -> dict[str, float]:
    """Return the share of 256 MB of bfloat16 that quantizing takes in addition, in a fresh process each (Linux)."""
    peaks = {}
    for operation in ("fake_quantize", "fake_quantize_"):
        code = (
            "import re, torch; from pathlib import Path; from kbit import QuantSpec\n"
            "from kbit.numerics.quantizer import fake_quantize, fake_quantize_\n"
            "def peak():\n"  # not ru_maxrss, which a process inherits from the one that started it
            "    status = Path('/proc/self/status').read_text()\n"
            "    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status)[1])\n"
            "spec = QuantSpec(bits=4, data_type='nf', block_size=64)\n"
            f"{operation}(torch.ones(4096, dtype=torch.bfloat16), spec)\n"
            "x = torch.ones(2**27, dtype=torch.bfloat16)\n"
            "before = peak()\n"
            f"{operation}(x, spec)\n"
            "print((peak() - before) / x.nbytes)"
        )
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        peaks[operation] = float(output)
    return peaks


def measure_first_call() -> dict[str, float]:
    """Return the seconds of the imports and of the first quantize, in a process that finds the kernels compiled."""
    code = (
        "import time; start = time.perf_counter(); import torch; from kbit import QuantSpec, quantize; "
        "import kbit.numerics.quantizer; imported = time.perf_counter()\n"
        "quantize(torch.randn(4096), QuantSpec(bits=4, data_type='nf', block_size=64))\n"
        "print(imported - start, time.perf_counter() - imported)"
    )
    for _ in range(2):  # the first process may have to compile
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    imports, first = map(float, output.split())
    return {"import": imports, "first_quantize": first}


def list_ratios(rows: list[Row], libraries: list[str]) -> Iterator[tuple[str, float]]:
    """Yield what the table is read for, of the rows of one kind of memory and one dtype."""
    speeds = {(r.library, r.name, r.operation, r.block_size): r.gigabytes_per_second for r in rows}
    nf4 = {o: speeds["kbit", "nf4", o, 64] for o in ("quantize", "dequantize", "fake_quantize", "fake_quantize_")}
    for library in libraries[1:]:
        other = "nf4" if library == "bitsandbytes" else "int4"
        for operation in ("quantize", "dequantize"):
            ratio = nf4[operation] / speeds[library, other, operation, 64]
            yield f"kbit nf4 {operation} / {library} {other} {operation}, block 64", ratio
    for operation in nf4:
        ours = {key: v for key, v in speeds.items() if key[0] == "kbit" and key[2] == operation}
        fixed = [v for key, v in ours.items() if key[1] != "quantile4"]
        yield f"kbit {operation}, fastest / slowest type, bits and block", max(fixed) / min(fixed)
        yield f"kbit {operation}, the same with quantile, whose table is made first", max(fixed) / min(ours.values())
    for operation in ("fake_quantize", "fake_quantize_"):
        yield f"kbit nf4 {operation} / quantize, block 64", nf4[operation] / nf4["quantize"]
    for operation, speed in nf4.items():
        for copy in ("copy_", "clone"):
            yield f"kbit nf4 {operation}, block 64 / torch {copy}", speed / speeds["torch", copy, "copy", 0]


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        print(f"{package} is not installed: skipped")
        return False
    return True


def run_child(memory: str, size: int, repeats: int, libraries: list[str]) -> list[Row]:
    """Measure everything in a process of its own, which gets its memory in this way."""
    command = [sys.executable, __file__, "--size", str(size), "--repeats", str(repeats), "--memory", memory]
    environment = os.environ | MEMORY[memory] | {"KBIT_BENCHMARK_LIBRARIES": " ".join(libraries)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        rows = []
        for line in child.stdout:
            if line.startswith("{"):
                rows.append(Row(**json.loads(line)))
                print_row(rows[-1])
    if child.returncode:
        raise SystemExit(f"the measurement with {memory} memory ended with exit code {child.returncode}")
    return rows


def print_row(row: Row) -> None:
    print(
        f"{row.memory:7}{row.dtype:9}{row.block_size or '':>6}  {row.library:15}{row.name:10}{row.operation:15}"
        f"{row.milliseconds:9.2f}{row.gigabytes_per_second:8.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight (default 4096)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=sorted(MEMORY), help=argparse.SUPPRESS)  # the process that measures
    arguments = parser.parse_args()
    if arguments.size % 4096:
        parser.error(f"--size {arguments.size} is not a multiple of 4096, the largest block")
    if arguments.memory is not None:
        libraries = os.environ["KBIT_BENCHMARK_LIBRARIES"].split()
        for row in list_rows(arguments.memory, arguments.size, arguments.repeats, libraries):
            print(json.dumps(asdict(row)), flush=True)
        return 0
    libraries = ["kbit", *filter(is_installed, PEERS)]
    versions = {package: importlib.metadata.version(package) for package in ("torch", "numba", "numpy", *libraries[1:])}
    record: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": versions,
        "size": arguments.size,
        "repeats": arguments.repeats,
    }
    print(record)
    print(f"{'memory':7}{'dtype':9}{'block':>6}  {'library':15}{'type':10}{'operation':15}{'ms':>9}{'GB/s':>8}")
    rows = [r for memory in MEMORY for r in run_child(memory, arguments.size, arguments.repeats, libraries)]
    ratios: dict[str, dict[str, float]] = {}
    for memory in MEMORY:
        for dtype in ("float32", "bfloat16"):
            of_kind = [r for r in rows if r.memory == memory and r.dtype == dtype]
            ratios[f"{dtype}, {memory} memory"] = dict(list_ratios(of_kind, libraries))
    for kind, of_kind in ratios.items():
        print(f"\n{kind}")
        for name, ratio in of_kind.items():
            print(f"  {ratio:8.2f}  {name}")
    memory_shares, seconds = measure_peak_memory(), measure_first_call()
    print(f"\npeak memory beyond a 256 MB bfloat16 weight, as a share of it: {memory_shares}")
    print(f"seconds in a second process: {seconds}")
    record |= {"ratios": ratios, "peak_memory": memory_shares, "second_process_seconds": seconds}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
