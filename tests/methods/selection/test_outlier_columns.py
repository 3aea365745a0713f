"""Outliers that stay at 16 bits: which dimensions, what a method makes of the rest, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.methods.report import plan_quantization
from kbit.methods.selection.outlier_columns import choose_outliers
from kbit.methods.weight import Weight
from kbit.models.architectures import find_sources, orient
from kbit.models.parameters import hash_weights
from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.spec import QuantSpec

Build = Callable[..., Any]

configure = functools.partial(QuantConfig, bits=3, data_type="nf", block_size=64)
PLANTED = 23  # the residual stream's unit whose weights are made large
FC1, FC2 = "model.decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc2.weight"


def plant(model: Any, name: str, scale: float = 20.0) -> None:
    """Make the weights into one unit 20 times as large: the paper's "up to 20x"."""
    with torch.no_grad():
        orient(model, name)[PLANTED] *= scale


def quantized(model: Any, config: QuantConfig) -> list[str]:
    return [t.name.split(" = ")[0] for t in plan_quantization(model, config).tensors if t.quantized]


# ---- which dimensions


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom", "llama"])
def test_the_proxy_finds_the_unit_whose_incoming_weights_are_large(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    config = configure(outlier_fraction=0.02)
    names = quantized(model, config)
    for name in names:
        for source in find_sources(model)[name]:
            row = PLANTED if source.rows is None else int(source.rows[PLANTED])
            with torch.no_grad():
                orient(model, source.name)[row] *= 20
        assert PLANTED in choose_outliers(model, [name], config)[name][0].tolist(), name


def test_each_selection_finds_what_it_looks_at(build_tiny: Build) -> None:
    model = build_tiny("opt")
    plant(model, "model.decoder.layers.1.self_attn.out_proj.weight")  # makes FC1's input
    with torch.no_grad():
        model.get_parameter(FC1)[:, 5] *= 20
    one = functools.partial(configure, outlier_fraction=0.01)
    assert choose_outliers(model, [FC1], one())[FC1][0].tolist() == [PLANTED]
    assert choose_outliers(model, [FC1], one(outlier_selection="column"))[FC1][0].tolist() == [5]
    drawn = [choose_outliers(model, [FC1], one(outlier_selection="random", seed=s))[FC1][0].item() for s in range(20)]
    assert len(set(drawn)) > 5
    assert drawn[0] == choose_outliers(model, [FC1], one(outlier_selection="random"))[FC1][0].item()


@pytest.mark.parametrize(("selection", "found"), [("proxy", [PLANTED]), ("column", [5])])
def test_a_zscore_keeps_what_stands_out_and_nothing_else(build_tiny: Build, selection: str, found: list[int]) -> None:
    model = build_tiny("opt")
    plant(model, "model.decoder.layers.1.self_attn.out_proj.weight")
    with torch.no_grad():
        model.get_parameter(FC1)[:, 5] *= 20
    config = configure(outlier_zscore=4.0, outlier_selection=selection)
    kept = choose_outliers(model, quantized(model, config), config)
    assert kept[FC1][0].tolist() == found
    # the row planted is also a row of the matrix before, and its reader's column; all others keep nothing
    assert sum(len(dimensions) > 0 for (dimensions,) in kept.values()) == 1
    report = quantize_model(model, config)
    plain = plan_quantization(model, configure())
    assert report.total_bits - plain.total_bits == 256 * (16 - 3)


def test_all_deviations_equal_stand_out_nowhere(build_tiny: Build) -> None:
    model = build_tiny("opt")
    with torch.no_grad():
        model.get_parameter(FC1).fill_(0.0)
    assert (
        choose_outliers(model, [FC1], configure(outlier_zscore=4.0, outlier_selection="column"))[FC1][0].tolist() == []
    )


def test_gpt2_and_opt_keep_the_same_of_the_same_weights(build_tiny: Build) -> None:
    """Conv1D is the equivalent Linear: the same matrices, stored transposed."""
    gpt2 = build_tiny("gpt2")
    name = "transformer.h.1.mlp.c_proj.weight"
    kept = choose_outliers(gpt2, [name], configure(outlier_fraction=0.02))[name][0]
    deviation = gpt2.get_parameter("transformer.h.1.mlp.c_fc.weight").std(0)  # [in, out]: of each output unit
    assert set(kept.tolist()) == set(deviation.topk(len(kept)).indices.tolist())
    assert len(kept) == 5  # 2% of 256


def test_an_unknown_previous_layer_is_named_and_nothing_is_changed(build_tiny: Build) -> None:
    model = build_tiny("mixtral")
    before = hash_weights(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj.*Mixtral.*selection=column"):
        quantize_model(model, configure(outlier_fraction=0.02, exclude="self_attn", min_coverage=0))
    assert hash_weights(model) == before
    quantize_model(model, configure(outlier_fraction=0.02, outlier_selection="column"))


def test_an_included_tensor_without_a_previous_layer_is_named(build_tiny: Build) -> None:
    with pytest.raises(ValueError, match=r"inputs of model\.decoder\.embed_positions\.weight is not known"):
        quantize_model(build_tiny("opt"), configure(outlier_fraction=0.02, include="embed_positions"))


@pytest.mark.parametrize("selection", ["column", "random"])
@pytest.mark.parametrize(("architecture", "include"), [("gpt2", "wte|wpe"), ("gpt2", "bias|ln_"), ("opt", "embed_pos"),
    ("gpt_neox", "bias|embed_in"), ("gpt_oss", "bias|embed")])  # fmt: skip
def test_what_is_included_is_kept_along_its_last_dimension(
    build_tiny: Build, architecture: str, include: str, selection: str
) -> None:
    """Of an embedding these are hidden units; a vector has no input dimensions."""
    model = build_tiny(architecture)
    config = configure(include=include, outlier_fraction=0.05, outlier_selection=selection)
    names = [name for name in quantized(model, config) if re.search(include, name)]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    kept = choose_outliers(model, names, config)
    assert kept.keys() == {name for name in names if before[name].ndim > 1 and "experts" not in name}  # stacked biases
    plan = plan_quantization(model, config)
    assert quantize_model(model, config) == plan
    for name, (dimensions,) in kept.items():
        assert len(dimensions) == config.count_kept(before[name].shape[-1])
        assert torch.equal(model.get_parameter(name)[..., dimensions], before[name][..., dimensions])


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
def test_an_included_vector_is_quantized_as_it_lies(build_tiny: Build, method: str) -> None:
    model = build_tiny("gpt2")
    report = quantize_model(model, configure(include="bias|ln_", method=method, outlier_fraction=0.05))
    assert all(t.quantized for t in report.tensors if t.name.startswith("transformer.h"))


def test_column_chooses_the_hidden_unit_of_an_embedding_and_not_a_token(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[200] *= 20  # a token
        model.gpt_neox.embed_in.weight[:, 40] *= 20
    config = configure(outlier_fraction=0.01, outlier_selection="column")
    assert choose_outliers(model, ["gpt_neox.embed_in.weight"], config)["gpt_neox.embed_in.weight"][0].tolist() == [40]


# ---- what becomes of the weights


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama"])
def test_kept_columns_stay_and_the_rest_is_quantized_without_them(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    config = configure(outlier_fraction=0.05)
    names = quantized(model, config)
    kept = choose_outliers(model, names, config)
    before = {name: orient(model, name).clone() for name in names}
    copies = copy_weights(model, plan_quantization(model, config))
    original = hash_weights(model)
    quantize_model(model, config)
    for name in names:
        after, expected = orient(model, name), before[name].contiguous().clone()
        assert torch.equal(after[:, kept[name][0]], before[name][:, kept[name][0]])
        expected[:, kept[name][0]] = 0  # so they decide no block's scale
        expected = fake_quantize(expected, config.spec)
        expected[:, kept[name][0]] = before[name][:, kept[name][0]]
        assert torch.equal(after, expected)
    restore_weights(model, copies)
    assert hash_weights(model) == original


def test_outliers_rescue_the_levels_of_their_blocks(build_tiny: Build) -> None:
    errors = {}
    for fraction in (0.0, 0.01):
        model = build_tiny("opt")
        plant(model, "model.decoder.layers.1.self_attn.out_proj.weight")
        with torch.no_grad():
            model.get_parameter(FC1)[:, PLANTED] *= 20
        weight = model.get_parameter(FC1).detach()
        before = weight.clone()
        quantize_model(model, configure(outlier_fraction=fraction))
        rest = torch.arange(64) != PLANTED
        errors[fraction] = float((weight - before)[:, rest].square().mean().sqrt())
    # a block is a row here: the large column took its scale, most others became 0, and their error their deviation
    assert errors[0.0] > 0.5 * float(before[:, rest].std())
    assert errors[0.01] < 0.25 * float(before[:, rest].std())


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 12), st.data())
def test_outlier_columns_stay_whatever_the_codes_are(rows: int, inputs: int, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.integers(0, inputs - 1), unique=True))
    values = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    weight = Weight("w", values, QuantSpec(), outlier_columns=torch.tensor(kept, dtype=torch.int64))
    zeroed = before.clone()
    zeroed[:, kept] = 0
    with weight.outliers_at_zero() as at_zero:
        assert torch.equal(at_zero, zeroed)
    assert torch.equal(weight.copy_matrix(), zeroed)
    assert torch.equal(values, before)
    sevens = quantize(torch.full((rows, inputs), 7.0), QuantSpec(data_type="int", bits=4))
    weight.replace(sevens.keep_columns(weight.outlier_columns, weight.copy_outliers()).dequantize())
    rest = [i for i in range(inputs) if i not in kept]
    assert torch.equal(values[:, kept], before[:, kept])
    assert (values[:, rest] == 7).all()
    assert weight.squared_error == pytest.approx(float((7 - before[:, rest]).square().sum()), rel=1e-5)


# ---- bits


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "llama"])
def test_outliers_cost_p_times_16_less_k(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    config = configure(outlier_fraction=1 / 32)  # a whole number of dimensions of 64 and 256; 5 of Llama's 172
    plain, plan = plan_quantization(model, configure()), plan_quantization(model, config)
    by_hand = 0
    for name in quantized(model, config):
        outputs, inputs = orient(model, name).shape
        by_hand += outputs * round(inputs / 32) * (16 - 3)
    assert plan.total_bits - plain.total_bits == by_hand
    if architecture != "llama":
        assert plan.bits_per_param - plain.bits_per_param == pytest.approx((16 - 3) / 32)
    assert quantize_model(model, config) == plan


@pytest.mark.parametrize(
    ("fraction", "inputs", "count"), [(0.0, 64, 0), (0.02, 64, 1), (0.02, 4096, 82), (0.001, 64, 1), (0.5, 3, 2)]
)
def test_the_count_is_rounded_and_never_none(fraction: float, inputs: int, count: int) -> None:
    assert QuantConfig(outlier_fraction=fraction).count_kept(inputs) == count


# ---- configuration


def test_fields_of_outliers_are_content_only_where_they_mean_something() -> None:
    def key(**fields: Any) -> str:
        return find_key(Experiment(quant=dataclasses.replace(QuantConfig(), **fields)))

    default = key()
    assert key(outlier_selection="column") == key(activation_threshold=3.0) == default
    assert key(bits=16, outlier_fraction=0.1) == key(bits=16)
    some = [
        key(outlier_fraction=0.02), key(outlier_fraction=0.03), key(outlier_fraction=0.02, outlier_selection="column"),
        key(outlier_zscore=4.0), key(outlier_fraction=0.02, outlier_selection="random"),
        key(outlier_fraction=0.02, outlier_selection="random", seed=1),
    ]  # fmt: skip
    assert len({default, *some}) == 7
    assert key(outlier_fraction=0.02, seed=1) == key(outlier_fraction=0.02)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"outlier_fraction": 1.0}, r"quant\.outlier_fraction=1 is not in \[0, 1\)"),
        ({"outlier_fraction": -0.1}, r"outlier_fraction=-0\.1"),
        ({"outlier_fraction": float("nan")}, r"outlier_fraction=nan"),
        ({"outlier_selection": "previous"}, r"outlier_selection='previous'.*proxy, column, random"),
        ({"outlier_zscore": 0.0}, r"outlier_zscore=0 is not a finite number > 0"),
        ({"outlier_zscore": 4.0, "outlier_fraction": 0.1}, r"neither"),
        ({"outlier_zscore": 4.0, "outlier_selection": "random"}, r"neither"),
        ({"activation_threshold": 0.0}, r"activation_threshold=0 is not a finite number > 0"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantConfig(**fields)
