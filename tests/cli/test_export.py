"""`kbit results --to TRACKER`: one run an experiment, in each tracker's offline mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_results import fill, make_result

from kbit.cli.export import TRACKERS, describe_run, flatten, name_metric
from kbit.experiments.result import Result
from kbit.store.store import Store

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four results in the place where `kbit results` looks."""
    return fill(tmp_path / "results", range(4))


def test_a_run_has_the_configuration_and_every_number() -> None:
    result = make_result(0)
    missing = dataclasses.replace(result.measurements[0], task="text", low=math.nan, high=math.nan)
    result = dataclasses.replace(result, measurements=(*result.measurements, missing), weight_rmse=None)
    run = describe_run(result)
    assert (run.key, run.name, run.group) == (result.key, result.experiment.label(), result.family)
    assert run.config["quant"]["bits"] == result.experiment.quant.bits
    assert dict(flatten(run.config))["quant.calibration.samples"] == 128
    expected = {f"{m.task}/{m.metric}": m.value for m in result.measurements}
    assert {name: run.numbers[name] for name in expected} == expected
    assert run.numbers["total_bits"] == result.total_bits
    first = result.measurements[0]
    assert run.numbers[f"{first.task}/{first.metric}/low"] == first.low
    assert f"text/{first.metric}/low" not in run.numbers
    assert "weight_rmse" not in run.numbers
    assert datetime.fromtimestamp(run.ended, UTC) == datetime.fromisoformat(result.finished)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("nano_cloze/acc", "nano_cloze/acc"), ("/home/a b/x.txt/ce", "home/a b/x.txt/ce"), ("../a(1)/ce", "a_1_/ce")],
)
def test_mlflow_takes_the_name_of_a_metric(name: str, metric: str) -> None:
    assert name_metric(name) == metric


def test_wandb_has_one_offline_run_an_experiment(
    kbit: Kbit, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs kbit[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = kbit("results", "--to", "wandb")
    assert (done.code, done.out) == (0, "4 experiments written to the wandb project 'kbit'\n")
    keys = {path.suffix or path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert keys == store.finished_keys()
    [record] = (tmp_path / "wandb").glob(f"offline-run-*-{make_result(0).key}/run-*.wandb")
    content = record.read_bytes()
    label = make_result(0).experiment.label()
    assert [text for text in (label, "data_type", "nano_cloze/acc") if text.encode() not in content] == []


def test_mlflow_has_one_run_an_experiment_and_each_once(
    kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs kbit[mlflow]")
    pytest.importorskip("sqlalchemy", reason="needs kbit[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    keys = sorted(store.finished_keys())
    done = kbit("results", "--to", "mlflow", "--project", "mine", "--where", f"key == {keys[0]!r}")
    assert (done.code, done.out) == (0, "1 experiments written to the mlflow project 'mine'\n")
    done = kbit("results", "--to", "mlflow", "--project", "mine")
    assert done.out == "3 experiments written to the mlflow project 'mine', which has the other 1 already\n"
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert sorted(run.data.tags["kbit.key"] for run in runs) == keys
    [first] = [run for run in runs if run.data.tags["kbit.key"] == make_result(0).key]
    expected = describe_run(make_result(0))
    assert first.info.run_name == expected.name
    assert first.data.metrics == expected.numbers
    assert first.data.params["quant.bits"] == str(make_result(0).experiment.quant.bits)


def test_trackio_has_one_run_an_experiment_and_each_once(
    kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    trackio = pytest.importorskip("trackio", reason="needs kbit[trackio]")
    for written in ("4 experiments written to the trackio project 'kbit'\n", "0 experiments written to"):
        done = kbit("results", "--to", "trackio")
        assert (done.code, done.out.startswith(written)) == (0, True)
    runs = {run.name: run for run in trackio.Api().runs("kbit")}
    first = describe_run(make_result(0))
    assert len(runs) == 4
    assert runs[f"{first.name} ({first.key})"].config["quant"]["bits"] == make_result(0).experiment.quant.bits


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    kbit: Kbit, store: Store, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, tracker, None)
    done = kbit("results", "--to", tracker)
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith(f"; pip install 'kbit[{tracker}]' brings it\n")


class FakeMlflow:
    """What kbit uses of MLflow. The second batch of numbers is lost on its way."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []
        self.batches = 0
        self.entities = SimpleNamespace(Param=lambda *of: of, Metric=lambda *of: of)

    def MlflowClient(self) -> FakeMlflow:
        return self

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id=name)

    def search_runs(self, places: list[str], filter_string: str) -> list[SimpleNamespace]:
        return [run for run in self.runs if filter_string == f"tags.`kbit.key` = '{run.tags['kbit.key']}'"]

    def create_run(self, place: str, start_time: int, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        info = SimpleNamespace(run_id=len(self.runs), status="RUNNING")
        self.runs.append(SimpleNamespace(info=info, tags=tags, numbers={}))
        return self.runs[-1]

    def log_batch(self, run_id: int, metrics: list[tuple[Any, ...]], params: list[tuple[Any, ...]]) -> None:
        self.batches += 1
        if self.batches == 2:
            raise ConnectionError("reset by peer")
        self.runs[run_id].numbers |= {name: value for name, value, *_ in metrics}

    def set_terminated(self, run_id: int, end_time: int) -> None:
        self.runs[run_id].info.status = "FINISHED"


def test_an_interrupted_export_is_completed_by_the_next(
    kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = FakeMlflow()
    monkeypatch.setitem(__import__("sys").modules, "mlflow", there)
    assert kbit("results", "--to", "mlflow").err.endswith("--to mlflow: ConnectionError: reset by peer\n")
    done = kbit("results", "--to", "mlflow")
    assert done.out == "3 experiments written to the mlflow project 'kbit', which has the other 1 already\n"
    assert {run.tags["kbit.key"]: run.numbers for run in there.runs} == {
        run.key: run.numbers for run in (describe_run(make_result(number)) for number in range(4))
    }
    assert (len(there.runs), {run.info.status for run in there.runs}) == (4, {"FINISHED"})
    assert kbit("results", "--to", "mlflow").out.startswith("0 experiments written to")


def test_what_the_store_refuses_is_not_the_trackers_error(
    kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Iterator[Result]:
        yield make_result(0)
        raise OSError("the disk is gone")

    monkeypatch.setattr("kbit.store.results.load_results", refuse)
    monkeypatch.setitem(__import__("sys").modules, "mlflow", FakeMlflow())
    assert kbit("results", "--to", "mlflow").err.endswith("kbit: error: the disk is gone\n")


def test_what_cannot_be_read_is_not_said_to_be_there(kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.store.results.load_results", lambda *_: iter([make_result(0)]))
    monkeypatch.setitem(__import__("sys").modules, "mlflow", FakeMlflow())
    done = kbit("results", "--to", "mlflow")
    assert done.out == "1 experiments written to the mlflow project 'kbit'; 3 cannot be read\n"


def test_what_a_tracker_refuses_is_named(kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such project")

    monkeypatch.setitem(TRACKERS, "wandb", refuse)
    monkeypatch.setitem(__import__("sys").modules, "wandb", object())
    assert kbit("results", "--to", "wandb").err == "kbit: error: --to wandb: RuntimeError: no such project\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["results", "--to", "wandb", "--csv", "x.csv"], "--to goes without --csv"),
        (["results", "--to", "wandb", "--failures"], "--to goes without --failures"),
        (["results", "--project", "mine"], "--project mine goes with --to TRACKER"),
        (["results", "--to", "wandb", "compact"], "kbit results compact has no --to"),
        (["results", "--project", "mine", "compact"], "kbit results compact has no --project"),
        (["results", "--to", "wandb", "--damaged"], "--damaged goes without --to"),
        (["results", "--damaged", "--project", "mine"], "--damaged goes without --project"),
        (["results", "--to", "wandb", "delete", "--where", "bits == 99"], "kbit results delete has no --to"),
        (["results", "--project", "mine", "delete", "--damaged"], "kbit results delete has no --project"),
        (["results", "--project", "mine", "merge", "other"], "kbit results merge has no --project"),
    ],
    ids=" ".join,
)
def test_one_thing_at_a_time(kbit: Kbit, store: Store, arguments: list[str], words: str) -> None:
    done = kbit(*arguments)
    assert (done.code, words in done.err) == (1, True)
