"""What an experiment's key depends on, and what a configuration refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kbit.data.texts import locate_text
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RayConfig, RunConfig
from kbit.methods.config import METHODS, CalibrationConfig, GptqConfig, QuantConfig
from kbit.models.config import ModelConfig
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS

# Of each field: what else must be set so that it means something, and another value than its default.
DISTINCT: dict[str, tuple[dict[str, Any], Any]] = {
    "bits": ({}, 5),
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
    "min_coverage": ({}, 0.5),
}

BAD_VALUES: list[tuple[Callable[[], object], list[str]]] = [
    (lambda: QuantConfig(bits=1), ["bits=1", "2..8", "16"]),
    (lambda: QuantConfig(bits=9), ["bits=9", "2..8", "16"]),
    (lambda: QuantConfig(bits=0), ["bits=0", "2..8"]),
    (lambda: QuantConfig(data_type="flaot"), ["data_type='flaot'", "int, float, dynamic, quantile, nf"]),
    (lambda: QuantConfig(data_type=""), ["data_type=''", "int, float"]),
    (lambda: QuantConfig(bits=4, exponent_bits=4), ["exponent_bits=4", "bits=4", "1..3"]),
    (lambda: QuantConfig(bits=3, exponent_bits=7), ["exponent_bits=7", "bits=3", "1..2"]),
    (lambda: QuantConfig(exponent_bits=0), ["exponent_bits=0", "1..3"]),
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
    (lambda: RayConfig(gpus_per_worker=-0.5), ["ray.gpus_per_worker=-0.5", ">= 0"]),
    (lambda: RayConfig(gpus_per_worker=1.5), ["ray.gpus_per_worker=1.5", "whole above 1"]),
    (lambda: RayConfig(gpus_per_worker=float("nan")), ["ray.gpus_per_worker=nan", ">= 0"]),
    (lambda: RayConfig(gpus_per_worker=float("inf")), ["ray.gpus_per_worker=inf", ">= 0"]),
]


def with_quant(**fields: object) -> Experiment:
    """The default experiment with other fields of quant."""
    return Experiment(quant=dataclasses.replace(QuantConfig(), **fields))  # type: ignore[arg-type]  # wrong ones too


def with_eval(**fields: object) -> Experiment:
    """The default experiment with other fields of eval."""
    return Experiment(eval=dataclasses.replace(EvalConfig(), **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "words"), BAD_VALUES, ids=[words[0] for _, words in BAD_VALUES])
def test_bad_value_is_refused_with_the_value_and_what_is_allowed(make: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        make()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("exponent_bits", [1, 2, 3, None, 99])
@pytest.mark.parametrize("data_type", ["int", "dynamic", "quantile", "nf"])
def test_exponent_bits_mean_nothing_without_float(data_type: str, exponent_bits: int | None) -> None:
    assert with_quant(data_type=data_type, exponent_bits=exponent_bits).key == with_quant(data_type=data_type).key


@pytest.mark.parametrize("data_type", ["int", "dynamic", "quantile", "nf"])
def test_float_bias_means_nothing_without_float(data_type: str) -> None:
    assert with_quant(data_type=data_type, float_bias="paper").key == with_quant(data_type=data_type).key


@pytest.mark.parametrize(
    "fields",
    [
        {"data_type": "nf"},
        {"exponent_bits": 2},
        {"float_bias": "bnb"},
        {"block_size": None},
        {"scale_format": "fp32"},
        {"include": "lm_head"},
        {"exclude": "fc"},
        {"min_coverage": 0.1},
    ],
    ids=str,
)
def test_every_quantizer_field_means_nothing_at_16_bits(fields: dict[str, object]) -> None:
    assert with_quant(bits=16, **fields).key == with_quant(bits=16).key


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_papers_exponent_bits_are_the_default(bits: int) -> None:
    assert with_quant(bits=bits, exponent_bits=PAPER_EXPONENT_BITS[bits]).key == with_quant(bits=bits).key


@pytest.mark.parametrize(("bits", "exponent_bits"), [(3, 2), (4, 3), (5, 4), (2, 1)])
def test_float_bias_means_nothing_without_mantissa(bits: int, exponent_bits: int) -> None:
    shared = {"bits": bits, "exponent_bits": exponent_bits}
    assert with_quant(**shared, float_bias="bnb").key == with_quant(**shared, float_bias="ieee").key


def test_float_bias_counts_with_a_mantissa() -> None:
    keys = {with_quant(bits=4, exponent_bits=2, float_bias=bias).key for bias in ("ieee", "bnb", "paper")}
    assert len(keys) == 3


def test_order_of_tasks_does_not_change_the_key() -> None:
    assert with_eval(tasks=("piqa", "winogrande")).key == with_eval(tasks=("winogrande", "piqa")).key


def test_limit_means_nothing_without_tasks() -> None:
    assert with_eval(tasks=(), limit=5).key == with_eval(tasks=()).key


def test_windows_mean_nothing_without_a_text() -> None:
    assert with_eval(perplexity=None, perplexity_windows=5).key == with_eval(perplexity=None).key


def test_the_definition_of_perplexity_is_content() -> None:
    assert with_eval(perplexity_kind="windows").key == Experiment().key
    rolling = with_eval(perplexity_kind="rolling")
    assert rolling.key != Experiment().key
    assert with_eval(perplexity_kind="rolling", perplexity_windows=3).key == rolling.key  # it has no windows


def test_batch_size_does_not_change_the_key() -> None:
    assert with_eval(batch_size=1).key == Experiment().key


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "cuda:1"},
        {"results": "/elsewhere"},
        {"ray": RayConfig(num_workers=7)},
        {"fail_fast": True},
        {"retry_failed": True},
    ],
    ids=str,
)
def test_how_it_runs_does_not_change_the_key(fields: dict[str, object]) -> None:
    config = dataclasses.replace(RunConfig(), **fields)  # type: ignore[arg-type]
    assert config.key == config.experiment.key == Experiment().key


def test_every_scientific_field_changes_the_key() -> None:
    experiments = [
        Experiment(),
        Experiment(ModelConfig("nano-neox-332k")),
        Experiment(ModelConfig(dtype="bfloat16")),
        with_quant(bits=5),
        with_quant(bits=16),
        with_quant(data_type="int"),
        with_quant(data_type="nf"),
        with_quant(exponent_bits=1),
        with_quant(exponent_bits=2),
        with_quant(exponent_bits=2, float_bias="bnb"),
        with_quant(block_size=128),
        with_quant(block_size=None),
        with_quant(scale_format="bf16"),
        with_quant(include="lm_head"),
        with_quant(exclude="lm_head"),
        with_eval(tasks=("piqa",)),
        with_eval(tasks=()),
        with_eval(limit=5),
        with_eval(perplexity=None),
        with_eval(perplexity_windows=5),
        with_eval(perplexity_windows=None),
    ]
    assert len({experiment.key for experiment in experiments}) == len(experiments)


def test_a_local_model_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    for folder, weights in [("a/model", b"one"), ("b/model", b"one"), ("c/model", b"two")]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
    same, copy, other = (Experiment(model=ModelConfig(name=str(tmp_path / f / "model"))) for f in "abc")
    assert same.key == copy.key != other.key


def test_a_users_own_task_counts_by_its_folders_content(tmp_path: Path) -> None:
    def key_with(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(f"task: piqa\n# {text}\n")
        return with_eval(tasks=("piqa",), task_path=str(tmp_path)).key

    shipped = with_eval(tasks=("piqa",)).key
    assert len({shipped, key_with("one"), key_with("two")}) == 3
    assert with_eval(tasks=("winogrande",), task_path=str(tmp_path)).key == with_eval(tasks=("winogrande",)).key


def test_a_text_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    for name, text in [("one.txt", "a b c"), ("same.txt", "a b c"), ("other.txt", "a b d")]:
        (tmp_path / name).write_text(text)
    one, same, other = (with_eval(perplexity=str(tmp_path / name)).key for name in ("one.txt", "same.txt", "other.txt"))
    assert one == same != other


FEW = CalibrationConfig(samples=5)


def test_options_of_a_method_mean_nothing_to_another() -> None:
    options = {"calibration": FEW, "gptq": GptqConfig(static_groups=True)}
    for method in ("rtn", "mse", "hqq"):
        assert with_quant(method=method, **options).key == with_quant(method=method).key
    assert with_quant(method="awq", **options).key == with_quant(method="awq", calibration=FEW).key
    assert with_quant(bits=16, method="gptq", **options).key == with_quant(bits=16).key


def test_every_method_and_each_of_its_options_changes_the_key() -> None:
    experiments = [
        *(with_quant(bits=8, method=method) for method in METHODS),
        *(
            with_quant(method="gptq", calibration=dataclasses.replace(CalibrationConfig(), **fields))
            for fields in ({"samples": 5}, {"length": 64}, {"seed": 1}, {"unseen": "rtn"})
        ),
        *(
            with_quant(method="gptq", gptq=GptqConfig(**fields))
            for fields in (
                {"static_groups": True},
                {"static_groups": True, "act_order": True},
                {"damping": 0.1},
                {"search_scales": True},
            )
        ),
    ]
    assert len({experiment.key for experiment in experiments}) == len(experiments)


def test_a_calibration_text_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    for name, text in [("one.txt", "a b c"), ("same.txt", "a b c"), ("other.txt", "a b d")]:
        (tmp_path / name).write_text(text)
    one, same, other = (
        with_quant(method="gptq", calibration=CalibrationConfig(text=str(tmp_path / name))).key
        for name in ("one.txt", "same.txt", "other.txt")
    )
    assert one == same != other


# Keys name the results in every store there is. If this fails, a default was changed or a field is not dropped at its
# default: mend that, not the keys, or old results are no longer found.
GOLDEN_KEYS = [
    (Experiment(), "6d083d2168b91764"),
    (Experiment(quant=QuantConfig(bits=16)), "a350cc32e63d73a5"),
    (
        Experiment(
            ModelConfig("opt-125m", "bfloat16"),
            QuantConfig(bits=3, data_type="quantile", block_size=None, exclude="fc1"),
            EvalConfig(tasks=("piqa", "lambada_openai"), limit=100, perplexity=None),
        ),
        "c9b0e97c68502cd9",
    ),
]


@pytest.mark.parametrize(("experiment", "key"), GOLDEN_KEYS, ids=["default", "baseline", "everything set"])
def test_keys_of_old_results_stay(experiment: Experiment, key: str) -> None:
    assert experiment.key == key


def test_key_is_the_same_in_another_process() -> None:
    code = "from kbit.experiments.config import Experiment; print(Experiment().key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Experiment().key


def test_configuration_does_not_load_torch() -> None:
    code = "import sys, kbit.experiments.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_label_names_model_quantizer_and_block() -> None:
    assert with_quant(data_type="nf", block_size=None).label() == "nano-neox-98k nf4 block whole"
    assert with_quant(method="gptq").label() == "nano-neox-98k float4-e3m0 block 64 gptq"
    assert with_quant(bits=16, method="gptq").label() == "nano-neox-98k 16-bit"
    assert with_quant(bits=8, method="llm_int8", activation_threshold=3.0).label() == (
        "nano-neox-98k llm_int8 activation_threshold=3.0"
    )
    calibrated = with_quant(method="gptq", gptq=GptqConfig(damping=0.1), calibration=CalibrationConfig(samples=4))
    assert calibrated.label() == "nano-neox-98k float4-e3m0 block 64 gptq calibration.samples=4 gptq.damping=0.1"
    mine = with_quant(bits=2, data_type="table", table=(-1.0, 0.5, 1.0), layout="row", exclude="mlp")
    assert mine.label() == "nano-neox-98k table2 block 64 table=[-1, 0.5, 1] layout=row exclude=mlp"
    assert Experiment(ModelConfig(dtype="bfloat16"), QuantConfig(bits=16)).label() == (
        "nano-neox-98k 16-bit dtype=bfloat16"
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(QuantConfig)])
def test_no_two_quantizers_have_one_label(name: str) -> None:
    other = DISTINCT[name]
    values: dict[str, Any] = {"data_type": "float"} | other[0]
    base = QuantConfig(**values)
    changed = dataclasses.replace(base, **{name: other[1]})
    labels = {Experiment(ModelConfig(), quant).label() for quant in (base, changed)}
    assert (len(labels), base.content == changed.content) == ((2, False) if name != "min_coverage" else (1, True))


@pytest.mark.parametrize("text", ["nano_held_out", str(locate_text("nano_held_out"))])
def test_calibrating_on_the_text_that_is_measured_is_refused(text: str) -> None:
    experiment = with_quant(method="gptq", calibration=CalibrationConfig(text=text))
    for refuses in (experiment.check_texts, experiment.check_content):
        with pytest.raises(ValueError, match=r"calibration\.text=.* is the text that is measured: 'nano_held_out'"):
            refuses()
    with_quant(method="rtn", calibration=CalibrationConfig(text=text)).check_texts()  # which sees no text
