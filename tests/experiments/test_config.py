"""What a configuration refuses, and how it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RayConfig, RunConfig
from kbit.methods.allocation.config import AllocationConfig
from kbit.methods.config import ActivationConfig, CacheConfig, CalibrationConfig, GptqConfig, QuantConfig
from kbit.models.config import ModelConfig

# Of each field: what else must be set so that it means something, and another value than its default.
DISTINCT: dict[str, tuple[dict[str, Any], Any]] = {
    "bits": ({}, 5),
    "rules": ({}, ({"match": "lm_head", "bits": 6},)),
    "allocation": ({}, AllocationConfig(bits=3.25)),
    "data_type": ({}, "int"),
    "exponent_bits": ({}, 2),
    "float_bias": ({"exponent_bits": 2}, "bnb"),
    "table": ({"data_type": "table", "table": (-1.0, 1.0)}, (-1.0, 0.0, 1.0)),
    "block_size": ({}, None),
    "layout": ({}, "row"),
    "normalization": ({}, "signed_absmax"),
    "centering": ({}, True),
    "scale_format": ({}, "bf16"),
    "rounding": ({}, "truncate"),
    "seed": ({"rounding": "stochastic"}, 1),
    "method": ({}, "hqq"),
    "calibration": ({"method": "gptq"}, CalibrationConfig(seed=1)),
    "gptq": ({"method": "gptq"}, GptqConfig(static_groups=True)),
    "outlier_fraction": ({}, 0.02),
    "outlier_selection": ({"outlier_fraction": 0.02}, "column"),
    "outlier_zscore": ({}, 4.0),
    "activation_threshold": ({"bits": 8, "method": "llm_int8"}, 3.0),
    "include": ({}, "embed"),
    "exclude": ({}, "mlp"),
    "activations": ({}, ActivationConfig(bits=8)),
    "kv_cache": ({}, CacheConfig(bits=8)),
    "rotation": ({}, "hadamard"),
    "rotation_seed": ({"rotation": "hadamard"}, 1),
    "min_coverage": ({}, 0.5),
}

BAD_VALUES: list[tuple[Callable[[], object], list[str]]] = [
    (lambda: QuantConfig(bits=1), ["bits=1", "2..8", "16"]),
    (lambda: QuantConfig(bits=9), ["bits=9", "2..8", "16"]),
    (lambda: QuantConfig(bits=0), ["bits=0", "2..8"]),
    (lambda: QuantConfig(data_type="flaot"), ["data_type='flaot'", "int, float, dynamic, quantile, nf"]),
    (lambda: QuantConfig(data_type=""), ["data_type=''", "int, float"]),
    (lambda: QuantConfig(bits=4, data_type="float", exponent_bits=4), ["exponent_bits=4", "bits=4", "1..3"]),
    (lambda: QuantConfig(bits=3, data_type="float", exponent_bits=7), ["exponent_bits=7", "bits=3", "1..2"]),
    (lambda: QuantConfig(data_type="float", exponent_bits=0), ["exponent_bits=0", "1..3"]),
    (lambda: QuantConfig(float_bias="ocp"), ["float_bias='ocp'", "ieee, bnb, paper"]),
    (lambda: QuantConfig(scale_format="fp9"), ["scale_format='fp9'", "fp16, fp32, bf16"]),
    (lambda: QuantConfig(block_size=0), ["block_size=0", ">= 1"]),
    (lambda: QuantConfig(block_size=-64), ["block_size=-64", ">= 1"]),
    (lambda: QuantConfig(method="gptqq"), ["quant.method='gptqq'", "rtn"]),
    (lambda: QuantConfig(method="gptq", rounding="stochastic"), ["quant.method=gptq", "stochastic"]),
    (lambda: QuantConfig(method="gptq", gptq=GptqConfig(act_order=True)), ["act_order=true", "static_groups=true"]),
    (lambda: GptqConfig(damping=-1), ["quant.gptq.damping=-1", ">= 0"]),
    (lambda: GptqConfig(damping=float("nan")), ["quant.gptq.damping=nan", ">= 0"]),
    (lambda: CalibrationConfig(samples=0), ["quant.calibration.samples=0", ">= 1"]),
    (lambda: CalibrationConfig(length=0), ["quant.calibration.length=0", ">= 1"]),
    (lambda: CalibrationConfig(unseen="skip"), ["quant.calibration.unseen='skip'", "error, rtn"]),
    (lambda: QuantConfig(min_coverage=1.5), ["quant.min_coverage=1.5", "0..1"]),
    (lambda: QuantConfig(min_coverage=float("nan")), ["quant.min_coverage=nan", "0..1"]),
    (lambda: QuantConfig(include="[a"), ["quant.include='[a'", "regular expression"]),
    (lambda: QuantConfig(exclude="(fc"), ["quant.exclude='(fc'", "regular expression"]),
    (lambda: ModelConfig(dtype="fp16"), ["model.dtype='fp16'", "float32, bfloat16, float16"]),
    (lambda: EvalConfig(limit=0), ["eval.limit=0", ">= 1"]),
    (lambda: EvalConfig(perplexity_kind="sliding"), ["eval.perplexity_kind", "'sliding'", "windows, rolling"]),
    (lambda: EvalConfig(batch_size=0), ["eval.batch_size=0", ">= 1"]),
    (lambda: EvalConfig(perplexity_windows=-1), ["eval.perplexity_windows=-1", ">= 1"]),
    (lambda: EvalConfig(tasks=("piqa", "piqa")), ["piqa", "twice"]),
    (lambda: EvalConfig(tasks=(), perplexity=None), ["nothing to measure", "eval.tasks", "eval.perplexity"]),
    (lambda: RunConfig(device="gpu"), ["device='gpu'", "cpu, cuda, cuda:N"]),
    (lambda: RunConfig(device="cuda:x"), ["device='cuda:x'", "cpu, cuda, cuda:N"]),
    (lambda: RayConfig(num_workers=0), ["ray.num_workers=0", ">= 1"]),
    (lambda: RayConfig(cpus_per_worker=0), ["ray.cpus_per_worker=0", ">= 1"]),
    (lambda: RayConfig(niceness=20), ["ray.niceness=20", "0..19"]),
    (lambda: RayConfig(gpus_per_worker=-0.5), ["ray.gpus_per_worker=-0.5", ">= 0"]),
    (lambda: RayConfig(gpus_per_worker=1.5), ["ray.gpus_per_worker=1.5", "whole above 1"]),
    (lambda: RayConfig(gpus_per_worker=float("nan")), ["ray.gpus_per_worker=nan", ">= 0"]),
    (lambda: RayConfig(gpus_per_worker=float("inf")), ["ray.gpus_per_worker=inf", ">= 0"]),
]


def with_quant(**fields: object) -> Experiment:
    """The default experiment with other fields of quant."""
    return Experiment(quant=dataclasses.replace(QuantConfig(), **fields))  # type: ignore[arg-type]  # wrong ones too


@pytest.mark.parametrize(("make", "words"), BAD_VALUES, ids=[words[0] for _, words in BAD_VALUES])
def test_bad_value_is_refused_with_the_value_and_what_is_allowed(make: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        make()
    assert [word for word in words if word not in str(caught.value)] == []


def test_label_names_model_quantizer_and_block() -> None:
    assert with_quant(data_type="nf", block_size=None).label() == "nano-neox-98k nf4 block whole"
    assert with_quant(method="gptq").label() == "nano-neox-98k nf4 block 64 gptq"
    assert with_quant(bits=16, method="gptq").label() == "nano-neox-98k 16-bit"
    assert with_quant(bits=8, method="llm_int8", activation_threshold=3.0).label() == (
        "nano-neox-98k llm_int8 activation_threshold=3.0"
    )
    calibrated = with_quant(method="gptq", gptq=GptqConfig(damping=0.1), calibration=CalibrationConfig(samples=4))
    assert calibrated.label() == "nano-neox-98k nf4 block 64 gptq calibration.samples=4 gptq.damping=0.1"
    mine = with_quant(bits=2, data_type="table", table=(-1.0, 0.5, 1.0), layout="row", exclude="mlp")
    assert mine.label() == "nano-neox-98k table2 block 64 table=[-1, 0.5, 1] layout=row exclude=mlp"
    assert Experiment(ModelConfig(dtype="bfloat16"), QuantConfig(bits=16)).label() == (
        "nano-neox-98k 16-bit dtype=bfloat16"
    )


def test_every_field_of_a_quantizer_of_weights_can_differ() -> None:
    only_of_states = {"signed", "zero"}  # a QuantConfig refuses to have no signs
    assert DISTINCT.keys() == {field.name for field in dataclasses.fields(QuantConfig)} - only_of_states


@pytest.mark.parametrize("name", DISTINCT)
def test_no_two_quantizers_have_one_label(name: str) -> None:
    other = DISTINCT[name]
    values: dict[str, Any] = {"data_type": "float"} | other[0]
    base = QuantConfig(**values)
    changed = dataclasses.replace(base, **{name: other[1]})
    labels = {Experiment(ModelConfig(), quant).label() for quant in (base, changed)}
    same = base.identity_fields == changed.identity_fields
    assert (len(labels), same) == ((2, False) if name != "min_coverage" else (1, True))


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        ({"exponent_bits": 2}, "exponent_bits"),
        ({"data_type": "float", "exponent_bits": 3}, ""),  # what a float of 4 bits has anyway
        ({"data_type": "float", "exponent_bits": 2, "float_bias": "bnb"}, ""),
        ({"float_bias": "bnb", "table": (0.0, 1.0), "seed": 3}, "float_bias table seed"),
        ({"bits": 2, "data_type": "table", "table": (1.0, 0.0)}, ""),
        ({"data_type": "learned", "seed": 3, "min_coverage": 0.5, "exclude": "mlp"}, ""),
        ({"gptq": GptqConfig(damping=0.1), "calibration": CalibrationConfig(samples=4)}, "gptq calibration"),
        ({"method": "gptq", "gptq": GptqConfig(damping=0.1), "calibration": CalibrationConfig(samples=4)}, ""),
        ({"outlier_selection": "column", "activation_threshold": 5.0}, "outlier_selection activation_threshold"),
        ({"bits": 8, "method": "llm_int8", "data_type": "float", "block_size": 32}, "data_type block_size"),
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_known(fields: dict[str, Any], idle: str) -> None:
    assert QuantConfig(**fields).idle_fields == set(idle.split())
