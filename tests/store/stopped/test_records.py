"""Records of experiments that stopped early: what further rounds, merging, damage and deleting do to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from toy_results import make_result

from kbit.evaluation.measurement import Measurement, encode_items
from kbit.evaluation.rounds.order import TASKS, TEXT
from kbit.evaluation.rounds.sample import SampledPart
from kbit.experiments.result import Result
from kbit.store.damage import DamagedRecordWarning
from kbit.store.filesystem import Files, open_files
from kbit.store.results import find_damaged, load_failures
from kbit.store.store import Store


def make_round(number: int, *rounds: int) -> Result:
    """An invented result that measured so many rounds of its tasks, or of its tasks and its text."""
    parts = [SampledPart(part, count, {}) for part, count in zip((TASKS, TEXT), rounds, strict=False)]
    items = (encode_items("nano_cloze", "acc", [1.0] * sum(rounds), exactly=True),)
    measured = (Measurement("nano_cloze", "acc", 1.0, 0.0, 1.0, sum(rounds)),)
    return dataclasses.replace(make_result(number), sampled=tuple(parts), items=items, measurements=measured)


def path_of_round(store: Store, number: int, digits: str) -> Path:
    return store.path / "stopped" / f"{make_result(number).key}-{digits}.json"


def list_files(store: Store) -> list[str]:
    """What is after the key in the names of the files."""
    return sorted(path.stem.partition("-")[2] for path in (store.path / "stopped").iterdir())


@pytest.mark.parametrize(("mine", "theirs", "left"), [((3,), (1,), "3"), ((1,), (3,), "3"), ((2,), (2,), "2")])
def test_merging_keeps_the_record_that_went_further(
    tmp_path: Path, mine: tuple[int, ...], theirs: tuple[int, ...], left: str
) -> None:
    store, other = Store(tmp_path / "mine"), Store(tmp_path / "theirs")
    store.write(make_round(0, *mine))
    other.write(make_round(0, *theirs))
    store.merge(other.path)
    assert (list_files(store), list_files(other)) == ([left], [str(theirs[0])])
    found = store.find_stopped(make_result(0).key)
    assert found is not None
    assert found.items[0].n == int(left)


def test_a_driver_that_is_behind_takes_no_rounds_from_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for rounds in ((1, 1), (3, 1), (1, 1), (2, 1), (1, 2)):
        store.write(make_round(0, *rounds))
    assert list_files(store) == ["31"]
    store.write(make_round(0, 3, 4))
    assert list_files(store) == ["34"]


@pytest.mark.parametrize(("theirs", "failures"), [((1,), 0), ((3,), 1)])
def test_a_failure_of_another_store_counts_where_it_went_further(
    tmp_path: Path, theirs: tuple[int, ...], failures: int
) -> None:
    store, other = Store(tmp_path / "mine"), Store(tmp_path / "theirs")
    key, experiment = make_result(0).key, make_result(0).experiment
    store.write(make_round(0, 2))
    other.write(make_round(0, *theirs))
    other.write_failure(key, experiment, "it failed in the next round", "")
    store.merge(other.path)
    assert len(list(load_failures(store.path))) == failures


@pytest.mark.parametrize("content", ["{}", "damaged items"])
def test_what_cannot_be_read_is_no_round_and_is_found_and_replaced(tmp_path: Path, content: str) -> None:
    store, key = Store(tmp_path), make_result(0).key
    store.write(make_round(0, 1))
    path = path_of_round(store, 0, "1")
    data = make_round(0, 1).items[0].data
    path.write_text(path.read_text().replace(f'"{data}"', '"?"') if content == "damaged items" else content)
    with pytest.warns(DamagedRecordWarning, match=f"stopped/{key}-1.json is damaged"):
        assert store.list_rounds([key]) == {}
    with pytest.warns(DamagedRecordWarning):
        assert store.list_rounds([key]) == {}
    [damaged] = find_damaged(store.path)
    assert damaged.name == f"stopped/{key}-1.json"
    with pytest.warns(DamagedRecordWarning):
        store.write(make_round(0, 1))
    assert store.list_rounds([key]) == {key: (1,)}
    path.write_text("{}")
    assert store.delete_damaged(find_damaged(store.path)) == 1
    assert list_files(store) == []


def test_a_kill_while_a_damaged_round_is_replaced_loses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced as a whole: nothing is removed before the new one is there."""
    store = Store(tmp_path)
    store.write(make_round(0, 1))
    path = path_of_round(store, 0, "1")
    path.write_text("{}")

    def be_killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", be_killed)
    with pytest.raises(KeyboardInterrupt), pytest.warns(DamagedRecordWarning):
        store.write(make_round(0, 1))
    assert path.read_text() == "{}"


def test_deleting_counts_rounds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(make_result(0))
    store.write(make_round(1, 1, 1))
    store.write(make_round(2, 1))
    assert store.delete([make_result(number).key for number in (0, 1, 5)]) == 2
    assert list_files(store) == ["1"]


def test_writing_lists_no_folder_of_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep writes tens of thousands of results, beside as many rounds."""
    store = Store(tmp_path)
    files = type(open_files(tmp_path))
    names = files.names

    def list_others(self: Files, folder: str, suffix: str) -> list[str]:
        assert folder != "stopped"
        return names(self, folder, suffix)

    monkeypatch.setattr(files, "names", list_others)
    store.write(make_round(0, 1, 1))
    store.write(make_round(0, 2, 1))
    assert store.list_rounds([make_result(0).key]).get(make_result(0).key) == (2, 1)
    store.write(make_result(0))
    assert list_files(store) == []


def test_a_store_behind_a_url_has_the_same_rounds() -> None:
    store = Store("memory://rounds-of-kbit")
    store.write(make_round(0, 1))
    store.write(make_round(0, 3))
    store.write(make_round(0, 2))
    assert store.list_rounds([make_result(0).key]) == {make_result(0).key: (3,)}
    assert store.stopped_keys() == {make_result(0).key}
    assert store.delete([make_result(0).key]) == 1
