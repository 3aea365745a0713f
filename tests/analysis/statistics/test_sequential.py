"""Verdicts before all items are measured: the formulas by enumeration, and the errors in studies of known truth."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from kbit.analysis.curves.curves import Floats
from kbit.analysis.statistics.stopping.sequential import (
    ALPHA,
    LOOKS,
    UNDECIDED,
    Contest,
    Standing,
    count_degrees,
    find_reach,
    judge_whole,
    look,
    measure_leads,
    name_best,
)
from kbit.evaluation.rounds.order import LAST, list_places


def make_contest(options: int) -> Contest:
    """A contest in which each option is one point."""
    unit = np.eye(options)
    names = tuple("abcdefgh"[:options])
    return Contest("letters", names, unit[:, None] - unit[None], tuple((number,) for number in range(options)))


def start(contest: Contest) -> Standing:
    return Standing(tuple(range(len(contest.options))))


def make_scores(gap: float, items: int, seed: int = 0) -> Floats:
    """Two options of which the first leads by the gap on average, with differences of standard deviation 1."""
    noise = np.random.default_rng(seed).normal(0, 1, items)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    return np.stack([gap + noise, np.zeros(items)])


def test_what_a_sample_misses_of_all_items_has_the_variance_of_the_formula() -> None:
    """Over all 20 samples of 3 of 6 items, without replacement: S^2 / 3 - S^2 / 6 (Cochran 1977, theorem 2.2)."""
    scores = np.array([[1.0, 4.0, 2.0, 8.0, 5.0, 7.0], [0.0, 3.0, 3.0, 1.0, 0.0, 2.0]])
    everything = make_contest(2).leads[0, 1] @ scores
    missed = [everything[list(sample)].mean() - everything.mean() for sample in combinations(range(6), 3)]
    _, now, whole = measure_leads(make_contest(2).leads[0, 1], [scores], [12])
    assert np.mean(np.square(missed)) == pytest.approx(everything.var(ddof=1) * (1 / 3 - 1 / 6))
    assert now**2 - whole**2 == pytest.approx(everything.var(ddof=1) * (1 / 6 - 1 / 12))


def test_tasks_weigh_the_same_and_their_variances_add() -> None:
    rng = np.random.default_rng(1)
    tasks = [rng.normal(size=(2, 40)), rng.normal(size=(2, 60))]
    gap, now, _ = measure_leads(np.array([1.0, -1.0]), tasks, [40, 60])
    differences = [task[0] - task[1] for task in tasks]
    assert gap == pytest.approx(np.mean([d.mean() for d in differences]))
    assert now == pytest.approx(np.sqrt(sum(stats.sem(d) ** 2 for d in differences)) / 2)


def test_the_intervals_are_widened_for_looks_and_pairs() -> None:
    assert find_reach(10, np.array(31.0)) == pytest.approx(stats.t.ppf(1 - 0.05 / (2 * 3 * 10), 31))
    assert (ALPHA, LOOKS) == (0.05, 3)


def test_a_small_task_with_most_of_the_variance_has_most_of_the_degrees_of_freedom() -> None:
    """The sum of two means' variances has Welch's degrees of freedom: near 29 here, not 29 + 499."""
    rng = np.random.default_rng(3)
    tasks = [np.stack([rng.normal(0, 1, count), np.zeros(count)]) for count in (30, 500)]
    lead = np.array([1.0, -1.0])
    welch = stats.ttest_ind(tasks[0][0], tasks[1][0], equal_var=False).df
    assert count_degrees(lead, tasks) == pytest.approx(welch)
    assert welch < 35
    assert count_degrees(lead, tasks[:1]) == pytest.approx(29)


@pytest.mark.parametrize(("items", "differing", "is_known"), [(40, 13, False), (90, 30, True)])
def test_answers_that_hardly_differ_decide_nothing(items: int, differing: int, is_known: bool) -> None:
    """Student's interval would have 13 to 0 for known: .325 > 1.96 x .053 + 2.5 x .053."""
    contest = make_contest(2)
    right = np.repeat([1.0, 0.0], [differing, items - differing])
    scores = np.stack([right, np.zeros(items)])
    assert look(contest, start(contest), [scores], [2 * items], 1).is_known == is_known


@pytest.mark.parametrize(("gap", "is_known"), [(0.56, True), (0.54, False)])
def test_a_lead_is_known_where_all_items_must_show_it(gap: float, is_known: bool) -> None:
    """64 of 512 items, 100 pairs: known above 1.96 / sqrt(512) + t sqrt(1/64 - 1/512) = .0866 + 4.00 x .1169 = .555."""
    needed = 1.959964 / np.sqrt(512) + stats.t.ppf(1 - 0.05 / (2 * 3 * 100), 63) * np.sqrt(1 / 64 - 1 / 512)
    assert needed == pytest.approx(0.555, abs=0.001)
    contest = make_contest(2)
    standing = look(contest, start(contest), [make_scores(gap, 64)], [512], 100)
    assert standing.is_known == is_known
    assert name_best(contest, standing) == ("a" if is_known else UNDECIDED)


def test_options_drop_out_one_by_one() -> None:
    contest = make_contest(3)
    noise = np.random.default_rng(2).normal(0, 0.1, 64)
    scores = np.stack([noise * 0, noise + 0.01, noise - 5])  # c is far behind, a and b are close
    assert look(contest, start(contest), [scores], [512], 3) == Standing((0, 1))


def test_it_gives_up_where_all_items_would_not_tell() -> None:
    """Half of the items, and a lead of nothing: P(|Z| > 1.96 | data) = P(N(0, 1) > 1.96) = .025 for each side."""
    contest = make_contest(2)
    standing = look(contest, start(contest), [make_scores(0.0, 256)], [512], 1)
    assert standing == Standing((0, 1), given_up=True)
    assert name_best(contest, standing) == UNDECIDED
    quarter = look(contest, start(contest), [make_scores(0.0, 128)], [512], 1)  # P(N(0, sqrt(3)) > 1.96) = .13
    assert not quarter.is_known


def test_nothing_is_decided_from_few_items_or_without_any_difference() -> None:
    contest = make_contest(2)
    assert look(contest, start(contest), [make_scores(9.0, 29)], [232], 1) == start(contest)
    assert look(contest, start(contest), [np.zeros((2, 64))], [512], 1) == start(contest)


def test_pairs_that_never_meet_decide_nothing() -> None:
    contest = make_contest(3)
    contest.leads[0, 2] = contest.leads[2, 0] = np.nan
    assert contest.pairs == 2
    scores = np.stack([np.zeros(64), np.ones(64), np.full(64, 2.0)]) + np.random.default_rng(0).normal(0, 0.01, (3, 64))
    assert look(contest, start(contest), [scores], [512], 2).left == (2,)  # by way of b


def test_wrong_verdicts_are_rare_in_studies_whose_truth_is_known() -> None:
    """80 studies of 4 contests between 4 options, of which some tie. benchmarks/decided.py has 1,000 of two kinds."""
    rng = np.random.default_rng(0)
    wrong = different = early = 0
    contest = make_contest(4)
    for _ in range(80):
        for _ in range(4):
            effects = rng.normal(0, rng.choice([0.0, 0.3, 1.0, 3.0]), 4)
            scores = effects[:, None] + rng.normal(0, 3, 256) + rng.standard_t(3, (4, 256))
            best = contest.options[int(effects.argmax())] if effects.any() else UNDECIDED
            standing = start(contest)
            for rounds in range(1, LAST):
                standing = look(contest, standing, [scores[:, list_places(256, rounds)]], [256], 4 * 6)
            whole = judge_whole(contest, [scores])
            found = name_best(contest, standing) if standing.is_known else whole
            early += standing.is_known
            wrong += found not in (best, UNDECIDED)
            different += found != whole
    assert wrong <= 0.05 * 320
    assert different <= 0.05 * 320
    assert early > 0.2 * 320  # it is no test of a procedure that never stops
