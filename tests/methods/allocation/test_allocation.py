"""A budget of bits becomes rules for each tensor, is never exceeded, and is refused where it cannot be kept."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.serialize import from_json, to_json
from kbit.lmeval import read_options
from kbit.methods.allocation import allocate as allocate_module
from kbit.methods.allocation import kept
from kbit.methods.allocation.config import AllocationConfig
from kbit.methods.allocation.losses import measure_errors
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import allocate_bits, quantize_model
from kbit.methods.report import QuantizationReport, plan_quantization
from kbit.models.loading import load_model
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.store import read_results
from kbit.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))


def ask(
    bits: float | None = None, objective: str = "error", *, quant: dict[str, Any] | None = None, **fields: Any
) -> QuantConfig:
    """A budget by the weights alone, unless another objective is named."""
    return QuantConfig(**(quant or {}), allocation=AllocationConfig(bits=bits, objective=objective, **fields))


def copy_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def list_sizes(report: QuantizationReport) -> list[tuple[str, int, bool]]:
    return [(tensor.name, tensor.bits, tensor.quantized) for tensor in report.tensors]


def test_the_map_is_that_of_rules_and_of_tensors_one_by_one(build_tiny: Callable[..., Any]) -> None:
    choices = [2, 3, 5, "mxfp4", {"bits": 3, "block_size": 16}]
    quant = ask(3.4, choices=choices)
    model, ruled = build_tiny("llama"), build_tiny("llama")
    before = copy_parameters(model)
    report = quantize_model(model, quant)
    notes = report.notes["allocation"]

    # the rules alone, as they are in the record
    rules = json.loads(json.dumps(notes["rules"]))
    by_rules = quantize_model(ruled, QuantConfig(rules=rules))
    assert list_sizes(by_rules) == list_sizes(report)
    for (name, ours), theirs in zip(model.named_parameters(), ruled.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    # each tensor by itself
    specs = [QuantSpec(bits=bits) for bits in (2, 3, 5)]
    specs += [QuantSpec.from_name("mxfp4"), QuantSpec(bits=3, block_size=16)]
    used = set()
    for tensor in report.tensors:
        now = model.get_parameter(tensor.name).detach()
        if not tensor.quantized:
            assert torch.equal(now, before[tensor.name])
            continue
        alike = [n for n, spec in enumerate(specs) if torch.equal(now, fake_quantize(before[tensor.name], spec))]
        assert len(alike) == 1
        assert tensor.bits == specs[alike[0]].count_bits(tensor.shape)
        used.add(alike[0])
    assert len(used) > 1  # a mix
    budget = math.floor(3.4 * report.quantized_parameters)
    assert notes["budget_bits"] == budget
    assert notes["left_bits"] == budget - sum(t.bits for t in report.tensors if t.quantized) >= 0


@pytest.mark.parametrize(
    "fields",
    [{"total_bits": 1_600_000}, {"memory": "200 kb"}, {"memory": "195.3125KiB"}],
    ids=["total bits", "memory", "binary memory"],
)
def test_a_budget_of_the_whole_model_counts_what_is_not_quantized(
    fields: dict[str, Any], build_tiny: Callable[..., Any]
) -> None:
    rules = ({"match": "lm_head", "bits": 6},)
    quant = ask(**fields, choices=(2, 4, 8, 16), quant={"rules": rules})
    model = build_tiny("llama")
    report = quantize_model(model, quant)
    assert report.notes["allocation"]["budget_bits"] == 1_600_000
    assert report.notes["allocation"]["left_bits"] == 1_600_000 - report.total_bits >= 0
    (head,) = [t for t in report.tensors if t.name == "lm_head.weight"]
    assert head.bits == QuantSpec(bits=6).count_bits(head.shape)  # its own rule goes first
    assert report.notes["allocation"]["rules"][0] == rules[0]


def test_the_coverage_is_checked_before_anything_is_measured(
    build_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny("llama")
    with monkeypatch.context() as patch:
        patch.setattr(allocate_module, "measure_errors", None)
        with pytest.raises(ValueError, match=r"would be quantized, quant\.min_coverage=0\.9; skipped 7 tensors"):
            quantize_model(model, ask(3, quant={"exclude": r"layers\.0"}))
    # what a choice leaves at 16 bits is no lack
    found = allocate_bits(model, ask(12, choices=(4, 16)))
    report = quantize_model(model, found.quant)
    assert 0 < report.coverage < 0.9
    assert list_sizes(quantize_model(build_tiny("llama"), ask(12, choices=(4, 16)))) == list_sizes(report)


@pytest.mark.parametrize("base", [{}, {"data_type": "int", "block_size": 16, "scale_format": "fp32"}])
def test_the_rules_of_a_record_serve_beside_any_quantizer(base: dict[str, Any], build_tiny: Callable[..., Any]) -> None:
    asked = {"data_type": "float", "block_size": 32, "layout": "row", "normalization": "minmax"}
    report = quantize_model(build_tiny("llama"), ask(4, choices=(2, 3, 5), quant=asked))
    rules = json.loads(json.dumps(report.notes["allocation"]["rules"]))
    by_rules = quantize_model(build_tiny("llama"), QuantConfig(**base, rules=rules))
    assert list_sizes(by_rules) == list_sizes(report)
    assert by_rules.weight_rmse == report.weight_rmse


def test_a_rule_may_leave_a_tensor_at_16_bits(build_tiny: Callable[..., Any]) -> None:
    rules = ({"match": r"layers\.0\.mlp\.down_proj", "bits": 16},)
    report = quantize_model(build_tiny("llama"), ask(3, quant={"rules": rules, "min_coverage": 0.5}))
    (left,) = [t for t in report.tensors if t.name == "model.layers.0.mlp.down_proj.weight"]
    assert not left.quantized
    assert report.bits_per_param <= 3


def test_a_larger_budget_never_loses_more(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt2")
    losses = [allocate_bits(model, ask(bits)).notes["loss"] for bits in (2.25, 2.6, 4.4, 8.25)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_fused_experts_are_one_tensor(build_tiny: Callable[..., Any]) -> None:
    model, ruled = build_tiny("mixtral"), build_tiny("mixtral")
    outliers: dict[str, Any] = {"outlier_fraction": 0.05, "outlier_selection": "column"}
    report = quantize_model(model, ask(3.5, choices=(2, 3, 4), quant=outliers))
    quantize_model(ruled, QuantConfig(**outliers, rules=report.notes["allocation"]["rules"]))
    assert report.bits_per_param <= 3.5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ruled.parameters(), strict=True))


def test_the_losses_of_a_rotated_model_are_those_of_its_own_weights(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("llama")
    before = copy_parameters(model)
    quant = ask(3.4, choices=(2, 3, 4), quant={"rotation": "hadamard"})
    loss = quantize_model(model, quant).notes["allocation"]["loss"]
    changed = sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters())
    assert loss == pytest.approx(changed, rel=1e-4)


def test_a_method_with_data_gets_the_map_that_rounding_measured() -> None:
    calibration = CalibrationConfig(samples=2, length=32)
    loaded, apart = load_model("nano-neox-98k"), load_model("nano-neox-98k")
    quant = dataclasses.replace(ask(3.25, "fisher"), method="gptq", calibration=calibration)
    rules = quantize_model(loaded.model, quant, loaded.tokenizer).notes["allocation"]["rules"]
    rounded = dataclasses.replace(quant, method="rtn")
    assert allocate_bits(apart.model, rounded, apart.tokenizer).rules == rules
    quantize_model(apart.model, QuantConfig(method="gptq", calibration=calibration, rules=rules), apart.tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), apart.model.parameters(), strict=True))


def test_a_rule_and_a_choice_may_name_the_method_that_all_have(build_tiny: Callable[..., Any]) -> None:
    choices = (2, {"bits": 4, "method": "gptq"})
    quant = {"method": "gptq", "rules": ({"match": "lm_head", "method": "gptq", "bits": 6},)}
    found = allocate_bits(build_tiny("llama"), ask(3, choices=choices, quant=quant))
    plain = ask(3, choices=(2, 4), quant={"rules": ({"match": "lm_head", "bits": 6},)})
    again = allocate_bits(build_tiny("llama"), plain)
    assert (again.losses == found.losses).all()
    assert again.rules[1:] == found.rules[1:]
    assert again.notes["kept"] == ["2", "4"]


def test_one_measurement_serves_every_budget_and_no_other_weights(
    build_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def count(candidates: Any) -> Any:
        measured.append(len(candidates))
        return measure_errors(candidates)

    monkeypatch.setattr(allocate_module, "measure_errors", count)
    model = build_tiny("llama")
    first = allocate_bits(model, ask(3.25))
    again = allocate_bits(model, ask(4.5))
    assert measured == [6]
    assert (first.losses == again.losses).all()
    allocate_bits(model, ask(3.25, choices=(2, 3, 7)))  # of which 2 and 3 are known
    assert measured == [6, 1]
    allocate_bits(build_tiny("llama", seed=1), ask(3.25))
    assert measured == [6, 1, 6]
    assert (first.notes["kept"], again.notes["kept"]) == ([], ["2", "3", "4", "5", "6", "8"])
    monkeypatch.setattr(kept, "REVISION", kept.REVISION + 1)  # as after a mended codebook
    assert allocate_bits(model, ask(3.25)).notes["kept"] == []


def test_a_damaged_measurement_is_made_again(build_tiny: Callable[..., Any], tmp_path: Any) -> None:
    model = build_tiny("llama")
    first = allocate_bits(model, ask(3.25))
    for path in (tmp_path / "losses").iterdir():
        path.write_text("[1.0, 2")
    assert (allocate_bits(model, ask(3.25)).losses == first.losses).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2.0}, r"bits=2\.0 is below what the choices 2, 3 can take, which is 2\.25 to 3\.25 bits per"),
        ({"bits": 3.5}, r"bits=3\.5 is above what the choices 2, 3 can take, which is 2\.25 to 3\.25 bits per"),
        ({"total_bits": 1000}, r"total_bits=1000 \(1,000 bits\) is below .* bits of the whole model"),
        ({"memory": "6GB"}, r"memory=6GB \(48,000,000,000 bits\) is above"),
    ],
)  # fmt: skip
def test_a_budget_out_of_reach_is_refused_with_the_numbers(
    fields: dict[str, Any], message: str, build_tiny: Callable[..., Any]
) -> None:
    model = build_tiny("llama", intermediate_size=192)  # whole blocks, so that the bits are round
    with pytest.raises(ValueError, match=message):
        quantize_model(model, ask(**fields, choices=(2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ask(3, total_bits=5), "has one budget, and bits and total_bits are given"),
        (lambda: ask(-1), r"quant\.allocation\.bits=-1 is not a finite number > 0"),
        (lambda: ask(math.nan), "bits=nan is not a finite number"),
        (lambda: ask(memory="6 gigabytes"), r"memory='6 gigabytes' is no number of KB, MB, GB"),
        (lambda: ask(3, "perplexity"), r"objective='perplexity' is not one of: kl, fisher, error"),
        (lambda: ask(3, unit="model"), "unit='model' is not one of: tensor, layer"),
        (lambda: ask(3, choices=(4, "4")), r"choices=\[4\] leaves nothing to choose"),
        (lambda: ask(3, choices=(3, 9)), r"choices: 9 is not in 2\.\.8, nor 16"),
        (lambda: ask(3, choices=(3, "nf4_qd")), r"choices='nf4_qd': did you mean nf4_dq\?"),
        (lambda: ask(3, choices=(3, {"bit": 4})), r"\(bit=4\): 'bit' is no field of a tensor's quantizer; did you"),
        (lambda: ask(3, choices=(3, {"exclude": "mlp"})), "'exclude' is no field of a tensor's quantizer"),
        (lambda: ask(3, choices=(3, {"bits": 2, "method": "gptq"})), "method=gptq is for a whole model; allowed"),
        (lambda: ask(3, choices=(3, {"block_size": 32})), r"choices: \(block_size=32\): it has no bits, and quant"),
        (lambda: ask(3, quant={"bits": 16}), "quantizes nothing, so that quant.allocation has nothing to distribute"),
        (lambda: ask(3, quant={"bits": 8, "method": "llm_int8"}), "method=llm_int8 decides the quantizer"),
        (lambda: ask(3, quant={"outlier_zscore": 4.0}), "outlier_zscore takes bits that only the weights' values tell"),
    ],
)  # fmt: skip
def test_what_cannot_be_allocated_is_refused(make: Callable[[], QuantConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_knows_no_weights_refuses_an_allocation(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("llama")
    with pytest.raises(ValueError, match=r"only kbit\.allocate_bits tells what each tensor gets"):
        plan_quantization(model, ask(3))
    with pytest.raises(ValueError, match=r"quant\.allocation has no budget"):
        allocate_bits(model, QuantConfig())
    with pytest.raises(ValueError, match=r"quant\.allocation\.objective=kl calibrates on a text"):
        quantize_model(model, ask(3, "kl"))
    with pytest.raises(ValueError, match="rules are for all of them"):
        quantize_model(model, ask(3, quant={"rules": ({"match": "layers", "bits": 3},)}))
    with pytest.raises(ValueError, match=r"one quantizer for all of its weights: it has no quant\.allocation"):
        ask(3).check_packable()
    with pytest.raises(ValueError, match=r"give quant\.rules of kbit\.allocate_bits"):
        Experiment(quant=ask(3), train=TrainConfig(steps=1))


def test_the_key_has_what_decides_the_map_and_no_more() -> None:
    def key(quant: QuantConfig) -> str:
        return find_key(Experiment(quant=quant))

    base = key(ask(3))
    assert key(QuantConfig(allocation=AllocationConfig(choices=(2, 4), objective="error"))) == key(QuantConfig())
    assert key(ask(3, quant={"bits": 7})) == base  # which no tensor has
    assert key(ask(3.0)) == base
    assert key(ask(total_bits=8e5)) == key(ask(total_bits=800000))
    for fields in ({"data_type": "float"}, {"data_type": "float", "float_bias": "bnb"}):
        assert len({key(ask(3, quant={"bits": bits, **fields})) for bits in (2, 3, 4, 5)}) == 1
    assert key(ask(3, quant={"data_type": "float", "exponent_bits": 1})) != key(ask(3, quant={"data_type": "float"}))
    head = ({"match": "lm_head", "block_size": 32},)  # whose bits are quant.bits
    assert key(ask(3, quant={"bits": 5, "rules": head})) != key(ask(3, quant={"bits": 7, "rules": head}))
    whole = ({"match": "lm_head", "block_size": 32, "bits": 5},)
    assert len({key(ask(3, quant={"bits": bits, "rules": whole})) for bits in (4, 5)}) == 1
    assert key(ask(3, choices=("8", 6, 5, 4, 3, "2"))) == base
    assert key(ask(memory="1KB")) == key(ask(total_bits=8000))
    assert key(ask(3, choices=("nf3", {"bits": 4}))) == key(ask(3, choices=(3, 4)))
    others = [ask(3.5), ask(total_bits=3), ask(3, choices=(2, 3)), ask(3, "kl"), ask(3, unit="layer")]
    others += [dataclasses.replace(ask(3, "kl"), calibration=CalibrationConfig(seed=1))]
    assert len({base, *map(key, others)}) == 7


def test_a_record_and_a_label_have_the_budget() -> None:
    experiment = Experiment(quant=ask(3.25, "kl", choices=(2, 3, "nf4_dq", {"bits": 3, "block_size": 32})))
    again = from_json(Experiment, json.loads(to_json(experiment)))
    assert again == experiment
    assert hash(again) == hash(experiment)
    assert experiment.label() == (
        "nano-neox-98k nf block 64 allocation=(3.25 bits by kl of 2, 3, nf4_dq, (bits=3 block_size=32))"
    )
    layers = AllocationConfig(memory="6 gb", choices=(2, 3), objective="fisher", unit="layer")
    assert layers.label() == "6 gb by fisher of 2, 3 by layer"
    assert read_options({"allocation.bits": 3.25, "allocation.choices": [2, 3]}) == ask(3.25, "kl", choices=(2, 3))


def test_a_run_keeps_the_map(kbit: Callable[..., Any], tmp_path: Any) -> None:
    done = kbit(
        "run", "quant.allocation={bits: 3.4, objective: fisher, choices: [2, 3, nf4_dq]}",
        "quant.calibration.samples=1", "quant.calibration.length=32", "eval.tasks=[]", "eval.perplexity_windows=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert re.search(r"of a budget of [\d,]+ bits, [\d,]+ are left; the map of its \d rules is in the record", done.out)
    row = read_results(tmp_path / "results").iloc[0]
    assert row["allocation"] == "3.4 bits by fisher of 2, 3, nf4_dq"
    assert row["bits"] == 3
    assert row["block_size"] == 64  # of all choices, which differ in their scales
    assert pd.isna(row["scale_format"])
    assert 3.2 < row["bits_per_param"] <= 3.4
    assert row["method_options"] == "calibration.samples=1 calibration.length=32"
