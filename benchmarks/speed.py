"""How good the measurement of time is: its overhead beside a bare loop, and how much repeated measurements differ.

    python benchmarks/speed.py [--model nano-neox-3m] [--rounds 40] [--repeats 5]

The overhead is that of `kbit bench` and eval.speed, which time with one function. A loop without any clock generates
the same tokens in turns with it. The time is the thread's own processor time, without that of other processes.
Reported is the median of the rounds' ratios. Then `kbit bench` measures the same variants again and again, and the
spread of their medians is reported: (largest - smallest) / median. It is the machine's more than kbit's, so the record
says how busy the machine was, and how far its fixed product moved. Writes benchmarks/results/speed.json. Exit code 1:
the overhead is 2% or more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch

from kbit.checkpoints.loading import load_model
from kbit.costs.bench import Variant, bench_model, make_rival, make_variant
from kbit.evaluation.config import SpeedConfig
from kbit.evaluation.speed.generation import Workload, generate
from kbit.evaluation.speed.timing import make_clock
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig

RECORD: Final = Path(__file__).parent / "results" / "speed.json"
ALLOWED: Final = 0.02


@torch.no_grad()
def run_bare(model: Any, work: Workload, tokens: torch.Tensor) -> None:
    """Generate as a user's own loop does."""
    output = model(tokens[:, : work.prompt], use_cache=True, logits_to_keep=1)
    for place in range(work.prompt, work.prompt + work.new):
        output.logits[:, -1].argmax(-1)
        output = model(tokens[:, place : place + 1], cache=output.cache, use_cache=True)
    output.logits[:, -1].argmax(-1)


def measure_overhead(name: str, rounds: int) -> dict[str, float]:
    """Return the ratios of the timed loop's time to the bare one's: the median, and the middle half of them."""
    model, work = load_model(name).model, Workload(1, 64, 16)
    tokens, clock = work.draw_tokens(model), make_clock("cpu")
    ratios = []
    for number in range(-2, rounds):
        taken = {}
        for way in ("bare", "timed") if number % 2 else ("timed", "bare"):
            start = time.thread_time()
            run_bare(model, work, tokens) if way == "bare" else generate(model, work, tokens, clock)
            taken[way] = time.thread_time() - start
        if number >= 0:
            ratios.append(taken["timed"] / taken["bare"])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def measure_spread(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return the spread of repeated medians of milliseconds per token, by variant, and that of the fixed product."""
    model = ModelConfig(name)
    variants: list[Variant] = [make_variant(model, QuantConfig(bits=bits), "cpu") for bits in (3, 4)]
    variants += [make_rival(model, dtype, "cpu") for dtype in ("bf16", "fp32")]
    config = SpeedConfig(measure=True, batches=(1, 8), prompt=64, new=16, repetitions=9)
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for one in bench_model(variants, config, make_clock):
            for m in one.measurements:
                if m.metric in ("ms_per_token", "matmul_gigaflops"):
                    found.setdefault(f"{one.variant.precision} {m.task} {m.metric}", []).append(m.value)
    return {
        label: {"median": statistics.median(values), "spread": (max(values) - min(values)) / statistics.median(values)}
        for label, values in found.items()
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-neox-3m")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    overhead = measure_overhead(options.model, options.rounds)
    print(
        f"timed / bare: {overhead['median']:.4f} ({overhead['lower_quartile']:.4f} to {overhead['upper_quartile']:.4f})"
    )
    spread = measure_spread(options.model, options.repeats)
    for label, numbers in spread.items():
        print(f"{label:60} {numbers['median']:9.3f}  spread {numbers['spread']:.1%}")
    record = {
        "model": options.model, "load": os.getloadavg()[0], "overhead": overhead, "repeats": options.repeats,
        "spread": spread,
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if overhead["median"] - 1 >= ALLOWED:
        sys.exit(f"the overhead is {overhead['median'] - 1:.1%}")


if __name__ == "__main__":
    main()
