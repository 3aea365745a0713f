"""A study that stops when it knows, of which experiments fail: what is missing, and what its rounds are good for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_results import make_result

from kbit.evaluation.measurement import encode_items, measure_mean
from kbit.evaluation.rounds.order import TEXT, list_places
from kbit.evaluation.rounds.sample import WHOLE, Sample
from kbit.experiments.config import Experiment
from kbit.experiments.result import Result
from kbit.store.readers import list_keys
from kbit.store.store import Store

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py

MODELS = ("nano-gpt2-98k", "nano-gpt2-332k")
STUDY = (
    *("-m", f"model.name={','.join(MODELS)}", "quant.bits=3,4,8", "quant.data_type=nf", "eval.tasks=[]"),
    *("hydra/launcher=basic", "study.until.decided=true"),
)
WINDOWS, NAME = 256, "nano_held_out"
fails: set[tuple[str, int, int]] = set()  # models, bits and rounds


class Session:
    """Stands for kbit's: it loads no model, and draws losses that no round but the last can tell apart."""

    def __init__(self, *_: object, **__: object) -> None:
        self._chance = np.random.default_rng(0).normal(3, 1, (2, 9, WINDOWS))

    def holds(self, *_: object) -> bool:
        return True

    def run(self, experiment: Experiment, key: str, _: object, sample: Sample = WHOLE) -> Result:
        model, bits, rounds = experiment.model.name, experiment.quant.bits, sample.goals.get(TEXT, 4)
        if (model, bits, rounds) in fails:
            raise ValueError("it fails here")
        losses = self._chance[MODELS.index(model), bits][list_places(WINDOWS, rounds)].tolist()
        return dataclasses.replace(
            make_result(0), key=key, experiment=experiment, family="nano-gpt2",
            total_bits=4 ** MODELS.index(model) * 10**6 * bits,
            measurements=(measure_mean(NAME, "cross_entropy", losses),),
            items=(encode_items(NAME, "cross_entropy", losses, exactly=True),),
            sampled=sample.describe(TEXT, {NAME: WINDOWS}),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    fails.clear()
    monkeypatch.setattr("kbit.experiments.session.Session", Session)


def test_an_experiment_that_fails_in_a_later_round_is_missing(kbit: Kbit, tmp_path: Path) -> None:
    fails.add((MODELS[1], 4, 2))
    done = kbit("run", *STUDY)
    assert "round 2 of 4" in done.err
    assert done.code == 1
    assert "it fails here" in done.err
    assert "1 of 6 asked results are missing" in done.err
    assert "asked results are in" not in done.out
    assert "tokens were scored" in done.out  # what is known is said all the same
    again = kbit("run", *STUDY)
    assert "1 failed before" in again.out
    assert "1 of 6 asked results are missing" in again.err

    store = Store(tmp_path / "results")
    count = len(store.stopped_keys())
    assert count
    note = f"kbit: note: {count} experiments stopped early"
    assert note in kbit("results").err
    assert note in kbit("recommend", "--memory", "1GB").err
    deleted = kbit("results", "delete", "--where", "bits == 4", "--yes")
    assert deleted.out.endswith("deleted 2 of 2 experiments\n"), deleted
    assert note not in deleted.err
    assert len(store.stopped_keys() | list_keys(store.path)[0]) == 4


def test_a_study_that_was_broken_off_has_not_stopped_early(kbit: Kbit) -> None:
    fails.add((MODELS[1], 4, 2))
    done = kbit("run", *STUDY, "fail_fast=true")
    assert done.code == 1
    assert "in part" in done.err
    assert "its verdict is open: the same command goes on" in done.err
    assert "6 of 6 asked results are missing" in done.err


def test_where_all_fail_the_failures_are_shown(kbit: Kbit) -> None:
    fails.update((model, bits, 1) for model in MODELS for bits in (3, 4, 8))
    done = kbit("run", *STUDY)
    assert done.code == 1
    assert "6 of 6 asked results are missing" in done.err
    assert done.err.count("it fails here") >= 1
    assert "nothing is known: without the experiments that failed nothing competes" in done.out
    assert "A contest needs" not in done.err
