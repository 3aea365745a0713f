"""Makes results of invented models of one to three sizes, in every combination of settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

PARAMETERS = {"toy-1m": 1_000_000, "toy-4m": 4_000_000, "toy-16m": 16_000_000}
PRECISIONS = (3, 4, 8, 16)


def make_rows(bits: int, model: str, data_type: str, block_size: int, family: str) -> list[dict[str, Any]]:
    """The rows of one experiment. Loss falls with size and rises as bits run out; accuracy mirrors it."""
    baseline = bits == 16
    loss = 6.0 - 0.2 * np.log(PARAMETERS[model]) + 2.0 * 4.0 ** (2 - bits)
    row = {
        "key": f"{bits}-{model}-{data_type}-{block_size}",
        "model": model,
        "family": family,
        "parameters": PARAMETERS[model],
        "quantized_parameters": PARAMETERS[model],
        "bits": bits,
        "data_type": None if baseline else data_type,
        "exponent_bits": pd.NA,
        "float_bias": None,
        "block_size": pd.NA if baseline else block_size,
        "method": "none" if baseline else "rtn",
        "seed": 0,
        "bits_per_param": float(bits),
        "total_bits": PARAMETERS[model] * bits,
    }
    score = 0.8 - 0.1 * loss
    accuracy = {"metric": "acc", "value": score, "low": score - 0.03, "high": score + 0.02}
    entropy = {"metric": "cross_entropy", "value": loss, "low": loss - 0.03, "high": loss + 0.02}
    tasks = ("mean_zero_shot", "a", "b", "c", "d")
    return [
        *({**row, **accuracy, "task": task, "n": 100} for task in tasks),
        {**row, **entropy, "task": "text", "n": 64},
    ]


def make_results(
    data_types: tuple[str, ...] = ("nf",),
    block_sizes: tuple[int, ...] = (64,),
    families: tuple[str, ...] = ("toy",),
    precisions: tuple[int, ...] = PRECISIONS,
) -> pd.DataFrame:
    """A store of every combination."""
    rows = [
        row
        for family in families
        for model in PARAMETERS
        for bits in precisions
        for data_type in data_types
        for block_size in block_sizes
        for row in make_rows(bits, model, data_type, block_size, family)
    ]
    frame = pd.DataFrame(rows).astype({"exponent_bits": "Int64", "block_size": "Int64"})
    return frame.drop_duplicates(["family", "model", "bits", "data_type", "block_size", "metric", "task"])
