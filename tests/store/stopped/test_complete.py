"""Values of experiments that stopped early: paired with the others on what is shared, and never silently a result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_results import make_result

from kbit.evaluation.measurement import Measurement, encode_items, measure_accuracy, measure_mean
from kbit.evaluation.rounds.order import SHARES, TASKS, TEXT, list_places
from kbit.evaluation.rounds.sample import SampledPart
from kbit.experiments.result import Result
from kbit.store.damage import DamagedRecordWarning
from kbit.store.items import read_items
from kbit.store.readers import list_keys, read_results
from kbit.store.stopped.complete import Floats, Measured, complete_items, read_completed, read_measured
from kbit.store.stopped.tables import load_completed
from kbit.store.store import Store

TEXT_NAME = "nano_held_out"
TOTAL = 64


def make_loss(number: int, values: Floats, rounds: int = 4) -> Result:
    """An invented result with the losses of 64 windows, or of those of the first rounds."""
    places = list_places(TOTAL, rounds)
    own = values[places]
    measured = Measurement(TEXT_NAME, "cross_entropy", float(own.mean()), 0.0, 9.0, len(own))
    sampled = (SampledPart(TEXT, rounds, {TEXT_NAME: TOTAL}),) if rounds < len(SHARES) else ()
    items = (encode_items(TEXT_NAME, "cross_entropy", own.tolist(), exactly=bool(sampled)),)
    return dataclasses.replace(make_result(number), measurements=(measured,), items=items, sampled=sampled)


@pytest.fixture
def losses() -> Floats:
    """Losses of three experiments that share most of their windows' chance."""
    rng = np.random.default_rng(0)
    shared, gaps = rng.normal(0, 1, TOTAL), np.array([[0.0], [0.1], [0.3]])
    return np.asarray(3.0 + shared + gaps + rng.normal(0, 0.05, (3, TOTAL)), dtype=np.float64)


@pytest.fixture
def store(tmp_path: Path, losses: Floats) -> Store:
    """The first of three experiments is measured in full, the second on a half, the third on an eighth."""
    store = Store(tmp_path)
    for number, rounds in ((0, 4), (1, 3), (2, 1)):
        store.write(make_loss(number, losses[number], rounds))
    return store


def test_the_estimate_is_that_of_the_differences_on_shared_items(losses: Floats) -> None:
    half, eighth = list_places(TOTAL, 3), list_places(TOTAL, 1)
    group = [
        Measured("whole", "m", 4, losses[0]),
        Measured("half", "m", 3, losses[1][half]),
        Measured("eighth", "m", 1, losses[2][eighth]),
    ]
    done = complete_items(group, TOTAL)
    by_half = losses[0].mean() + (losses[1] - losses[0])[half].mean()
    assert done["half"].values.mean() == pytest.approx(by_half)
    both = (losses[0].mean() + by_half) / 2  # the references of the third are both others
    shared = (losses[2] - (losses[0] + losses[1]) / 2)[eighth].mean()
    assert done["eighth"].values.mean() == pytest.approx(both + shared)


def test_the_spread_of_a_difference_is_that_of_the_measured_items(losses: Floats) -> None:
    half = list_places(TOTAL, 3)
    done = complete_items([Measured("whole", "m", 4, losses[0]), Measured("half", "m", 3, losses[1][half])], TOTAL)
    found = (done["half"].values - done["whole"].values).var(ddof=1) / TOTAL
    assert found == pytest.approx((losses[1] - losses[0])[half].var(ddof=1) / half.size)


def test_two_that_stopped_at_once_differ_as_on_their_items(losses: Floats) -> None:
    places = list_places(TOTAL, 2)
    group = [Measured(str(number), "m", 2, losses[number][places]) for number in (1, 2)]
    for others in ([], [Measured("whole", "m", 4, losses[0])]):
        done = complete_items([*group, *others], TOTAL)
        assert (done["2"].values - done["1"].values).mean() == pytest.approx((losses[2] - losses[1])[places].mean())


def test_references_are_of_the_own_model_where_there_are_some(losses: Floats) -> None:
    places = list_places(TOTAL, 1)
    group = [Measured("a", "m", 4, losses[0]), Measured("b", "other", 4, 100 * losses[1])]
    done = complete_items([*group, Measured("c", "m", 1, losses[2][places])], TOTAL)
    assert done["c"].values.mean() == pytest.approx(losses[0].mean() + (losses[2] - losses[0])[places].mean())


def test_stopped_experiments_are_no_results_unless_asked_for(store: Store, losses: Floats) -> None:
    keys = [make_result(number).key for number in range(3)]
    assert list_keys(store.root)[0] == {keys[0]} == store.finished_keys()
    assert set(read_results(store.root)["key"]) == {keys[0]}
    assert "measured" not in read_results(store.root)
    assert read_items(store.root, TEXT_NAME, "cross_entropy").keys() == {keys[0]}
    table = read_results(store.root, stopped=True)
    shares = read_results(store.root, stopped=True, wide=True).set_index("key")["measured"]
    assert shares[keys].tolist() == [1.0, 0.5, 0.125]
    assert "stopped" not in table.attrs  # pandas copies them at each step
    rows = table[table["metric"] == "cross_entropy"].set_index("key")
    assert rows.loc[keys, "n"].tolist() == [64, 32, 8]
    assert rows.loc[keys, "measured"].tolist() == [1.0, 0.5, 0.125]
    half = list_places(TOTAL, 3)
    assert rows.loc[keys[1], "value"] == pytest.approx(losses[0].mean() + (losses[1] - losses[0])[half].mean())
    assert set(table.loc[table["key"] == keys[2], "metric"]) == {"cross_entropy", "perplexity"}


def test_what_was_measured_is_read_with_its_places(store: Store, losses: Floats) -> None:
    keys = [make_result(number).key for number in range(3)]
    found = read_measured(store.root, keys)["cross_entropy"][TEXT_NAME]
    assert np.flatnonzero(~np.isnan(found[keys[2]])).tolist() == list_places(TOTAL, 1).tolist()
    assert found[keys[2]][list_places(TOTAL, 1)] == pytest.approx(losses[2][list_places(TOTAL, 1)])
    assert read_completed(store.root, "cross_entropy", [keys[0]]) == {}


def test_a_later_round_takes_the_place_of_an_earlier_one_and_a_result_that_of_all(store: Store, losses: Floats) -> None:
    key = make_result(2).key
    assert (store.list_rounds([key]), store.stopped_keys()) == ({key: (1,)}, {make_result(1).key, key})
    store.write(make_loss(2, losses[2], 2))
    assert store.list_rounds([key]) == {key: (2,)}
    assert len(list((store.path / "stopped").glob(f"{key}*"))) == 1
    store.write(make_loss(2, losses[2]))
    assert (store.list_rounds([key]), store.find_stopped(key)) == ({}, None)
    assert key in store.finished_keys()


def test_deleting_forgets_rounds_and_merging_takes_them_along(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    assert other.merge(store.path) == (1, 0)
    assert other.stopped_keys() == store.stopped_keys()
    other.delete(other.stopped_keys())
    assert other.stopped_keys() == set()


def test_a_damaged_round_is_left_out_with_a_warning_and_measured_again(store: Store, losses: Floats) -> None:
    key = make_result(2).key
    (path,) = (store.path / "stopped").glob(f"{key}*")
    path.write_text(path.read_text()[:100])
    with pytest.warns(DamagedRecordWarning, match=f"stopped/{key}-1.json is damaged"):
        assert store.find_stopped(key) is None
    with pytest.warns(DamagedRecordWarning):
        store.write(make_loss(2, losses[2], 1))
    assert store.list_rounds([key]) == {key: (1,)}
    path.write_text("{}")
    with pytest.warns(DamagedRecordWarning):
        store.write(make_loss(2, losses[2], 2))
    assert store.list_rounds([key]) == {key: (2,)}


def test_a_record_without_rounds_is_as_before(tmp_path: Path, losses: Floats) -> None:
    store = Store(tmp_path / "plain")
    store.write(make_loss(0, losses[0]))
    assert "sampled" not in (store.path / "experiments" / f"{make_result(0).key}.json").read_text()


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("total", [16, 64, 400])
def test_the_interval_of_few_items_is_theirs(rounds: int, total: int) -> None:
    """The N numbers have the interval of the n values, by Student's quantile: 12.7 standard errors for two."""
    values = np.random.default_rng(1).normal(3, 1, len(list_places(total, rounds)))
    done = complete_items([Measured("one", "m", rounds, values)], total)["one"]
    own, found = (measure_mean("text", "cross_entropy", list(v)) for v in (values, done.values))
    assert (found.value, found.low, found.high) == pytest.approx((own.value, own.low, own.high))


def make_answers(number: int, right: Floats, rounds: int = 4, **evaluation: Any) -> Result:
    """An invented result with the answers to all items of a task, or to those of the first rounds."""
    own, result = right[list_places(len(right), rounds)], make_result(number)
    model = dataclasses.replace(result.experiment.model, name="toy")
    config = dataclasses.replace(result.experiment.eval, **evaluation)
    return dataclasses.replace(
        result,
        experiment=dataclasses.replace(result.experiment, model=model, eval=config),
        measurements=(measure_accuracy("nano_cloze", "acc", own.tolist()),),
        items=(encode_items("nano_cloze", "acc", own.tolist()),),
        sampled=(SampledPart(TASKS, rounds, {"nano_cloze": len(right)}),) if rounds < len(SHARES) else (),
    )


def complete_one(path: Path, *results: Result) -> Measurement:
    """Return the measurement on all items of the only result that stopped early."""
    store = Store(path)
    for result in results:
        store.write(result)
    [completed] = load_completed(path).values()
    return completed.measurements[0]


def test_one_item_has_no_interval(tmp_path: Path) -> None:
    whole, early = make_answers(0, np.array([1.0, 0, 1, 1, 0, 1, 1, 0])), make_answers(1, np.ones(8), 1)
    found = complete_one(tmp_path, whole, early)
    assert np.isnan([found.low, found.high]).all()
    assert found.n == 1
    assert read_completed(tmp_path, "acc", [early.key]) == {}  # so no bootstrap makes one of it


def test_no_accuracy_is_above_1(tmp_path: Path) -> None:
    """The reference is wrong on the items that were measured, and right on all others."""
    reference = np.ones(64)
    reference[list_places(64, 1)] = 0
    early = make_answers(1, np.ones(64), 1)
    found = complete_one(tmp_path, make_answers(0, reference), early)
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0 < found.low < 1
    [numbers] = read_completed(tmp_path, "acc", [early.key])["nano_cloze"].values()
    assert numbers.mean() == pytest.approx(1.0)  # the bootstrap goes on from the value that is shown


def test_answers_without_references_have_their_own_interval(tmp_path: Path) -> None:
    early = make_answers(1, np.ones(64), 1)
    assert complete_one(tmp_path, early) == measure_accuracy("nano_cloze", "acc", [1.0] * 8)


def test_right_answers_leave_a_doubt(tmp_path: Path) -> None:
    """8 of 8 as the reference: the interval is no narrower than that of 64 of 64."""
    found = complete_one(tmp_path, make_answers(0, np.ones(64)), make_answers(1, np.ones(64), 1))
    assert found.low == pytest.approx(measure_accuracy("t", "acc", [1.0] * 64).low)


@pytest.mark.parametrize("other", [{"num_fewshot": 5}, {"apply_chat_template": True}])
def test_references_were_asked_in_the_same_way(tmp_path: Path, other: dict[str, Any]) -> None:
    right = np.tile([1.0, 0.0], 32)
    found = complete_one(tmp_path, make_answers(0, np.ones(64), **other), make_answers(1, right, 1))
    assert found.value == right[list_places(64, 1)].mean()
