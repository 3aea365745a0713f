"""Inputs of products in few bits: the numbers of one layer, which layers, and that a batch changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kbit.analysis.curves.settings import make_label
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import evaluate
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.serialize import from_json, to_json
from kbit.layers.run_time.forwards import list_forwards
from kbit.layers.run_time.quantized_inputs import QuantizedInput
from kbit.layers.run_time.rotation import Basis, make_rotation
from kbit.lmeval import read_options
from kbit.methods.config import ActivationConfig, CacheConfig, QuantConfig
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.methods.report import plan_quantization
from kbit.models.loading import load_model
from kbit.numerics.spec import QuantSpec
from kbit.store.conditions import is_baseline

INT8 = ActivationConfig(bits=8)
ROWWISE = QuantSpec.from_name("int8_rowwise")
W8A8 = dataclasses.replace(
    QuantConfig.of(ROWWISE), activations=dataclasses.replace(INT8, rounding="nearest_even"), min_coverage=0.0
)


def round_tokens(x: np.ndarray[Any, Any], levels: int, block: int) -> np.ndarray[Any, Any]:
    """Symmetric integers in blocks along the rows, ties away from zero, in float64."""
    rounded = np.zeros_like(x)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        scale = np.abs(part).max(axis=-1, keepdims=True) / levels
        rounded[..., start : start + block] = np.sign(part) * np.floor(np.abs(part) / scale + 0.5) * scale
    return rounded


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(("architecture", "name"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj")])
def test_a_layer_multiplies_rounded_inputs(
    architecture: str, name: str, block: int | None, build_tiny: Callable[..., Any]
) -> None:
    model = build_tiny(architecture)
    quant = QuantConfig(bits=4, activations=ActivationConfig(bits=5, block_size=block))
    quantize_model(model, quant)
    layer = next(module for path, module in model.named_modules() if path.endswith(f"0.{name}"))
    weight = layer.weight.detach().double().numpy()
    weight = weight if architecture == "gpt2" else weight.T  # [in, out]
    x = torch.randn(2, 7, weight.shape[0], generator=torch.Generator().manual_seed(1)) * 3
    expected = round_tokens(x.double().numpy(), 15, block or weight.shape[0]) @ weight
    bias = getattr(layer, "bias", None)
    expected = expected if bias is None else expected + bias.detach().double().numpy()
    # float32 sums of at most 256 products
    bound = 256 * 2.0**-24 * (np.abs(x.double().numpy()) @ np.abs(weight)).max()
    assert np.abs(layer(x).detach().double().numpy() - expected).max() < bound


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_int8_per_token_reproduces_the_int8_method(outliers: float, build_tiny: Callable[..., Any]) -> None:
    """To the rounding of float32 sums, where the method sums integers. Outlier columns stay at 16 bits in both."""
    kept = {"outlier_fraction": outliers, "outlier_selection": "column"}
    ours, theirs = build_tiny("llama"), build_tiny("llama")
    quantize_model(ours, dataclasses.replace(W8A8, **kept))  # type: ignore[arg-type]
    quantize_model(theirs, QuantConfig(bits=8, method="vectorwise", **kept))  # type: ignore[arg-type]
    names = [name for name, _ in list_forwards(theirs)]
    assert [name for name, _ in list_forwards(ours)] == names
    for name in names:
        layer, other = ours.get_submodule(name), theirs.get_submodule(name)
        x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(2))
        bound = layer.in_features * 2.0**-23 * (x.abs() @ layer.weight.abs().T).max()
        assert (layer(x) - other(x)).abs().max() < bound, name


def test_weights_with_a_scale_for_each_input_have_it_taken_from_the_input() -> None:
    layer = nn.Linear(4, 2)
    product = QuantizedInput(layer, "layer.weight", ActivationConfig(bits=2))  # -1, 0, 1 times the largest
    x = torch.tensor([[4.0, 1.0, -8.0, 0.5]])
    assert product.round(x).tolist() == [[8.0, 0.0, -8.0, 0.0]]
    product.input_scales = torch.tensor([4.0, 1.0, 8.0, 1.0], dtype=torch.float16)
    assert product.round(x).tolist() == [[4.0, 1.0, -8.0, 1.0]]  # x / s is 1, 1, -1, 0.5
    product.outlier_columns = torch.tensor([2])
    assert product.round(x).tolist() == [[4.0, 1.0, -8.0, 1.0]]


def test_rotated_and_scaled_inputs_are_rounded_to_bfloat16_once() -> None:
    """x R -> Q(x R / s) s R^T in float32, by NumPy, and only then in the layer's type."""
    rotation = make_rotation(64, 0)
    product = QuantizedInput(nn.Linear(64, 2), "layer.weight", ActivationConfig(bits=8), Basis(rotation))
    product.input_scales = torch.rand(64, generator=torch.Generator().manual_seed(2)).add(0.5).half()
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    matrix, scales = rotation.rotate(torch.eye(64)).double().numpy(), product.input_scales.double().numpy()
    mixed = x.double().numpy() @ matrix / scales
    expected = (round_tokens(mixed, 127, 64) * scales) @ matrix.T
    found = product.round(x).double().numpy()
    # an error of at most half of bfloat16's spacing, which is 2^-7 of a value at most, and of float32's sums
    assert product.round(x).dtype == torch.bfloat16
    assert (np.abs(found - expected) <= np.abs(expected) * 2.0**-8 + 1e-5).mean() > 0.99


def test_an_exclude_that_finds_nothing_is_told_at_16_bits_too(
    build_tiny: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    quantize_model(build_tiny("opt"), QuantConfig(bits=16, activations=INT8, exclude="nowhere"))
    assert "quant.exclude='nowhere' finds none of the model's" in caplog.text


def test_gradients_go_straight_through_the_rounding() -> None:
    layer = nn.Linear(3, 1, bias=False)
    product = QuantizedInput(layer, "layer.weight", ActivationConfig(bits=2))
    product.install(layer)
    x = torch.tensor([[1.0, 0.2, -0.7]], requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.detach())  # type: ignore[arg-type]
    assert layer.weight.grad.tolist() == [[1.0, 0.0, -1.0]]  # type: ignore[union-attr]


def test_exclude_and_rules_say_which_inputs_are_rounded(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("llama")
    rules = ({"match": "q_proj", "bits": 16}, {"match": "embed_tokens", "bits": 8})
    quant = QuantConfig(
        rules=rules, activations=dataclasses.replace(INT8, exclude=r"down_proj|layers\.1"), min_coverage=0.0
    )
    quantize_model(model, quant)
    found = [name.removeprefix("model.layers.0.") for name, _ in list_forwards(model)]
    assert found == ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]


def test_a_16_bit_model_can_have_rounded_inputs_and_is_itself_again_afterwards(build_tiny: Callable[..., Any]) -> None:
    model, tokens = build_tiny("opt"), torch.arange(20)[None]
    before = model(tokens).logits
    quant = QuantConfig(bits=16, activations=INT8, exclude="fc1")
    weights = copy_weights(model, plan_quantization(model, quant))
    report = quantize_model(model, quant)
    assert report.bits_per_param == 16
    assert len(list_forwards(model)) == 2 * 5
    assert not torch.equal(model(tokens).logits, before)
    with pytest.raises(ValueError, match="already quantized"):
        quantize_model(model, QuantConfig(bits=16, activations=dataclasses.replace(INT8, bits=4)))
    restore_weights(model, weights)
    assert torch.equal(model(tokens).logits, before)


def test_another_forward_is_put_back(build_tiny: Callable[..., Any]) -> None:
    """Such as one of accelerate's hooks, which moves inputs to the layer's device."""
    model = build_tiny("llama")
    layer = model.model.layers[0].mlp.up_proj
    own, calls = layer.forward, []
    layer.forward = lambda x: calls.append(1) or own(x)  # type: ignore[func-returns-value]
    quantize_model(model, QuantConfig(bits=16, activations=INT8))
    model(torch.arange(5)[None])
    assert calls == [1]
    restore_weights(model, {})
    model(torch.arange(5)[None])
    assert calls == [1, 1]


@pytest.mark.parametrize(
    ("fields", "one_by_one"),
    [
        ({}, False),
        ({"block_size": 8, "scale_format": "e8m0"}, False),
        ({"layout": "flat"}, True),  # one scale for the tensor
        ({"centering": True}, True),
        ({"block_size": 8, "scale_format": "fp8"}, True),  # NVFP4 has a float32 for the tensor
        ({"rounding": "stochastic"}, True),  # numbers are drawn by places
    ],
)
def test_scores_do_not_depend_on_the_batch(fields: dict[str, Any], *, one_by_one: bool) -> None:
    loaded = load_model("nano-neox-98k")
    loaded.model.double()  # whose rounding moves no value over a threshold
    activations = dataclasses.replace(INT8, **fields)
    quantize_model(loaded.model, QuantConfig(bits=16, activations=activations))
    scorer = Scorer(loaded.model, loaded.tokenizer)
    assert (scorer.batch_tokens == 1) == one_by_one
    assert (scorer.path == "one sequence per row") == one_by_one
    by_1, by_32 = (evaluate(loaded.model, loaded.tokenizer, "nano_cloze", batch_size=size, limit=2) for size in (1, 32))
    assert by_1 == by_32
    requests = [(None, [5, 6, 7, 8], [9, 10]), (None, [5, 6, 7, 8], [11]), (None, [300] * 20, [301])]
    together = scorer.score_tokens(requests)
    alone = [scorer.score_tokens([request])[0] for request in requests]
    assert np.allclose([s for s, _ in together], [s for s, _ in alone], rtol=0, atol=1e-6)


def test_in_float32_the_batch_moves_scores_by_far_less_than_the_rounding() -> None:
    """A batch sums in another order, which may move a value over the threshold between two codes."""
    loaded = load_model("nano-neox-98k")
    generator = torch.Generator().manual_seed(4)
    draw = torch.randint(5, 1000, (24, 30), generator=generator).tolist()
    requests = [(None, tokens[: 10 + number % 15], tokens[-5:]) for number, tokens in enumerate(draw)]
    plain = np.array([score for score, _ in Scorer(loaded.model, loaded.tokenizer).score_tokens(requests)])
    quantize_model(loaded.model, QuantConfig(bits=16, activations=INT8))
    scorer = Scorer(loaded.model, loaded.tokenizer)
    together = np.array([score for score, _ in scorer.score_tokens(requests)])
    alone = np.array([scorer.score_tokens([request])[0][0] for request in requests])
    by_rounding, by_batch = np.abs(alone - plain), np.abs(together - alone)
    assert by_rounding.mean() > 1e-3  # .079 was measured
    assert (
        by_batch.mean() < by_rounding.mean() / 4
    )  # 1e-6 was measured; a value beyond a threshold moves one score by .1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationConfig(bits=4, data_type="quantile"), r"quant\.activations: .*quantile is fitted .* nf"),
        (lambda: CacheConfig(bits=4, data_type="learned"), r"quant\.kv_cache: data_type=learned is fitted"),
        (lambda: ActivationConfig(bits=4, signed=False), r"quant\.activations\.signed=false"),
        (lambda: ActivationConfig(bits=4, exclude="("), r"quant\.activations\.exclude='\(' is no regular expression"),
        (lambda: ActivationConfig(bits=1), "bits=1 is not in 2..8"),
        (lambda: QuantConfig(bits=8, method="vectorwise", activations=INT8), "quantizes its inputs itself"),
        (lambda: QuantConfig(bits=16, outlier_fraction=0.1, activations=INT8), r"would round the inputs of quant\.out"),
        (lambda: QuantConfig(bits=16, outlier_zscore=4.0, activations=INT8), r"would round the inputs of quant\.out"),
        (lambda: read_options({"activations.bit": 4}), "no key 'activations.bit'"),
    ],
)
def test_a_wrong_quantizer_of_inputs_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("llama", {"activations": ActivationConfig(bits=4, block_size=128)}, "summed over 64 inputs, fewer than the 1"),
        ("llama", {"activations": ActivationConfig(bits=4, block_size=48, layout="flat")}, "do not divide"),
        ("llama", {"activations": dataclasses.replace(INT8, exclude="nowhere")}, r"exclude='nowhere' finds none"),
        ("llama", {"activations": dataclasses.replace(INT8, exclude="layers")}, "there is no product"),
        ("llama", {"activations": INT8, "include": "lm_head"}, r"lm_head\.weight is the output embedding"),
        ("mixtral", {"activations": INT8}, r"experts.*leave it out by quant\.activations\.exclude"),
    ],
)
def test_what_a_model_cannot_have_leaves_it_as_it_was(
    architecture: str, fields: dict[str, Any], message: str, build_tiny: Callable[..., Any]
) -> None:
    model = build_tiny(architecture, num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        quantize_model(model, QuantConfig(bits=4, **fields))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert list_forwards(model) == []


def test_keys_know_what_is_rounded_at_run_time_and_no_more() -> None:
    def key(**fields: Any) -> str:
        return find_key(Experiment(quant=QuantConfig(**fields)))

    four = dataclasses.replace(INT8, bits=4)
    assert key() == key(activations=ActivationConfig(data_type="nf"), kv_cache=CacheConfig(keys="channel"))
    distinct: list[dict[str, Any]] = [
        {},
        {"activations": INT8},
        {"activations": four},
        {"activations": dataclasses.replace(four, exclude="mlp")},
        {"bits": 16, "activations": INT8},
        {"bits": 16, "activations": INT8, "exclude": "mlp"},
        {"bits": 16},
        {"kv_cache": CacheConfig(bits=4)},
        {"kv_cache": CacheConfig(bits=4, keys="channel")},
        {"kv_cache": CacheConfig(bits=4, keys="channel", block_tokens=64)},
    ]
    assert len({key(**fields) for fields in distinct}) == len(distinct)
    # what changes nothing is in no key
    assert key(kv_cache=CacheConfig(bits=4, block_tokens=64)) == key(kv_cache=CacheConfig(bits=4))
    assert key(bits=16, exclude="mlp") == key(bits=16)


def test_record_label_and_figures_name_what_is_rounded_at_run_time() -> None:
    quant = QuantConfig(
        activations=dataclasses.replace(INT8, block_size=32), kv_cache=CacheConfig(bits=4, keys="channel")
    )
    experiment = Experiment(quant=quant)
    assert from_json(Experiment, json.loads(to_json(experiment))) == experiment
    words = "activations=int8(block_size=32) kv_cache=int4(keys=channel)"
    assert experiment.label() == f"nano-neox-98k nf4 block 64 {words}"
    assert Experiment(quant=QuantConfig(bits=16, activations=INT8)).label() == "nano-neox-98k 16-bit activations=int8"
    idle = CacheConfig(bits=4, block_tokens=64)  # of which the key knows nothing
    assert Experiment(quant=QuantConfig(bits=16, kv_cache=idle)).label() == "nano-neox-98k 16-bit kv_cache=int4"
    row = {"bits": 4, "data_type": "nf", "exponent_bits": None, "activations": "int block_size=32"}
    row |= {"activation_bits": 8, "kv_cache": "int keys=channel", "cache_bits": 4}
    assert make_label(row) == "nf activations int block_size=32 at 8 bits cache int keys=channel at 4 bits"
    assert read_options({"bits": 4, "activations.bits": 8, "activations.block_size": 32, "kv_cache.bits": 4}) == (
        QuantConfig(bits=4, activations=quant.activations, kv_cache=CacheConfig(bits=4))
    )


def test_a_16_bit_model_with_rounded_inputs_is_no_baseline() -> None:
    table = pd.DataFrame({"data_type": [None, None, "nf"], "activations": [None, "int8", None]})
    assert is_baseline(table).tolist() == [True, False, False]
