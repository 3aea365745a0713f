"""The contests of a study: their leads are those of the verdicts, and what goes on is what they depend on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from toy_curves import make_results

from kbit.analysis.curves.curves import ZERO_SHOT, Floats, Measure, precision_curves, split_variants
from kbit.analysis.statistics.stopping.contests import Question, list_questions
from kbit.analysis.statistics.stopping.looks import Decision, Scores, decide, find_goals
from kbit.analysis.statistics.stopping.sequential import UNDECIDED, Standing, name_best
from kbit.analysis.statistics.verdicts import line_up, try_precision
from kbit.evaluation.rounds.order import LAST, TASKS, TEXT, list_places

LOSS = Measure("cross entropy", "cross_entropy", "text", higher_is_better=False)
TOTAL = 512


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    """Two data types at 3, 4, 8 and 16 bits on three sizes of one family."""
    return make_results(data_types=("int", "nf"))


@pytest.fixture(scope="module")
def losses(results: pd.DataFrame) -> list[Question]:
    questions = list_questions(results, ("precision", "setting"))
    return [question for question in questions if question.measure == LOSS]


def value_points(results: pd.DataFrame, question: Question) -> Floats:
    """Return the value of each point of a contest."""
    rows = results[(results["metric"] == question.measure.metric) & (results["task"] == question.measure.task)]
    values = rows.set_index("key")["value"].to_dict()
    return np.array([np.mean([values[key] for key in keys]) for keys in question.keys], dtype=np.float64)


def test_a_study_has_its_contests(results: pd.DataFrame) -> None:
    found = [(q.claim, q.contest.name, q.contest.options) for q in list_questions(results, ("precision", "setting"))]
    precisions = ("3-bit", "4-bit", "8-bit", "16-bit")
    settings = ("int block 64", "nf block 64")
    expected = [
        *(("precision", f"toy, {data_type} block 64", precisions) for data_type in ("int", "nf")),
        *(("setting", f"toy, {bits}-bit", settings) for bits in (3, 4, 8)),
    ]
    assert found == [*expected, *expected]  # by accuracy and by cross entropy


def test_leads_are_those_of_the_verdicts(results: pd.DataFrame, losses: list[Question]) -> None:
    curves = precision_curves(results, LOSS.metric, LOSS.task)
    for question, (_, group) in zip(losses, split_variants(curves), strict=False):
        trial = try_precision(line_up(group, LOSS), 4)
        options = question.contest.options
        leads = question.contest.leads[options.index("4-bit"), options.index(f"{trial.rival}-bit")]
        assert -leads @ value_points(results, question) == pytest.approx(trial.gap)


def test_the_frontier_has_a_contest_at_each_measured_size(results: pd.DataFrame) -> None:
    frontier = [q for q in list_questions(results, ("frontier",)) if q.measure == LOSS]
    assert [q.contest.name for q in frontier] == [
        "toy, 8 Mbit",
        "toy, 12 Mbit",
        "toy, 16 Mbit",
        "toy, 32 Mbit",
        "toy, 48 Mbit",
    ]
    assert frontier[0].contest.options == (
        "16-bit", "int block 64, 3-bit", "int block 64, 4-bit", "int block 64, 8-bit",
        "nf block 64, 3-bit", "nf block 64, 4-bit", "nf block 64, 8-bit",
    )  # fmt: skip
    leads = frontier[0].contest.leads  # at 8 Mbit the 4-bit curves lie between two models, and 8 bits at the smallest
    assert np.isnan(leads[0]).any(axis=1).tolist() == [False, True, True, True, True, True, True]  # 16 bits begin at 16


def make_scores(results: pd.DataFrame, question: Question, rounds: int, gaps: dict[str, float]) -> Scores:
    """Scores of a contest's experiments after some rounds: little noise, and a gap for the keys of an option."""
    rng = np.random.default_rng(0)
    shared, places = rng.normal(0, 1, TOTAL), list_places(TOTAL, rounds)
    scores = {}
    for key in dict.fromkeys(key for keys in question.keys for key in keys):
        whole = np.full(TOTAL, np.nan)
        noise = shared + rng.normal(0, 0.01, TOTAL)
        whole[places] = noise[places] + next((gap for start, gap in gaps.items() if key.startswith(start)), 0.0)
        scores[key] = whole
    return {"text": scores}


def test_what_is_beaten_stays_and_the_others_go_on(results: pd.DataFrame, losses: list[Question]) -> None:
    question = losses[0]
    scores = make_scores(results, question, 1, {"8-": 1.0, "16-": 1.0})  # 3 and 4 bits are level
    [decision] = decide([question], {"cross_entropy": scores}, 1)
    assert [question.contest.options[option] for option in decision.standing.left] == ["3-bit", "4-bit"]
    assert "int block 64, cross entropy: 3-bit or 4-bit, not known from an eighth of the items" in decision.describe()
    goals = find_goals([decision], 1)
    assert {key.split("-toy")[0] for key in goals} == {"3", "4"}
    assert set(map(str, goals.values())) == {str({TEXT: 2})}


def test_earlier_looks_are_taken_again_and_what_was_known_stays_known(
    results: pd.DataFrame, losses: list[Question]
) -> None:
    question = losses[0]
    scores = make_scores(results, question, LAST, {"3-": 1.0, "8-": 1.0, "16-": 1.0})
    for rounds in (1, 2, LAST):
        [decision] = decide([question], {"cross_entropy": scores}, rounds)
        assert (decision.rounds, decision.standing.is_known) == (1, True)
        assert decision.describe().endswith("4-bit is best, known from an eighth of the items")
        assert find_goals([decision], rounds) == {}


@pytest.mark.parametrize(
    ("failed", "words"),
    [
        (("3-",), "3-bit or 4-bit, not known: 3-bit without a quarter of the items, as an experiment failed"),
        (("3-", "4-"), "3-bit or 4-bit, not known: 3-bit and 4-bit without a quarter of the items"),
    ],
)
@pytest.mark.parametrize("rounds", [2, LAST])
def test_a_failure_makes_no_rival_the_best(
    results: pd.DataFrame, losses: list[Question], failed: tuple[str, ...], words: str, rounds: int
) -> None:
    """An experiment that fails in a later round has values of the earlier ones alone."""
    question = losses[0]
    gaps = {"8-": 1.0, "16-": 1.0}  # 3 and 4 bits are level
    scores = {"text": dict(make_scores(results, question, rounds, gaps)["text"])}
    early = make_scores(results, question, 1, gaps)["text"]
    for start in failed:
        lost = next(key for key in scores["text"] if key.startswith(start))
        scores["text"][lost] = early[lost]
    [decision] = decide([question], {"cross_entropy": scores}, rounds)
    assert not decision.standing.is_known
    assert name_best(question.contest, decision.standing) == UNDECIDED
    assert words in decision.describe()
    assert find_goals([decision], rounds) == {}


def test_a_store_without_items_tells_nothing(losses: list[Question]) -> None:
    [decision] = decide([losses[0]], {}, 1)
    assert decision.standing.lost == (0, 1, 2, 3)
    assert not decision.standing.is_known


@pytest.mark.parametrize(
    ("gap", "words"),
    [(0.0015, "4-bit is best from all of the items"), (0.0003, "3-bit or 4-bit, undecided from all of the items")],
)
def test_after_the_last_round_the_verdict_is_that_of_all_items(
    results: pd.DataFrame, losses: list[Question], gap: float, words: str
) -> None:
    question = losses[0]
    scores = make_scores(results, question, LAST, {"3-": gap, "8-": 1.0, "16-": 1.0})
    [decision] = decide([question], {"cross_entropy": scores}, LAST)
    assert decision.describe().endswith(words)


def test_accuracies_ask_for_tasks_and_given_up_ones_for_nothing(losses: list[Question]) -> None:
    question = dataclasses.replace(losses[0], measure=ZERO_SHOT)
    open_question = Decision(question, Standing((0, 1)), 2)
    assert set(map(str, find_goals([open_question], 2).values())) == {str({TASKS: 3})}
    given_up = Decision(question, Standing((0, 1), given_up=True), 2)
    assert find_goals([given_up], 2) == {}
    assert given_up.describe().endswith(
        "3-bit or 4-bit, and all items would hardly tell (given up after a quarter of the items)"
    )
