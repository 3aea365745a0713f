"""The store: what is written is read back, nothing is overwritten, and nothing half-written is seen."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toy_results import fill, race

from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import Measurement, TaskRecord, TextRecord, encode_items
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.methods.config import CalibrationConfig, GptqConfig, QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.damage import SCHEMA_VERSION, DamagedRecordWarning
from kbit.store.items import read_items
from kbit.store.readers import list_keys, read_failures, read_provenance, read_results
from kbit.store.store import Store

ACCURACY = Measurement("nano_cloze", "acc", 0.5, 0.4, 0.6, 100)
LOSS = Measurement("nano_held_out", "cross_entropy", 3.0, math.nan, math.nan, 1)


def make_result(quant: QuantConfig | None = None, model: str = "toy", loss: float = 3.0) -> Result:
    """A result with two measurements, invented."""
    experiment = Experiment(ModelConfig(model), quant or QuantConfig())
    return Result(
        key=find_key(experiment),
        experiment=experiment,
        family="toys",
        architecture="ToyForCausalLM",
        parameters=1000,
        quantized_parameters=900,
        total_bits=5425,
        bits_per_param=4.25,
        coverage=1.0,
        skipped=(),
        measurements=(ACCURACY, dataclasses.replace(LOSS, value=loss)),
        model_revision="0" * 40,
        checkpoint_dtype="float16",
        weights_hash="0" * 32,
        tasks=(),
        text=None,
        truncated=0,
        versions={"python": "3.11"},
        git_commit="",
        device="none",
        threads=1,
        seconds_quantize=0.1,
        seconds_evaluate=0.2,
        peak_memory_bytes=1,
        finished="2026-01-01T00:00:00+00:00",
    )


def files_of(store: Store) -> list[str]:
    """Every file of the store, hidden ones too."""
    return sorted(path.name for path in store.path.rglob("*") if path.is_file())


def test_result_is_read_back(tmp_path: Path) -> None:
    result = make_result(QuantConfig(bits=5, data_type="nf", block_size=128, scale_format="bf16"))
    Store(tmp_path).write(result)
    table = read_results(tmp_path)
    assert table["metric"].tolist() == ["acc", "cross_entropy"]
    row = table.iloc[0]
    expected = {
        "key": result.key,
        "model": "toy",
        "family": "toys",
        "parameters": 1000,
        "quantized_parameters": 900,
        "dtype": "float32",
        "bits": 5,
        "data_type": "nf",
        "block_size": 128,
        "scale_format": "bf16",
        "method": "rtn",
        "bits_per_param": 4.25,
        "total_bits": 5425,
        "task": "nano_cloze",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 100,
    }
    assert {name: row[name] for name in expected} == expected


def evaluations_of(path: Path, result: Result, **changes: Any) -> dict[str, str]:
    """What read_results says of each task's evaluation, of the result with its data changed."""
    Store(path).write(dataclasses.replace(result, **changes))
    table = read_results(path)
    return dict(zip(table["task"], table["evaluation"], strict=True))


def test_values_of_other_content_do_not_compare(tmp_path: Path) -> None:
    """Nor of other windows; results from before that was recorded are read as they were."""
    config = EvalConfig(tasks=("nano_cloze", "piqa", "f1"), limit=9, perplexity="nano_held_out", perplexity_windows=3)
    tasks = [TaskRecord(name, "1", "d", digit * 64, "", 0, ()) for name, digit in zip(config.tasks, "123", strict=True)]
    metrics = {
        "nano_cloze": "acc",
        "piqa": "acc",
        "f1": "f1",
        "mean_zero_shot": "acc",
        "nano_held_out": "cross_entropy",
    }
    measured = tuple(Measurement(task, metric, 0.5, 0.4, 0.6, 9) for task, metric in metrics.items())
    result = dataclasses.replace(
        make_result(), experiment=Experiment(eval=config), measurements=measured, tasks=(), text=None
    )
    assert evaluations_of(tmp_path / "old", result) == {
        "nano_cloze": "float32, 9 items",
        "piqa": "float32, 9 items",
        "f1": "float32, 9 items",
        "mean_zero_shot": "float32, 9 items, nano_cloze piqa",  # f1 is not in it
        "nano_held_out": "float32, 3 windows",
    }
    text = TextRecord("nano_held_out", "4" * 64, 3, 256)
    first = evaluations_of(tmp_path / "new", result, tasks=tuple(tasks), text=text)
    assert first["piqa"] == "float32, 9 items, data 22222222"
    assert first["nano_held_out"] == "float32, 3 windows of 256 tokens, text 44444444"
    assert first["mean_zero_shot"].startswith("float32, 9 items, nano_cloze piqa, data ")
    tasks[2] = dataclasses.replace(tasks[2], sha256="", fingerprint="9" * 16)
    hub = evaluations_of(tmp_path / "hub", result, tasks=tuple(tasks), text=text)
    assert hub == first | {"f1": "float32, 9 items, data 99999999"}
    tasks[1] = dataclasses.replace(tasks[1], definition_sha256="5" * 64)
    edited = evaluations_of(tmp_path / "edited", result, tasks=tuple(tasks), text=text)
    assert edited["piqa"] == "float32, 9 items, data 22222222, definition 55555555"
    assert edited["mean_zero_shot"] != hub["mean_zero_shot"]
    longer = evaluations_of(tmp_path / "longer", result, text=dataclasses.replace(text, window_length=512))
    assert longer["nano_held_out"] == "float32, 3 windows of 512 tokens, text 44444444"
    rolling = dataclasses.replace(config, perplexity_kind="rolling")
    whole = evaluations_of(tmp_path / "whole", result, experiment=Experiment(eval=rolling), text=text)
    assert whole["nano_held_out"] == "float32, rolling, text 44444444"


def test_columns_have_their_types(tmp_path: Path) -> None:
    Store(tmp_path).write(make_result())
    types = read_results(tmp_path).dtypes
    assert types["block_size"] == types["exponent_bits"] == pd.Int64Dtype()
    assert all(pd.api.types.is_float_dtype(types[name]) for name in ("value", "low", "high", "bits_per_param"))
    assert all(pd.api.types.is_integer_dtype(types[name]) for name in ("bits", "n", "parameters", "total_bits"))


def test_block_size_of_a_whole_tensor_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(make_result(QuantConfig(block_size=None)))
    store.write(make_result(QuantConfig(block_size=32)))
    sizes = read_results(tmp_path)["block_size"]
    assert sizes.isna().sum() == 2
    assert sizes.dropna().tolist() == [32, 32]


def test_float_has_its_exponent_bits_and_int_has_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for data_type in ("float", "int"):
        store.write(make_result(QuantConfig(data_type=data_type, exponent_bits=2)))
    rows = read_results(tmp_path).groupby("data_type").first()
    assert rows.loc["float", "exponent_bits"] == 2
    assert rows.loc["float", "float_bias"] == "ieee"
    assert rows.loc["int", ["exponent_bits", "float_bias"]].isna().all()


def test_baseline_has_no_quantizer(tmp_path: Path) -> None:
    Store(tmp_path).write(make_result(QuantConfig(bits=16, data_type="int", block_size=32)))
    table = read_results(tmp_path)
    assert (table["bits"] == 16).all()
    quantizer = ["data_type", "exponent_bits", "float_bias", "block_size", "scale_format", "method"]
    assert table[quantizer].isna().all(axis=None)


def test_undefined_interval_stays_undefined(tmp_path: Path) -> None:
    Store(tmp_path).write(make_result())
    loss = read_results(tmp_path).query("metric == 'cross_entropy'").iloc[0]
    assert math.isnan(loss["low"])
    assert math.isnan(loss["high"])


def test_full_configuration_is_kept(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write(result)
    record = json.loads((store.path / "experiments" / f"{result.key}.json").read_text())
    expected = dataclasses.asdict(result.experiment)
    del expected["train"]  # there is no training
    assert record["experiment"] == json.loads(json.dumps(expected))
    assert record["schema_version"] == SCHEMA_VERSION


def test_first_result_of_a_key_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(make_result(loss=3.0))
    store.write(make_result(loss=9.0))
    table = read_results(tmp_path).query("metric == 'cross_entropy'")
    assert table["value"].tolist() == [3.0]
    assert len(files_of(store)) == 1


def test_failure_is_recorded_with_its_reason(tmp_path: Path) -> None:
    store, experiment = Store(tmp_path), make_result().experiment
    store.write_failure(find_key(experiment), experiment, "ValueError: no", "Traceback ...")
    assert list_keys(tmp_path) == (set(), {find_key(experiment)})
    assert store.finished_keys() == set()
    row = read_failures(tmp_path).iloc[0]
    assert (row["key"], row["model"], row["bits"], row["reason"]) == (find_key(experiment), "toy", 4, "ValueError: no")


def test_failure_gives_no_row_of_results(tmp_path: Path) -> None:
    Store(tmp_path).write_failure(make_result().key, make_result().experiment, "ValueError: no", "")
    assert read_results(tmp_path).empty


def test_later_failure_replaces_the_earlier_one(tmp_path: Path) -> None:
    store, experiment = Store(tmp_path), make_result().experiment
    for reason in ("first", "second"):
        store.write_failure(find_key(experiment), experiment, reason, "")
    assert read_failures(tmp_path)["reason"].tolist() == ["second"]


def test_success_replaces_the_failure(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write_failure(result.key, result.experiment, "ValueError: no", "")
    store.write(result)
    assert list_keys(tmp_path) == ({result.key}, set())
    assert store.finished_keys() == {result.key}
    assert read_failures(tmp_path).empty


def test_half_written_file_is_ignored(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write(result)
    (store.path / "experiments" / ".0123456789abcdef-x1y2z3").write_text('{"key": "0123')  # a killed writer leaves this
    assert store.finished_keys() == {result.key}
    assert set(read_results(tmp_path)["key"]) == {result.key}


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write(result)
    store.write_failure(make_result(model="other").key, make_result(model="other").experiment, "no", "")
    assert [name for name in files_of(store) if not name.endswith(".json")] == []


def test_two_processes_writing_the_same_keys_leave_one_valid_file_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can wait for ever
    start = context.Barrier(2)
    writers = [context.Process(target=race, args=(tmp_path, value, start)) for value in (0.25, 0.75)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(files_of(Store(tmp_path))) == 50
    values = read_results(tmp_path).query("metric == 'acc'")["value"]
    assert len(values) == 50
    assert set(values) <= {0.25, 0.75}


def test_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot write to .*/results: Not a directory"):
        Store(tmp_path / "results")


def test_folder_that_cannot_be_made_is_a_clear_error() -> None:
    with pytest.raises(OSError, match=r"results=/proc/kbit: cannot write to /proc/kbit"):
        Store("/proc/kbit")


@pytest.mark.parametrize("read", [read_results, read_failures], ids=["results", "failures"])
def test_missing_store_is_not_an_empty_one(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(FileNotFoundError, match=r"no results at .*/nowhere: start with `kbit run`"):
        read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_newer_schema_is_left_out_and_named(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write(make_result(model="other"))
    store.write(result)
    path = store.path / "experiments" / f"{result.key}.json"
    changes = {"schema_version": SCHEMA_VERSION + 1, "versions": {"kbit": "9.1"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    words = rf"{result.key}.json was written by a newer kbit: it has schema {SCHEMA_VERSION + 1}, .*; use kbit 9.1$"
    with pytest.warns(DamagedRecordWarning, match=words):
        assert set(read_results(tmp_path)["model"]) == {"other"}


def test_field_added_later_does_not_hide_old_results(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write(result)
    path = store.path / "experiments" / f"{result.key}.json"
    record = json.loads(path.read_text())
    del record["experiment"]["quant"]["scale_format"]  # as a store has it from before the field was there
    path.write_text(json.dumps(record))
    assert (read_results(tmp_path)["scale_format"] == "fp16").all()


def test_empty_store_has_the_columns(tmp_path: Path) -> None:
    Store(tmp_path)
    assert {"key", "bits", "block_size", "value"} <= set(read_results(tmp_path).columns)


def test_more_results_than_are_tabulated_at_once_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.store.results.PART_EXPERIMENTS", 10)
    fill(tmp_path, range(25))
    table = read_results(tmp_path)
    assert table["key"].nunique() == 25
    assert len(table) == 50


def test_a_colleague_may_read_a_result(tmp_path: Path) -> None:
    Store(tmp_path).write(make_result())
    (file,) = (tmp_path / "experiments").glob("*.json")
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_items_are_read_by_experiment(tmp_path: Path) -> None:
    store, plain = Store(tmp_path), make_result(model="without items")
    items = (encode_items("nano_cloze", "acc", [1.0, 0.0]), encode_items("nano_held_out", "cross_entropy", [2.5, 3.5]))
    with_items = [dataclasses.replace(make_result(model=name), items=items) for name in ("one", "two")]
    for result in (plain, *with_items):
        store.write(result)
    found = read_items(tmp_path, "nano_cloze", "acc")
    assert {key: values.tolist() for key, values in found.items()} == {r.key: [1.0, 0.0] for r in with_items}
    assert read_items(tmp_path, "nano_held_out", "cross_entropy")[with_items[0].key].tolist() == [2.5, 3.5]
    assert set(read_items(tmp_path, "nano_cloze", "acc", keys={with_items[1].key})) == {with_items[1].key}
    assert read_items(tmp_path, "nano_cloze", "acc_norm") == {}


def test_a_store_from_before_items_were_kept_is_read(tmp_path: Path) -> None:
    store, result = Store(tmp_path), make_result()
    store.write(result)
    path = store.path / "experiments" / f"{result.key}.json"
    record = json.loads(path.read_text())
    del record["items"]
    path.write_text(json.dumps(record))
    assert len(read_results(tmp_path)) == 2
    assert read_items(tmp_path, "nano_cloze", "acc") == {}


def test_provenance_has_a_row_for_each_origin(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for model, device in (("a", "CPU 1"), ("b", "CPU 1"), ("c", "CPU 2")):
        store.write(dataclasses.replace(make_result(model=model), device=device))
    origins = read_provenance(tmp_path).set_index("device")
    assert origins["experiments"].to_dict() == {"CPU 1": 2, "CPU 2": 1}
    assert (origins["first"] <= origins["last"]).all()


def test_the_table_knows_its_store(tmp_path: Path) -> None:
    Store(tmp_path).write(make_result())
    results = read_results(tmp_path)
    assert results.attrs["store"] == str(tmp_path)
    assert results[results["bits"] < 16].attrs["store"] == str(tmp_path)


def test_options_of_a_method_are_a_column(tmp_path: Path) -> None:
    store = Store(tmp_path)
    options = {"calibration": CalibrationConfig(samples=8), "gptq": GptqConfig(static_groups=True)}
    for method in ("rtn", "awq", "gptq"):
        store.write(make_result(QuantConfig(method=method, **options)))  # type: ignore[arg-type]
    store.write(make_result(QuantConfig(data_type="int", method="gptq")))
    rows = read_results(tmp_path).drop_duplicates("key").set_index(["data_type", "method"])["method_options"]
    assert rows.to_dict() == {
        ("nf", "rtn"): "",
        ("nf", "awq"): "calibration.samples=8",
        ("nf", "gptq"): "calibration.samples=8 static_groups=True",
        ("int", "gptq"): "",
    }


def test_a_failure_has_the_quantizer_that_a_result_would_have(tmp_path: Path) -> None:
    """The fields of a quantizer have defaults, which the 16-bit baseline does not use."""
    store = Store(tmp_path)
    for quant in (
        QuantConfig(bits=16),
        QuantConfig(bits=3, data_type="int"),
        QuantConfig(data_type="nf", block_size=None),
    ):
        result = make_result(quant)
        store.write_failure(result.key, result.experiment, "no", "")
    rows = read_failures(tmp_path).set_index("bits")
    assert set(rows.index) == {16, 3, 4}
    assert rows["data_type"].dropna().to_dict() == {3: "int", 4: "nf"}
    assert rows["block_size"].dropna().to_dict() == {3: 64}
