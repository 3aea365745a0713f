"""Rules: the first that matches changes the quantizer of a tensor, and the others keep theirs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kbit.analysis.curves.settings import make_label
from kbit.checkpoints.config import KbitConfig
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.serialize import from_json, to_json
from kbit.lmeval import read_options
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.methods.report import plan_quantization
from kbit.models.loading import load_model

BASE = QuantConfig(bits=3, block_size=16, min_coverage=0.0)
CHANGES: list[dict[str, Any]] = [
    {"bits": 6},
    {"bits": 16},
    {"data_type": "int", "block_size": None},
    {"method": "mse"},
    {"bits": 2, "method": "hqq", "normalization": "minmax"},
    {"bits": 4, "data_type": "table", "table": [-1, -0.5, 0, 0.25, 1]},
    {},
]
PATTERNS = ["lm_head", "embed_tokens", r"layers\.0\.", "down_proj", "self_attn", "mlp", "q_proj|o_proj"]


def quantize_alone(model: nn.Module, names: Sequence[str], quant: QuantConfig) -> dict[str, torch.Tensor]:
    """Quantize some tensors of a fresh model by a quantizer without rules."""
    pattern = "|".join(map(re.escape, names))
    alone = dataclasses.replace(quant, include=f"^({pattern})$", exclude=f"^(?!({pattern})$)", min_coverage=0.0)
    quantize_model(model, alone)
    return {name: model.get_parameter(name).detach() for name in names}


@settings(max_examples=12, deadline=None)
@given(
    rules=st.lists(st.tuples(st.sampled_from(PATTERNS), st.sampled_from(CHANGES)), min_size=1, max_size=3),
    tied=st.booleans(),
)
def test_a_mix_equals_quantizing_the_tensors_one_by_one(
    rules: list[tuple[str, dict[str, Any]]], *, tied: bool, build_tiny: Callable[..., Any]
) -> None:
    written = [{"match": pattern, **changes} for pattern, changes in rules]
    quant = dataclasses.replace(BASE, rules=tuple(written))
    model = build_tiny("llama", tie_word_embeddings=tied)
    try:
        report = quantize_model(model, quant)
    except ValueError:
        with pytest.raises(ValueError, match="applies to none"):  # an earlier rule took all of its tensors
            plan_quantization(model, quant)
        return
    assert report == plan_quantization(build_tiny("llama", tie_word_embeddings=tied), quant)
    alike: dict[QuantConfig, list[str]] = {}
    for tensor in report.tensors:
        names = tensor.name.split(" = ")
        found = [number for number, (pattern, _) in enumerate(rules) if any(in_name(pattern, name) for name in names)]
        if len(tensor.shape) < 2 or not (found or "layers" in tensor.name):
            assert not tensor.quantized
            continue
        expected = dataclasses.replace(BASE, **(rules[found[0]][1] if found else {}))
        assert tensor.quantized == (expected.bits < 16)
        assert tensor.rule == (found[0] if found else None)
        assert tensor.bits == expected.count_bits(tensor.shape)
        if tensor.quantized:
            alike.setdefault(expected, []).extend(names)  # an exclude finds any of them
    for expected, names in alike.items():
        alone = quantize_alone(build_tiny("llama", tie_word_embeddings=tied), names, expected)
        assert all(torch.equal(model.get_parameter(name).detach(), alone[name]) for name in names)


def in_name(pattern: str, name: str) -> bool:
    """Search without a regular expression: the patterns above are words, dots and one alternative."""
    return any(word.replace("\\", "") in name for word in pattern.split("|"))


def test_rules_and_outlier_columns_go_together_on_fused_experts(build_tiny: Callable[..., Any]) -> None:
    base = dataclasses.replace(BASE, outlier_fraction=0.05, outlier_selection="column")
    mixed, three, five = (build_tiny("mixtral", num_hidden_layers=1) for _ in range(3))
    quantize_model(mixed, dataclasses.replace(base, rules=({"match": "experts", "bits": 5},)))
    quantize_model(three, base)
    quantize_model(five, dataclasses.replace(base, bits=5))
    for name, weight in mixed.named_parameters():
        expected = (five if "experts" in name else three).get_parameter(name)
        assert torch.equal(weight, expected), name


def test_calibrated_methods_see_the_weights_of_the_rules_as_they_will_be() -> None:
    """GPTQ of the second layer depends on what the first layer's rule made of it, even though it runs without data."""
    loaded = load_model("nano-neox-98k")
    calibration = {"samples": 2, "length": 32}
    fields: dict[str, Any] = {"calibration": calibration, "method": "gptq", "bits": 4, "min_coverage": 0.0}
    first = r"layers\.0\."
    mixed = from_json(QuantConfig, fields | {"rules": [{"match": first, "bits": 2, "method": "rtn"}]})
    quantize_model(loaded.model, mixed, loaded.tokenizer)

    apart = load_model("nano-neox-98k")
    quantize_model(apart.model, QuantConfig(bits=2, exclude=r"layers\.1\.", min_coverage=0.0))
    del apart.model.kbit_quantized
    rest = from_json(QuantConfig, fields | {"exclude": first})
    quantize_model(apart.model, rest, apart.tokenizer)
    for (name, ours), theirs in zip(loaded.model.named_parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["lm_head"], r"quant\.rules\[0\]='lm_head' is no mapping such as \{match: lm_head, bits: 6\}"),
        ([{"bits": 3}], r"quant\.rules\[0\]=\{'bits': 3\} lacks `match`"),
        ([{"match": "("}], r"match='\(' is not a regular expression"),
        (
            [{"match": "a", "bit": 3}],
            r"quant\.rules\[0\]: 'bit' is no field that a rule can change; did you mean bits\?",
        ),
        ([{"match": "a"}, {"match": "b", "bits": 9}], r"quant\.rules\[1\] \(b: bits=9\): bits=9"),
        ([{"match": "a", "bits": "many"}], r"quant\.rules\[0\] \(a: bits=many\)"),
        ([{"match": "a", "method": "gptq"}], r"method=gptq needs a calibration text or multiplies int8"),
        ([{"match": "a", "method": "llm_int8", "bits": 8}], r"method=llm_int8 needs a calibration text or multiplies"),
        ([{"match": "a", "signed": False}], r"quant\.rules\[0\] \(a: signed=False\): signed=false is for int"),
    ],
)
def test_a_wrong_rule_is_refused_by_its_number(rules: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(rules=tuple(rules))


def test_rules_need_a_quantizer_of_k_bits() -> None:
    with pytest.raises(ValueError, match=r"quantizes nothing, so that quant\.rules have nothing to change"):
        QuantConfig(bits=16, rules=({"match": "a", "bits": 3},))
    with pytest.raises(ValueError, match="decides the quantizer of every weight"):
        QuantConfig(bits=8, method="llm_int8", rules=({"match": "a", "bits": 3},))
    with pytest.raises(ValueError, match=r"one quantizer for all of its weights: it has no quant\.rules"):
        KbitConfig(bits=4, rules=[{"match": "a", "bits": 3}])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["nowhere"], r"quant\.rules\[0\] \(nowhere: bits=4\) applies to none of .*: its match finds none"),
        (["norm"], "its match finds only tensors that are not quantized, or that an earlier rule takes"),
        ([r"layers\.0", "0.mlp"], r"quant\.rules\[1\] .*its match finds only tensors"),
    ],
)
def test_a_rule_that_changes_nothing_is_an_error(
    rules: list[str], message: str, build_tiny: Callable[..., Any]
) -> None:
    quant = QuantConfig(rules=tuple({"match": pattern, "bits": 4} for pattern in rules))
    with pytest.raises(ValueError, match=message):
        plan_quantization(build_tiny("llama"), quant)


def test_keys_know_what_a_rule_changes_and_no_more() -> None:
    def key(*rules: dict[str, Any], **fields: Any) -> str:
        return find_key(Experiment(quant=QuantConfig(**fields, rules=rules)))

    six = {"match": "lm_head", "bits": 6}
    assert key() == find_key(Experiment(quant=QuantConfig()))
    assert len({key(), key(six), key({"match": "lm_head", "bits": 5}), key({"match": "mlp", "bits": 6})}) == 4
    assert key(six, {"match": "mlp"}) != key({"match": "mlp"}, six)  # the first that matches applies
    # what changes nothing is not in the key, as for the quantizer itself
    assert key({"match": "lm_head", "bits": 6, "exponent_bits": 2}) == key(six)
    assert key({"match": "lm_head", "bits": 6, "data_type": "nf"}) == key(six)


def test_a_record_and_a_label_have_the_rules() -> None:
    table = (-1.0, 0.0, 1.0)
    quant = QuantConfig(
        rules=({"match": "lm_head", "bits": 6}, {"match": "a", "data_type": "table", "table": [*table]})
    )
    experiment = Experiment(quant=quant)
    record = json.loads(to_json(experiment))
    assert record["quant"]["rules"][0] == {"match": "lm_head", "bits": 6}
    assert from_json(Experiment, record) == experiment
    assert hash(from_json(Experiment, record)) == hash(experiment)
    assert "rules=(lm_head: bits=6; a: data_type=table table=" in experiment.label()


def test_a_mix_is_a_variant_of_its_own_in_figures_and_lm_eval_takes_it() -> None:
    row = {"bits": 3, "data_type": "nf", "exponent_bits": None, "rules": "lm_head: bits=6"}
    assert make_label(row) == "nf rules (lm_head: bits=6)"
    assert make_label(row | {"rules": None}) == "nf"
    rules = [{"match": "lm_head", "bits": 6}]
    assert read_options({"bits": 3, "rules": rules}) == QuantConfig(bits=3, rules=tuple(rules))
