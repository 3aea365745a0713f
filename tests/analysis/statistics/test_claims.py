"""Claims on curves with known answers: margins, intervals, grades."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.analysis.curves.curves import ZERO_SHOT, Measure
from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.statistics.claims import Comparison, Contrast, contrast_curves, judge_contrasts
from kbit.analysis.statistics.frontier import Draws, find_strongest_rival
from kbit.analysis.statistics.grades import describe_lead
from kbit.analysis.statistics.verdicts import (
    MOST_VARIANTS,
    NO_CONTEST,
    NOT_TRIED,
    Trial,
    judge_four_bit,
    line_up,
    tabulate_verdicts,
    try_precision,
)

LOSS = Measure("cross entropy", "cross_entropy", "text", higher_is_better=False)
Build = Callable[..., pd.DataFrame]
A_AND_OTHERS = Comparison(lambda points: (["a"], ["b", "c"]), "a", "others")


def test_the_claim_counts_only_shared_budgets(make_points: Build) -> None:
    curves = make_points({4: {10: 0.4, 100: 0.6}, 8: {20: 0.3, 1000: 0.5}, 16: {40: 0.2, 2000: 0.5}})
    trial = try_precision(line_up(curves, ZERO_SHOT))
    assert (trial.share, trial.ahead, trial.grade, trial.rivals) == (1.0, 1.0, "holds", ())


def test_the_claim_is_refuted_with_the_better_precision_and_the_margin(make_points: Build) -> None:
    text = judge_four_bit(make_points({4: {10: 0.4, 100: 0.6}, 5: {10: 0.5, 100: 0.7}}), ZERO_SHOT)
    assert text.startswith(
        "Does not hold: the mean lead of 4-bit over its strongest rival, 5-bit, is -0.1000 (95% interval -"
    )
    assert "It is best over 0% of the shared budgets (else 5-bit)" in text
    assert "Its chance to be best is 0% on average" in text


def test_the_margin_is_the_mean_lead_with_its_interval(make_points: Build) -> None:
    curves = make_points({3: {10: 3.0, 100: 2.0}, 4: {10: 2.9, 100: 1.9}}, error=0.01)
    trial = try_precision(line_up(curves, LOSS))
    assert trial.gap == pytest.approx(0.1)
    # mean over evenly spaced budgets of two independent errors at each end: 0.01 sqrt(2 * (1/3 + 1/6)) at most
    assert trial.high - trial.low == pytest.approx(2 * 1.96 * 0.01, rel=0.15)
    assert trial.low < trial.gap < trial.high


def test_a_lead_inside_the_noise_decides_nothing(make_points: Build) -> None:
    curves = make_points({4: {10: 0.40, 100: 0.60}, 5: {10: 0.401, 100: 0.601}}, error=0.01)
    text = judge_four_bit(curves, ZERO_SHOT)
    assert text.startswith(
        "Undecided: the mean lead of 4-bit over its strongest rival, 5-bit, is -0.0010 (95% interval -"
    )
    assert "unpaired: no items" in text


def test_the_claim_is_not_tested_without_four_bit(make_points: Build) -> None:
    curves = make_points({3: {10: 0.4, 100: 0.6}, 5: {10: 0.41, 100: 0.61}})
    assert judge_four_bit(curves, ZERO_SHOT) == "Not tested: no 4-bit model was measured at two sizes."
    apart = make_points({4: {10: 0.4, 100: 0.6}, 5: {200: 0.41, 300: 0.61}})
    text = judge_four_bit(apart, ZERO_SHOT)
    assert text == "Not tested: no 4-bit curve meets another precision at equal total bits."
    assert try_precision(line_up(curves, ZERO_SHOT)).grade == "not tested"


def test_a_measure_without_intervals_decides_nothing(make_points: Build) -> None:
    curves = make_points({3: {10: 0.5, 100: 0.5}, 4: {10: 0.4, 100: 0.6}}).assign(low=np.nan, high=np.nan)
    text = judge_four_bit(curves, ZERO_SHOT)
    assert text.startswith(
        "Undecided: the mean lead of 4-bit over its strongest rival, 3-bit, is +0.0000 (no interval)"
    )
    assert "chance" not in text


def test_any_precision_can_be_tried(make_points: Build) -> None:
    curves = make_points({3: {10: 0.5, 100: 0.6}, 4: {10: 0.4, 100: 0.5}})
    race = line_up(curves, ZERO_SHOT)
    assert try_precision(race, bits=3).grade == "holds"
    assert try_precision(race, bits=4).rivals == (3,)


@pytest.mark.parametrize(
    ("expected", "gap", "half", "grade"),
    [
        ("better", 0.1, 0.05, "holds"),
        ("better", 0.1, 0.2, "undecided"),
        ("better", -0.1, 0.05, "does not hold"),
        ("worse", -0.1, 0.05, "holds"),
        ("worse", 0.1, 0.05, "does not hold"),
        ("no better", 0.0, 0.005, "holds"),
        ("no better", -0.1, 0.005, "holds"),
        ("no better", 0.1, 0.05, "does not hold"),
        ("no better", 0.01, 0.05, "undecided"),
        ("worse", -0.1, 0.2, "undecided"),
        ("level", 0.0, 0.005, "holds"),
        ("level", -0.005, 0.01, "undecided"),
        ("level", -0.1, 0.005, "does not hold"),
        ("level", 0.1, 0.005, "does not hold"),
        ("level", 0.0, 0.5, "undecided"),
        ("level", 0.0, np.nan, "undecided"),
        ("better", 0.1, np.nan, "undecided"),
        ("better", np.nan, 0.0, "not tested"),
    ],
)
def test_grades(expected: str, gap: float, half: float, grade: str) -> None:
    assert Contrast(gap, gap - half, gap + half).grade(expected, 0.01) == grade  # type: ignore[arg-type]


@given(gap=st.floats(-1, 1), half=st.floats(0, 1), share=st.floats(0, 1), ahead=st.floats(0, 1))
def test_a_verdict_follows_from_the_interval_alone(gap: float, half: float, share: float, ahead: float) -> None:
    """However many budgets a precision wins: against the interval it neither holds nor fails."""
    trial = Trial(4, share, gap, gap - half, gap + half, ahead=ahead, behind=1 - ahead)
    assert (trial.grade == "undecided") == (trial.low <= 0 <= trial.high)
    assert trial.grade == Contrast(gap, gap - half, gap + half).grade("better", 0.01)
    text = describe_lead(trial.gap, trial.low, trial.high, ZERO_SHOT)
    assert [float(number) for number in re.findall(r"[+-]\d\.\d{4}", text)] == pytest.approx(
        [trial.gap, trial.low, trial.high], abs=6e-5
    )


def test_several_families_are_judged_one_by_one(make_points: Build) -> None:
    better = make_points({4: {10: 0.5, 100: 0.7}, 5: {10: 0.4, 100: 0.6}}).assign(family="a")
    worse = make_points({4: {10: 0.4, 100: 0.6}, 5: {10: 0.5, 100: 0.7}}).assign(family="b")
    text = judge_four_bit(pd.concat([better, worse], ignore_index=True), ZERO_SHOT)
    assert text.startswith("Of 2 panels: holds in 1, does not hold in 1.")
    assert "a, nf block 64: holds, +0.1000 (95%" in text
    assert "b, nf block 64: does not hold, -0.1000 (95%" in text


def test_a_contrast_is_the_mean_difference_at_equal_bits(make_points: Build) -> None:
    curves = make_points({"a": {10: 0.3, 100: 0.5}, "b": {10: 0.3, 100: 0.4}, "c": {10: 0.1, 100: 0.2}}, error=0.001)
    test = contrast_curves(curves, (["a", "b"], ["c"]), ZERO_SHOT)
    # linear in log bits: the mean over the range is the mean of the ends
    assert test.gap == pytest.approx((0.3 + 0.45) / 2 - 0.15, abs=1e-3)
    assert test.low < test.gap < test.high
    swapped = contrast_curves(curves, (["c"], ["a", "b"]), ZERO_SHOT)
    assert swapped.gap == pytest.approx(-test.gap)
    assert contrast_curves(curves, (["a", "b"], ["c"]), LOSS).gap == pytest.approx(-test.gap)


def test_the_best_leads_every_other_not_their_mean(make_points: Build) -> None:
    curves = make_points({"a": {10: 0.3, 100: 0.5}, "b": {10: 0.4, 100: 0.6}, "c": {10: 0.0, 100: 0.1}}, error=0.001)
    judged = {expected: judge_contrasts(curves, A_AND_OTHERS, expected, ZERO_SHOT) for expected in ("better", "best")}
    assert judged["better"].startswith("Holds. Mean lead: toy, a over b and c: +0.1250")
    assert judged["best"].startswith("Does not hold. Mean lead over the strongest rival: toy, a over b: -0.1000")


def test_the_best_must_lead_an_uncertain_rival_too(make_points: Build) -> None:
    """The rival with the smallest lead is led for sure; one with a larger lead of which little is known is not."""
    sure = make_points({"a": {10: 0.60, 100: 0.60}, "b": {10: 0.59, 100: 0.59}}, error=0.0005)
    unsure = make_points({"c": {10: 0.58, 100: 0.58}}, error=0.1)
    curves = pd.concat([sure, unsure], ignore_index=True)
    text = judge_contrasts(curves, A_AND_OTHERS, "best", ZERO_SHOT)
    assert text.startswith("Undecided. Mean lead over the strongest rival: toy, a over c: +0.0200 (95% interval -0.")


def test_a_precision_must_lead_an_uncertain_rival_too(make_points: Build) -> None:
    sure = make_points({4: {10: 0.60, 100: 0.60}, 5: {10: 0.59, 100: 0.59}}, error=0.0005)
    unsure = make_points({8: {10: 0.58, 100: 0.58}}, error=0.1)
    trial = try_precision(line_up(pd.concat([sure, unsure], ignore_index=True), ZERO_SHOT))
    assert (trial.grade, trial.rival) == ("undecided", 8)
    assert trial.gap == pytest.approx(0.02)


@pytest.mark.parametrize("others", [(0.0,) * 5, (0.0, 0.5, 0.5), (0.0,), (-0.2, -0.2, -0.2)])
def test_the_interval_over_the_strongest_rival_covers(others: tuple[float, ...]) -> None:
    """Of 400 made-up samples with a known least lead, 2.5% lie above it and 2.5% below at most, within chance.

    With the rival that is best by value 10% of the intervals were below a least lead of 0 over five equals.
    """
    rng = np.random.default_rng(0)
    truth = np.array([0.0, *(-lead for lead in others)])
    rows = np.eye(len(truth))[0] - np.eye(len(truth))[1:]
    above = below = 0
    for _ in range(400):
        value = truth + rng.standard_normal(len(truth))
        draws = Draws(value + rng.standard_normal((400, len(truth))), paired=False)
        lead = find_strongest_rival(draws, rows, rows @ value)
        above += lead.low > min(others)
        below += lead.high < min(others)
    assert max(above, below) / 400 <= 0.025 + 3 * (0.025 * 0.975 / 400) ** 0.5


def test_a_contrast_needs_both_groups_at_shared_budgets(make_points: Build) -> None:
    curves = make_points({"a": {10: 0.3, 100: 0.5}, "b": {200: 0.3, 300: 0.4}})
    for groups in ((["a"], ["b"]), (["a"], ["x"])):
        assert contrast_curves(curves, groups, ZERO_SHOT).grade("better", 0.01) == "not tested"
    text = judge_contrasts(curves, Comparison(lambda points: (["a"], ["x"]), "a", "x"), "better", ZERO_SHOT)
    assert text == "Not tested: there is no curve of x."
    text = judge_contrasts(curves, Comparison(lambda points: (["a"], ["b"]), "a", "b"), "better", ZERO_SHOT)
    assert text == "Not tested: in no panel do curves of a and b meet at equal total bits."
    apart = pd.concat([curves[curves["series"] == "a"], curves[curves["series"] == "b"].assign(panel="other")])
    text = judge_contrasts(apart, Comparison(lambda points: (["a"], ["b"]), "a", "b"), "better", ZERO_SHOT)
    assert text == "Not tested: no panel has curves of a and b."


def test_panels_are_counted_and_named(make_points: Build) -> None:
    better = make_points({"a": {10: 0.3, 100: 0.5}, "b": {10: 0.1, 100: 0.2}}, error=0.001)
    worse = make_points({"a": {10: 0.1, 100: 0.2}, "b": {10: 0.3, 100: 0.5}}, error=0.001).assign(panel="other")
    text = judge_contrasts(
        pd.concat([better, worse], ignore_index=True),
        Comparison(lambda points: (["a"], ["b"]), "a", "b"),
        "better",
        ZERO_SHOT,
    )
    assert text.startswith("Of 2 panels: holds in 1, does not hold in 1.")
    assert "toy, a over b: +0.2500 (95%" in text
    assert "other, a over b: -0.2500 (95%" in text


@pytest.fixture(scope="module")
def verdicts(draw_planted: Callable[[str], PaperFigure]) -> pd.DataFrame:
    """The verdicts of the planted store, as their figure has them."""
    return draw_planted("verdicts").data


def test_the_verdicts_of_a_planted_store(verdicts: pd.DataFrame) -> None:
    table = verdicts
    assert set(table["family"]) == {"opt", "pythia"}
    assert set(table["measure"]) == {"mean zero-shot accuracy", "cross entropy"}
    variants = table.groupby(["family", "measure"])[["data_type", "block_size"]]
    assert (variants.size() > MOST_VARIANTS).all()  # the table that is drawn shows some, the CSV all
    assert not table.duplicated(["family", "measure", "data_type", "block_size"]).any()
    table = table[~table["grade"].isin([NO_CONTEST, NOT_TRIED])]
    best = table[(table["data_type"] == "float") & (table["block_size"] == 64) & (table["measure"] == "cross entropy")]
    assert best["precisions"].tolist() == ["2, 3, 4, 5, 6, 7, 8, 16"] * 2
    assert set(table["grade"]) <= {"holds", "does not hold", "undecided"}
    for low, high, grade in zip(table["low"], table["high"], table["grade"], strict=True):
        assert grade == ("holds" if low > 0 else "does not hold" if high < 0 else "undecided")
    assert (table["share"] <= 1).all()


def test_of_many_variants_the_first_are_tried(
    planted: pd.DataFrame, verdicts: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbit.analysis.statistics.verdicts.MOST_TRIALS", 2)
    few = tabulate_verdicts(planted)
    assert few["keys"].tolist() == verdicts["keys"].tolist()
    assert set(few[few["grade"] != NO_CONTEST].groupby(["family", "measure"])["bits"].count()) == {MOST_VARIANTS}
    assert few.loc[few["bits"].isna(), "grade"].isin([NO_CONTEST, NOT_TRIED]).all()


def test_a_family_measured_in_two_ways_is_listed_with_the_reason(planted: pd.DataFrame) -> None:
    mixed = planted.assign(evaluation=np.where(planted["bits"] == 4, "5 items", "all items"))
    table = tabulate_verdicts(mixed)
    assert table["grade"].str.contains("measured in 2 ways").all()
    assert table["bits"].isna().all()
