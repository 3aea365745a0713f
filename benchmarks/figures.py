"""All figures from a store of 35,000 experiments: CPU seconds for each, and for all.

    OPENBLAS_NUM_THREADS=1 python benchmarks/figures.py [--experiments 35000]

`kbit figures` sets the same number of threads. The store is SYNTHETIC and says so in every row: its models, families,
keys and text are named synthetic-*, each value
has the column synthetic = True, and its cross entropies follow a formula with noise. It exists in memory alone, so
nothing can take it for results. The script prints a table and writes benchmarks/results/figures.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.registry import FIGURES, save_figures
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS

RESULTS = Path(__file__).parent / "results" / "figures.json"
SYNTHETIC = "synthetic"
TASKS = ("lambada", "piqa", "winogrande", "hellaswag")
SIZES = tuple(int(n) for n in np.geomspace(2e7, 1.7e11, 10))
PRECISIONS = (3, 4, 5, 6, 7, 8)
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("int", "float", "dynamic", "quantile", "nf", "af", "learned")
SCALES = ("fp16", "fp32", "bf16", "dq8")  # settings beyond the paper's, to reach 35,000


def list_settings() -> Iterator[dict[str, Any]]:
    """Yield the quantizers of one model: exponents, GPTQ, outliers, scales x data types x blocks x precisions."""
    for bits in PRECISIONS:
        for exponent in set(range(1, bits)) - {PAPER_EXPONENT_BITS[bits]}:
            yield {"bits": bits, "data_type": "float", "block_size": 64, "exponent_bits": exponent}
    for bits, block in itertools.product((2, 3, 4), (64, 256, 1024)):
        yield {"bits": bits, "data_type": "int", "block_size": block, "method": "gptq"}
        yield {"bits": bits, "data_type": "float", "block_size": block, "outlier_fraction": 0.02}
    for scale, bits, kind, block in itertools.product(SCALES, PRECISIONS, TYPES, BLOCKS):
        yield {"bits": bits, "data_type": kind, "block_size": block, "scale_format": scale}


def list_experiments(count: int) -> pd.DataFrame:
    """Return `count` experiments over five families, the baselines first, then the settings in order."""
    settings = [{"bits": 16, "method": "none"}, *list_settings()]
    rows = []
    for setting in settings:
        for family, parameters in itertools.product(range(5), SIZES):
            if len(rows) < count:
                rows.append(setting | {"family": f"{SYNTHETIC}-{family}", "parameters": parameters})
    if len(rows) < count:
        raise ValueError(f"--experiments={count}: at most {len(rows)} are described here")
    table = pd.DataFrame(rows)
    floats = (table["data_type"] == "float") & table["exponent_bits"].isna()
    table.loc[floats, "exponent_bits"] = table.loc[floats, "bits"].map({2: 1, **PAPER_EXPONENT_BITS})
    return table


def synthesize(count: int, seed: int = 0) -> pd.DataFrame:
    """Return SYNTHETIC results in the form of kbit.read_results, one row per experiment and measurement."""
    table = list_experiments(count)
    rng = np.random.default_rng(seed)
    overhead = (16 / table["block_size"]).fillna(0.0)
    base = 1.7 + 40 * table["parameters"] ** -0.16
    added = 400 * table["parameters"] ** -0.2 * np.exp(-1.5 * table["bits"]) * (1 + np.log2(table["block_size"]) / 8)
    loss = base + added.fillna(0.0) + 0.001 * rng.standard_normal(len(table))
    score = 1 - 0.2 * loss
    table = table.assign(
        key=[f"{SYNTHETIC}-{k}" for k in range(len(table))],
        model=table["family"] + "-" + table["parameters"].astype(str),
        quantized_parameters=table["parameters"],
        float_bias=np.where(table["data_type"] == "float", "ieee", None),
        method=table["method"].fillna("rtn"),
        scale_format=table["scale_format"].fillna("fp16"),
        bits_per_param=table["bits"] + overhead,
        total_bits=(table["parameters"] * (table["bits"] + overhead)).astype("int64"),
        weight_rmse=np.where(table["bits"] == 16, 0.0, 2.0 ** -table["bits"]),
        evaluation="float32, all items",
        seed=0,
        synthetic=True,
    )
    parts = [measure(table, task, "acc", score + 0.003 * rng.standard_normal(len(table)), 0.005) for task in TASKS]
    parts.append(measure(table, "mean_zero_shot", "acc", score, 0.003))
    parts.append(measure(table, f"{SYNTHETIC}-text", "cross_entropy", loss, 0.002))
    quantized = table["bits"] < 16
    parts.append(measure(table[quantized], f"{SYNTHETIC}-text", "kl_divergence", added[quantized] + 1e-6, 1e-4))
    whole = pd.concat(parts, ignore_index=True)
    return whole.astype({"block_size": "Int64", "exponent_bits": "Int64"})


def measure(table: pd.DataFrame, task: str, metric: str, value: pd.Series[float], half: float) -> pd.DataFrame:
    """Return the rows of one measurement."""
    return table.assign(task=task, metric=metric, value=value, low=value - half, high=value + half, n=2000)


def main() -> None:
    """Time every figure, then all of them with their files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiments", type=int, default=35_000)
    parser.add_argument("--out", type=Path, default=Path("figures-synthetic"), help="folder for the drawn files")
    options = parser.parse_args()
    results = synthesize(options.experiments)
    print(f"{results['key'].nunique()} synthetic experiments, {len(results)} measurements")
    seconds: dict[str, float | None] = {}
    for name, draw in FIGURES.items():
        start = time.process_time()  # a busy machine must not count
        try:
            draw(results)
            seconds[name] = round(time.process_time() - start, 2)
        except (MissingResults, AmbiguousResults) as reason:
            seconds[name] = None
            print(f"{name}: {reason}")
        print(f"{name:22} {seconds[name]} s", flush=True)
    start, start_wall = time.process_time(), time.perf_counter()
    list(save_figures(results, options.out))
    whole, wall = round(time.process_time() - start, 1), round(time.perf_counter() - start_wall, 1)
    slowest = max((value, name) for name, value in seconds.items() if value is not None)
    print(f"slowest: {slowest[1]} {slowest[0]} s; all, with PNG, SVG and CSV: {whole} s ({wall} s on the clock)")
    record = {
        "experiments": int(results["key"].nunique()),
        "measurements": len(results),
        "cpu_seconds": seconds,
        "cpu_seconds_all_with_files": whole,
        "wall_seconds_all_with_files": wall,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "load_average": os.getloadavg()[1],
        "versions": {name: importlib.metadata.version(name) for name in ("pandas", "numpy", "matplotlib")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
