"""Products with packed weights on one thread: kbit's layers, torch's F.linear in three dtypes, and bitsandbytes' layer.

    python benchmarks/packed_linear.py [--size 4096] [--rounds 30]

Takes 3 to 10 minutes. Each layer is called as a model calls it. The layers take turns in each round, so that a busy
machine slows all alike. Each has copies of its weight that together are larger than three times the last cache, and
takes another one at each call, as a model with many layers does. The time is the median of the thread's own processor
time: other processes' time is not in it, but the caches and the memory are shared with them, so run it on a quiet
machine. Prints times and ratios, and writes benchmarks/results/packed_linear.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
import torch.nn.functional as F

from kbit import QuantSpec, quantize
from kbit.kernels.simd import find_isa
from kbit.layers.quantized_linear import QuantizedLinear

RESULTS = Path(__file__).parent / "results" / "packed_linear.json"
SPECS = {
    f"{t}{bits}": QuantSpec(bits=bits, data_type=t, block_size=64)
    for t, bits in (*(("nf", bits) for bits in range(2, 9)), ("int", 4), ("int", 8), ("dynamic", 8))
}
LARGEST_CACHE = 32 * 2**20  # bytes, if the system does not say
Call = Callable[[int], Any]


@dataclass(frozen=True)
class Row:
    """One layer at one batch: median and least milliseconds, and the largest error in deviations of the output."""

    name: str
    batch: int
    path: str
    milliseconds: float
    least: float
    error: float | None


def find_cache() -> int:
    """Return the bytes of the last cache."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=LARGEST_CACHE)


def copy_weights(weight: Any, nbytes: int) -> list[Any]:
    """Return so many copies that their sum is larger than three times the cache."""
    return [copy.deepcopy(weight) for _ in range(max(2, math.ceil(3 * find_cache() / nbytes)))]


def start(layers: list[Any], dtype: torch.dtype) -> None:
    """Call each layer once: the first call of a layer prepares its weight."""
    for layer in layers:
        layer(torch.zeros(1, layer.in_features, dtype=dtype))


def list_torch(w: torch.Tensor) -> Iterator[tuple[str, torch.dtype, Callable[[torch.Tensor], Call]]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weights = copy_weights(w.to(dtype), w.numel() * dtype.itemsize)

        def bind(x: torch.Tensor, weights: list[torch.Tensor] = weights) -> Call:
            return lambda i: F.linear(x, weights[i % len(weights)])

        yield f"torch {str(dtype).removeprefix('torch.')}", dtype, bind


def list_kbit(
    w: torch.Tensor, fused_rows: int | None
) -> Iterator[tuple[str, torch.dtype, Callable[[torch.Tensor], Call], QuantizedLinear]]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, spec in SPECS.items():
            q = quantize(w.to(dtype), spec)
            layer = QuantizedLinear.from_codes(q, torch.nn.Linear(1, 1, bias=False))
            layer.fused_rows = fused_rows
            layers = copy_weights(layer, q.nbytes)
            start(layers, dtype)

            def bind(x: torch.Tensor, layers: list[QuantizedLinear] = layers) -> Call:
                return lambda i: layers[i % len(layers)](x)

            yield f"kbit {name} {str(dtype).removeprefix('torch.')}", dtype, bind, layer


def list_bitsandbytes(w: torch.Tensor) -> Iterator[tuple[str, torch.dtype, Callable[[torch.Tensor], Call]]]:
    try:
        import bitsandbytes as bnb
    except ImportError:
        print("bitsandbytes is not installed: skipped")
        return
    made = bnb.nn.Linear4bit(w.shape[1], w.shape[0], False, torch.bfloat16, quant_type="nf4", compress_statistics=False)
    made.weight = bnb.nn.Params4bit(w.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layers = copy_weights(made.to("cpu").eval(), w.numel() // 2 + w.numel() // 16)
    start(layers, torch.bfloat16)

    def bind(x: torch.Tensor) -> Call:
        return lambda i: layers[i % len(layers)](x)

    yield "bitsandbytes nf4 bfloat16", torch.bfloat16, bind


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of the thread that each call took in each round but the first ones, which compile."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-2, rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call(i)
            if i >= 0:
                times[name].append(1000 * (time.thread_time() - start))
    return times


def measure_batch(layers: list[tuple[Any, ...]], batch: int, rounds: int) -> Iterator[Row]:
    x = torch.randn(batch, layers[0][4], generator=torch.Generator().manual_seed(batch))
    paths, errors = {}, {}
    for name, dtype, _, layer, _ in layers:
        if layer is None:
            continue
        paths[name] = layer.choose_path(batch, dtype)
        if dtype == torch.float32:
            exact = x.double() @ layer.dequantize().double().t()
            errors[name] = float((layer(x) - exact).abs().max() / exact.std())
    calls = {name: bind(x.to(dtype)) for name, dtype, bind, _, _ in layers}
    for name, taken in measure(calls, rounds).items():
        yield Row(name, batch, paths.get(name, ""), statistics.median(taken), min(taken), errors.get(name))


def list_ratios(rows: list[Row]) -> Iterator[tuple[str, float]]:
    """Yield what the table is read for: how many times as fast kbit is."""
    times = {(row.name, row.batch): row.milliseconds for row in rows}
    for row in rows:
        if row.name.startswith("kbit"):
            for other in ("torch bfloat16", "torch float16", "torch float32", "bitsandbytes nf4 bfloat16"):
                if (other, row.batch) in times:
                    yield f"{row.name}, batch {row.batch} / {other}", times[other, row.batch] / row.milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--fused-rows", type=int, help="0 measures tiles, and a large number the fused path")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")  # what bitsandbytes advises
    for name in set(SPECS) - set(options.only):
        del SPECS[name]
    w = 0.02 * torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0))
    layers = [(*case, None, options.size) for case in (*list_torch(w), *list_bitsandbytes(w))]
    layers += [(*case, options.size) for case in list_kbit(w, options.fused_rows)]
    rows = [row for batch in options.batches for row in measure_batch(layers, batch, options.rounds)]
    for row in rows:
        error = "" if row.error is None else f"error {row.error:.1e}"
        print(
            f"{row.name:28} batch {row.batch:3} {row.path:6}{row.milliseconds:9.3f} ms, least {row.least:8.3f} {error}"
        )
    ratios = dict(list_ratios(rows))
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}  {name}")
    packages = ("torch", "numba", "bitsandbytes")
    record = {
        "size": options.size, "rounds": options.rounds, "isa": find_isa().name, "processor": read_processor(),
        "cache_bytes": find_cache(), "load": os.getloadavg()[0], "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": [asdict(row) for row in rows], "ratios": ratios,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def read_processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
