"""Int8 linear layers beside float32 and bitsandbytes; what finding outliers costs; memory of the analysis of features.

    python benchmarks/outliers.py

Products: 1024 tokens x 4096 x 4096, random values, 4 input dimensions beyond the threshold; each implementation in
turn, median CPU seconds of the process on one thread (a machine that others use must not count). bitsandbytes' CPU path
computes its float16 result of float16 inputs.

Proxy: CPU seconds to choose 2% of the dimensions of a random OPT of OPT-125M's shape, over those of quantizing it
(3-bit NormalFloat, blocks of 64) without outliers; and of quantizing it with them.

Features: bytes that are kept of a text of 8 and of 64 windows, streamed through nano-opt-1m, and its CPU seconds.

Prints, and writes benchmarks/results/outliers.json. Exit code 1: a decomposed product takes more than twice the float32
one, or choosing adds 10% or more to quantization.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from kbit.data.windows import Windows
from kbit.evaluation.outlier_features import Observations, observe
from kbit.evaluation.token_budget import TokenBudget
from kbit.layers.int8_linear import Int8Linear
from kbit.layers.int8_schemes import SCHEMES
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.methods.report import plan_quantization
from kbit.methods.selection.outlier_columns import choose_outliers
from kbit.methods.weight import Weight
from kbit.models.loading import load_model
from kbit.silence import silence_libraries

RESULTS = Path(__file__).parent / "results" / "outliers.json"
SHAPE = (1024, 4096, 4096)  # tokens, inputs, outputs
OUTLIERS = 4  # of 4096 dimensions: the paper's 0.1%
Record = dict[str, Any]


def time_in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each call; all in turn, so that a slow moment hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def compare_products(repeats: int) -> dict[str, float]:
    """Time a float32 linear layer, bitsandbytes' and every int8 method of kbit's."""
    tokens, inputs, outputs = SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator)
    x[:, :OUTLIERS] *= 30
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    calls: dict[str, Callable[[], object]] = {"float32": lambda: F.linear(x, weight)}
    for method in SCHEMES:
        config = QuantConfig(bits=8, method=method)
        layer = Int8Linear(Weight("weight", weight, config.spec), None, config)
        calls[method] = lambda layer=layer: layer(x)  # type: ignore[misc]
    try:
        import bitsandbytes
    except ImportError:
        print("bitsandbytes is not installed: left out")
    else:
        state = bitsandbytes.MatmulLtState()
        state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
        half, half_weight = x.half(), weight.half()
        calls["bitsandbytes llm_int8"] = lambda: bitsandbytes.matmul(half, half_weight, state=state)
    with torch.no_grad():
        return time_in_turn(calls, repeats)


def time_proxy(repeats: int) -> Record:
    """Time choosing outliers and quantizing, on a random model of OPT-125M's shape."""
    config = transformers.OPTConfig()  # its defaults are OPT-125M's
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    plain = QuantConfig(bits=3, data_type="nf", block_size=64)
    kept = QuantConfig(bits=3, data_type="nf", block_size=64, outlier_fraction=0.02)
    names = [t.name.split(" = ")[0] for t in plan_quantization(model, plain).tensors if t.quantized]

    def quantize(quant: QuantConfig) -> None:
        quantize_model(model, quant)
        del model.kbit_quantized  # the values do not matter here

    calls = {
        "choose": lambda: choose_outliers(model, names, kept),
        "quantize": lambda: quantize(plain),
        "quantize with outliers": lambda: quantize(kept),
    }
    seconds = time_in_turn(calls, repeats)
    return {"cpu_seconds": seconds, "share": round(seconds["choose"] / seconds["quantize"], 4)}


def count_bytes(seen: Observations) -> int:
    """Return what the observations of a text take."""
    tensors = [t for extremes in seen.inputs.values() for t in (extremes.high, extremes.low, extremes.large)]
    assert seen.histogram is not None
    return sum(t.nbytes for t in [*tensors, seen.histogram])


def measure_streaming() -> list[Record]:
    """Return the bytes kept, and CPU seconds per token, of two lengths of text."""
    model = load_model("nano-opt-1m").model
    rows = []
    for count in (8, 64):
        tokens = torch.randint(1, 1000, (count, 256), generator=torch.Generator().manual_seed(0))
        start = time.process_time()
        seen = observe(model, Windows("random", "", tokens, 1.0), TokenBudget(1024), 3.0)
        seconds = time.process_time() - start
        rows.append(
            {"tokens": seen.positions, "bytes_kept": count_bytes(seen), "seconds_per_token": seconds / seen.positions}
        )
    return rows


def main() -> None:
    """Measure all three, print and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    products = compare_products(options.repeats)
    for name, seconds in products.items():
        print(f"{name:24} {seconds:.3f} s   {seconds / products['float32']:.2f} of float32", flush=True)
    proxy = time_proxy(options.repeats)
    print(f"proxy: {proxy['cpu_seconds']}, choosing is {proxy['share']:.1%} of quantizing", flush=True)
    streaming = measure_streaming()
    print(*(f"features: {row}" for row in streaming), sep="\n")
    record = {
        "shape": SHAPE,
        "products_cpu_seconds": products,
        "proxy": proxy,
        "streaming": streaming,
        "load_average": os.getloadavg()[1],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes", "transformers")},
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if products["llm_int8"] > 2 * products["float32"] or proxy["share"] >= 0.1:
        sys.exit("a bound of this benchmark's description is broken")


if __name__ == "__main__":
    main()
