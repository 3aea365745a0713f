"""The measure of time and memory: on a clock of the tests' own, of packed and plain models, stored and read back."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kbit.checkpoints.loading import load_model
from kbit.costs.memory import Use, count_memory
from kbit.costs.shapes import find_shape
from kbit.evaluation.config import EvalConfig, SpeedConfig
from kbit.evaluation.measure import Measured
from kbit.evaluation.measurement import Measurement
from kbit.evaluation.measures import MEASURES
from kbit.evaluation.speed.generation import Workload, generate, measure_allocated
from kbit.evaluation.speed.measure import Speed
from kbit.evaluation.speed.record import SpeedRecord
from kbit.evaluation.speed.weights import count_held_bytes, count_read_bytes, find_packed_share
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.session import Session
from kbit.layers.int8_linear import list_products
from kbit.layers.quantized_linear import QuantizedLinear
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.config import ModelConfig
from kbit.store.items import read_items
from kbit.store.readers import read_results
from kbit.store.results import load_results
from kbit.store.store import Store

TICK = 2.0**-6  # seconds between two looks at the clock: no trial of the machine is too short to be told
SMALL = ModelConfig("nano-neox-98k")
FAST = SpeedConfig(measure=True, batches=(1, 4), prompt=16, new=3, repetitions=6)


class FakeClock:
    """A clock that goes on by a tick when it is read, and by what a model's forward passes cost."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += TICK
        return self.now

    def attach(self, model: torch.nn.Module, seconds: Callable[[int, int], float]) -> None:
        """Let each forward pass of (batch, tokens) take so many seconds."""

        def advance(_: Any, arguments: Any) -> None:
            self.now += seconds(*arguments[0].shape)

        model.register_forward_pre_hook(advance)


def measure_model(model: Any, config: SpeedConfig, clock: FakeClock | None = None) -> Measured:
    subject: Any = SimpleNamespace(
        model=model, config=EvalConfig(speed=config), counted_bits=8_000_000,
        load_seconds=2.5, scorer=SimpleNamespace(max_length=256),
    )  # fmt: skip
    return (Speed() if clock is None else Speed(lambda device: clock)).run(subject)


def find(measured: Measured | Result, task: str, metric: str) -> Measurement:
    [found] = [m for m in measured.measurements if (m.task, m.metric) == (task, metric)]
    return found


def run(quant: QuantConfig, *, packed: bool, config: SpeedConfig = FAST) -> Result:
    evaluation = EvalConfig(tasks=(), perplexity=None, speed=config)
    experiment = Experiment(SMALL, quant, evaluation, packed)
    return Session(SMALL, packed_as=experiment.packed_as).run(experiment)


@pytest.fixture(scope="module")
def packed_result() -> Result:
    return run(QuantConfig(bits=3), packed=True)


def test_a_step_by_the_batch_is_the_time_of_a_token(build_tiny: Callable[..., Any]) -> None:
    model, clock = build_tiny("llama"), FakeClock()
    clock.attach(model, lambda batch, tokens: 0.5 * batch if tokens > 1 else 0.25)
    measured = measure_model(model, FAST, clock)
    for batch in (1, 4):
        steps, prompt = FAST.new * 0.25 + TICK, 0.5 * batch + TICK
        time = find(measured, f"speed/batch_{batch}", "ms_per_token")
        assert time.value == pytest.approx(1e3 * steps / (FAST.new * batch))
        assert (time.low, time.high, time.n) == (time.value, time.value, 6)
        rate = find(measured, f"speed/batch_{batch}", "prompt_tokens_per_second")
        assert rate.value == pytest.approx(16 * batch / prompt)
    assert measured.tokens == 6 * (1 + 4) * (16 + 3)
    assert find(measured, "speed", "load_seconds").value == 2.5
    record = measured.records["speed"]
    assert record.counted_bytes == 1e6
    assert record.gigaflops == (pytest.approx(2 * 768**3 / TICK / 1e9),) * 2


def test_it_measures_only_if_asked(build_tiny: Callable[..., Any]) -> None:
    assert measure_model(build_tiny("llama"), SpeedConfig()) == Measured()
    assert [type(measure).__name__ for measure in MEASURES].count("Speed") == 1


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom", "llama", "mixtral"])
def test_steps_with_the_cache_give_the_whole_texts_logits(build_tiny: Callable[..., Any], architecture: str) -> None:
    """The oracle of generate: the same tokens at once, without a cache."""
    model, work = build_tiny(architecture), Workload(2, 5, 3)
    tokens, seen = work.draw_tokens(model), []
    hook = model.register_forward_hook(lambda _, inputs, output: seen.append(output.logits[:, -1]))
    generate(model, work, tokens, float)
    hook.remove()
    with torch.no_grad():
        whole = model(tokens).logits
    assert len(seen) == 4
    for place, logits in zip(range(4, 8), seen, strict=True):
        torch.testing.assert_close(logits, whole[:, place], rtol=1e-4, atol=1e-5)


def test_a_model_without_a_cache_is_refused(build_tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel keeps no cache"):
        measure_model(build_tiny("openai"), FAST)


def test_what_is_longer_than_the_context_is_refused(build_tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"eval\.speed\.prompt=250 and eval\.speed\.new=7 .* context of 256"):
        measure_model(build_tiny("llama"), SpeedConfig(measure=True, prompt=250, new=7))


@contextmanager
def limited_memory(free: int) -> Iterator[None]:
    """Let this process have no more than so many bytes beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_batch_that_does_not_fit_is_oom_and_the_others_are_kept(build_tiny: Callable[..., Any]) -> None:
    """The embedded prompts alone are 100,000 x 64 x 64 x 4 bytes = 1.6 GB. The system refuses them."""
    model = build_tiny("llama")
    config = SpeedConfig(measure=True, batches=(1, 100_000), prompt=64, new=2, repetitions=1)
    with limited_memory(700_000_000):
        measured = measure_model(model, config)
    record: SpeedRecord = measured.records["speed"]
    assert [(batch.batch, batch.reason) for batch in record.batches] == [(1, ""), (100_000, "oom")]
    assert record.batches[1].peak_bytes is None
    assert {m.task for m in measured.measurements} == {"speed", "speed/batch_1"}
    assert find(measured, "speed/batch_1", "ms_per_token").value > 0


def test_packed_layers_are_timed_on_their_own_paths(packed_result: Result) -> None:
    record = packed_result.speed
    assert record is not None
    paths = {batch.batch: batch.step_path for batch in record.batches}
    assert paths[1] == "fused 8, plain 1"  # two layers of four matrices each, and the head
    assert record.packed_share == pytest.approx(packed_result.quantized_parameters / packed_result.parameters)
    assert find(packed_result, "speed", "packed_share").value == record.packed_share
    loaded = load_model(SMALL.name, packed_as=QuantConfig(bits=3))
    result = Session(SMALL, loaded=loaded, packed_as=QuantConfig(bits=3)).run(packed_result.experiment)
    layers = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.fused_rows for layer in layers} == {0}  # exact again for what is measured next
    assert result.weights_hash == packed_result.weights_hash


def test_plain_layers_are_called_plain() -> None:
    result = run(QuantConfig(bits=3), packed=False)
    record = result.speed
    assert record is not None
    assert record.packed_share == 0
    assert {batch.step_path for batch in record.batches} == {"plain 9"}
    assert record.weight_bytes == 4 * result.parameters  # float32
    assert record.counted_bytes == result.total_bits / 8


def test_int8_products_are_called_int8() -> None:
    record = run(QuantConfig(bits=8, method="llm_int8"), packed=False).speed
    assert record is not None
    assert record.batches[0].step_path == "int8 8, plain 1"


def test_settings_and_packing_are_in_the_key_only_if_it_measures() -> None:
    def key(packed: bool = False, **fields: Any) -> str:
        evaluation = EvalConfig(speed=SpeedConfig(**fields))
        return find_key(Experiment(SMALL, QuantConfig(bits=3), evaluation, packed))

    plain = find_key(Experiment(SMALL, QuantConfig(bits=3)))
    assert key() == key(packed=True) == key(prompt=5) == plain
    assert len({plain, key(measure=True), key(True, measure=True), key(measure=True, prompt=5)}) == 4


def test_it_is_stored_and_read_back(packed_result: Result, tmp_path: Path) -> None:
    Store(tmp_path).write(packed_result)
    [read] = load_results(tmp_path, {packed_result.key})
    assert dataclasses.asdict(read)["speed"] == dataclasses.asdict(packed_result)["speed"]
    rows = read_results(tmp_path)
    record = packed_result.speed
    assert record is not None
    assert set(rows["evaluation"]) == {f"{record.processor} ({record.host}), {record.threads} thread, 16 + 3 tokens"}
    assert record.threads == 1  # of the tests
    items = read_items(tmp_path, "speed/batch_4", "ms_per_token", [packed_result.key])[packed_result.key]
    assert np.median(items) == pytest.approx(find(packed_result, "speed/batch_4", "ms_per_token").value, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_counted_once_as_they_are_in_memory(build_tiny: Callable[..., Any], dtype: str) -> None:
    width = getattr(torch, dtype).itemsize
    for tied in (True, False):
        model = build_tiny("llama", tie_word_embeddings=tied).to(getattr(torch, dtype))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count_held_bytes(model) == width * count
        assert count_read_bytes(model) == width * (count - (0 if tied else 259 * 64))
        assert find_packed_share(model) == 0
    assert count_read_bytes(build_tiny("mixtral")) is None


@pytest.mark.parametrize(("method", "is_wide"), [("llm_int8", True), ("vectorwise", False)])
def test_what_int8_products_keep_and_read_is_counted(
    build_tiny: Callable[..., Any], method: str, is_wide: bool
) -> None:
    """By hand: a code for each weight, a float32 scale for each output, and another 16-bit weight for outliers."""
    model = build_tiny("llama", tie_word_embeddings=False)
    plain = count_held_bytes(model)
    quantize_model(model, QuantConfig(bits=8, method=method), None)
    shapes = [tuple(model.get_submodule(name).weight.shape) for name, _ in list_products(model)]
    weights = sum(rows * columns for rows, columns in shapes)
    codes = weights + 4 * sum(rows for rows, _ in shapes)
    assert count_held_bytes(model) == plain + codes + (4 * weights if is_wide else 0)
    read = plain - 4 * 259 * 64 - 4 * weights + codes
    assert count_read_bytes(model) == read
    name, product = list_products(model)[0]
    product.met[:3] = True  # three columns that were multiplied at 16 bits
    assert count_read_bytes(model) == read + (3 * 4 * len(model.get_submodule(name).weight) if is_wide else 0)


def test_the_constants_of_bitsandbytes_are_counted(build_tiny: Callable[..., Any]) -> None:
    """They hang on the parameter, and those that are quantized themselves have a state of their own."""
    model = build_tiny("llama")
    before = count_held_bytes(model), count_read_bytes(model)
    assert before[1] is not None
    nested = SimpleNamespace(absmax=torch.ones(5), code=torch.ones(256), offset=None, state2=None)
    first, second = [parameter for parameter in model.parameters() if parameter.dim() == 2][-2:]
    first.quant_state = SimpleNamespace(absmax=torch.ones(7), code=torch.ones(16), offset=None)
    second.quant_state = SimpleNamespace(
        absmax=torch.ones(9, dtype=torch.uint8), code=nested.code, offset=torch.ones(1), state2=nested
    )
    added = 4 * (7 + 16) + 9 + 4 * (256 + 1 + 5)
    assert (count_held_bytes(model), count_read_bytes(model)) == (before[0] + added, before[1] + added)


def test_a_timed_batch_keeps_its_times_where_its_peak_does_not_fit(
    build_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, work: Workload) -> int:
        raise MemoryError

    monkeypatch.setattr("kbit.evaluation.speed.measure.measure_allocated", fail)
    measured = measure_model(build_tiny("llama"), dataclasses.replace(FAST, batches=(1,), repetitions=1))
    [batch] = measured.records["speed"].batches
    assert (batch.reason, batch.peak_bytes) == ("", None)
    assert find(measured, "speed/batch_1", "ms_per_token").value > 0
    assert not [m for m in measured.measurements if m.metric == "peak_megabytes"]


@pytest.mark.parametrize(
    ("name", "bits"), [("nano-neox-98k", 3), ("nano-neox-98k", 8), ("nano-neox-1m", 4), ("nano-neox-1m", 16)]
)
def test_memory_is_within_5_percent_of_what_is_predicted(name: str, bits: int) -> None:
    """kbit fit's formula. It computes in 16 bits."""
    quant = QuantConfig(bits=bits)
    model = load_model(name, dtype="bfloat16", packed_as=None if quant.is_baseline else quant).model
    shape, work = find_shape(name), Workload(8, 120, 8)
    predicted = count_memory(shape, quant, Use(context=128, batch=8))
    assert count_held_bytes(model) == pytest.approx(predicted.weights, rel=0.005)
    measured = count_held_bytes(model) + measure_allocated(model, work)
    assert measured == pytest.approx(predicted.total, rel=0.05)
