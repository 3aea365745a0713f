"""Records as tables: one stored result is a row with the list of its measurements; read_results has a row for each.

A record (a dict, as JSON has it) is the whole result. Its row has the columns that tables of results show, typed; a
Parquet part of the store keeps both, so that reading results touches no JSON and no result loses a field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from kbit.quantconfig import CALIBRATED, QuantConfig
from kbit.spec import write_table

SCHEMA_VERSION: Final = 1

EXPERIMENT_COLUMNS: Final[dict[str, pa.DataType]] = {
    "key": pa.string(), "model": pa.string(), "family": pa.string(), "architecture": pa.string(),
    "parameters": pa.int64(), "quantized_parameters": pa.int64(), "dtype": pa.string(),
    "bits": pa.int64(), "data_type": pa.string(), "exponent_bits": pa.int64(), "float_bias": pa.string(),
    "table": pa.string(),
    "block_size": pa.int64(), "layout": pa.string(), "normalization": pa.string(), "centering": pa.bool_(),
    "scale_format": pa.string(), "rounding": pa.string(), "seed": pa.int64(), "method": pa.string(),
    "method_options": pa.string(), "outlier_fraction": pa.float64(), "outlier_selection": pa.string(),
    "outlier_zscore": pa.float64(), "activation_threshold": pa.float64(),
    "include": pa.string(), "exclude": pa.string(),
    "bits_per_param": pa.float64(), "total_bits": pa.int64(), "weight_rmse": pa.float64(),
}  # fmt: skip
MEASUREMENT_COLUMNS: Final[dict[str, pa.DataType]] = {
    "evaluation": pa.string(), "task": pa.string(), "metric": pa.string(),
    "value": pa.float64(), "low": pa.float64(), "high": pa.float64(), "n": pa.int64(),
}  # fmt: skip
COLUMNS: Final = (
    *(name for name in EXPERIMENT_COLUMNS if name not in ("bits_per_param", "total_bits", "weight_rmse")),
    "evaluation", "bits_per_param", "total_bits", "weight_rmse",
    *(name for name in MEASUREMENT_COLUMNS if name != "evaluation"),
)  # fmt: skip
ROW_SCHEMA: Final = pa.schema(
    [*EXPERIMENT_COLUMNS.items(), ("measurements", pa.list_(pa.struct(list(MEASUREMENT_COLUMNS.items()))))]
)
PART_SCHEMA: Final = ROW_SCHEMA.append(pa.field("record", pa.string()))


def parse_record(content: bytes | str, source: str) -> dict[str, Any]:
    """Return the record that a file holds.

    Args:
        content: JSON.
        source: what to call it in an error.

    Raises:
        ValueError: it is not JSON, or of a newer kbit.
    """
    try:
        record: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}; remove it to run its experiment again") from None
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(f"{source} was written by a newer kbit (schema {record['schema_version']})")
    return record


def tabulate(records: Iterable[dict[str, Any]]) -> pa.Table:
    """Return the rows of records (ROW_SCHEMA)."""
    return pa.Table.from_pylist([_row(record) for record in records], schema=ROW_SCHEMA)


def make_part(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Return records with their rows (PART_SCHEMA)."""
    texts = [json.dumps(record, separators=(",", ":")) for record in records]
    return tabulate(records).append_column("record", pa.array(texts, pa.string()))


def list_measurements(rows: pa.Table) -> pa.Table:
    """Return COLUMNS, one row for each measurement of each experiment's row."""
    lists = rows["measurements"].combine_chunks()
    shared = rows.drop_columns("measurements").take(pc.list_parent_indices(lists))
    measured = pc.list_flatten(lists)
    for name in MEASUREMENT_COLUMNS:
        shared = shared.append_column(name, pc.struct_field(measured, name))
    return shared.select(list(COLUMNS))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """Return one stored result as a row of ROW_SCHEMA."""
    experiment, quant = record["experiment"], record["experiment"]["quant"]
    row: dict[str, Any] = {name: record[name] for name in EXPERIMENT_COLUMNS if name in record}
    row |= {"model": experiment["model"]["name"], "dtype": experiment["model"]["dtype"], "bits": quant["bits"]}
    config = QuantConfig.from_json(quant)
    spec = config.spec.canonical()
    if not spec.is_baseline:
        row |= dataclasses.asdict(spec) | {name: quant[name] for name in ("method", "include", "exclude")}
        row |= {} if spec.data_type == "float" else {"float_bias": None}
        row |= {"table": None if spec.table is None else write_table(spec.table)}
        row |= {"method_options": _describe_options(quant)} | _describe_outliers(config)
    row["measurements"] = [
        measurement | {"evaluation": _describe_evaluation(experiment, measurement["task"])}
        for measurement in record["measurements"]
    ]
    return row


def _describe_options(quant: dict[str, Any]) -> str:
    """Return the options that mean something to the method and are not at their default; see config.method_options."""
    groups = ["calibration"] if quant["method"] in CALIBRATED else []
    groups += ["gptq"] if quant["method"] == "gptq" else []
    default = dataclasses.asdict(QuantConfig())
    changed = [(g, name, value) for g in groups for name, value in quant[g].items() if value != default[g][name]]
    return " ".join(
        f"{name if group == quant['method'] else f'{group}.{name}'}={value}" for group, name, value in changed
    )


def _describe_outliers(config: QuantConfig) -> dict[str, Any]:
    """Return what stays at 16 bits inside the quantized matrices; fields that mean nothing here are missing."""
    columns: dict[str, Any] = {"outlier_fraction": config.outlier_fraction, "outlier_zscore": config.outlier_zscore}
    if config.keeps_outliers:
        columns |= {"outlier_selection": config.outlier_selection}
        columns |= {"seed": config.seed} if config.outlier_selection == "random" else {}
    return columns | ({"activation_threshold": config.activation_threshold} if config.decomposes else {})


def _describe_evaluation(experiment: dict[str, Any], task: str) -> str:
    """Return what must be equal for two values of a measurement to compare: dtype, and items or windows."""
    evaluation, dtype = experiment["eval"], experiment["model"]["dtype"]
    if task in evaluation["tasks"]:
        return f"{dtype}, {evaluation['limit'] or 'all'} items"
    if task == "mean_zero_shot":
        return f"{dtype}, {evaluation['limit'] or 'all'} items, {' '.join(sorted(evaluation['tasks']))}"
    if evaluation.get("perplexity_kind") == "rolling":
        return f"{dtype}, rolling"
    return f"{dtype}, {evaluation['perplexity_windows'] or 'all'} windows"
