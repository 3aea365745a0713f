"""What an experiment's key depends on: the fields that decide its numbers, and the content of the files it reads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from kbit.data.texts import locate_text
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RayConfig, RunConfig
from kbit.experiments.identity import check_texts, check_unchanged, find_key
from kbit.methods.config import METHODS, CalibrationConfig, GptqConfig, QuantConfig
from kbit.models.config import ModelConfig
from kbit.numerics.codebooks import PAPER_EXPONENT_BITS


def with_quant(**fields: object) -> Experiment:
    """The default experiment with other fields of quant."""
    return Experiment(quant=dataclasses.replace(QuantConfig(), **fields))  # type: ignore[arg-type]  # wrong ones too


def with_eval(**fields: object) -> Experiment:
    """The default experiment with other fields of eval."""
    return Experiment(eval=dataclasses.replace(EvalConfig(), **fields))  # type: ignore[arg-type]


def quant_key(**fields: object) -> str:
    """The key of the default experiment with other fields of quant."""
    return find_key(with_quant(**fields))


def eval_key(**fields: object) -> str:
    """The key of the default experiment with other fields of eval."""
    return find_key(with_eval(**fields))


@pytest.mark.parametrize("exponent_bits", [1, 2, 3, None, 99])
@pytest.mark.parametrize("data_type", ["int", "dynamic", "quantile", "nf"])
def test_exponent_bits_mean_nothing_without_float(data_type: str, exponent_bits: int | None) -> None:
    assert quant_key(data_type=data_type, exponent_bits=exponent_bits) == quant_key(data_type=data_type)


@pytest.mark.parametrize("data_type", ["int", "dynamic", "quantile", "nf"])
def test_float_bias_means_nothing_without_float(data_type: str) -> None:
    assert quant_key(data_type=data_type, float_bias="paper") == quant_key(data_type=data_type)


@pytest.mark.parametrize(
    "fields",
    [
        {"data_type": "float", "exponent_bits": 2},
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
    assert quant_key(bits=16, **fields) == quant_key(bits=16)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_papers_exponent_bits_are_the_default(bits: int) -> None:
    assert quant_key(data_type="float", bits=bits, exponent_bits=PAPER_EXPONENT_BITS[bits]) == quant_key(
        data_type="float", bits=bits
    )


@pytest.mark.parametrize(("bits", "exponent_bits"), [(3, 2), (4, 3), (5, 4), (2, 1)])
def test_float_bias_means_nothing_without_mantissa(bits: int, exponent_bits: int) -> None:
    shared = {"bits": bits, "data_type": "float", "exponent_bits": exponent_bits}
    assert quant_key(**shared, float_bias="bnb") == quant_key(**shared, float_bias="ieee")


def test_float_bias_counts_with_a_mantissa() -> None:
    keys = {quant_key(data_type="float", exponent_bits=2, float_bias=bias) for bias in ("ieee", "bnb", "paper")}
    assert len(keys) == 3


def test_order_of_tasks_does_not_change_the_key() -> None:
    assert eval_key(tasks=("piqa", "winogrande")) == eval_key(tasks=("winogrande", "piqa"))


def test_limit_means_nothing_without_tasks() -> None:
    assert eval_key(tasks=(), limit=5) == eval_key(tasks=())


def test_windows_mean_nothing_without_a_text() -> None:
    assert eval_key(perplexity=None, perplexity_windows=5) == eval_key(perplexity=None)


def test_the_definition_of_perplexity_is_content() -> None:
    assert eval_key(perplexity_kind="windows") == find_key(Experiment())
    rolling = eval_key(perplexity_kind="rolling")
    assert rolling != find_key(Experiment())
    assert eval_key(perplexity_kind="rolling", perplexity_windows=3) == rolling  # it has no windows


def test_batch_size_does_not_change_the_key() -> None:
    assert eval_key(batch_size=1) == find_key(Experiment())


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
    assert find_key(config) == find_key(config.experiment) == find_key(Experiment())


def test_every_scientific_field_changes_the_key() -> None:
    experiments = [
        Experiment(),
        Experiment(ModelConfig("nano-neox-332k")),
        Experiment(ModelConfig(dtype="bfloat16")),
        with_quant(bits=5),
        with_quant(bits=16),
        with_quant(data_type="int"),
        with_quant(data_type="float"),
        with_quant(data_type="float", exponent_bits=1),
        with_quant(data_type="float", exponent_bits=2),
        with_quant(data_type="float", exponent_bits=2, float_bias="bnb"),
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
    assert len({find_key(experiment) for experiment in experiments}) == len(experiments)


def test_a_local_model_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    for folder, weights in [("a/model", b"one"), ("b/model", b"one"), ("c/model", b"two")]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
    same, copy, other = (find_key(Experiment(model=ModelConfig(name=str(tmp_path / f / "model")))) for f in "abc")
    assert same == copy != other


def test_a_users_own_task_counts_by_its_folders_content(tmp_path: Path) -> None:
    def key_with(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(f"task: piqa\n# {text}\n")
        return eval_key(tasks=("piqa",), task_path=str(tmp_path))

    shipped = eval_key(tasks=("piqa",))
    assert len({shipped, key_with("one"), key_with("two")}) == 3
    assert eval_key(tasks=("winogrande",), task_path=str(tmp_path)) == eval_key(tasks=("winogrande",))


def test_a_text_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    for name, text in [("one.txt", "a b c"), ("same.txt", "a b c"), ("other.txt", "a b d")]:
        (tmp_path / name).write_text(text)
    one, same, other = (eval_key(perplexity=str(tmp_path / name)) for name in ("one.txt", "same.txt", "other.txt"))
    assert one == same != other


FEW = CalibrationConfig(samples=5)


def test_options_of_a_method_mean_nothing_to_another() -> None:
    options = {"calibration": FEW, "gptq": GptqConfig(static_groups=True)}
    for method in ("rtn", "mse", "hqq"):
        assert quant_key(method=method, **options) == quant_key(method=method)
    assert quant_key(method="awq", **options) == quant_key(method="awq", calibration=FEW)
    assert quant_key(bits=16, method="gptq", **options) == quant_key(bits=16)


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
    assert len({find_key(experiment) for experiment in experiments}) == len(experiments)


def test_a_calibration_text_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    for name, text in [("one.txt", "a b c"), ("same.txt", "a b c"), ("other.txt", "a b d")]:
        (tmp_path / name).write_text(text)
    one, same, other = (
        quant_key(method="gptq", calibration=CalibrationConfig(text=str(tmp_path / name)))
        for name in ("one.txt", "same.txt", "other.txt")
    )
    assert one == same != other


# Keys name the results in every store there is. If this fails, a default was changed or a field is not dropped at its
# default: mend that, not the keys, or old results are no longer found.
GOLDEN_KEYS = [
    (Experiment(quant=QuantConfig(data_type="float")), "6d083d2168b91764"),
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


@pytest.mark.parametrize(("experiment", "key"), GOLDEN_KEYS, ids=["first default", "baseline", "everything set"])
def test_keys_of_old_results_stay(experiment: Experiment, key: str) -> None:
    assert find_key(experiment) == key


def test_results_of_a_quantizer_that_was_mended_are_not_found_under_its_key() -> None:
    experiment = with_quant(data_type="quantile", normalization="signed_absmax")
    assert find_key(experiment) != "0dc6bb4b0c45e729"  # of the codebook that was fitted to values before scaling
    assert "revision" not in experiment.label()


def test_key_is_the_same_in_another_process() -> None:
    code = (
        "from kbit.experiments.config import Experiment; from kbit.experiments.identity import find_key\n"
        "print(find_key(Experiment()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == find_key(Experiment())


@pytest.mark.parametrize("text", ["nano_held_out", str(locate_text("nano_held_out"))])
def test_calibrating_on_the_text_that_is_measured_is_refused(text: str) -> None:
    experiment = with_quant(method="gptq", calibration=CalibrationConfig(text=text))
    for refuse in (lambda: check_texts(experiment), lambda: check_unchanged(experiment, find_key(experiment))):
        with pytest.raises(ValueError, match=r"calibration\.text=.* is the text that is measured: 'nano_held_out'"):
            refuse()
    check_texts(with_quant(method="rtn", calibration=CalibrationConfig(text=text)))  # rtn sees no text
