"""Records as tables: one stored result is a row with the list of its measurements; read_results has a row for each.

A record (a dict, as JSON has it) is the whole result. Its row has the columns that tables of results show, typed; a
Parquet part of the store keeps both, so that reading results touches no JSON and no result loses a field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from kbit.evaluation.config import FeatureConfig
from kbit.methods.config import METHODS, QuantConfig
from kbit.numerics.spec import write_table
from kbit.store import parquet
from kbit.store.filesystem import Files
from kbit.store.records import parse_record, read_json

PART_EXPERIMENTS: Final = 5000  # of a Parquet file: tens of megabytes, which compaction holds in memory
_HASH: Final = 8  # hexadecimal digits shown of a hash: of a thousand contents two are equal once in 8,600 times


# Of outlier features; those of a record that are not these are said in `evaluation`.
_CRITERIA: Final = {field.name: field.default for field in dataclasses.fields(FeatureConfig) if field.name != "measure"}


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


# Of what the columns say, where it changed under their names; a part of another one is made again from its records.
ROWS_VERSION: Final = {b"kbit.rows": b"2"}


PART_SCHEMA: Final = ROW_SCHEMA.append(pa.field("record", pa.string())).with_metadata(ROWS_VERSION)


def tabulate(records: Iterable[dict[str, Any]]) -> pa.Table:
    """Return the rows of records (ROW_SCHEMA)."""
    return pa.Table.from_pylist([_row(record) for record in records], schema=ROW_SCHEMA)


def make_part(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Return records with their rows (PART_SCHEMA)."""
    texts = [json.dumps(record, separators=(",", ":")) for record in records]
    part = tabulate(records).append_column("record", pa.array(texts, pa.string()))
    return part.replace_schema_metadata(ROWS_VERSION)


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
        measurement | {"evaluation": _describe_evaluation(record, measurement["task"])}
        for measurement in record["measurements"]
    ]
    return row


def _describe_options(quant: dict[str, Any]) -> str:
    """Return the options that mean something to the method and are not at their default; see config.method_options."""
    method = METHODS[quant["method"]]
    groups = (["calibration"] if method.needs_text else []) + ([method.options] if method.options else [])
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


def _describe_evaluation(record: dict[str, Any], task: str) -> str:
    """Return what must be equal for two values of a measurement to compare: dtype, items or windows, and their content.

    Content is the beginning of a hash, see LoadedTask and TextRecord; of a mean, over those of its tasks. Results in
    which it is not recorded do without.
    """
    evaluation, dtype = record["experiment"]["eval"], record["experiment"]["model"]["dtype"]
    items = f"{dtype}, {evaluation['limit'] or 'all'} items"
    content = {data["name"]: _describe_content(data) for data in record.get("tasks", ())}
    if task in evaluation["tasks"]:
        return ", ".join(filter(None, [items, content.get(task)]))
    if task == "mean_zero_shot":  # of those that have it
        names = sorted({m["task"] for m in record["measurements"] if m["metric"] == "acc"} - {task})
        joined = "; ".join(content[name] for name in names if content.get(name))
        digest = f"data {hashlib.sha256(joined.encode()).hexdigest()[:_HASH]}" if joined else None
        return ", ".join(filter(None, [items, " ".join(names), digest]))
    text = record.get("text")
    digest = f"text {text['sha256'][:_HASH]}" if text else None
    if evaluation.get("perplexity_kind") == "rolling":
        return ", ".join(filter(None, [f"{dtype}, rolling", digest]))
    length = f" of {text['window_length']} tokens" if text else ""
    windows = f"{dtype}, {evaluation['perplexity_windows'] or 'all'} windows{length}"
    criteria = _describe_criteria(evaluation.get("features", {})) if task.startswith("features/") else None
    return ", ".join(filter(None, [windows, digest, criteria]))


def _describe_criteria(features: dict[str, Any]) -> str | None:
    """Return the criteria of outlier features that are not LLM.int8()'s: "criteria magnitude 2 positions 0.01"."""
    own = [f"{name} {features[name]:g}" for name, usual in _CRITERIA.items() if features.get(name, usual) != usual]
    return f"criteria {' '.join(own)}" if own else None


def _describe_content(task: dict[str, Any]) -> str:
    """Return what tells a task's rows, and a user's own definition, from others of its name."""
    data, definition = task["sha256"] or task["fingerprint"], task.get("definition_sha256")
    parts = {"data": data, "definition": definition}
    return ", ".join(f"{name} {digest[:_HASH]}" for name, digest in parts.items() if digest)


def read_parts(files: Files, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the store's experiments as tables, ROW_SCHEMA or PART_SCHEMA; an experiment may come twice."""
    loose = files.names("experiments", ".json")  # before compacted/: see the module
    for name in files.names("compacted", ".parquet"):
        yield read_rows(files, name, schema)
    make = tabulate if schema == ROW_SCHEMA else make_part
    for at in range(0, len(loose), PART_EXPERIMENTS):
        yield make([read_json(files, name) for name in loose[at : at + PART_EXPERIMENTS]])


def read_rows(files: Files, name: str, schema: pa.Schema) -> pa.Table:
    """Return the rows of a Parquet file, ROW_SCHEMA or PART_SCHEMA."""
    return parquet.read_rows(
        files, name, schema.names, PART_SCHEMA, lambda texts: make_part([parse_record(text, name) for text in texts])
    )


def drop_repeated(rows: pa.Table) -> pa.Table:
    """Keep the first of each key's rows."""
    repeated = rows["key"].to_pandas().duplicated().to_numpy()
    return rows.filter(pa.array(~repeated)) if repeated.any() else rows
