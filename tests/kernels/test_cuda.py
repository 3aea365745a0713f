"""CUDA kernels: equal to kbit.reference under numba's simulator; compiled for four architectures without a driver.

Simulation needs its own process, since numba decides on import: this file is that process's script too.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kbit import reference
from kbit.datatypes import ADAPTIVE, DATA_TYPES, decision_thresholds, make_codebook
from kbit.kernels import cuda as kernels
from kbit.scales import decode_scales, encode_scales

numba: Any = importlib.import_module("numba")  # Any: it and torch.cuda are only partly annotated
numba_cuda: Any = importlib.import_module("numba.cuda")
torch_cuda: Any = torch.cuda

Array = NDArray[Any]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ARCHITECTURES = [(7, 5), (8, 0), (9, 0), (12, 0)]
REGISTERS_PER_SM = 65536  # on every architecture here


@dataclass(frozen=True)
class Case:
    """One input and quantizer: everything that can select another path through the kernels."""

    data_type: str = "nf"
    bits: int = 4
    block_size: int = 16
    row: int = 104
    n: int = 104
    dtype: str = "float32"
    scale_format: str = "fp16"
    rounding: str = "nearest"
    normalization: str = "absmax"
    skip: int = 0  # elements before the first: the array is then not aligned to a word
    limit: int = 4096  # MAX_FUSED_BLOCK, lowered to have the paths for longer blocks in small tensors

    def __str__(self) -> str:
        rows = f"{self.n}" if self.row == self.n else f"{self.n // self.row}x{self.row}"
        words = [self.data_type + str(self.bits), f"block{self.block_size}", rows, self.dtype, self.scale_format]
        words += [self.rounding, self.normalization] + ["unaligned"] * bool(self.skip)
        words += [f"limit{self.limit}"] * (self.limit != 4096)
        return "-".join(words)


def list_cases() -> list[Case]:
    """Every data type at 2, 3, 4 and 8 bits; block size, layout, dtype, format and rounding take turns beside it."""
    shapes = [(16, 104), (64, 104), (100, 104), (104, 104), (16, 26), (16, 52), (1, 104), (5, 13)]
    turns = [(name, bits) for bits in (2, 3, 4, 8) for name in DATA_TYPES]
    cases = [
        Case(
            name, bits, *shapes[(i + i // 8) % 8], 104, list(DTYPES)[i % 3], ("fp16", "bf16", "fp32")[i // 3 % 3],
            ("nearest", "truncate", "stochastic")[i // 2 % 3], ("absmax", "signed_absmax", "minmax")[i // 5 % 3],
        )
        for i, (name, bits) in enumerate(turns)
    ]  # fmt: skip
    cases += [Case(dtype=dtype, rounding="stochastic", skip=1) for dtype in DTYPES]
    cases += [Case(block_size=64, dtype=dtype, scale_format=f) for dtype in DTYPES for f in ("fp16", "bf16", "fp32")]
    # a thread block for each block, its last one short
    cases += [Case("int", 3, 1200, 2000, 2000, "float16"), Case("dynamic", 4, 4096, 4400, 4400, "bfloat16", "bf16")]
    cases += [Case("float", 4, 4096, 4200, 4200, "float16", "fp32"), Case("int", 8, 4200, 4200, 4200, "float32")]
    # two passes: a thread block for each long block; pieces of a whole tensor; and pieces of pieces
    cases += [Case("float", 4, 72, 200, 200, "float16", limit=64), Case("nf", 3, 300, 300, 300, "bfloat16", limit=64)]
    cases += [Case("int", 4, 272, 272, 272, "float32", limit=16), Case("nf", 4, 64, 100, 200, "float16", limit=16)]
    return cases


CASES = list_cases()
SIMULATED = [str(case) for case in CASES] + ["pack", "special", "tiny"]


# ---- inputs and expectations, from kbit.reference ----


def awkward_values(n: int) -> Array:
    """Normal values of very different scales, with a zero block, ties, both zeros, subnormals and tiny numbers."""
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-7, 4, n)).astype(np.float32)
    x[: n // 5] = 0.0
    x[n // 4 : n // 2] = rng.integers(-14, 15, n // 2 - n // 4) / np.float32(14)
    x[n // 2 : n // 2 + 4] = [1e-41, -1e-41, -0.0, -3e-8]
    return x


def as_words(tensor: torch.Tensor) -> Array:
    words: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return words


def bits_of(array: Array) -> Array:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])


def choose_grid(case: Case, x: Array) -> tuple[Array, Array, Array, Array]:
    """Return scales, offsets, codebook and thresholds."""
    low, high = reference.block_extremes(x, case.row, case.block_size)
    name, tensor = case.data_type, x if case.data_type in ADAPTIVE else None
    table = [-1, 0.3, 0.5, 1] if name == "table" else None
    block_size = 64 if name == "af" else None
    codebook = make_codebook(name, case.bits, tensor=tensor, table=table, block_size=block_size)
    match case.normalization:
        case "minmax":
            scales = (high - low) / (codebook[-1] - codebook[0])
        case "signed_absmax":
            scales = np.where(high >= -low, high, low)
        case _:
            scales = np.maximum(high, -low)
    scales = decode_scales(encode_scales(scales, case.scale_format), case.scale_format)
    offsets = low - codebook[0] * scales if case.normalization == "minmax" else np.zeros_like(scales)
    rounding = "floor" if case.rounding == "stochastic" else case.rounding
    return scales, offsets, codebook, decision_thresholds(codebook, rounding)


def compare(name: str, actual: Array, expected: Array) -> list[str]:
    different = np.flatnonzero(bits_of(actual) != bits_of(expected))
    return [f"{name}: {different.size} of {expected.size} differ, first {different[0]}"] if different.size else []


def check_case(case: Case, put: Any, get: Any) -> list[str]:
    """Return how the kernels differ from the reference; put and get copy an array to and from where they run."""
    with patch.object(kernels, "MAX_FUSED_BLOCK", case.limit):
        return list(find_differences(case, put, get))


def find_differences(case: Case, put: Any, get: Any) -> Iterator[str]:
    tensor = torch.from_numpy(awkward_values(case.n + case.skip)).to(DTYPES[case.dtype])
    x = tensor[case.skip :].float().numpy()
    device_x = put(as_words(tensor))[case.skip :]
    shape, seed = (case.row, case.block_size), 7 if case.rounding == "stochastic" else None
    scales, offsets, codebook, thresholds = choose_grid(case, x)
    device = put(scales), put(offsets)
    low, high = kernels.block_extremes(device_x, *shape)
    yield from compare("low", get(low) + np.float32(0), reference.block_extremes(x, *shape)[0] + np.float32(0))
    yield from compare("high", get(high) + np.float32(0), reference.block_extremes(x, *shape)[1] + np.float32(0))
    codes = reference.quantize(x, scales, offsets, codebook, thresholds, *shape, seed)
    device_codes = kernels.quantize(device_x, *device, codebook, thresholds, *shape, seed)
    yield from compare("quantize", get(device_codes), codes)
    values = reference.dequantize(codes, scales, offsets, codebook, *shape)
    expected = as_words(torch.from_numpy(values).to(DTYPES[case.dtype]))
    out = put(np.zeros_like(as_words(tensor)))[case.skip :]
    kernels.dequantize(put(codes), *device, codebook, *shape, out)
    yield from compare("dequantize", get(out), expected)
    out = put(np.zeros_like(as_words(tensor)))[case.skip :]
    kernels.fake_quantize(device_x, *device, codebook, thresholds, *shape, seed, out)
    yield from compare("fake_quantize", get(out), expected)
    if case.normalization == "absmax" and seed is None:
        out = put(np.zeros_like(as_words(tensor)))[case.skip :]
        kernels.fake_quantize_absmax(device_x, codebook, thresholds, *shape, case.scale_format, out)
        yield from compare("fake_quantize_absmax", get(out), expected)


def check_pack(put: Any, get: Any) -> list[str]:
    differences = []
    for bits in range(2, 9):
        for n in (1, 8, 37):
            codes = np.random.default_rng(n).integers(0, 2**bits, n).astype(np.uint8)
            packed = kernels.pack(put(codes), bits)
            differences += compare(f"pack {bits} {n}", get(packed), reference.pack(codes, bits))
            differences += compare(f"unpack {bits} {n}", get(kernels.unpack(packed, bits, n)), codes)
    return differences


def check_tiny_scales(put: Any, get: Any) -> list[str]:
    """A block whose maximum rounds to 0 in the scale's format keeps the format's smallest number as its scale."""
    x = np.repeat(np.array([3e-9, -1e-8, 1e-42, 4e-41], np.float32), 8)  # 2^-25 is 3e-8 and 2^-134 is 5e-41
    codebook, shape, differences = make_codebook("int", 8), (32, 8), []
    thresholds, largest = decision_thresholds(codebook), np.abs(x[::8])
    for scale_format in ("fp16", "bf16", "fp32"):
        scales = decode_scales(encode_scales(largest, scale_format), scale_format)
        expected = reference.fake_quantize(x, scales, np.zeros_like(scales), codebook, thresholds, *shape)
        out = put(np.zeros_like(x))
        kernels.fake_quantize_absmax(put(x), codebook, thresholds, *shape, scale_format, out)
        differences += compare(scale_format, get(out), expected)
    return differences


def check_special_values(put: Any, get: Any) -> list[str]:
    """A block with NaN or Inf, or a maximum beyond the scale's format, becomes NaN and its neighbours do not."""
    codebook = make_codebook("int", 4)
    x = np.ones(80, np.float32)
    x[[0, 17]] = np.nan, -np.inf
    differences = []
    for dtype in DTYPES:
        x[34] = 65520 if dtype == "float16" else 65505  # the first to be refused: it rounds to Inf, it is beyond 65504
        for block_size in (16, 80):
            tensor = torch.from_numpy(x).to(DTYPES[dtype])
            out = put(as_words(torch.zeros_like(tensor)))
            shape = (80, block_size)
            kernels.fake_quantize_absmax(
                put(as_words(tensor)), codebook, decision_thresholds(codebook), *shape, "fp16", out
            )
            words = torch.from_numpy(get(out))
            values = (words.view(torch.bfloat16) if dtype == "bfloat16" else words).float().numpy()
            expected = np.repeat([np.nan, np.nan, np.nan, 1, 1] if block_size == 16 else [np.nan], block_size)
            if not np.array_equal(values, expected, equal_nan=True):
                differences.append(f"{dtype} {block_size}: {values}")
            low, high = kernels.block_extremes(put(as_words(tensor)), *shape)
            if np.isfinite(get(low) - get(high))[:2].any():
                differences.append(f"{dtype} {block_size}: finite extremes of a block with NaN or Inf")
    return differences


# ---- (a) the simulator ----


def find_shared_array(shared: Any, shape: int, dtype: Any) -> Array:
    """Return a thread block's array for the line that calls this, the same one to all of its threads.

    Takes the place of the simulator's own, which looks the array up and stores a new one in two steps: threads that
    come at the same time each keep an array of their own there. dict.setdefault is one step.
    """
    caller = sys._getframe(1)
    line = caller.f_code.co_filename, caller.f_lineno
    array: Array = shared._allocations.setdefault(line, np.empty(shape, numba.np.numpy_support.as_dtype(dtype)))
    return array


def simulate() -> None:
    """Print what differs, by case; runs in the process that `outcomes` starts."""
    importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared.array = find_shared_array
    warnings.simplefilter("ignore")  # NumPy's, of overflow in integers that are meant to wrap
    sys.setswitchinterval(1e-5)  # seconds; the simulator polls its threads, and would keep them waiting for 5 ms
    results = {str(case): check_case(case, np.array, np.asarray) for case in CASES}
    results["pack"] = check_pack(np.array, np.asarray)
    results["special"] = check_special_values(np.array, np.asarray)
    results["tiny"] = check_tiny_scales(np.array, np.asarray)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    """Differences from the reference, by case, found under the simulator in a process of its own."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_kernels_equal_reference(case: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[case] == []


# ---- (b) the compiler ----


@dataclass(frozen=True)
class Compiled:
    """What ptxas reports of a kernel."""

    name: str
    architecture: tuple[int, int]
    ptx: str
    threads: int
    registers: int
    spilled: int  # bytes
    stack: int


def find_ptxas() -> str:
    """Return the path of the wheel's ptxas, or skip."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in package.submodule_search_locations or []] if package else []
    found = [path for folder in folders for path in folder.glob("**/bin/ptxas")]
    if not found:
        pytest.skip("ptxas (wheel nvidia-cuda-nvcc) is not installed")
    return str(found[0])


def compile_launch(launch: tuple[Any, int, tuple[Any, ...]], architecture: tuple[int, int], folder: Path) -> Compiled:
    """Compile a kernel for the types of the arguments that it was to be started with."""
    kernel, threads, arguments = launch
    signature = tuple(numba.typeof(argument) for argument in arguments)
    ptx, _ = numba_cuda.compile(kernel.py_func, signature, device=False, abi="numba", cc=architecture, output="ptx")
    (folder / "kernel.ptx").write_text(ptx)
    arch = f"-arch=sm_{architecture[0]}{architecture[1]}"
    command = [find_ptxas(), "-v", arch, "-o", str(folder / "kernel.cubin"), str(folder / "kernel.ptx")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert numbers is not None
    assert registers is not None
    stack, stores, loads = map(int, numbers.groups())
    return Compiled(kernel.py_func.__name__, architecture, ptx, threads, int(registers[1]), stores + loads, stack)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int, tuple[Any, ...]]]:
    """Kernel, threads and arguments of each launch, which is written down instead of made; arrays are NumPy's."""
    pytest.importorskip("numba_cuda")
    nvvm = pytest.importorskip("numba.cuda.cudadrv.nvvm")
    if kernels._SIMULATED or not nvvm.is_available():
        pytest.skip("NVVM (wheel nvidia-nvvm) is not installed")
    recorded: list[tuple[Any, int, tuple[Any, ...]]] = []

    def record(kernel: Any, tasks: int, *arguments: Any, threads: int | None = None) -> None:
        recorded.append((kernel, threads or kernels._THREADS_PER_BLOCK, arguments))

    monkeypatch.setattr(kernels, "_SIMULATED", True)  # for the arrays; device functions were made on import
    monkeypatch.setattr(kernels, "_thread_count", lambda: kernels._THREADS_PER_BLOCK)
    monkeypatch.setattr(kernels, "_launch", record)
    return recorded


def launch_all(dtype: str, bits: int, block_size: int, skip: int = 0) -> None:
    """Call each function once, on values whose content does not matter."""
    x = np.zeros(3 * block_size + skip, np.dtype("uint16" if dtype == "bfloat16" else dtype))[skip:]
    codebook = make_codebook("int", bits)
    thresholds = decision_thresholds(codebook)
    shape, ones = (x.size, block_size), np.ones(3, np.float32)
    kernels.block_extremes(x, *shape)
    codes = kernels.quantize(x, ones, ones, codebook, thresholds, *shape, None)
    kernels.quantize(x, ones, ones, codebook, thresholds, *shape, 1)
    kernels.dequantize(codes, ones, ones, codebook, *shape, x)
    kernels.fake_quantize(x, ones, ones, codebook, thresholds, *shape, None, x)
    kernels.fake_quantize(x, ones, ones, codebook, thresholds, *shape, 1, x)
    kernels.fake_quantize_absmax(x, codebook, thresholds, *shape, "fp16", x)
    kernels.unpack(kernels.pack(codes, bits), bits, x.size)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_kernels_compile_without_driver_and_spill_nothing(
    architecture: tuple[int, int],
    launches: list[tuple[Any, int, tuple[Any, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # numba asks the device for its architecture when it compiles a device function
    device = SimpleNamespace(compute_capability=architecture)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
    variants = [("float32", 4, 64, 0), ("float16", 3, 64, 0), ("bfloat16", 4, 4096, 0), ("float16", 8, 4096, 1)]
    for dtype, bits, block_size, skip in variants:
        del launches[:]
        launch_all(dtype, bits, block_size, skip)
        for launch in launches:
            compiled = compile_launch(launch, architecture, tmp_path)
            variant = f"{dtype:8} {bits} bits, block {block_size:4}{', unaligned' if skip else ''}"
            print(
                f"sm_{architecture[0]}{architecture[1]:<2} {compiled.name:14} {variant:36} "
                f"{compiled.registers:3} registers {compiled.threads:4} threads {compiled.spilled} bytes spilled"
            )
            assert compiled.spilled == 0
            assert compiled.stack == 0
            assert compiled.registers * compiled.threads <= REGISTERS_PER_SM
            assert_exact(compiled)


def assert_exact(compiled: Compiled) -> None:
    """No contraction, approximation or flushing to zero; division where values are normalised."""
    arithmetic = re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|cvt)\.\S*f32\S*", compiled.ptx)
    assert not [
        word for word in arithmetic if word.startswith(("fma", "mad", "rcp")) or "approx" in word or "ftz" in word
    ]
    divides = any(word.startswith("div.rn.f32") for word in arithmetic)
    assert divides == (compiled.name in ("encode", "encode_decode", "absmax"))


# ---- (c) a GPU ----


def test_error_without_device() -> None:
    """Nothing falls back to the CPU."""
    if numba_cuda.is_available():
        pytest.skip("there is a CUDA device")
    x, codebook = np.zeros(64, np.float32), make_codebook("int", 4)
    grid = (x[:1], x[:1], codebook, decision_thresholds(codebook), 64, 64)
    calls: list[Callable[[], Any]] = [
        lambda: kernels.block_extremes(x, 64, 64),
        lambda: kernels.quantize(x, *grid),
        lambda: kernels.dequantize(np.zeros(64, np.uint8), x[:1], x[:1], codebook, 64, 64, x),
        lambda: kernels.fake_quantize(x, *grid, None, x),
        lambda: kernels.fake_quantize_absmax(x, *grid[2:], "fp16", x),
        lambda: kernels.pack(np.zeros(64, np.uint8), 4),
        lambda: kernels.unpack(np.zeros(32, np.uint8), 4, 64),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            call()


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not (torch_cuda.is_available() and numba_cuda.is_available()):
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch_cuda.current_device())


LARGE = [
    Case(name, bits, block_size, n, n, dtype, rounding=rounding)
    for name, bits in (("int", 3), ("nf", 4), ("dynamic", 8))
    for block_size, n in ((16, 40960), (64, 40007), (100, 40000), (4096, 40960), (5000, 40000), (40000, 40000))
    for dtype in DTYPES
    for rounding in ("nearest", "stochastic")
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_kernels_on_gpu_equal_reference(case: Case, gpu: torch.device) -> None:
    assert check_case(case, lambda array: torch.from_numpy(array).to(gpu), lambda tensor: tensor.cpu().numpy()) == []


@pytest.mark.gpu
def test_packing_and_special_values_on_gpu(gpu: torch.device) -> None:
    def put(array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(gpu)

    assert check_pack(put, lambda tensor: tensor.cpu().numpy()) == []
    assert check_special_values(put, lambda tensor: tensor.cpu().numpy()) == []
    assert check_tiny_scales(put, lambda tensor: tensor.cpu().numpy()) == []


@pytest.mark.gpu
def test_kernels_use_torchs_current_stream(gpu: torch.device) -> None:
    """A stream that is busy for a while: the result is right only if the kernel waits for it, and not for more."""
    codebook = make_codebook("int", 4)
    x, out = torch.zeros(1 << 20, device=gpu), torch.empty(1 << 20, device=gpu)
    stream = torch_cuda.Stream(gpu)
    stream.wait_stream(torch_cuda.current_stream(gpu))
    with torch_cuda.stream(stream):
        torch_cuda._sleep(100_000_000)
        x.fill_(1)
        kernels.fake_quantize_absmax(x, codebook, decision_thresholds(codebook), x.numel(), 64, "fp16", out)
    stream.synchronize()
    assert bool((out == 1).all())


if __name__ == "__main__":
    simulate()
