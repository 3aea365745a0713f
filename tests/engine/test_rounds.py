"""Rounds of a sweep: who is handed out, how far, what goes on after a kill, and what has no rounds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_results import make_result

from kbit.engine.outcome import Outcome
from kbit.engine.plan import make_plan
from kbit.engine.ray_cluster import dispatch
from kbit.engine.rounds import DecidedRounds, Rounds, bound_tokens
from kbit.engine.worker import Worker
from kbit.evaluation.config import EvalConfig, FeatureConfig, SpeedConfig
from kbit.evaluation.rounds.order import TASKS, TEXT
from kbit.evaluation.rounds.sample import RoundsError, SampledPart
from kbit.experiments.config import Experiment, RunConfig, UntilConfig
from kbit.experiments.decidable import check_decidable
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.damage import DamagedRecordWarning
from kbit.store.store import Store
from kbit.training.config import TrainConfig

BITS = (3, 4, 5)
EXPERIMENTS = [
    Experiment(ModelConfig("nano-neox-98k"), QuantConfig(bits=bits), EvalConfig(tasks=("nano_cloze",))) for bits in BITS
]


class Sweep:
    """A plan of three experiments on a store, of which some rounds have been measured."""

    def __init__(self, path: Path, goals: Mapping[int, Mapping[int, Mapping[str, int]]]) -> None:
        self.store = Store(path)
        self.plan = make_plan(EXPERIMENTS, path)
        self.keys = dict(zip(BITS, self.plan.keys.values(), strict=True))
        self.said: list[str] = []
        self.asked: list[int] = []
        self._goals = goals
        self.rounds = DecidedRounds(self.plan, self.store, self._judge, self._begin)

    def _judge(self, ended: int) -> dict[str, Mapping[str, int]]:
        self.asked.append(ended)
        return {self.keys[bits]: goals for bits, goals in self._goals.get(ended, {}).items()}

    def _begin(self, experiments: Sequence[Experiment], words: str, share: float) -> None:
        self.said.append(words)

    def measure(self, bits: int, tasks: int, text: int) -> None:
        """Let the store have these rounds of an experiment."""
        parts = () if tasks == text == 4 else (SampledPart(TASKS, tasks, {}), SampledPart(TEXT, text, {}))
        self.store.write(dataclasses.replace(make_result(0), key=self.keys[bits], items=(), sampled=parts))

    def start_next(self) -> list[int]:
        """Start a round, measure what it asks for, and return the bits of its experiments."""
        started = self.rounds.start_next()
        for experiment in started:
            goals = self.rounds.find_goals(experiment)
            assert goals is not None
            key = self.keys[experiment.quant.bits]
            done = self.store.list_rounds([key]).get(key, (0, 0))
            self.measure(experiment.quant.bits, max(goals.get(TASKS, 0), done[0]), max(goals.get(TEXT, 0), done[1]))
        return sorted(experiment.quant.bits for experiment in started)


GOALS = {1: {3: {TASKS: 2}, 4: {TASKS: 2, TEXT: 2}}, 2: {4: {TASKS: 3}}, 3: {4: {TASKS: 4}}}


def test_each_round_goes_on_with_those_that_matter(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, GOALS)
    assert [sweep.start_next() for _ in range(5)] == [[3, 4, 5], [3, 4], [4], [4], []]
    assert sweep.asked == [1, 2, 3]
    assert sweep.said[1] == "round 2 of 4, a quarter of the items: 2 of 3 experiments"
    rounds = sweep.store.list_rounds(sweep.keys.values())
    assert [rounds[sweep.keys[bits]] for bits in BITS] == [(2, 1), (4, 2), (1, 1)]


def test_after_a_kill_the_same_rounds_are_looked_at_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    first = Sweep(tmp_path, GOALS)
    first.measure(3, 2, 1)
    first.measure(4, 1, 1)
    first.measure(5, 1, 1)
    again = Sweep(tmp_path, GOALS)
    assert [again.start_next() for _ in range(4)] == [[4], [4], [4], []]
    assert again.said[0].startswith("round 2 of 4")


def test_what_is_open_at_the_end_and_in_a_round_that_was_broken_off(tmp_path: Path) -> None:
    """The 4-bit experiment fails in the second round. If that ends the sweep, nobody knows who would have gone on."""
    sweep = Sweep(tmp_path, {1: {3: {TASKS: 2}, 4: {TASKS: 2}}})
    sweep.start_next()
    second = sweep.rounds.start_next()
    sweep.measure(3, 2, 1)
    assert len(second) == 2
    assert sweep.rounds.list_open() == {sweep.keys[3], sweep.keys[4]}
    sweep.measure(4, 2, 1)
    assert list(sweep.rounds.start_next()) == []
    assert sweep.rounds.list_open() == set()


def test_a_damaged_round_is_handed_out_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, {})
    sweep.start_next()
    (tmp_path / "stopped" / f"{sweep.keys[3]}-11.json").write_text("{}")
    with pytest.warns(DamagedRecordWarning):
        assert Sweep(tmp_path, {}).start_next() == [3]
    assert Sweep(tmp_path, {}).start_next() == []


def test_a_worker_measures_no_rounds_that_another_driver_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path, {})
    sweep.measure(3, 2, 1)
    worker = Worker(str(tmp_path), "cpu")
    tried: list[tuple[object, ...]] = []

    def fail(*given: object) -> tuple[None, tuple[str, str, str]]:
        tried.append(given)
        return None, ("why", "", "failed")

    monkeypatch.setattr(worker, "_try", fail)
    experiment, key = EXPERIMENTS[0], sweep.keys[3]
    for goals in ({TASKS: 2, TEXT: 1}, {TASKS: 1}):
        assert worker.run(experiment, key, goals) == Outcome(experiment, "")
    assert tried == []
    for further in ({TASKS: 3}, {TEXT: 2}, None):
        assert worker.run(experiment, key, further).error == "why"
    assert len(tried) == 3


def test_what_rounds_refuse_is_tried_again_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure would be skipped by study.until.decided=false, too, which the error advises."""

    def refuse(*_: object) -> None:
        raise RoundsError("no mean over items")

    monkeypatch.setattr("kbit.experiments.rounds.make_sample", refuse)
    sweep = Sweep(tmp_path, {})
    outcome = Worker(str(tmp_path), "cpu").run(EXPERIMENTS[0], sweep.keys[3], {TASKS: 1})
    assert outcome.error == "RoundsError: no mean over items"
    plan = make_plan(EXPERIMENTS, tmp_path)
    assert (plan.failed, plan.crashed, len(plan.to_run)) == (0, 1, 3)


def test_what_is_finished_is_not_handed_out(tmp_path: Path) -> None:
    Sweep(tmp_path, {}).measure(3, 4, 4)
    assert Sweep(tmp_path, {}).start_next() == [4, 5]
    assert make_plan(EXPERIMENTS, tmp_path).done == 1


def test_a_run_without_rounds_takes_what_stopped_early(tmp_path: Path) -> None:
    Sweep(tmp_path, {}).measure(3, 1, 1)
    plan = make_plan(EXPERIMENTS, tmp_path)
    assert len(plan.to_run) == 3
    rounds = Rounds(plan)
    assert (rounds.start_next(), rounds.start_next()) == (plan.to_run, ())
    assert rounds.find_goals(plan.to_run[0]) is None


class Actor:
    """A worker in this process, which measures what it is asked for: run.remote(...) as Ray calls it."""

    def __init__(self, sweep: Sweep) -> None:
        self.run = self
        self._sweep = sweep

    def remote(self, experiment: Experiment, key: str, goals: Mapping[str, int]) -> Outcome:
        done = self._sweep.store.list_rounds([key]).get(key, (0, 0))
        rounds = [max(goals.get(part, 0), before) for part, before in zip((TASKS, TEXT), done, strict=True)]
        self._sweep.measure(experiment.quant.bits, *rounds)
        return Outcome(experiment, "")


def test_workers_of_ray_go_through_the_same_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of kbit.engine.ray_cluster, on a stand-in for Ray: each round begins when the one before has ended."""

    def wait(jobs: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return jobs[:num_returns], jobs[num_returns:]

    def get(job: Outcome) -> Outcome:
        return job

    errors = SimpleNamespace(RayTaskError=KeyError, RayError=OSError)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(wait=wait, get=get, exceptions=errors))
    sweep = Sweep(tmp_path, GOALS)
    outcomes = list(dispatch(sweep.plan, lambda: Actor(sweep), 2, sweep.store, rounds=sweep.rounds))
    bits = [outcome.experiment.quant.bits for outcome in outcomes]
    assert [sorted(bits[:3]), sorted(bits[3:5]), bits[5:]] == [[3, 4, 5], [3, 4], [4, 4]]
    rounds = sweep.store.list_rounds(sweep.keys.values())
    assert [rounds[sweep.keys[bits]] for bits in BITS] == [(2, 1), (4, 2), (1, 1)]


def make_configs(**fields: Any) -> list[RunConfig]:
    """A study of two models and two quantizers, with other fields."""
    points: list[dict[str, Any]] = [
        {"model": ModelConfig(model), "quant": QuantConfig(bits=bits)} | fields
        for model in ("nano-neox-98k", "nano-neox-332k")
        for bits in (3, 4)
    ]
    return [RunConfig(**point) for point in points]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": TrainConfig(steps=3)}, "a training takes its time"),
        ({"eval": EvalConfig(features=FeatureConfig(measure=True))}, r"eval\.features\.measure is no mean over them"),
        ({"eval": EvalConfig(speed=SpeedConfig(measure=True))}, r"eval\.speed\.measure is no mean over them"),
        ({"eval": EvalConfig(measures=("mine.py:Mine",))}, r"eval\.measures is no mean over them"),
        ({"eval": EvalConfig(perplexity_kind="rolling")}, "perplexity_kind=rolling is not divided into windows"),
        ({"quant": QuantConfig()}, "two quantizers and two sizes of a model, not 1 and 2"),
        ({"model": ModelConfig("nano-neox-98k")}, "not 2 and 1"),
    ],
)
def test_what_cannot_stop_early_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_decidable(make_configs(**fields))


def test_what_can_stop_early_is_not() -> None:
    check_decidable(make_configs())


def test_a_plan_says_the_least_and_the_most(tmp_path: Path) -> None:
    """What was measured in earlier rounds is not measured again, and may be enough."""
    counts = dict.fromkeys(Sweep(tmp_path / "store", {}).keys.values(), 8000)
    assert bound_tokens(counts, str(tmp_path / "none")) == (3000, 24000)
    assert not (tmp_path / "none").exists()
    Sweep(tmp_path / "store", {}).measure(3, 3, 2)
    assert bound_tokens(counts, str(tmp_path / "store")) == (2000, 22000)


def test_claims_and_metrics_have_names() -> None:
    assert UntilConfig(claims=["frontier"]).claims == ("frontier",)  # type: ignore[arg-type]  # as Hydra does
    with pytest.raises(ValueError, match=r"study\.until\.claims='frontiers' is not one of: precision, setting"):
        UntilConfig(claims=("frontiers",))
    with pytest.raises(ValueError, match=r"study\.until\.metrics='accuracy' is not one of: acc, cross_entropy"):
        UntilConfig(metrics=("accuracy",))
    with pytest.raises(ValueError, match="asks for no verdict"):
        UntilConfig(claims=())
