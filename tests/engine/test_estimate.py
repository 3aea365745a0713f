"""What a study is said to take: nothing without a basis, and near the truth with one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_results import make_result

from kbit.data.tasks import load_tasks
from kbit.data.windows import make_windows
from kbit.engine.estimate import (
    CostClass,
    Estimator,
    estimate_memory,
    estimate_tokens,
    format_count,
    format_seconds,
)
from kbit.engine.estimate_passes import estimate_training
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import prepare_task
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.methods.allocation.config import AllocationConfig
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.models.config import ModelConfig
from kbit.models.size import ModelSize, find_size
from kbit.numerics.spec import QuantSpec
from kbit.store.damage import DamagedRecordWarning
from kbit.store.store import Store
from kbit.training.config import TrainConfig
from kbit.training.sections import LoraConfig

NANO = ModelSize(10**6, 64, 256, 1024)
HUB = ModelSize(10**9, 2048, 2048, None)
TEXT = EvalConfig(tasks=(), perplexity_windows=16)


def make_experiment(model: str = "nano-neox-98k", method: str = "rtn", bits: int = 4) -> Experiment:
    return Experiment(ModelConfig(model), QuantConfig(bits=bits, method=method), TEXT)


def test_before_any_result_nothing_is_said_of_time(tmp_path: Path) -> None:
    estimator = Estimator()
    estimator.learn_stored(str(tmp_path / "none"), [make_experiment()], threads=1)
    assert estimator.predict_seconds(CostClass.of(make_experiment())) is None
    line = estimator.describe([make_experiment()] * 3, workers=2)
    assert line.startswith("tokens to score: about 12.3 thousand; time: unknown until the first result; memory: about ")
    assert "GB a worker, by parameters and batch size" in line


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    line = Estimator().describe([make_experiment("nobody/knows")], workers=1)
    unknown = "unknown until the first result"
    assert line == f"tokens to score: {unknown}; time: {unknown}; memory: unknown"


@pytest.mark.parametrize(
    ("size", "evaluation", "peak"),
    [
        # measured with SmolLM2's and Pythia's architectures and random weights: see FINDINGS.md
        (ModelSize(70_426_624, 512, 2048, 50304), EvalConfig(tasks=(), perplexity_windows=1), 1.365e9),
        (ModelSize(97_728, 64, 256, 1024), EvalConfig(tasks=("piqa", "nano_endings"), perplexity_windows=4), 0.799e9),
        (ModelSize(134_515_008, 576, 8192, 49152), EvalConfig(tasks=(), perplexity_windows=2), 1.968e9),
        (ModelSize(134_515_008, 576, 8192, 49152), EvalConfig(tasks=("hellaswag", "nano_choice"), limit=24), 1.933e9),
    ],
)
def test_memory_is_bounded_by_the_estimate_and_within_a_fifth_of_it(
    size: ModelSize, evaluation: EvalConfig, peak: float
) -> None:
    experiment = Experiment(ModelConfig("any"), QuantConfig(bits=4), evaluation)
    assert peak <= estimate_memory(size, experiment, "cpu") <= 1.2 * peak


def test_gptqs_memory_is_bounded_by_the_estimate_and_within_a_fifth_of_it() -> None:
    """Measured (VmHWM) with SmolLM2-135M's architecture and 8 windows of 256 tokens: see FINDINGS.md."""
    size, peak = ModelSize(134_515_008, 576, 8192, 49152, inner=1536), 2.119e9
    quant = QuantConfig(bits=4, method="gptq", calibration=CalibrationConfig(samples=8, length=256))
    experiment = Experiment(ModelConfig("any"), quant, EvalConfig(tasks=(), perplexity_windows=1))
    assert peak <= estimate_memory(size, experiment, "cpu") <= 1.2 * peak


def test_requests_and_calibration_states_take_memory_on_a_cpu() -> None:
    plain, tasks = make_experiment(), EvalConfig(tasks=("hellaswag",))
    usual = estimate_memory(HUB, plain, "cpu")
    asked = dataclasses.replace(plain, eval=tasks)
    # 40,168 requests of 6.3 KB with 3,135,532 tokens of 48 bytes
    assert estimate_memory(HUB, asked, "cpu") - usual == 40_168 * 6_300 + 3_135_532 * 48
    assert estimate_memory(HUB, asked, "cuda") == estimate_memory(HUB, plain, "cuda")
    calibrated = estimate_memory(HUB, make_experiment(method="gptq"), "cpu")
    # samples, length, hidden size, float32; sums over the inputs of seven matrices, and the inverse of the largest
    sums = 4 * (6 * 2048**2 + 8192**2)
    assert calibrated - usual == 2 * 128 * 2048 * 2048 * 4 + sums + 52 * 8192**2
    on_gpu = [estimate_memory(HUB, make_experiment(method=method), "cuda") for method in ("rtn", "awq")]
    assert on_gpu[1] - on_gpu[0] == sums


def allocate(objective: str, samples: int = 128, bits: float = 3, **fields: Any) -> Experiment:
    allocation = AllocationConfig(bits=bits, objective=objective, **fields)
    quant = QuantConfig(calibration=CalibrationConfig(samples=samples), allocation=allocation)
    return dataclasses.replace(make_experiment(), quant=quant)


def test_losses_of_an_allocation_take_memory() -> None:
    """By hand: float32 logits of 2,048 tokens, and of fisher information, gradients and what backward passes keep."""
    plain = estimate_memory(HUB, make_experiment(), "cuda")
    added = {name: estimate_memory(HUB, allocate(name), "cuda") - plain for name in ("error", "kl", "fisher")}
    logits = 3 * 4 * 2048 * 50_000
    layers = 10**9 / (12 * 2048**2)
    assert added["error"] == 0
    assert added["kl"] == logits
    assert added["fisher"] == pytest.approx(2 * 4 * 10**9 + 4 * 2048 * 17 * layers * 2048 + logits, abs=1)
    few, none = (estimate_memory(NANO, each, "cpu") for each in (allocate("kl", samples=4), make_experiment()))
    assert few - none == 3 * 4 * 4 * 256 * 1024  # four windows of 256 tokens, not eight
    both = [allocate(name) for name in ("error", "kl", "fisher")]
    each = [Estimator().predict_memory([experiment]) for experiment in both]
    assert Estimator().predict_memory(both) == Estimator().predict_memory(both[::-1]) == max(filter(None, each))


def test_an_allocation_takes_a_pass_for_each_tensor_and_choice() -> None:
    size = find_size("nano-neox-98k") or NANO
    layers = size.parameters / (12 * size.hidden**2)
    text = 128 * size.context
    estimator = Estimator()

    def count(experiment: Experiment) -> float:
        more = estimator.cost_of(experiment) - estimator.cost_of(make_experiment())
        return more / size.parameters

    assert count(allocate("error")) == 0
    assert count(allocate("fisher")) == 3 * text
    assert count(allocate("kl")) == pytest.approx((1 + 7 * layers * 6) * text, abs=1)
    assert count(allocate("kl", unit="layer", choices=(2, 4, 16))) == pytest.approx((1 + layers * 2) * text, abs=1)
    assert CostClass.of(allocate("kl")) == CostClass.of(allocate("kl", bits=4))  # which keeps its losses
    classes = [allocate("error"), allocate("fisher"), allocate("kl"), allocate("kl", samples=9), make_experiment()]
    assert len(set(map(CostClass.of, classes))) == 5


def test_a_packed_model_takes_its_packed_weights_and_two_tensors() -> None:
    """By hand, for 4-bit weights with a 16-bit scale for each 64, and what has a row for each token in float32."""
    size = ModelSize(10**9, 2048, 2048, 50_000, embedded=2 * 50_000 * 2048, largest=4 * 2048**2)
    packed = dataclasses.replace(make_experiment(), packed=True)
    states = 800_000_000 + 4 * (50_000 * 2048 + 16 * 2048 * 2048)  # process, copied embedding, hidden states
    weights = (10**9 - 2 * 50_000 * 2048) * 4.25 / 8 + 4 * 2 * 50_000 * 2048
    assert estimate_memory(size, packed, "cpu") == pytest.approx(states + weights + 2 * 4 * 4 * 2048**2, abs=1)
    plain = estimate_memory(size, make_experiment(), "cpu")
    assert plain == states + 2 * 4 * 10**9
    whole = dataclasses.replace(make_experiment(method="awq"), packed=True)  # the whole model comes first
    calibration = 2 * 128 * 2048 * 2048 * 4 + 4 * (6 * 2048**2 + 8192**2)
    of_inputs = 16 / 2048 / 8 * (10**9 - 2 * 50_000 * 2048)
    assert estimate_memory(size, whole, "cpu") == pytest.approx(states + weights + of_inputs + 4e9 + calibration, abs=1)
    baseline = dataclasses.replace(make_experiment(bits=16), packed=True)
    assert estimate_memory(size, baseline, "cpu") == plain


def test_the_largest_estimate_counts_which_experiments_are_packed() -> None:
    packed = [dataclasses.replace(make_experiment("org/model-1b", bits=bits), packed=True) for bits in (2, 8)]
    plain = make_experiment("org/model-1b")
    two, eight, whole = (Estimator().predict_memory([e]) for e in (*packed, plain))
    assert None not in (two, eight, whole)
    assert float(two or 0) < float(eight or 0) < float(whole or 0)
    assert Estimator().predict_memory([*packed, plain]) == whole
    assert Estimator().predict_memory(packed) == eight


def test_alike_experiments_take_as_long_as_the_middle_one() -> None:
    """The first of a worker also loads the model."""
    estimator = Estimator()
    for seconds in (60, 9, 10, 11):
        estimator.learn(make_experiment(bits=3), seconds)
    assert estimator.predict_seconds(CostClass.of(make_experiment(bits=16))) == 10.5


def test_time_grows_with_tokens_and_parameters_from_the_nearest_model() -> None:
    estimator = Estimator()
    estimator.learn(make_experiment("some/model-1b"), 100)
    estimator.learn(make_experiment("some/model-7b"), 300)
    assert estimator.predict_seconds(CostClass.of(make_experiment("some/model-2b"))) == pytest.approx(200)
    assert estimator.predict_seconds(CostClass.of(make_experiment("some/model-70b"))) == pytest.approx(3000)
    more = dataclasses.replace(make_experiment("some/model-1b"), eval=dataclasses.replace(TEXT, perplexity_windows=32))
    assert estimator.predict_seconds(CostClass.of(more)) == pytest.approx(200)


def test_a_method_that_was_not_measured_makes_it_at_least() -> None:
    estimator = Estimator()
    estimator.learn(make_experiment(), 120)
    both = Counter(map(CostClass.of, [make_experiment(), make_experiment(method="gptq")]))
    assert estimator.predict_time(both, 1) == "at least 2 min"
    estimator.learn(make_experiment(method="gptq"), 600)
    assert estimator.predict_time(both, 1) == "about 12 min"
    assert estimator.predict_time(both, 2) == "about 10 min"  # one worker has the longer
    assert estimator.predict_time(both, 2, start=120.0) == "about 12 min"


@given(st.lists(st.sampled_from(["98k", "332k", "1m"]), min_size=1, max_size=30), st.integers(1, 8))
def test_time_left_is_that_of_the_work_left_not_of_its_count(sizes: list[str], workers: int) -> None:
    seconds = {"98k": 1.0, "332k": 30.0, "1m": 1000.0}
    estimator = Estimator()
    for size, second in seconds.items():
        estimator.learn(make_experiment(f"nano-neox-{size}"), second)
    left = Counter(CostClass.of(make_experiment(f"nano-neox-{size}")) for size in sizes)
    expected = max(sum(seconds[s] for s in sizes) / workers, max(seconds[s] for s in sizes))
    assert estimator.predict_time(left, workers) == f"about {format_seconds(expected)}"


def test_what_runs_is_counted_from_its_start() -> None:
    """Else the time left would stand still while the last ones run."""
    estimator = Estimator()
    estimator.learn(make_experiment(), 120)
    alike = CostClass.of(make_experiment())
    assert estimator.predict_time(Counter({alike: 1}), 1, [(alike, 60.0)]) == "about 60 s"
    assert estimator.predict_time(Counter({alike: 3}), 2, [(alike, 60.0), (alike, 90.0)]) == "about 2 min"
    assert estimator.predict_time(Counter({alike: 2}), 2, [(alike, 60.0), (alike, 90.0)]) == "about 60 s"
    assert estimator.predict_time(Counter({alike: 1}), 1, [(alike, 200.0)]) == ""  # longer than ever: nothing is known


def store_result(path: Path, device: str = "x86_64, 1 threads", **changes: object) -> None:
    """An invented result of 12 seconds."""
    result = dataclasses.replace(make_result(0), experiment=make_experiment(), device=device, seconds_quantize=2.0)
    Store(path).write(dataclasses.replace(result, seconds_evaluate=10.0, **changes))  # type: ignore[arg-type]


def test_stored_results_are_a_basis(tmp_path: Path) -> None:
    store_result(tmp_path, tokens=5000)
    estimator = Estimator()
    estimator.learn_stored(str(tmp_path), [make_experiment()], threads=1)
    assert estimator.describe([make_experiment(bits=3)] * 20, workers=2).startswith(
        "tokens to score: about 100 thousand; time: about 2 min on 2 workers, by 1 stored result; "
    )
    assert "; time: about 4 min on 2 workers, 2 min of it to start, by 1 stored result; " in estimator.describe(
        [make_experiment(bits=3)] * 20, workers=2, start=120.0
    )


def test_results_of_the_same_revision_are_a_better_basis(tmp_path: Path) -> None:
    """Other models' results count only where the model itself has none. The store names a model with its revision."""
    mine = dataclasses.replace(make_experiment(), model=ModelConfig("toy", revision="step1"))
    for experiment, seconds in ((mine, 1.0), (make_experiment(), 50.0)):
        result = dataclasses.replace(make_result(0), experiment=experiment, key=find_key(experiment))
        Store(tmp_path).write(dataclasses.replace(result, device="x86_64, 1 threads", seconds_evaluate=seconds))
    estimator = Estimator()
    estimator.learn_stored(str(tmp_path), [mine], threads=1)
    assert estimator.learned == 1


@pytest.mark.parametrize(("device", "threads"), [("x86_64, 8 threads", 8), ("NVIDIA H100", 1)])
def test_results_of_other_hardware_are_no_basis(tmp_path: Path, device: str, threads: int) -> None:
    store_result(tmp_path, device, threads=threads)
    estimator = Estimator()
    estimator.learn_stored(str(tmp_path), [make_experiment()], threads=1)
    assert estimator.learned == 0


def test_a_damaged_record_is_named_and_the_others_are_learned(tmp_path: Path) -> None:
    store_result(tmp_path)
    (tmp_path / "experiments" / "0.json").write_text("{")
    estimator = Estimator()
    with pytest.warns(DamagedRecordWarning, match=r"0\.json is damaged"):
        estimator.learn_stored(str(tmp_path), [make_experiment()], threads=1)
    assert estimator.learned == 1


def test_tokens_of_a_task_are_those_that_are_sent() -> None:
    from kbit.models.loading import load_model

    loaded, size = load_model("nano-neox-98k"), find_size("nano-neox-98k")
    assert size is not None
    task = prepare_task(load_tasks(["nano_cloze"])[0])
    scorer = Scorer(loaded.model, loaded.tokenizer)
    scorer.loglikelihood(task.instances)
    sent = scorer.sent
    assert estimate_tokens(EvalConfig(("nano_cloze",), perplexity=None), size) == pytest.approx(sent, rel=0.02)
    assert estimate_tokens(EvalConfig(("nano_cloze",), limit=64, perplexity=None), size) == pytest.approx(
        sent / 10, rel=0.02
    )
    windows = make_windows("nano_held_out", loaded.tokenizer, context=256, max_windows=None)
    assert estimate_tokens(EvalConfig((), perplexity_windows=None), size) == pytest.approx(
        windows.tokens.numel(), rel=0.1
    )


def test_tokens_of_windows_are_counted_and_of_other_things_not_guessed(tmp_path: Path) -> None:
    assert estimate_tokens(TEXT, NANO) == 16 * 256
    assert estimate_tokens(EvalConfig((), perplexity="wikitext2", perplexity_windows=100), HUB) == 100 * 2048
    assert estimate_tokens(EvalConfig((), perplexity="wikitext2", perplexity_kind="rolling"), HUB) is None
    (tmp_path / "own.yaml").write_text("task: own\n")
    assert estimate_tokens(EvalConfig(("own",), task_path=str(tmp_path)), NANO) is None


def test_the_papers_tasks_are_counted_with_a_tokenizer_of_their_models_size() -> None:
    tasks = EvalConfig(("lambada_openai", "piqa", "winogrande", "hellaswag"), perplexity=None)
    assert estimate_tokens(tasks, HUB) == 415206 + 129742 + 54426 + 3135532
    assert estimate_tokens(dataclasses.replace(tasks, tasks=("piqa",)), NANO) == 245948


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45, "45 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5400, "2 h"), (864000, "10 days")],
)
def test_durations_have_two_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (31_000, "31 thousand"), (4_234_000, "4.23 million"), (7.06e8, "706 million")]
)
def test_counts_have_three_digits(count: int, text: str) -> None:
    assert format_count(count) == text


def test_a_trained_token_costs_three_passes() -> None:
    train = TrainConfig(steps=10, batch_size=4, context=128, seed=3)
    plain, trained = make_experiment(), dataclasses.replace(make_experiment(), train=train)
    estimator = Estimator()
    passes = estimator.cost_of(trained) / estimator.cost_of(plain)
    tokens = estimate_tokens(TEXT, find_size("nano-neox-98k") or NANO) or 0
    assert passes == pytest.approx((tokens + 3 * 10 * 4 * 128) / tokens)
    assert "tokens to score: about 4.1 thousand, to train on: about 5.12 thousand;" in estimator.describe([trained], 1)
    assert CostClass.of(trained) == CostClass.of(
        dataclasses.replace(trained, train=dataclasses.replace(train, seed=0, lr=1e-2))
    )
    assert CostClass.of(trained) != CostClass.of(plain)


def test_memory_of_a_training_is_above_what_was_measured() -> None:
    """Measured: training nano-neox-98k in steps of 2,048 tokens had a peak of 828 MB, and evaluating it one of 771."""
    size = find_size("nano-neox-98k")
    assert size is not None
    trained = dataclasses.replace(make_experiment(), train=TrainConfig(steps=10))
    added = estimate_memory(size, trained, "cpu") - estimate_memory(size, make_experiment(), "cpu")
    assert 57_000_000 < added < 2 * 57_000_000
    adapters = dataclasses.replace(trained.train, lora=LoraConfig(rank=2))
    assert estimate_memory(size, dataclasses.replace(trained, train=adapters), "cpu") == (
        estimate_memory(size, trained, "cpu") - 12 * size.parameters
    )
    aware = dataclasses.replace(trained.train, weights=QuantSpec(bits=3))
    assert estimate_training(size, aware) == estimate_training(size, trained.train) + 4 * size.parameters


def test_memory_of_replicas_is_a_gradient_for_each_and_the_activations_of_one() -> None:
    size = find_size("nano-neox-98k")
    assert size is not None
    one = estimate_training(size, TrainConfig(steps=10, batch_size=2))
    exchange = QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32")
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 4),
        ({"error_feedback": True}, 4),  # nothing is rounded, so that nothing is lost
        ({"exchange": exchange, "error_feedback": True}, 8),
        ({"exchange": exchange, "error_feedback": True, "exchange_form": "two_shot"}, 9),
    ]
    for fields, copies in cases:
        train = TrainConfig(steps=10, batch_size=8, replicas=4, **fields)
        assert estimate_training(size, train) == one + 4 * copies * size.parameters


def test_recent_results_without_a_training_hide_no_trainings(tmp_path: Path) -> None:
    train = TrainConfig(steps=10)
    trained = dataclasses.replace(make_experiment(), train=train)
    others = [make_experiment(bits=bits) for bits in range(2, 9)]
    for experiment in (trained, *others):
        result = dataclasses.replace(make_result(0), experiment=experiment, key=find_key(experiment))
        Store(tmp_path).write(dataclasses.replace(result, device="x86_64, 1 threads", seconds_evaluate=50.0))
    estimator = Estimator()
    estimator.learn_stored(str(tmp_path), [trained], threads=1)
    assert estimator.predict_seconds(CostClass.of(trained)) == 50.0 + result.seconds_quantize
    assert estimator.learned == 5
