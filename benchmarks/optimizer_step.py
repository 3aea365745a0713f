"""A step of AdamW with k-bit states on the CPU: kbit beside torch (fused, foreach), bitsandbytes and torchao.

    python benchmarks/optimizer_step.py [--size 4096] [--rounds 9] [--threads 1 2]

Takes 2 to 5 minutes. One parameter of size x size float32 values. The optimizers take turns in each round, so that a
busy machine slows all alike. The time of one thread is the processor time of the process, which other processes are
not in, though they share caches and memory. The time of several threads is that of the clock. A ratio is the median
over rounds, and beside it stands the ratio of the least times. Steps before the first round compile and create the
states. The bytes of states are those of the tensors that hold them. bitsandbytes and torchao take part where they are
installed. torchao compiles its step and needs a C++ compiler. Writes benchmarks/results/optimizer_step.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from packed_linear import read_processor

from kbit.kernels.simd import find_isa
from kbit.numerics.spec import QuantSpec
from kbit.optim import AdamW, States
from kbit.optim.states import STATES

RESULTS = Path(__file__).parent / "results" / "optimizer_step.json"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
BASE = "torch fused 32-bit"
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def list_kbit() -> Iterator[tuple[str, Make]]:
    for name in ("8bit", "4bit", "32bit"):
        yield f"kbit {name}", lambda params, name=name: AdamW(params, state=name, **OPTIONS)
    wide = QuantSpec(bits=8, data_type="dynamic", block_size=2048, scale_format="fp32")
    states = States(wide, QuantSpec(8, "dynamic", block_size=2048, scale_format="fp32", signed=False, zero=False))
    yield "kbit 8bit block 2048", lambda params: AdamW(params, state=states, **OPTIONS)
    ints = STATES["8bit"].momentum, QuantSpec(4, "int", block_size=256, scale_format="fp32", signed=False, zero=False)
    yield "kbit 8bit momentum, int4 variance", lambda params: AdamW(params, state=States(*ints), **OPTIONS)


def list_others() -> Iterator[tuple[str, Make]]:
    yield BASE, lambda params: torch.optim.AdamW(params, fused=True, **OPTIONS)
    yield "torch foreach 32-bit", lambda params: torch.optim.AdamW(params, foreach=True, **OPTIONS)
    try:
        import bitsandbytes

        yield "bitsandbytes 8-bit", lambda params: bitsandbytes.optim.AdamW8bit(params, **OPTIONS)
    except ImportError:
        print("bitsandbytes is not installed: skipped")
    try:
        from torchao.optim import AdamW4bit, AdamW8bit

        yield "torchao 8-bit, compiled", lambda params: AdamW8bit(params, **OPTIONS)
        yield "torchao 4-bit, compiled", lambda params: AdamW4bit(params, **OPTIONS)
    except ImportError:
        print("torchao is not installed: skipped")


def count_bytes(value: Any) -> int:
    """Return the bytes of a state tensor, which torchao makes of several."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return 0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        tables = {"qmap"}  # one table for all states
        return sum(count_bytes(getattr(value, name)) for name in names if name not in tables)
    is_table = value.numel() <= 256
    return 0 if is_table else value.nbytes


def measure(threads: int, size: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each optimizer's step in each round, and the bytes of its states for a parameter."""
    torch.set_num_threads(threads)
    gradient = 1e-3 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    entries, taken = {}, {}
    for name, make in (*list_others(), *list_kbit()):
        p = torch.nn.Parameter(torch.zeros(size, size))
        p.grad = gradient
        try:
            optimizer = make([p])
            for _ in range(2):
                optimizer.step()
        except Exception as error:  # such as torchao without a compiler
            print(f"{name} does not run: {type(error).__name__}: {str(error)[:200]}")
            continue
        entries[name], taken[name] = (p, optimizer), []
    clock = time.process_time if threads == 1 else time.perf_counter
    for _ in range(rounds):
        for name, (_, optimizer) in entries.items():
            start = clock()
            optimizer.step()
            taken[name].append(clock() - start)
    states = {
        name: sum(count_bytes(value) for value in optimizer.state[p].values()) / p.numel()
        for name, (p, optimizer) in entries.items()
    }
    return taken, states


def compare(taken: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return how many times the base's time each takes: the median over rounds, and of the least times."""
    return {
        name: {
            "median": statistics.median(t / b for t, b in zip(times, taken[base], strict=True)),
            "least": min(times) / min(taken[base]),
        }
        for name, times in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what the other libraries advise
    load, runs = os.getloadavg()[0], {}
    for threads in options.threads:
        taken, states = measure(threads, options.size, options.rounds)
        ratios = compare(taken, BASE)
        print(f"{threads} threads, {options.size**2 / 1e6:.1f} million parameters")
        for name, times in taken.items():
            row = f"{1000 * min(times):9.1f} ms, {ratios[name]['median']:6.2f} times {BASE}"
            print(f"  {name:34}{row} (least {ratios[name]['least']:.2f}), {states[name]:.4f} bytes a parameter")
        runs[str(threads)] = {"seconds": taken, "ratios": ratios, "state_bytes_per_parameter": states}
    packages = ("torch", "numba", "bitsandbytes", "torchao")
    record = {
        "size": options.size, "rounds": options.rounds, "isa": find_isa().name, "processor": read_processor(),
        "load_before": load, "versions": {name: find_version(name) for name in packages}, "threads": runs,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {options.out}")


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
