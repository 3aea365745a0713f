"""Presets in Python, what they would quantize, and what they lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra_state import config_store_kept
from omegaconf import OmegaConf

import kbit
from kbit.cli.hydra.app import register_schema
from kbit.experiments.config import RunConfig
from kbit.numerics.data_types import make_codebook

FOLDER = Path(__file__).parents[2] / "conf" / "quant"


def test_every_preset_is_there_by_its_name() -> None:
    presets = kbit.presets()
    assert list(presets) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert presets["nf4_dq"].scale_format == "dq8"
    assert kbit.QuantSpec.from_name("nf4") == kbit.QuantSpec() == presets["default"].spec
    assert kbit.QuantSpec.from_name("default") == kbit.QuantSpec()


@pytest.mark.parametrize("name", ["default", "nf4_dq", "mxfp4", "int8_rowwise", "fp4_bnb"])
def test_a_preset_is_what_the_command_line_makes_of_its_name(name: str) -> None:
    with config_store_kept(), initialize_config_module("kbit.conf", version_base="1.3"):
        register_schema()
        config = OmegaConf.to_object(compose("run", [f"quant={name}"]))
    assert isinstance(config, RunConfig)
    assert kbit.QuantConfig.from_name(name) == config.quant


def test_matrices_are_listed_with_the_reasons_of_the_others() -> None:
    table = kbit.list_matrices(kbit.load_model("nano-neox-98k").model, "nf4").set_index("name")
    dense: Any = table.loc["gpt_neox.layers.0.attention.dense.weight"]
    assert (dense["shape"], dense["quantized"]) == ((64, 64), True)
    assert table.loc["lm_head.weight", "reason"] == "outside the transformer blocks"
    assert table.loc[table["quantized"], "bits"].sum() == table.loc[table["quantized"], "parameters"].sum() * 4.25


def test_errors_of_a_tensor_are_the_definitions() -> None:
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    table = kbit.error_table(x, ["int4", kbit.QuantSpec(bits=8, data_type="int")]).set_index("quantizer")
    error = kbit.fake_quantize(x, kbit.QuantSpec(bits=8, data_type="int")).astype(np.float64) - x
    row = table.loc["int8 block 64"]
    assert row["relative_error"] == pytest.approx(np.sqrt((error**2).sum() / (x.astype(np.float64) ** 2).sum()))
    assert row["largest_error"] == pytest.approx(np.abs(error).max() / np.abs(x).max())
    assert table.loc["int4", "relative_error"] > 10 * row["relative_error"]


def test_codebooks_are_drawn_value_by_value() -> None:
    [axis] = kbit.plot_codebooks(["nf4", "int3"]).axes
    drawn = [np.asarray(line.get_xdata()) for line in axis.get_lines()]
    np.testing.assert_array_equal(drawn[1], make_codebook("nf", 4))
    np.testing.assert_array_equal(drawn[0], make_codebook("int", 3))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["int3", "nf4"]


def test_a_codebook_that_is_fitted_is_drawn_of_a_tensor() -> None:
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    [line] = kbit.plot_codebooks(["quantile4"], tensor=x).axes[0].get_lines()
    np.testing.assert_array_equal(np.asarray(line.get_xdata()), make_codebook("quantile", 4, tensor=x))
    with pytest.raises(ValueError, match="'quantile' needs tensor="):
        kbit.plot_codebooks(["quantile4"])
