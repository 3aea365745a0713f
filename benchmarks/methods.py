"""What each method costs on one layer, and kbit's GPTQ beside GPTQModel's on the same weights and inputs.

    python benchmarks/methods.py [--sizes 1024 2048] [--tokens 8192]

A layer has `size` inputs and outputs; its inputs are correlated and of unequal size. Seconds are CPU seconds of the
process on one thread, the best of three runs, without the forward passes of calibration (which awq and gptq share, and
which cost what the model costs) but with the sums of its inputs' products. Memory is the process' high-water mark
during the call, beyond what it held before. Both are given per million weights.

GPTQModel (pip install gptqmodel, in an environment of its own if its pins disagree) runs its per-layer class on the
CPU, groups of 64, damping 0.01. Its grid is 2^k even steps between each group's extremes with an integer zero point;
kbit's here is the same with a float32 offset. Groups are static: without, GPTQModel takes a group's range from weights
in which the errors of the same 128 columns are not made up for yet, kbit from the current ones. Exit code 1: kbit's
layer error is more than 2% above, or kbit is slower.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbit.methods.awq import quantize_scaled
from kbit.methods.block_scales import BlockScales, find_best_scales
from kbit.methods.config import METHODS, GptqConfig
from kbit.methods.gptq import quantize_weight
from kbit.methods.hqq import find_half_quadratic_scales
from kbit.methods.weight import Weight
from kbit.numerics.quantizer import quantize as quantize_tensor
from kbit.numerics.spec import QuantSpec

RESULTS = Path(__file__).parent / "results" / "methods.json"
BATCH = 2048  # tokens whose products are summed at once, as in calibration
REPEATS = 3
SLACK = 1.02


@dataclass(frozen=True)
class Layer:
    """A layer's weights [out, in] and inputs [tokens, in]."""

    weights: Tensor
    inputs: Tensor

    def error(self, quantized: Tensor) -> float:
        """Return || W X - Q X ||^2 / || W X ||^2."""
        lost = (quantized - self.weights) @ self.inputs.T
        return float(lost.square().sum() / (self.weights @ self.inputs.T).square().sum())

    def sum_products(self) -> Tensor:
        """Return H [1, in, in]."""
        sums = torch.zeros(self.inputs.shape[1], self.inputs.shape[1])
        for x in self.inputs.split(BATCH):
            sums.addmm_(x.T, x)
        return (sums * (2 / len(self.inputs)))[None]


@dataclass(frozen=True)
class Cost:
    """What one quantization of a layer took; seconds and MiB per million weights."""

    method: str
    size: int
    bits: int
    seconds: float
    mebibytes: float
    error: float


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers = {size: make_layer(size, arguments.tokens) for size in arguments.sizes}
    costs = [measure(m, layer, size, QuantSpec(4, "nf")) for size, layer in layers.items() for m in METHODS]
    pairs = []
    if importlib.util.find_spec("gptqmodel") is None:
        print("gptqmodel is not installed: kbit's GPTQ is measured without it")
    else:
        pairs = [measure_beside_gptqmodel(layer, size, bits) for size, layer in layers.items() for bits in (2, 3, 4)]
    print_costs(costs)
    for ours, theirs in pairs:
        print(f"{describe(ours)}; {describe(theirs)}; error {ours.error / theirs.error:.3f} of its, "
              f"{theirs.seconds / ours.seconds:.2f} times as fast")  # fmt: skip
    write(costs, pairs)
    return int(any(o.error > SLACK * t.error or o.seconds > t.seconds for o, t in pairs))


def make_layer(size: int, tokens: int) -> Layer:
    """Return a seeded random layer."""
    generator = torch.Generator().manual_seed(size)
    mix = torch.randn(size, size, generator=generator) * torch.rand(size, generator=generator)
    inputs = torch.randn(tokens, size, generator=generator) @ mix / size**0.5
    return Layer(0.02 * torch.randn(size, size, generator=generator), inputs)


def quantize(method: str, layer: Layer, spec: QuantSpec, options: GptqConfig) -> Tensor:
    """Return the layer's weights quantized by a method of kbit."""
    weight = Weight("w", layer.weights, spec)
    match method:
        case "awq":
            return quantize_scaled(weight, layer.sum_products())[0].dequantize()
        case "gptq":
            return quantize_weight(weight, layer.sum_products(), options)[0].dequantize()
        case "mse" | "hqq":
            find_scales = find_best_scales if method == "mse" else find_half_quadratic_scales
            matrix = weight.copy_matrix()
            blocks = BlockScales(matrix, spec)
            return blocks.encode(matrix, find_scales(matrix, blocks), matrix.shape, matrix.dtype).dequantize()
        case _:
            return quantize_tensor(layer.weights, spec).dequantize()


def measure(method: str, layer: Layer, size: int, spec: QuantSpec, options: GptqConfig | None = None) -> Cost:
    """Measure a method of kbit on a layer."""
    return time_call(lambda: quantize(method, layer, spec, options or GptqConfig()), method, layer, size, spec.bits)


def measure_beside_gptqmodel(layer: Layer, size: int, bits: int) -> tuple[Cost, Cost]:
    """Measure GPTQ of kbit and of GPTQModel on the same even grid."""
    table = tuple(np.linspace(-1, 1, 2**bits).tolist())
    spec = QuantSpec(bits, "table", table=table, normalization="minmax", layout="row", scale_format="fp32")
    ours = measure("gptq", layer, size, spec, GptqConfig(static_groups=True))
    return ours, time_call(lambda: quantize_by_gptqmodel(layer, bits), "gptqmodel", layer, size, bits)


def quantize_by_gptqmodel(layer: Layer, bits: int) -> Tensor:
    """Return the layer's weights quantized by GPTQModel's per-layer class."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = torch.nn.Linear(*layer.weights.T.shape, bias=False)
    linear.weight.data = layer.weights.clone()
    config = QuantizeConfig(
        bits=bits,
        group_size=64,
        sym=False,
        desc_act=False,
        static_groups=True,
        act_group_aware=False,
        damp_percent=0.01,
    )
    gptq: Any = GPTQ(linear, config)
    gptq.quantizer.configure(perchannel=True)
    for i, x in enumerate(layer.inputs.split(BATCH)):
        gptq.add_batch(x[None], None, batch_index=i)
    quantized: Tensor = gptq.quantize()[0]
    return quantized


def time_call(function: Callable[[], Tensor], method: str, layer: Layer, size: int, bits: int) -> Cost:
    """Return the best CPU time of some calls, and the memory of one more."""
    quantized, seconds = function(), []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    before = reset_peak_memory()
    function()
    million = layer.weights.numel() / 1e6
    extra = (read_status("VmHWM") - before) / 2**10
    return Cost(method, size, bits, min(seconds) / million, extra / million, layer.error(quantized))


def reset_peak_memory() -> int:
    """Set the high-water mark to what is resident now, and return that, in KiB (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed is not this one's
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_status(name: str) -> int:
    """Return a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def describe(cost: Cost) -> str:
    """Return one measurement in words."""
    return f"{cost.method} {cost.size} x {cost.size}, {cost.bits} bits: {cost.seconds:.3f} s, {cost.mebibytes:.1f} MiB"


def print_costs(costs: list[Cost]) -> None:
    """Print a table of kbit's methods."""
    print(
        f"{'method':8} {'size':>5} {'s / million':>12} {'MiB / million':>14} {'layer error':>12}   (nf4, blocks of 64)"
    )
    for cost in costs:
        print(f"{cost.method:8} {cost.size:5} {cost.seconds:12.3f} {cost.mebibytes:14.1f} {cost.error:12.5f}")


def write(costs: list[Cost], pairs: list[tuple[Cost, Cost]]) -> None:
    """Write the record."""
    load = os.getloadavg()[0]
    versions = {name: version(name) for name in ("torch", "numba", *(["gptqmodel"] if pairs else []))}
    record = {
        "versions": versions,
        "cores": os.cpu_count(),
        "load": round(load, 1),
        "costs": [asdict(c) for c in costs],
    }
    record["beside_gptqmodel"] = [{"kbit": asdict(ours), "gptqmodel": asdict(theirs)} for ours, theirs in pairs]
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
