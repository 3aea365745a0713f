"""read_results(wide=True): one row for each experiment, of which groupby and pivot lose none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toy_results import fill, make_result

from kbit.experiments.identity import find_key
from kbit.methods.allocation.config import AllocationConfig
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.readers import read_results
from kbit.store.store import Store


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """Eight experiments with four quantizers, the 16-bit baseline among them."""
    fill(tmp_path, range(8))
    return read_results(tmp_path, wide=True)


def test_every_measurement_is_in_the_row_of_its_experiment(table: pd.DataFrame, tmp_path: Path) -> None:
    assert len(table) == table["key"].nunique() == 8
    rows = read_results(tmp_path)
    for row in rows.to_dict("records"):
        [wide] = table[table["key"] == row["key"]].to_dict("records")
        column = f"{row['task']} {row['metric']}"
        stored = [row["value"], row["low"], row["high"]]
        assert [wide[column], wide[f"{column} low"], wide[f"{column} high"]] == pytest.approx(stored, nan_ok=True)


def test_a_pivot_on_any_setting_keeps_every_experiment(table: pd.DataFrame) -> None:
    for name in ("exponent_bits", "block_size", "data_type", "method", "exclude", "outlier_fraction", "checkpoint"):
        assert table.groupby(name).size().sum() == 8
    by_type = table.pivot_table(index="data_type", columns="block_size", values="nano_cloze acc", aggfunc="count")
    counts: Any = by_type.to_dict()  # by block size, then by data type
    assert counts["whole"]["nf"] == counts[64]["int"] == counts["none"]["none"] == 2


def test_label_and_cost_are_columns(table: pd.DataFrame) -> None:
    labels = set(table["label"])
    assert {"toy-0 16-bit", "toy-1 float3-e2m0 block 64 centering=True", "toy-2 nf4 block whole exclude=mlp"} < labels
    assert table["seconds"].tolist() == pytest.approx([0.3] * 8)
    assert table["peak_memory_bytes"].tolist() == [1] * 8
    assert set(table["finished"]) == {"2026-01-01T00:00:00+00:00"}


def test_rows_are_in_the_order_of_model_bits_type_and_block(tmp_path: Path) -> None:
    store, same = Store(tmp_path), make_result(0)
    quants = [QuantConfig(bits=16)]
    quants += [QuantConfig(bits=4, data_type="nf", block_size=size) for size in (1024, None, 64, 4096, 128)]
    quants += [QuantConfig(bits=3, data_type=data_type, block_size=64) for data_type in ("nf", "int")]
    for name, parameters in (("toy-9", 2000), ("toy-10", 500)):
        for quant in quants:
            experiment = dataclasses.replace(same.experiment, model=ModelConfig(name), quant=quant)
            result = dataclasses.replace(same, key=find_key(experiment), experiment=experiment, parameters=parameters)
            store.write(result)
    table = read_results(tmp_path, wide=True)
    rows = [(3, "int", 64), (3, "nf", 64), *((4, "nf", size) for size in (64, 128, 1024, 4096, "whole"))]
    expected = [(name, *row) for name in ("toy-10", "toy-9") for row in [*rows, (16, "none", "none")]]
    assert list(zip(*(table[name] for name in ("model", "bits", "data_type", "block_size")), strict=True)) == expected


def test_settings_that_choices_differ_in_are_no_setting(tmp_path: Path) -> None:
    """Of a budget, "whole" would be the tensor as a block. Not even 16 bits for all make it the baseline."""
    store, result = Store(tmp_path), make_result(0)
    mixed = (2, {"bits": 4, "block_size": 32}, {"bits": 8, "block_size": None, "scale_format": "dq8"})
    for choices, bits in (((2, 16), 16.0), (mixed, 3.2), ((2, "int3"), 2.4)):
        quant = QuantConfig(allocation=AllocationConfig(bits=3, choices=choices, objective="error"))
        experiment = dataclasses.replace(result.experiment, quant=quant)
        key = find_key(experiment)
        store.write(dataclasses.replace(result, key=key, experiment=experiment, bits_per_param=bits))
    table = read_results(tmp_path, wide=True).sort_values("bits")
    assert table["bits"].tolist() == [2, 3, 8]
    assert table["block_size"].tolist() == [64, "none", 64]
    assert table["scale_format"].tolist() == ["fp16", "none", "fp16"]
    assert table["layout"].tolist() == ["flat"] * 3
