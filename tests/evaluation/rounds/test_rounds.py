"""An experiment in rounds ends with what it gives at once, and no round measures an item twice."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import decode_items
from kbit.evaluation.rounds.order import LAST, SHARES, TASKS, TEXT, list_places, order_items
from kbit.evaluation.rounds.sample import RoundsError, Sample
from kbit.evaluation.zero_shot import score_tasks
from kbit.experiments.config import Experiment
from kbit.experiments.result import Result
from kbit.experiments.rounds import count_rounds, join_costs, make_sample
from kbit.experiments.session import Session
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig

EVAL = EvalConfig(tasks=("nano_cloze", "nano_choice"), limit=24, perplexity_windows=9)
EXPERIMENT = Experiment(ModelConfig("nano-neox-98k"), QuantConfig(bits=3, data_type="int"), EVAL)
GOALS = ({TASKS: 1, TEXT: 1}, {TASKS: 3, TEXT: 1}, {TASKS: 4, TEXT: 1}, None)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(EXPERIMENT.model)


@pytest.fixture(scope="module")
def whole(session: Session) -> Result:
    return session.run(EXPERIMENT)


@pytest.fixture(scope="module")
def rounds(session: Session) -> list[Result]:
    """The results of GOALS, each of which goes on from the one before."""
    results: list[Result] = []
    for goals in GOALS:
        stopped = results[-1] if results else None
        result = session.run(EXPERIMENT, sample=make_sample(EXPERIMENT, goals, stopped))
        results.append(join_costs(result, stopped))
    return results


def test_each_round_contains_the_one_before_and_the_last_one_everything() -> None:
    for total in (1, 2, 7, 64, 500):
        places = [set(list_places(total, rounds).tolist()) for rounds in range(LAST + 1)]
        assert places[0] == set()
        assert places[-1] == set(range(total))
        for share, before, after in zip(SHARES, places, places[1:], strict=False):
            assert before <= after
            assert len(after) == math.ceil(total * share)


def test_the_order_never_changes() -> None:
    """Stored rounds rest on it. The order is that of the SHA-256 of "kbit item 0", "kbit item 1", ..."""
    assert order_items(10).tolist() == [2, 3, 1, 9, 8, 7, 0, 5, 4, 6]


def test_rounds_end_with_the_result_of_a_run_without_rounds(whole: Result, rounds: list[Result]) -> None:
    last = rounds[-1]
    for own, other in zip(last.measurements, whole.measurements, strict=True):
        assert (own.task, own.metric, own.n) == (other.task, other.metric, other.n)
        # batches are made of other windows and items, and a product in float32 rounds by its shape
        assert (own.value, own.low, own.high) == pytest.approx((other.value, other.low, other.high), rel=1e-6)
    assert [dataclasses.replace(items, data="") for items in last.items] == [
        dataclasses.replace(items, data="") for items in whole.items
    ]
    assert [items.data for items in last.items if items.encoding == "bits"] == [
        items.data for items in whole.items if items.encoding == "bits"
    ]
    assert (last.tasks, last.text, last.tokens, last.sampled) == (whole.tasks, whole.text, whole.tokens, ())
    assert last.truncated == whole.truncated


def test_a_round_rests_on_its_share_of_the_items(whole: Result, rounds: list[Result]) -> None:
    counts = {(m.task, m.metric): m.n for m in rounds[1].measurements}
    assert counts["nano_cloze", "acc"] == 12
    assert counts["nano_held_out", "cross_entropy"] == 2  # an eighth of 9, rounded up
    assert counts["mean_zero_shot", "acc"] == 24
    assert [(part.part, part.rounds, part.totals) for part in rounds[1].sampled] == [
        (TASKS, 3, {"nano_cloze": 24, "nano_choice": 24}),
        (TEXT, 1, {"nano_held_out": 9}),
    ]
    assert count_rounds(EXPERIMENT, rounds[1]) == {TASKS: 3, TEXT: 1}
    shares = [result.tokens / whole.tokens for result in rounds]
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[2] < 1


def test_a_round_measures_what_the_whole_does_on_its_items(whole: Result, rounds: list[Result]) -> None:
    def take(result: Result, task: str, metric: str) -> NDArray[np.float64]:
        [found] = [items for items in result.items if (items.task, items.metric) == (task, metric)]
        return decode_items(found)

    places = list_places(24, 3)
    assert take(rounds[1], "nano_cloze", "acc").tolist() == take(whole, "nano_cloze", "acc")[places].tolist()
    losses = take(whole, "nano_held_out", "cross_entropy")[list_places(9, 1)]
    assert take(rounds[1], "nano_held_out", "cross_entropy") == pytest.approx(losses, rel=1e-6)


def test_other_weights_than_in_the_earlier_rounds_are_refused_before_they_are_measured(
    session: Session, rounds: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbit.experiments.session.MEASURES", [])  # nothing is measured: the error would be another
    sample = make_sample(EXPERIMENT, {TASKS: 2, TEXT: 2}, dataclasses.replace(rounds[0], weights_hash="another"))
    message = r"other weights of nano-neox-98k int3 block 64.*kbit results delete --where \"key == '0123'\""
    monkeypatch.setattr("kbit.experiments.session.check_unchanged", lambda *_: {"eval": {}})
    with pytest.raises(RoundsError, match=message):
        session.run(EXPERIMENT, "0123", sample=sample)


def test_a_result_says_all_that_measured_it(rounds: list[Result]) -> None:
    first = dataclasses.replace(rounds[0], device="cuda", peak_memory_bytes=9**12, versions={"kbit": "0", "torch": "2"})
    now = dataclasses.replace(rounds[1], device="cpu", peak_memory_bytes=1, versions={"kbit": "1", "torch": "2"})
    joined = join_costs(now, first)
    assert (joined.device, joined.versions) == ("cuda and cpu", {"kbit": "0 and 1", "torch": "2"})
    assert joined.peak_memory_bytes == 9**12
    assert join_costs(now, joined).device == "cuda and cpu"
    assert joined.tokens == first.tokens + now.tokens


def test_no_part_goes_back(rounds: list[Result]) -> None:
    sample = make_sample(EXPERIMENT, {TASKS: 2}, rounds[1])
    assert sample.goals == {TASKS: 3, TEXT: 1}
    assert not sample.list_new(TASKS, 24).size


def test_metrics_that_change_between_rounds_are_refused() -> None:
    sample = Sample({TEXT: 2}, {TEXT: 1}, {("text", "cross_entropy"): np.ones(2)})
    with pytest.raises(ValueError, match=r"'text' now measures \['loss'\], and \['cross_entropy'\] in earlier rounds"):
        sample.join(TEXT, "text", 16, {"loss": [1.0, 2.0]})


def test_a_group_of_tasks_has_no_rounds() -> None:
    """Its mean may weigh tasks in any way, which an estimate on some items would have to know."""
    group = SimpleNamespace(name="mmlu")
    task: Any = SimpleNamespace(list_items=lambda: [0], instances=[], loaded=SimpleNamespace(name="a", groups=(group,)))
    scorer: Any = SimpleNamespace(truncated=0, first_tokens=())
    with pytest.raises(ValueError, match=r"the group 'mmlu' has a mean of its own.*name its tasks in eval\.tasks"):
        score_tasks(scorer, [task], Sample({TASKS: 1}))


def test_rolling_perplexity_has_no_rounds(session: Session) -> None:
    config = EvalConfig(tasks=(), perplexity_kind="rolling")
    experiment = dataclasses.replace(EXPERIMENT, eval=config)
    with pytest.raises(ValueError, match="perplexity_kind=rolling measures whole texts"):
        session.run(experiment, sample=Sample({TEXT: 1}))
