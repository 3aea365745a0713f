"""Shapes of models: the table equals what transformers builds of the published configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from kbit.costs.shapes import find_shape, measure_shape, read_catalogue
from kbit.methods.config import QuantConfig
from kbit.models.catalog import STUDIED, locate_model

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "architectures.json").read_text())
FAMILIES = [family for family in PUBLISHED.values() if isinstance(family, dict)]
# Parameters as the models' authors state them, to the last digit that they print.
STATED = {
    "pythia-70m": 70_426_624, "pythia-1.4b": 1_414_647_808, "pythia-12b": 11_846_072_320,
    "bloom-560m": 559_214_592, "bloom-7b1": 7_069_016_064, "bloom": 176_247_271_424, "gpt2": 124_439_808,
}  # fmt: skip


def make_config(family: dict[str, Any], name: str) -> Any:
    fields = dict(zip(family["fields"], family["models"][name], strict=True))
    fields |= family.get("all", {}) | family.get("also", {}).get(name, {})
    return getattr(transformers, family["class"])(**fields)


@pytest.mark.parametrize("name", ["pythia-70m", "opt-125m", "opt-350m", "bloom-560m", "gpt2", "bloom"])
def test_the_table_equals_what_transformers_builds(name: str) -> None:
    family = next(family for family in FAMILIES if name in family["models"])
    assert read_catalogue()[name] == measure_shape(name, make_config(family, name))


def test_the_table_has_every_published_configuration_and_no_other() -> None:
    assert set(read_catalogue()) == {name for family in FAMILIES for name in family["models"]}
    for family in FAMILIES:
        for name in family["models"]:
            config, shape = make_config(family, name), read_catalogue()[name]
            sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
            assert (shape.layers, shape.hidden, shape.heads) == sizes
            assert shape.cached_values == 2 * shape.layers * shape.hidden  # each head has keys and values of its own


@pytest.mark.parametrize("name", STATED)
def test_parameters_are_those_that_the_authors_state(name: str) -> None:
    assert read_catalogue()[name].parameters == STATED[name]


def test_every_short_name_has_a_shape() -> None:
    for name, model in STUDIED.items():
        if model.hub_id is not None:
            assert find_shape(name).name == name
    assert find_shape("bloomz-3b").parameters == find_shape("bloom-3b").parameters
    assert find_shape("facebook/opt-13b").parameters == find_shape("opt-13b").parameters
    assert find_shape("pythia-70m-v0").matrices == find_shape("pythia-70m").matrices


@pytest.mark.parametrize("quant", [QuantConfig(bits=16), QuantConfig(bits=4), QuantConfig.from_name("nf4_dq")])
@pytest.mark.parametrize("name", ["nano-neox-98k", "nano-gpt2-98k", "nano-stories-260k"])
def test_bits_are_those_of_the_loaded_model(name: str, quant: QuantConfig) -> None:
    import kbit

    report = kbit.quantize_model(kbit.load_model(name).model, quant)
    shape = find_shape(name)
    assert shape.count_weight_bits(quant) == report.total_bits
    assert shape.parameters == report.parameters


def test_grouped_queries_and_experts_are_told_from_the_configuration(build_tiny: Any) -> None:
    config = build_tiny("mixtral", num_key_value_heads=2, num_attention_heads=4).config
    shape = measure_shape("tiny", config)
    assert (shape.heads, shape.cached_values) == (4, 2 * config.num_hidden_layers * 2 * config.hidden_size // 4)
    experts = config.num_local_experts * config.num_hidden_layers
    assert shape.matrices[2 * config.intermediate_size, config.hidden_size] == experts
    assert measure_shape("tiny", build_tiny("gpt_oss").config).cached_values > 0


def test_a_folder_of_ones_own_is_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(locate_model("nano-neox-98k")) / "config.json").read_text())
    assert find_shape(str(tmp_path)).parameters == find_shape("nano-neox-98k").parameters


def test_a_model_that_is_not_here_is_named() -> None:
    with pytest.raises(ValueError, match="'somebody/unknown' is not known here"):
        find_shape("somebody/unknown")
    with pytest.raises(ValueError, match="--models 'opt-13x'"):
        find_shape("opt-13x")


def test_one_head_of_keys_for_all_queries_is_cached_once() -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
    shape = measure_shape("tiny", transformers.FalconConfig(**sizes, multi_query=True))
    assert shape.cached_values == 2 * 2 * 16  # keys and values of 64 / 4 numbers in two layers


def test_the_context_is_what_the_configuration_states() -> None:
    mpt = transformers.MptConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=32, max_seq_len=4096)
    assert measure_shape("tiny", mpt).context == 4096
