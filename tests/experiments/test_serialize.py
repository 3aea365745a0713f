"""Dataclasses survive JSON, and records of an earlier or later kbit are read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from toy_results import make_result

from kbit.evaluation.config import EvalConfig, FeatureConfig
from kbit.evaluation.measurement import Feature, Layer, Measurement, TaskRecord, TextRecord
from kbit.experiments.config import Experiment, RunConfig
from kbit.experiments.result import Failure, Result, SkippedTensor
from kbit.experiments.serialize import from_json, to_json
from kbit.methods.config import CalibrationConfig, GptqConfig, QuantConfig

TABLE = QuantConfig(data_type="table", table=(-1.0, 0.5, 1.0), method="gptq", gptq=GptqConfig(static_groups=True))


def make_whole_result() -> Result:
    """A result with something in every field."""
    feature = Feature(3, True, 0.5, 0.25, False, (1.0, 2.0), (Layer(0, "attention", 0.5, -8.0),))
    return dataclasses.replace(
        make_result(0),
        experiment=Experiment(quant=TABLE, eval=EvalConfig(features=FeatureConfig(measure=True))),
        measurements=(Measurement("nano_cloze", "acc", 0.5, 0.4, 0.6, 100),),
        skipped=(SkippedTensor("lm_head.weight", (8, 4), "outside the transformer blocks"),),
        tasks=(TaskRecord("nano_cloze", "1", "rows", "0" * 64, "", 0, (1, 2, 3)),),
        text=TextRecord("nano_held_out", "0" * 64, 4, 256),
        features=(feature,),
        method_notes={"calibration": {"samples": 4}},
    )


def read_back(value: Any) -> Any:
    return from_json(type(value), json.loads(to_json(value)))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_result_is_read_back_equal(method: str) -> None:
    result = make_whole_result()
    quant = dataclasses.replace(TABLE, method=method, calibration=CalibrationConfig(samples=8))
    result = dataclasses.replace(result, experiment=dataclasses.replace(result.experiment, quant=quant))
    assert read_back(result) == result


def test_a_result_without_a_text_is_read_back_equal() -> None:
    result = dataclasses.replace(make_whole_result(), text=None, weight_rmse=None)
    assert read_back(result) == result


def test_a_run_is_read_back_equal() -> None:
    config = RunConfig(quant=TABLE, results="elsewhere")
    assert read_back(config) == config


def test_an_entry_beside_the_fields_is_ignored() -> None:
    failure = Failure("0" * 16, Experiment(), "ValueError: no", "Traceback", "2026-01-01T00:00:00+00:00", "label")
    record = json.loads(to_json(failure, schema_version=1))
    assert record["schema_version"] == 1
    record["experiment"]["quant"]["added_later"] = 1
    assert from_json(Failure, record) == failure


@pytest.mark.parametrize(
    ("name", "default"),
    [
        *[("tasks", ()), ("text", None), ("items", ()), ("scorer", ""), ("batch_tokens", 0), ("tokens", 0)],
        *[("features", ()), ("weight_rmse", None), ("method_notes", {})],
    ],
)
def test_a_field_that_an_older_record_lacks_takes_its_default(name: str, default: object) -> None:
    result = make_whole_result()
    record = json.loads(to_json(result))
    del record[name]
    assert from_json(Result, record) == dataclasses.replace(result, **{name: default})  # type: ignore[arg-type]


def test_a_missing_field_without_a_default_is_an_error() -> None:
    record = json.loads(to_json(make_whole_result()))
    del record["weights_hash"]
    with pytest.raises(TypeError, match="weights_hash"):
        from_json(Result, record)


def test_a_dataclass_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"model\.dtype='fp16'"):
        from_json(Experiment, {"model": {"dtype": "fp16"}})
