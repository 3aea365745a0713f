"""Texts of the hub, with a stand-in for the hub: which rows are read, and what is said where it cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import datasets
import pytest

from kbit.data.hub_texts import HUB_TEXTS, load_hub_text
from kbit.data.texts import check_text, locate_text, read_documents
from kbit.engine.plan import check_experiment
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.identity import identify_text

ROWS = {
    "wikitext2": [{"text": " = Title = \n"}, {"text": ""}, {"text": " A line . \n"}],
    "c4": [{"text": "one"}, {"text": "two"}],
    "wikitext2_train": [{"text": "more lines"}],
    "c4_train": [{"text": "three"}],
    "pile_cc": [
        {"text": "crawled", "meta": {"pile_set_name": "Pile-CC"}},
        {"text": "code", "meta": {"pile_set_name": "Github"}},
    ],
}


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    load_hub_text.cache_clear()
    yield
    load_hub_text.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub has these rows; what is asked of it is noted."""
    asked = []

    def load_dataset(name: str, config: str | None, *, data_files: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, data_files, split))
        [text] = [t for t, p in HUB_TEXTS.items() if (p.dataset, p.data_files, p.split) == (name, data_files, split)]
        return datasets.Dataset.from_list(ROWS[text])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "documents"),
    [("wikitext2", [" = Title = \n\n\n\n\n A line . \n"]), ("c4", ["one", "two"]), ("pile_cc", ["crawled"])],
)
def test_the_rows_of_a_text_are_its_documents(hub: list[Any], name: str, documents: list[str]) -> None:
    assert read_documents(name) == (documents, sha256("\n".join(documents).encode()).hexdigest())
    assert locate_text(name) is None
    assert identify_text(name) == name
    assert len(hub) == 1  # loaded once


def test_wikitext2_and_the_calibration_texts_are_gptqs(hub: list[Any]) -> None:
    for name in ("wikitext2", "wikitext2_train", "c4_train"):
        read_documents(name)
    assert hub == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train"),
        ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train[:20000]"),
    ]


@pytest.mark.parametrize("name", sorted(HUB_TEXTS))
def test_offline_it_is_a_clear_error_before_any_work(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"text '{name}' is the data set .* \(HF_HUB_OFFLINE=1 is set\)"):
        check_text(name)


def test_a_study_of_the_hubs_text_is_planned_offline() -> None:
    experiment = Experiment(eval=EvalConfig(tasks=(), perplexity="pile_cc"))
    check_experiment(experiment, planned_only=True)
    with pytest.raises(FileNotFoundError, match="pile_cc"):
        check_experiment(experiment)
