"""Experiments: reproducible, without a leak from one variant to the next, and recorded in full."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import pytest

from kbit.data.task_files import EMBEDDED_TASKS
from kbit.data.text_files import read_bytes
from kbit.data.texts import read_documents
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import decode_items
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.session import Session, run_experiment
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig

EVAL = EvalConfig(tasks=("nano_cloze", "nano_choice"), limit=10, perplexity_windows=4)
NF4 = QuantConfig(bits=4, data_type="nf")
INT3 = QuantConfig(bits=3, data_type="int")
SIXTEEN = QuantConfig(bits=16)
SMALL, LLAMA = ModelConfig("nano-neox-98k"), ModelConfig("nano-stories-260k")

TASK_WITHOUT_DATA = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: missing.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: one
doc_to_choice: [one, two]
doc_to_target: 0
metadata: {version: 1}
"""

Outcome = dict[str, object]


def outcome(result: Result) -> Outcome:
    """What must be equal in two runs of an experiment: everything but time and memory."""
    run_dependent = {"seconds_quantize", "seconds_evaluate", "peak_memory_bytes", "finished"}
    return {f.name: getattr(result, f.name) for f in dataclasses.fields(Result) if f.name not in run_dependent}


def values(result: Result) -> list[float]:
    return [m.value for m in result.measurements]


@pytest.fixture(scope="module")
def fresh_nf4() -> Result:
    return run_experiment(Experiment(SMALL, NF4, EVAL))


@pytest.fixture(scope="module")
def fresh_int3() -> Result:
    return run_experiment(Experiment(SMALL, INT3, EVAL))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(SMALL)


def test_variants_in_one_session_equal_their_fresh_runs(
    session: Session, fresh_nf4: Result, fresh_int3: Result
) -> None:
    experiments = [Experiment(SMALL, quant, EVAL) for quant in (NF4, INT3, NF4)]
    first, second, third = (outcome(session.run(experiment)) for experiment in experiments)
    assert first == outcome(fresh_nf4)
    assert second == outcome(fresh_int3)
    assert third == first
    assert values(fresh_nf4) != values(fresh_int3)


def test_running_twice_gives_the_same_result(fresh_nf4: Result) -> None:
    assert outcome(run_experiment(Experiment(SMALL, NF4, EVAL))) == outcome(fresh_nf4)


def test_another_evaluation_in_between_changes_nothing(session: Session, fresh_nf4: Result) -> None:
    other = EvalConfig(tasks=("nano_cloze", "nano_swap"), limit=5, perplexity=None)
    assert {m.task for m in session.run(Experiment(SMALL, NF4, other)).measurements} == {
        "nano_cloze",
        "nano_swap",
        "mean_zero_shot",
    }
    assert outcome(session.run(Experiment(SMALL, NF4, EVAL))) == outcome(fresh_nf4)


def test_two_models_in_turn_give_each_its_own_result(session: Session, fresh_nf4: Result) -> None:
    """The cache of lm-eval would answer the second model with the first one's scores."""
    of_llama = Experiment(LLAMA, NF4, EVAL)
    first, second = Session(LLAMA).run(of_llama), session.run(Experiment(SMALL, NF4, EVAL))
    assert outcome(first) == outcome(run_experiment(of_llama))
    assert outcome(second) == outcome(fresh_nf4)
    assert values(first) != values(second)
    assert first.weights_hash != second.weights_hash


def test_a_failed_experiment_leaves_the_weights_as_they_were(session: Session, tmp_path: Path) -> None:
    baseline = Experiment(SMALL, SIXTEEN, EVAL)
    before = session.run(baseline)
    (tmp_path / "mine.yaml").write_text(TASK_WITHOUT_DATA)
    without_data = EvalConfig(tasks=("mine",), perplexity=None, task_path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no data file at .*/missing\.jsonl"):
        session.run(Experiment(SMALL, INT3, without_data))  # the rows are read after the weights were quantized
    with pytest.raises(ValueError, match="min_coverage"):
        session.run(Experiment(SMALL, dataclasses.replace(INT3, exclude="dense"), EVAL))
    assert outcome(session.run(baseline)) == outcome(before)


def test_a_session_refuses_an_experiment_on_another_model(session: Session) -> None:
    with pytest.raises(ValueError, match=r"holds .*nano-neox-98k.*not .*nano-stories-260k"):
        session.run(Experiment(LLAMA, NF4, EVAL))


def test_a_result_carries_the_whole_configuration(fresh_nf4: Result) -> None:
    experiment = Experiment(SMALL, NF4, EVAL)
    assert fresh_nf4.experiment == experiment
    assert fresh_nf4.key == find_key(experiment)


def test_a_result_counts_its_bits_and_coverage(fresh_nf4: Result) -> None:
    assert fresh_nf4.parameters == 231_168  # both from the model card
    assert fresh_nf4.quantized_parameters == 98_304
    assert fresh_nf4.bits_per_param == 4.25  # 4 + 16/64
    assert fresh_nf4.total_bits == 4.25 * 98_304 + 16 * (231_168 - 98_304)
    assert fresh_nf4.coverage == 1.0
    assert {(s.name, s.shape) for s in fresh_nf4.skipped} == {
        ("gpt_neox.embed_in.weight", (1024, 64)),
        ("lm_head.weight", (1024, 64)),
    }
    assert all(s.reason == "outside the transformer blocks" for s in fresh_nf4.skipped)


def test_a_result_says_where_its_numbers_come_from(fresh_nf4: Result) -> None:
    assert (fresh_nf4.family, fresh_nf4.architecture) == ("nano-neox", "GPTNeoXForCausalLM")
    assert len(fresh_nf4.model_revision) == 64
    assert fresh_nf4.checkpoint_dtype == "float16"
    assert {"python", "kbit", "torch", "transformers", "lm-eval", "numpy"} <= set(fresh_nf4.versions)
    assert fresh_nf4.threads >= 1
    assert "threads" in fresh_nf4.device
    assert fresh_nf4.seconds_quantize > 0
    assert fresh_nf4.seconds_evaluate > 0
    assert fresh_nf4.peak_memory_bytes > 2**20
    assert datetime.fromisoformat(fresh_nf4.finished).tzinfo is not None


def test_a_result_identifies_its_data(fresh_nf4: Result) -> None:
    assert [task.name for task in fresh_nf4.tasks] == ["nano_cloze", "nano_choice"]
    for task in fresh_nf4.tasks:
        assert task.sha256 == sha256(read_bytes(EMBEDDED_TASKS / "data" / task.source)).hexdigest()
        assert task.version == "1.0"
        assert task.truncated == 0
        assert 2 < len(task.first_tokens) <= 64
    assert (fresh_nf4.scorer, fresh_nf4.batch_tokens) == ("prefix sharing", 1024)
    assert fresh_nf4.text is not None
    assert fresh_nf4.text.sha256 == read_documents("nano_held_out")[1]
    assert (fresh_nf4.text.windows, fresh_nf4.text.window_length) == (4, 256)


def test_a_result_measures_every_metric_with_an_interval(fresh_nf4: Result) -> None:
    assert [(m.task, m.metric, m.n) for m in fresh_nf4.measurements] == [
        ("nano_cloze", "perplexity", 10),
        ("nano_cloze", "acc", 10),
        ("nano_choice", "acc", 10),
        ("nano_choice", "acc_norm", 10),
        ("nano_choice", "acc_bytes", 10),
        ("mean_zero_shot", "acc", 20),
        ("nano_held_out", "cross_entropy", 4),
        ("nano_held_out", "bits_per_byte", 4),
        ("nano_held_out", "perplexity", 4),
        ("nano_held_out", "kl_divergence", 4),
        ("nano_held_out", "top1_agreement", 4),
    ]
    for m in fresh_nf4.measurements:
        assert m.low <= m.value <= m.high
        assert m.low < m.high


def test_a_result_keeps_the_items_of_its_measurements(fresh_nf4: Result) -> None:
    items = {(i.task, i.metric): decode_items(i) for i in fresh_nf4.items}
    assert set(items) == {
        ("nano_cloze", "acc"),
        *(("nano_choice", metric) for metric in ("acc", "acc_norm", "acc_bytes")),
        *(("nano_held_out", metric) for metric in ("cross_entropy", "kl_divergence", "top1_agreement")),
    }
    for m in fresh_nf4.measurements:
        if (m.task, m.metric) in items:
            assert len(items[m.task, m.metric]) == m.n
            # accuracies exactly; a loss near 4 is kept in float32, good to 2.4e-7
            assert items[m.task, m.metric].mean() == pytest.approx(m.value, abs=1e-6)


def test_one_item_is_enough_for_a_result(session: Session) -> None:
    one = EvalConfig(tasks=("nano_choice",), limit=1, perplexity=None)
    result = session.run(Experiment(SMALL, NF4, one))
    assert {m.metric for m in result.measurements} == {"acc", "acc_norm", "acc_bytes"}
    for m in result.measurements:
        assert m.value in {0.0, 1.0}
        assert m.high - m.low == pytest.approx(0.793, abs=1e-3)  # Wilson, n = 1: z^2 / (1 + z^2)


def test_fewer_bits_lose_more(session: Session, fresh_nf4: Result, fresh_int3: Result) -> None:
    def loss(result: Result) -> float:
        return next(m.value for m in result.measurements if m.metric == "cross_entropy")

    baseline = session.run(Experiment(SMALL, SIXTEEN, EVAL))
    assert loss(baseline) < loss(fresh_nf4) < loss(fresh_int3)
    assert baseline.total_bits == 16 * baseline.parameters > fresh_nf4.total_bits > fresh_int3.total_bits


def test_the_distance_from_16_bits_is_0_at_16_bits_and_grows_with_fewer(session: Session) -> None:
    text = EvalConfig(tasks=(), perplexity_windows=4)
    quantizers = [SIXTEEN, *(QuantConfig(bits=bits, data_type="int") for bits in (8, 6, 5, 4, 3))]
    results = [session.run(Experiment(SMALL, quant, text)) for quant in quantizers]
    measured = [{m.metric: m.value for m in result.measurements} for result in results]
    divergences = [m["kl_divergence"] for m in measured]
    assert divergences[0] == 0
    assert divergences == sorted(divergences)
    assert divergences[1] > 0
    agreements = [m["top1_agreement"] for m in measured]
    assert agreements[0] == 1
    assert agreements == sorted(agreements, reverse=True)
    assert agreements[-1] < 0.9


def test_a_quantized_head_is_compared_with_the_one_it_was() -> None:
    text = EvalConfig(tasks=(), perplexity_windows=2)
    with_head = Session(LLAMA).run(Experiment(LLAMA, dataclasses.replace(INT3, include="lm_head"), text))
    assert next(m.value for m in with_head.measurements if m.metric == "kl_divergence") > 0.01


def test_rolling_perplexity_is_the_whole_texts(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one small mouse", "two mice sat down"]))
    result = session.run(Experiment(SMALL, NF4, EvalConfig(tasks=(), perplexity=str(path), perplexity_kind="rolling")))
    assert [m.metric for m in result.measurements] == [
        "word_cross_entropy",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
    ]
    assert result.text is not None
    assert (result.text.windows, result.text.window_length) == (2, 0)


def test_a_tied_head_can_be_quantized_and_survives_the_evaluation() -> None:
    few = EvalConfig(tasks=("nano_choice",), limit=3, perplexity_windows=1)
    session = Session(LLAMA)
    without = session.run(Experiment(LLAMA, NF4, few))
    with_head = session.run(Experiment(LLAMA, dataclasses.replace(NF4, include="lm_head"), few))
    assert with_head.quantized_parameters - without.quantized_parameters == 512 * 64  # vocabulary x hidden, once
    assert without.total_bits - with_head.total_bits == 512 * 64 * (16 - 4.25)
    assert with_head.weights_hash != without.weights_hash


def test_a_single_window_leaves_the_interval_undefined(session: Session) -> None:
    one = EvalConfig(tasks=(), perplexity_windows=1)
    [nats, *_] = session.run(Experiment(SMALL, NF4, one)).measurements
    assert math.isfinite(nats.value)
    assert math.isnan(nats.low)


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda: there are 0 CUDA devices"):
        Session(SMALL, device="cuda")
