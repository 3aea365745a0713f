"""`kbit results`: what it lists, exports, deletes, compacts and merges, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toy_results import fill, make_result

from kbit.cli.listing import choose_columns, show_failures
from kbit.evaluation.config import EvalConfig
from kbit.experiments.identity import find_key
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.conditions import select_rows
from kbit.store.readers import list_keys, read_failures, read_results
from kbit.store.store import Store
from kbit.training.config import TrainConfig

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py, which starts in tmp_path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four results and a failure, in the place where `kbit results` looks."""
    store = fill(tmp_path / "results", range(4))
    reason = "ValueError: " + "a long reason " * 20
    store.write_failure(make_result(9).key, make_result(9).experiment, reason, "Traceback")
    return store


def test_results_are_exported_as_parquet(kbit: Kbit, store: Store, tmp_path: Path) -> None:
    done = kbit("results", "--where", "metric == 'acc'", "--parquet", "out.parquet", "--csv", "out.csv")
    assert (done.code, done.out) == (0, "4 rows written to out.csv and out.parquet\n")
    expected = read_results("results").query("metric == 'acc'").sort_values("model").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet("out.parquet"), expected)


def test_rows_are_in_the_order_of_size_bits_type_and_block(kbit: Kbit, store: Store) -> None:
    same = make_result(0)
    for block_size in (None, 1024, 64):
        for data_type in ("nf", "int"):
            experiment = dataclasses.replace(
                same.experiment, quant=QuantConfig(data_type=data_type, block_size=block_size)
            )
            for name, parameters in (("toy-9", 2000), ("toy-10", 500)):
                own = dataclasses.replace(experiment, model=ModelConfig(name))
                store.write(dataclasses.replace(same, key=find_key(own), experiment=own, parameters=parameters))
    shown = kbit("results", "--where", "metric == 'acc' and model in ['toy-9', 'toy-10']").out.splitlines()[1:]
    found = [tuple(line.split()[:4]) for line in shown]
    blocks = [("4", data_type, block) for data_type in ("int", "nf") for block in ("64", "1024", "whole")]
    assert found == [(model, *block) for model in ("toy-10", "toy-9") for block in blocks]
    kbit("results", "--where", "metric == 'acc'", "--sort=-parameters,data_type", "--csv", "out.csv")
    rows = pd.read_csv("out.csv")
    assert rows["parameters"].tolist() == [2000] * 6 + [1000] * 4 + [500] * 6
    assert rows["data_type"].dropna().tolist() == [
        *["int"] * 3,
        *["nf"] * 3,
        "float",
        "int",
        "nf",
        *["int"] * 3,
        *["nf"] * 3,
    ]


def test_columns_are_those_asked_for(kbit: Kbit, store: Store) -> None:
    done = kbit("results", "--columns", "value, model", "--where", "metric == 'acc' and bits == 4")
    assert done.out.split() == ["value", "model", "0.5", "toy-2", "0.5", "toy-3"]
    kbit("results", "--columns", "model,bits", "--csv", "out.csv")
    assert list(pd.read_csv("out.csv").columns) == ["model", "bits"]
    for option in ("--columns", "--sort"):
        refused = kbit("results", f"{option}=model,bit")
        assert refused.code == 1
        assert refused.err.startswith(f"kbit: error: {option}='bit': did you mean bits? It is not one of: key, model, ")


def test_wide_has_a_row_for_each_experiment(kbit: Kbit, store: Store) -> None:
    lines = kbit("results", "--wide").out.splitlines()
    head = "label bits_per_param total_bits nano_cloze acc nano_held_out cross_entropy seconds"
    assert " ".join(lines[0].split()) == head
    assert [line.split()[:2] for line in lines[1:]] == [
        ["toy-0", "16-bit"], ["toy-1", "float3-e2m0"], ["toy-2", "nf4"], ["toy-3", "int4"],
    ]  # fmt: skip
    assert [line.split()[-3:] for line in lines[1:]] == [["0.5", f"{value}.0", "0.3"] for value in (3, 4, 5, 6)]
    done = kbit("results", "--wide", "--where", "task == 'nano_cloze' and bits < 16", "--parquet", "out.parquet")
    assert done.out == "3 rows written to out.parquet\n"
    table = pd.read_parquet("out.parquet")
    assert table["block_size"].tolist() == ["64", "whole", "64"]
    assert [name for name in table if "nano" in str(name)] == [
        "nano_cloze acc",
        "nano_cloze acc low",
        "nano_cloze acc high",
    ]
    chosen = kbit("results", "--wide", "--columns", "finished,nano_cloze acc low", "--sort", "label").out.split("\n")
    assert chosen[1].split() == ["2026-01-01T00:00:00+00:00", "0.4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delete", "--where", "bits == 4", "--yes"], "kbit results delete has no --wide"),
        (["compact"], "kbit results compact has no --wide"),
        (["--failures"], "--failures goes without --wide"),
        (["--to", "wandb"], "--to goes without --wide"),
        (["--damaged"], "--damaged goes without --wide"),
    ],
)
def test_only_a_listing_of_results_is_arranged(kbit: Kbit, store: Store, arguments: list[str], message: str) -> None:
    done = kbit("results", "--wide", *arguments)
    assert (done.code, message in done.err) == (1, True)
    assert len(store.finished_keys()) == 4


@pytest.mark.parametrize("where", ["bits", "bits + 1", "3", "bits ===", "bitz == 4", "'nf'", "value.sum() > 3"])
def test_what_is_no_condition_is_refused(kbit: Kbit, store: Store, where: str) -> None:
    for command in (["results"], ["results", "delete", "--yes"]):
        done = kbit(*command, "--where", where)
        assert (done.code, f"--where {where!r}" in done.err, "scale_format" in done.err) == (1, True, True)
    assert len(store.finished_keys()) == 4


def test_a_condition_on_a_missing_value_does_not_hold() -> None:
    table = pd.DataFrame({"bits": [3, 4], "block_size": pd.array([64, None], dtype="Int64")})
    assert select_rows(table, "block_size >= 64")["bits"].tolist() == [3]
    assert select_rows(table, "bits >= 3 and block_size != 64")["bits"].tolist() == []


def test_what_tells_results_apart_is_shown(tmp_path: Path) -> None:
    store = Store(tmp_path)
    same = dataclasses.replace(make_result(0).experiment, quant=QuantConfig(bits=2, data_type="nf"))
    tables = [
        QuantConfig(bits=2, data_type="table", table=table) for table in ((-1.0, 0.3, 0.5, 1.0), (-1.0, 0.0, 1.0))
    ]

    def shown(*quants: QuantConfig) -> set[str]:
        for quant in quants:
            experiment = dataclasses.replace(same, quant=quant)
            store.write(dataclasses.replace(make_result(0), key=find_key(experiment), experiment=experiment))
        return set(choose_columns(read_results(tmp_path)))

    plain = {"model", "bits", "data_type", "block_size", "total_bits", "task", "metric", "value", "low", "high", "n"}
    assert shown(QuantConfig(bits=16), same.quant, QuantConfig(data_type="float")) == plain
    assert shown(tables[0]) == plain
    assert shown(tables[1]) == plain | {"table"}
    assert set(read_results(tmp_path)["table"].dropna()) == {"[-1, 0.3, 0.5, 1]", "[-1, 0, 1]"}
    assert shown(dataclasses.replace(same.quant, scale_format="bf16")) == plain | {"table", "scale_format"}
    assert shown(dataclasses.replace(same.quant, method="hqq")) == plain | {"table", "scale_format", "method"}
    seeds = [TrainConfig(steps=3, text="t", seed=seed) for seed in (0, 1)]
    for trainings, more in ((seeds[:1], {"training"}), (seeds[1:], {"training", "train_seed"})):
        for train in trainings:
            trained = dataclasses.replace(same, quant=QuantConfig(bits=16), train=train)
            store.write(dataclasses.replace(make_result(0), key=f"{train.seed:064d}", experiment=trained))
        assert set(choose_columns(read_results(tmp_path))) == plain | {"table", "scale_format", "method"} | more
    limited = dataclasses.replace(same, eval=EvalConfig(limit=3))
    store.write(dataclasses.replace(make_result(0), key=find_key(limited), experiment=limited))
    assert "evaluation" in choose_columns(read_results(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "bits == 7"], "no results in results with bits == 7"),
        (["--failures", "--where", "bits == 7"], "no failed experiments in results with bits == 7"),
        (["delete", "--where", "bits == 7"], "no results in results with bits == 7"),
    ],
)
def test_nothing_found_is_said(kbit: Kbit, store: Store, arguments: list[str], message: str) -> None:
    done = kbit("results", *arguments)
    assert (done.code, done.out) == (0, f"{message}\n")


def test_failures_fit_a_terminal(kbit: Kbit, store: Store) -> None:
    shown = show_failures(read_failures("results"), width=80)
    assert max(map(len, shown.splitlines()[1:])) <= 80
    assert f"  {make_result(9).experiment.label()}  " in shown.splitlines()[0]
    assert " ".join(shown.split()).count("a long reason") == 20
    assert "a long reason" in kbit("results", "--failures").out


def test_a_filter_says_which_baselines_it_leaves_out(kbit: Kbit, store: Store) -> None:
    done = kbit("results", "--where", "data_type == 'int'", "--csv", "out.csv")
    assert (done.code, done.out) == (0, "2 rows written to out.csv\n")
    assert "2 rows of 16-bit baselines are left out" in done.err
    again = kbit("results", "--where", "(data_type == 'int') or bits == 16", "--csv", "out.csv")
    assert (again.err, again.out) == ("", "4 rows written to out.csv\n")
    kbit("results", "delete", "--where", "data_type != 'nf'", "--yes")
    assert sorted(read_results("results")["bits"].unique()) == [4, 16]  # of the baseline, too, and the nf


def test_a_store_of_failures_says_so(kbit: Kbit, tmp_path: Path) -> None:
    """And what tells them apart, which their labels leave out."""
    store = Store(tmp_path / "results")
    for tasks, state in ((("nano_cloze",), "crashed"), (("piqa", "lambada"), "failed"), ((), "failed")):
        experiment = dataclasses.replace(make_result(0).experiment, eval=EvalConfig(tasks=tasks))
        store.write_failure(find_key(experiment), experiment, "no", "", state)
    done = kbit("results")
    said = (
        "no results in results; it has 1 crashed and 2 failed experiments: kbit results --failures --results results\n"
    )
    assert (done.code, done.out) == (0, said)
    lines = kbit("results", "--failures").out.splitlines()
    assert sum("  crashed  toy-0" in line and "tasks=nano_cloze " in line for line in lines) == 1
    assert sum("  failed   toy-0" in line and "tasks=piqa,lambada " in line for line in lines) == 1
    assert kbit("results", "--failures", "--where", "state == 'crashed'").out.count("toy-0") == 1


def test_delete_asks_first(kbit: Kbit, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = kbit("results", "delete", "--where", "bits == 16")
    assert (refused.code, "--yes" in refused.err) == (1, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in (("n", 4), ("", 4), ("y", 3)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        kbit("results", "delete", "--where", "bits == 16")
        assert len(store.finished_keys()) == left
    assert kbit("results", "delete", "--where", "bits < 16", "--yes").out.endswith("deleted 3 of 3 experiments\n")
    assert store.finished_keys() == set()


def test_delete_needs_a_condition(kbit: Kbit, store: Store) -> None:
    done = kbit("results", "delete", "--yes")
    assert (done.code, "--where" in done.err) == (1, True)
    assert len(store.finished_keys()) == 4


def test_failures_are_forgotten(kbit: Kbit, store: Store) -> None:
    done = kbit("results", "delete", "--failures", "--where", "model == 'toy-9'", "--yes")
    assert done.out.endswith("deleted 1 of 1 failed experiment\n")
    assert list_keys("results") == (store.finished_keys(), set())


def test_stores_are_compacted_and_merged(kbit: Kbit, store: Store, tmp_path: Path) -> None:
    fill(tmp_path / "b", range(3, 6))
    assert kbit("results", "compact").out == "4 experiments compacted in results\n"
    done = kbit("results", "merge", "b", "b")
    said = "b: {} experiments copied to results, which had {} of its experiments already\n"
    assert done.out == said.format(2, 1) + said.format(0, 3)
    assert len(store.finished_keys()) == 6
    for arguments in (["merge", "b", "nowhere"], ["compact", "--results", "nowhere"]):
        refused = kbit("results", *arguments)
        assert (refused.code, "no results at" in refused.err) == (1, True)
    assert not (tmp_path / "nowhere").exists()


def test_delete_takes_all_rows_of_an_experiment(kbit: Kbit, store: Store) -> None:
    kbit("results", "delete", "--yes", "--where", f"metric == 'acc' and key == '{make_result(1).key}'")
    assert set(read_results("results")["model"]) == {ModelConfig(f"toy-{n}").name for n in (0, 2, 3)}
