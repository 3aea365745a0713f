"""Results as rows of tables.

A stored result becomes one row with the list of its measurements (ROW_SCHEMA). read_results shows one row for each
measurement (COLUMNS). A Parquet file of the store keeps the row beside the whole record (PART_SCHEMA), so that reading
a table parses no JSON, and no result loses a field.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from kbit.checks import non_defaults
from kbit.evaluation.config import EvalConfig, FeatureConfig
from kbit.experiments.serialize import write_json
from kbit.methods.allocation.config import choose
from kbit.methods.config import OPTION_GROUPS, QuantConfig
from kbit.methods.selection.rules import write_rules
from kbit.models.catalog import STUDIED, name_run
from kbit.models.config import ModelConfig
from kbit.numerics.spec import write_table

if TYPE_CHECKING:
    from kbit.evaluation.measurement import TaskRecord
    from kbit.experiments.config import Experiment
    from kbit.experiments.result import Result

_SHA256: Final = 64  # hexadecimal digits
_HASH: Final = 8  # hexadecimal digits shown of a hash: among a thousand contents two are equal once in 8,600 times

EXPERIMENT_COLUMNS: Final[dict[str, pa.DataType]] = {
    "key": pa.string(), "model": pa.string(), "family": pa.string(), "architecture": pa.string(),
    "parameters": pa.int64(), "quantized_parameters": pa.int64(), "dtype": pa.string(),
    "bits": pa.int64(), "data_type": pa.string(), "exponent_bits": pa.int64(), "float_bias": pa.string(),
    "table": pa.string(),
    "block_size": pa.int64(), "layout": pa.string(), "normalization": pa.string(), "centering": pa.bool_(),
    "scale_format": pa.string(), "rounding": pa.string(), "seed": pa.int64(), "method": pa.string(),
    "method_options": pa.string(), "outlier_fraction": pa.float64(), "outlier_selection": pa.string(),
    "outlier_zscore": pa.float64(), "activation_threshold": pa.float64(),
    "include": pa.string(), "exclude": pa.string(), "rules": pa.string(), "allocation": pa.string(),
    "objective": pa.string(),
    "activations": pa.string(), "activation_bits": pa.int64(), "kv_cache": pa.string(), "cache_bits": pa.int64(),
    "rotation": pa.string(),
    "training": pa.string(), "train_seed": pa.int64(), "train_fields": pa.string(),
    "bits_per_param": pa.float64(), "total_bits": pa.int64(), "weight_rmse": pa.float64(),
    "checkpoint": pa.string(),
}  # fmt: skip

_RESULT_COLUMNS: Final = (
    *("key", "family", "architecture", "parameters", "quantized_parameters"),
    *("bits_per_param", "total_bits", "weight_rmse"),
)  # named as in a Result

_MOST_BITS: Final = 8  # of a quantized parameter
_CHOSEN: Final = (  # settings that the choices of an allocation may differ in
    *("exponent_bits", "block_size", "layout", "normalization", "centering", "scale_format", "rounding"),
)

# The columns of a quantizer, and of its method, that can be missing.
SETTING_COLUMNS: Final = tuple(
    name for name in EXPERIMENT_COLUMNS if name not in (*_RESULT_COLUMNS, "model", "dtype", "bits", "train_fields")
)

MEASUREMENT_COLUMNS: Final[dict[str, pa.DataType]] = {
    "evaluation": pa.string(), "task": pa.string(), "metric": pa.string(),
    "value": pa.float64(), "low": pa.float64(), "high": pa.float64(), "n": pa.int64(),
}  # fmt: skip

_LAST: Final = ("bits_per_param", "total_bits", "weight_rmse", "checkpoint", "train_fields")

COLUMNS: Final = (
    *(name for name in EXPERIMENT_COLUMNS if name not in _LAST),
    "evaluation", "bits_per_param", "total_bits", "weight_rmse",
    *(name for name in MEASUREMENT_COLUMNS if name != "evaluation"), "checkpoint", "train_fields",
)  # fmt: skip

ROW_SCHEMA: Final = pa.schema(
    [*EXPERIMENT_COLUMNS.items(), ("measurements", pa.list_(pa.struct(list(MEASUREMENT_COLUMNS.items()))))]
)

# The version of what the columns mean. The rows of a file with another version are made again from its records.
ROWS_VERSION: Final = {b"kbit.rows": b"7"}
PART_SCHEMA: Final = ROW_SCHEMA.append(pa.field("record", pa.string())).with_metadata(ROWS_VERSION)


def list_measurements(rows: pa.Table) -> pa.Table:
    """Return a table with COLUMNS, one row for each measurement of each experiment's row."""
    lists = rows["measurements"].combine_chunks()
    shared = rows.drop_columns("measurements").take(pc.list_parent_indices(lists))
    measured = pc.list_flatten(lists)
    for name in MEASUREMENT_COLUMNS:
        shared = shared.append_column(name, pc.struct_field(measured, name))
    return shared.select(list(COLUMNS))


def make_row(result: Result) -> dict[str, Any]:
    """Return one stored result as a row of ROW_SCHEMA."""
    model, quant = result.experiment.model, result.experiment.quant
    row = {name: getattr(result, name) for name in _RESULT_COLUMNS}
    row |= {"model": name_model(model), "dtype": model.dtype, "bits": quant.bits}
    row |= {"family": _find_family(result), "checkpoint": result.checkpoint_quantization or None}
    row |= _describe_training(result.experiment) | _describe_run_time(quant)
    if not quant.activations.is_baseline:
        row |= {name: getattr(quant, name) for name in ("include", "exclude")}
    spec = quant.spec.canonical()
    if not spec.is_baseline:
        row |= {name: value for name, value in dataclasses.asdict(spec).items() if name in EXPERIMENT_COLUMNS}
        row |= {name: getattr(quant, name) for name in ("method", "include", "exclude")}
        row |= {} if spec.data_type == "float" else {"float_bias": None}
        row |= {"rules": write_rules(quant.rules) or None}
        row |= {"table": None if spec.table is None else write_table(spec.table)}
        row |= _describe_allocation(result) if quant.allocates else {}
        row |= {"method_options": _describe_options(quant)} | _describe_outliers(quant)
    content = _describe_contents(result)
    row["measurements"] = [
        vars(measurement) | {"evaluation": _describe_evaluation(result, measurement.task, content)}
        for measurement in result.measurements
    ]
    return row


def _describe_allocation(result: Result) -> dict[str, Any]:
    """Return the budget that was distributed, and what all choices have in common. Settings that differ are missing.

    The bits are the whole number next to those that each parameter got, and at most 8, as 16 bits are a baseline's.
    """
    quant, config = result.experiment.quant, result.experiment.quant.allocation
    specs = [spec for choice in config.choices if not (spec := choose(quant, choice).spec.canonical()).is_baseline]
    values = {name: {getattr(spec, name) for spec in specs} for name in _CHOSEN}
    shared = {name: found.pop() if len(found) == 1 else None for name, found in values.items()}
    bits = min(round(result.bits_per_param), _MOST_BITS)
    return shared | {"bits": bits, "allocation": config.label(), "objective": config.objective}


def _describe_training(experiment: Experiment) -> dict[str, Any]:
    """Return a training in words without its seed, which several trainings of one kind differ in, and as JSON.

    The JSON has the fields that are not at their default (TrainConfig.identity_fields).
    """
    train = experiment.train
    if not train.steps:
        return {}
    words = dataclasses.replace(train, seed=0).label()
    return {"training": words, "train_seed": train.seed, "train_fields": write_json(train.identity_fields)}


def name_model(model: ModelConfig) -> str:
    """Return a model's name, with the parts of its checkpoint that are not its default."""
    return " ".join([model.name, *(f"{name}={value}" for name, value in model.parts.items())])


def _find_family(result: Result) -> str:
    """Return the model's family. Results of local folders from before runs had families have the folder's alone."""
    model = result.experiment.model
    is_local = model.name not in STUDIED and len(result.model_revision) == _SHA256  # a commit of the hub is shorter
    is_old = model.family is None and result.family == Path(model.name).name
    return name_run(Path(model.name)) if is_local and is_old else result.family


def _describe_options(quant: QuantConfig) -> str:
    """Return the options that the method uses and that are not at their default, see QuantConfig.method_options."""
    groups = ["calibration"] if quant.sees_text else []
    groups += [quant.traits.options] if quant.traits.options else []
    changed = {group: non_defaults(getattr(quant, group), OPTION_GROUPS[group]()) for group in groups}
    return " ".join(
        f"{name if group == quant.method else f'{group}.{name}'}={value}"
        for group, options in changed.items()
        for name, value in options.items()
    )


def _describe_run_time(quant: QuantConfig) -> dict[str, Any]:
    """Return what is rounded while the model runs: bits and, in words, all else. At 16 bits columns are missing."""
    columns: dict[str, Any] = {"rotation": quant.rotation_words}
    for group, bits in (("activations", "activation_bits"), ("kv_cache", "cache_bits")):
        if fields := quant.run_time_fields.get(group):
            others = {name: value for name, value in fields.items() if name not in ("bits", "data_type")}
            words = [getattr(quant, group).data_type, *(f"{name}={value}" for name, value in others.items())]
            columns |= {group: " ".join(words), bits: fields["bits"]}
    return columns


def _describe_outliers(quant: QuantConfig) -> dict[str, Any]:
    """Return what stays at 16 bits inside the quantized matrices. Columns without a meaning here are missing."""
    columns: dict[str, Any] = {"outlier_fraction": quant.outlier_fraction, "outlier_zscore": quant.outlier_zscore}
    if quant.keeps_outliers:
        columns |= {"outlier_selection": quant.outlier_selection}
        columns |= {"seed": quant.seed} if quant.outlier_selection == "random" else {}
    return columns | ({"activation_threshold": quant.activation_threshold} if quant.decomposes else {})


def _describe_evaluation(result: Result, task: str, content: Mapping[str, str]) -> str:
    """Return what must be equal for two values of a measurement to compare: dtype, items or windows, and their content.

    The content is the beginning of a hash, see LoadedTask and TextRecord. A mean has the hash over its tasks' contents.
    Results from before the content was recorded do without.

    Args:
        result: the result with the measurement.
        task: the measurement's task.
        content: hashes of each task's and group's data, see _describe_contents.
    """
    evaluation, dtype = result.experiment.eval, result.experiment.model.dtype
    if task == "training" or task.startswith("training/"):
        text, name = result.training_text, result.experiment.train.text
        return f"{dtype}, {name}" + (f" {text.sha256[:_HASH]}, windows of {text.window_length} tokens" if text else "")
    items = f"{dtype}, {evaluation.limit or 'all'} items{_describe_prompting(evaluation)}"
    if task in content or task in evaluation.tasks:
        return ", ".join(filter(None, [items, content.get(task)]))
    if result.speed is not None and task.partition("/")[0] == "speed":
        return result.speed.describe_conditions()
    measure = _find_measure(result, task)
    if measure is not None and result.text is None:
        return f"{items}, {measure}"
    if task == "mean_zero_shot":
        names = _list_averaged(result)
        joined = "; ".join(content[name] for name in names if content.get(name))
        digest = f"data {hashlib.sha256(joined.encode()).hexdigest()[:_HASH]}" if joined else None
        return ", ".join(filter(None, [items, " ".join(names), digest]))
    text = result.text
    digest = f"text {text.sha256[:_HASH]}" if text else None
    if evaluation.perplexity_kind == "rolling":
        return ", ".join(filter(None, [f"{dtype}, rolling", digest, measure]))
    length = f" of {text.window_length} tokens" if text else ""
    windows = f"{dtype}, {evaluation.perplexity_windows or 'all'} windows{length}"
    criteria = _describe_criteria(evaluation.features) if task.startswith("features/") else None
    return ", ".join(filter(None, [windows, digest, criteria, measure]))


def _describe_prompting(evaluation: EvalConfig) -> str:
    """Return how tasks were asked, if not without examples and templates: ", 5 examples, chat template"."""
    examples = "" if evaluation.num_fewshot is None else f", {evaluation.num_fewshot} examples"
    return examples + (", chat template" if evaluation.apply_chat_template else "")


def _list_averaged(result: Result) -> list[str]:
    """Return the sorted names whose accuracies the mean is of: groups with one stand for their tasks."""
    having = {m.task for m in result.measurements if m.metric == "acc"} - {"mean_zero_shot"}
    outermost = {t.name: next((g for g in t.groups if g in having), t.name) for t in result.tasks}
    inside = {group for task in result.tasks for group in task.groups}
    return sorted({outermost.get(name, name) for name in having if name not in inside})


def _describe_contents(result: Result) -> dict[str, str]:
    """Return the hashes of each task's data, see _describe_content, and of each group's, over those of its tasks."""
    content = {task.name: _describe_content(task) for task in result.tasks}
    groups: dict[str, list[str]] = {}
    for task in result.tasks:
        for group in task.groups:
            groups.setdefault(group, []).append(f"{task.name} {content[task.name]}")
    return content | {
        group: f"data {hashlib.sha256('; '.join(sorted(parts)).encode()).hexdigest()[:_HASH]}"
        for group, parts in groups.items()
    }


def _find_measure(result: Result, task: str) -> str | None:
    """Return the hash of the user's measure that a task belongs to ("measure 1a2b3c4d"). kbit's own give None."""
    owner = task.partition("/")[0]
    hashes = (measure.sha256[:_HASH] for measure in result.measures if measure.name == owner)
    return next((f"measure {digest}" for digest in hashes), None)


def _describe_criteria(features: FeatureConfig) -> str | None:
    """Return the criteria of outlier features that are not LLM.int8()'s: "criteria magnitude 2 positions 0.01"."""
    own = [f"{name} {value:g}" for name, value in non_defaults(features, FeatureConfig()).items() if name != "measure"]
    return f"criteria {' '.join(own)}" if own else None


def _describe_content(task: TaskRecord) -> str:
    """Return the hashes that tell a task's rows, and a user's own definition, from others with the same name."""
    parts = {"data": task.sha256 or task.fingerprint, "definition": task.definition_sha256}
    return ", ".join(f"{name} {digest[:_HASH]}" for name, digest in parts.items() if digest)


def drop_repeated(rows: pa.Table) -> pa.Table:
    """Return the table with the first row of each key only."""
    repeated = rows["key"].to_pandas().duplicated().to_numpy()
    return rows.filter(pa.array(~repeated)) if repeated.any() else rows
