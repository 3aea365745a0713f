"""Planted results: a made-up store in which every effect that the paper speaks of is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pandas as pd
import pytest

from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.figures.registry import FIGURES

SIZES = {"1m": 10**6, "4m": 4 * 10**6, "16m": 16 * 10**6}
TYPE_LOSS = {"quantile": 0.0, "float": 0.01, "nf": 0.005, "int": 0.3, "dynamic": 0.2}


def plant_loss(parameters: int, bits: int, setting: dict[str, Any]) -> float:
    """Loss of a made-up model: a base curve in its size, and what the quantizer adds.

    Small blocks, the data types of TYPE_LOSS, half of the bits as exponent, GPTQ and outliers all help, the more the
    fewer the bits; at 6 bits and more they add nothing.
    """
    base = 6.0 - 0.2 * math.log(parameters)
    if bits == 16:
        return base
    scale = max(0.0, 5.0 - bits) * (3.0 if bits == 3 else 1.0)
    added = 0.02 * math.log2(setting["block_size"] / 16) + TYPE_LOSS[setting["data_type"]]
    if setting["data_type"] == "float":
        added += 0.05 * abs(setting["exponent_bits"] - math.ceil(bits / 2))
    added -= 0.1 if setting["method"] == "gptq" else 0.0
    added -= 0.08 if setting["outlier_fraction"] else 0.0
    return base + 2.0 * 4.0 ** (2 - bits) + scale * added


def list_settings() -> Iterator[dict[str, Any]]:
    """Every quantizer of the made-up store."""
    plain: dict[str, Any] = {"method": "rtn", "outlier_fraction": 0.0, "exponent_bits": pd.NA, "float_bias": None}
    # float has one precision and one block size more than other data types: figures of one data type show it
    yield plain | {"bits": 7, "data_type": "float", "block_size": 64, "exponent_bits": 3, "float_bias": "ieee"}
    for bits in (4, 6):
        yield plain | {"bits": bits, "data_type": "float", "block_size": 256, "exponent_bits": 3, "float_bias": "ieee"}
    for bits in (2, 3, 4, 5, 6, 8):
        exponent = {2: 1, 3: 2}.get(bits, 3)
        for data_type, block_size in itertools.product(TYPE_LOSS, (64, 128, 1024)):
            own = {"exponent_bits": exponent, "float_bias": "ieee"} if data_type == "float" else {}
            yield plain | {"bits": bits, "data_type": data_type, "block_size": block_size} | own
        for other in range(1, bits - 1):
            if other != exponent:
                float_type = {"data_type": "float", "exponent_bits": other, "float_bias": "ieee"}
                yield plain | {"bits": bits, "block_size": 64} | float_type
        if bits <= 4:
            for block_size in (64, 1024):
                yield plain | {"bits": bits, "data_type": "int", "block_size": block_size, "method": "gptq"}
            yield plain | {"bits": bits, "data_type": "nf", "block_size": 64, "outlier_fraction": 0.02}
    yield plain | {
        "bits": 16,
        "data_type": None,
        "block_size": pd.NA,
        "method": "none",
        "outlier_fraction": float("nan"),
    }


def make_rows(family: str, size: str, setting: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The rows of one experiment: tasks, their mean, cross entropy, KL divergence."""
    parameters, bits = SIZES[size], int(setting["bits"])
    overhead = 0.0 if bits == 16 else 16 / setting["block_size"]
    loss = plant_loss(parameters, bits, setting)
    row = setting | {
        "key": f"{family}-{size}-{number}",
        "model": f"{family}-{size}",
        "family": family,
        "parameters": parameters,
        "quantized_parameters": parameters,
        "seed": 0,
        "bits_per_param": bits + overhead,
        "total_bits": int(parameters * (bits + overhead)),
        "weight_rmse": 0.0 if bits == 16 else 2.0**-bits * (1 + math.log2(setting["block_size"]) / 20),
        "include": None,
        "exclude": None,
        "evaluation": "float32, all items",
    }
    score = 0.8 - 0.1 * loss
    about: list[tuple[str, str, float, float]] = [
        *((task, "acc", score, 0.004) for task in ("mean_zero_shot", "a", "b", "c", "d")),
        ("text", "cross_entropy", loss, 0.002),
    ]
    if bits < 16:
        about.append(("text", "kl_divergence", loss - plant_loss(parameters, 16, setting) + 1e-4, 1e-5))
    return [
        row
        | {"task": task, "metric": metric, "value": value, "low": value - half, "high": value + 1.5 * half, "n": 100}
        for task, metric, value, half in about
    ]


@pytest.fixture(scope="session")
def planted() -> pd.DataFrame:
    """Two families of three sizes in all settings, as kbit.read_results gives a store; not to be changed by a test."""
    settings = list(list_settings())
    rows = [
        row
        for family, size in itertools.product(("opt", "pythia"), SIZES)
        for number, setting in enumerate(settings)
        for row in make_rows(family, size, setting, number)
    ]
    return pd.DataFrame(rows).astype({"exponent_bits": "Int64", "block_size": "Int64"})


@pytest.fixture(scope="session")
def draw_planted(planted: pd.DataFrame) -> Callable[[str], PaperFigure]:
    """Draw a figure of the planted store by its name, once for all tests that look at it."""

    @cache
    def draw(name: str) -> PaperFigure:
        figure = FIGURES[name](planted)
        figure.fig.draw_without_rendering()
        return figure

    return draw


@pytest.fixture(scope="session")
def make_points() -> Callable[..., pd.DataFrame]:
    """Build one panel, {curve: {total bits: value}}: the columns of precision_curves with series and panel."""

    def build(curves: dict[Any, dict[int, float]], error: float = 0.01) -> pd.DataFrame:
        rows = [
            {
                "family": "toy", "data_type": "nf", "label": "nf", "block_size": 64, "panel": "toy",
                "series": str(name),
                "bits": name if isinstance(name, int) else 4, "model": f"m{place}", "total_bits": size,
                "value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "key": f"{name}-{size}",
            }
            for name, curve in curves.items()
            for place, (size, value) in enumerate(curve.items())
        ]  # fmt: skip
        return pd.DataFrame(rows).astype({"block_size": "Int64"})

    return build
