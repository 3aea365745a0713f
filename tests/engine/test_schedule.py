"""Which experiment a worker is given: all of them, once, and in little more time than the work divided by workers."""

from __future__ import annotations

import heapq
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kbit.engine.schedule import Schedule
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig

NOBODY: Counter[ModelConfig] = Counter()


def make_group(model: str, count: int, text: str = "a") -> list[Experiment]:
    """Experiments of one model on one text."""
    evaluation = EvalConfig(perplexity=text)
    return [Experiment(ModelConfig(model), QuantConfig(block_size=n + 1), evaluation) for n in range(count)]


def held_by(*models: str) -> Counter[ModelConfig]:
    """How many workers have each model."""
    return Counter(map(ModelConfig, models))


def simulate(experiments: list[Experiment], seconds: dict[str, int], load: int, workers: int) -> tuple[int, int]:
    """Run a schedule with workers that take so long for each experiment and for loading; return (end, loads)."""
    schedule = Schedule(experiments, lambda e: seconds[e.model.name])
    last: dict[int, Experiment] = {}
    free = [(0, worker) for worker in range(workers)]
    end, loads, seen = 0, 0, set()
    while schedule:
        now, worker = heapq.heappop(free)
        experiment = schedule.take(last.get(worker), Counter(e.model for e in last.values()))
        fresh = worker not in last or last[worker].model != experiment.model
        last[worker] = experiment
        loads += fresh
        now += seconds[experiment.model.name] + load * fresh
        seen.add(experiment)
        heapq.heappush(free, (now, worker))
        end = max(end, now)
    assert len(seen) == len(experiments)
    return end, loads


def test_a_worker_keeps_to_its_model_and_text() -> None:
    mine = make_group("b", 1, "other") + make_group("b", 2)
    schedule = Schedule([*make_group("a", 3), *mine])
    assert [schedule.take(mine[2], held_by("a", "b")) for _ in range(3)] == [mine[1], mine[2], mine[0]]


def test_else_it_takes_the_first_model_that_nobody_has() -> None:
    schedule = Schedule([*make_group("a", 1), *make_group("b", 1), *make_group("c", 1)])
    assert schedule.take(make_group("x", 1)[0], held_by("a", "x")).model.name == "b"


def test_else_it_helps_where_most_work_is_left_for_each_worker_from_the_end() -> None:
    few, many = make_group("few", 2), make_group("many", 6, "a") + make_group("many", 2, "b")
    schedule = Schedule([*few, *many])
    assert schedule.take(None, held_by("few", "many")) == many[-1]
    assert schedule.take(None, held_by("few", "many", "many", "many")) == few[-1]  # 2 / 1 / 2 > 7 / 3 / 4


def test_work_is_counted_by_cost() -> None:
    small, large = make_group("small", 5), make_group("large", 1)
    schedule = Schedule([*small, *large], lambda e: 10.0 if e.model.name == "large" else 1.0)
    assert schedule.take(None, held_by("small", "large")) == large[0]


def test_one_model_is_shared_by_all_workers() -> None:
    assert simulate(make_group("only", 40), {"only": 10}, 0, 4) == (100, 4)


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1),
    st.integers(0, 30),
    st.integers(1, 6),
)
def test_no_worker_waits_long_for_another(groups: dict[str, tuple[int, int]], load: int, workers: int) -> None:
    """Greedy list scheduling: (work + loads) / workers + the longest (Graham 1969); one load more is a worker's own."""
    largest_first = sorted(groups, key=lambda name: -groups[name][1])
    experiments = [e for name in largest_first for e in make_group(name, groups[name][0])]
    seconds = {name: second for name, (_, second) in groups.items()}
    end, loads = simulate(experiments, seconds, load, workers)
    work = sum(count * second for count, second in groups.values())
    assert end <= (work + loads * load) / workers + max(seconds.values()) + load
    assert loads <= len(groups) * workers


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_what_is_put_back_is_handed_out_again(models: list[str]) -> None:
    """A worker that died."""
    experiments = [make_group(model, 1)[0] for model in models]
    schedule = Schedule(experiments)
    first = schedule.take(None, NOBODY)
    schedule.add(first)
    taken = []
    while schedule:
        taken.append(schedule.take(None, NOBODY))
    assert Counter(e.model for e in taken) == Counter(e.model for e in experiments)
