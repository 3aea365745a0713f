"""A store's content as tables."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa

from kbit.evaluation.measurement import Feature
from kbit.experiments.config import Experiment
from kbit.experiments.names import find_varied, name_experiment
from kbit.experiments.result import Result
from kbit.store.filesystem import open_files
from kbit.store.records import list_finished, open_existing, read_as, retry
from kbit.store.results import load_failures, read_parts
from kbit.store.rows import ROW_SCHEMA, drop_repeated, list_measurements, make_row
from kbit.store.stopped.tables import find_shares, load_completed
from kbit.store.wide import widen, write_words

_NULLABLE_INTEGERS: Final = ("exponent_bits", "block_size")


@dataclass(frozen=True)
class _Origin:
    """The fields of a Result that name the origin of its numbers. Reading them alone takes a third of the time."""

    git_commit: str
    device: str
    versions: dict[str, str]
    finished: str


@dataclass(frozen=True)
class _Features:
    """The fields of a Result that hold its outlier features."""

    key: str
    experiment: Experiment
    features: tuple[Feature, ...] = ()


def list_keys(path: str | Path) -> tuple[set[str], set[str]]:
    """Return the keys of finished and of failed experiments. Both are empty if there is no store yet."""
    files = open_files(path)
    failed = {Path(name).stem for name in files.names("failures", ".json")}
    finished = retry(files, lambda: list_finished(files, {}))
    return finished, failed - finished


def read_results(
    path: str | Path = "results", *, words: bool = False, wide: bool = False, stopped: bool = False
) -> pd.DataFrame:
    """Return the store as a table, one row for each measurement of each finished experiment.

    Columns:
        key, model, family, architecture, parameters, quantized_parameters, dtype: the experiment and its model.
        bits, data_type, exponent_bits, float_bias, table, block_size, layout, normalization, centering, scale_format,
            rounding, seed: the quantizer. A missing block_size is the whole tensor, and table is a text. All but bits
            are missing for the 16-bit baseline.
        method, method_options: the method, and its options that are not at their default, as text.
        outlier_fraction, outlier_selection, outlier_zscore, activation_threshold: dimensions that stay at 16 bits.
        include, exclude: regular expressions of tensor names.
        rules: the rules for some tensors in a line, such as "lm_head: bits=6", or None.
        allocation: the budget that was distributed over the tensors, such as "3.25 bits by kl of 2, 3, 4", or None.
            bits is then the whole number next to bits_per_param, at most 8, and settings that the choices differ in are
            missing, block_size among them.
        objective: what the budget was distributed by: kl, fisher or error, or None.
        evaluation: dtype, items or windows, and the beginning of a hash of their content. Two values compare only
            where their evaluations are equal.
        bits_per_param, total_bits, weight_rmse: sizes, and the relative error of the quantized weights.
        task, metric, value, low, high, n: the measurement with its 95% interval.
        checkpoint: how the model's checkpoint was quantized before kbit ("gguf Q4_0"). It is missing for plain ones.

    pandas drops rows with a missing value where it groups them or makes a pivot table, which leaves out every
    experiment without exponent bits, for example. With words=True a missing setting is a word, and such tables are
    whole: "whole" is a block size, and "none" stands for everything that a quantizer, or the 16-bit baseline, does not
    have. Settings that are numbers then share their column with a word.

    With wide=True there is one row for each experiment, with words: a column for each task and metric ("piqa acc",
    "piqa acc low", "piqa acc high"), and label, seconds, peak_memory_bytes and finished before the other columns.

    With stopped=True experiments that stopped early (study.until.decided) have rows, too: values on all items as far as
    others say (kbit.store.stopped.complete), with the n that they measured. The column measured has the share of its
    items that a value rests on, 1 for all. With wide=True it is the least of an experiment.

    The table's attrs["store"] is the path, with which read_items finds the items behind a value. What cannot be read is
    left out with a warning (kbit.store.damage.DamagedRecordWarning).

    Raises:
        FileNotFoundError: there is no store at path.
    """
    early = load_completed(path) if stopped else {}
    table = _read_rows(path, [make_row(result) for result in early.values()])
    if wide or words:
        table = widen(table, path) if wide else write_words(table)
    table.attrs["store"] = str(path)
    return _add_shares(table, early) if stopped else table


def _add_shares(table: pd.DataFrame, early: Mapping[str, Result]) -> pd.DataFrame:
    """Return the table with the column measured, see read_results. Pandas would copy attrs at each step."""
    table = table.assign(measured=1.0)
    shares = {key: find_shares(result) for key, result in early.items()}
    rows = table["key"].isin(shares)
    keys = table.loc[rows, "key"]
    tasks = table.loc[rows, "task"] if "task" in table else [""] * len(keys)
    own = [shares[key].get(task, min(shares[key].values())) for key, task in zip(keys, tasks, strict=True)]
    table.loc[rows, "measured"] = own
    return table


def _read_rows(path: str | Path, more: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows of the store's measurements, and of more experiments (rows.make_row)."""
    files = open_existing(path)
    rows = retry(files, lambda: pa.concat_tables([ROW_SCHEMA.empty_table(), *read_parts(files, ROW_SCHEMA)]))
    if more:
        rows = pa.concat_tables([rows, pa.Table.from_pylist(more, schema=ROW_SCHEMA)])
    table: pd.DataFrame = list_measurements(drop_repeated(rows).sort_by("key")).to_pandas()
    return table.astype(dict.fromkeys(_NULLABLE_INTEGERS, "Int64"))


def leave_out_checkpoints(results: pd.DataFrame) -> pd.DataFrame:
    """Return the table without the experiments on checkpoints that were quantized before: no 16-bit baseline is theirs.

    It warns of what it leaves out.
    """
    is_plain = results["checkpoint"].isna() if "checkpoint" in results else pd.Series(True, results.index)
    if is_plain.all():
        return results
    left_out = results.loc[~is_plain, "key"].nunique()
    warnings.warn(
        f"{left_out} experiments on quantized checkpoints are left out of the figures: they have no 16-bit baseline. "
        "The page of `kbit report` shows them beside the others",
        stacklevel=2,
    )
    plain = results[is_plain]
    plain.attrs = results.attrs
    return plain


def read_failures(path: str | Path = "results") -> pd.DataFrame:
    """Return the experiments that failed or crashed (see Failure), one a row.

    Columns: key, label (with what else tells the evaluations apart), model, bits, data_type, block_size, reason,
    finished, state. data_type and block_size are missing for the 16-bit baseline.
    """
    failures = list(load_failures(path))
    varied = find_varied(failure.experiment for failure in failures)
    rows = [
        {
            **{name: getattr(failure, name) for name in ("key", "reason", "finished", "state")},
            "label": name_experiment(failure.experiment, varied),
            "model": failure.experiment.model.name,
            **_describe_quantizer(failure.experiment),
        }
        for failure in failures
    ]
    columns = ["key", "label", "model", "bits", "data_type", "block_size", "reason", "finished", "state"]
    return pd.DataFrame(rows, columns=columns).astype({"block_size": "Int64"})


def _describe_quantizer(experiment: Experiment) -> dict[str, Any]:
    """Return the bits, data type and block size of an experiment, as read_results has them."""
    spec = experiment.quant.spec.canonical()
    if spec.is_baseline:
        return {"bits": spec.bits, "data_type": None, "block_size": None}
    return {name: getattr(spec, name) for name in ("bits", "data_type", "block_size")}


def read_provenance(path: str | Path = "results") -> pd.DataFrame:
    """Return one row for each origin of results: git_commit, device, versions, experiments, first, last.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    rows = [
        {"git_commit": origin.git_commit, "device": origin.device, "finished": origin.finished}
        | {"versions": ", ".join(f"{name} {version}" for name, version in sorted(origin.versions.items()))}
        for origin in read_as(_Origin, path)
    ]
    table = pd.DataFrame(rows, columns=["git_commit", "device", "versions", "finished"])
    origins = table.groupby(["git_commit", "device", "versions"], dropna=False)["finished"]
    return origins.agg(experiments="size", first="min", last="max").reset_index()


def read_features(path: str | Path, keys: Collection[str] | None = None) -> pd.DataFrame:
    """Return the hidden dimensions that are large most often, a row for each dimension, layer and input.

    Columns: key, model, dimension, is_feature, layers and positions (shares of the whole model), one_sided, layer,
    input, share (of the positions of this input), largest. See kbit.evaluation.outlier_features.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    of_feature = ("dimension", "is_feature", "layers", "positions", "one_sided")
    rows = []
    for found in read_as(_Features, path, keys=keys):
        about = {"key": found.key, "model": found.experiment.model.name}
        for feature in found.features:
            own = {name: getattr(feature, name) for name in of_feature}
            rows += [about | own | vars(place) for place in feature.by_layer]
    return pd.DataFrame(rows, columns=["key", "model", *of_feature, "layer", "input", "share", "largest"])


def list_readable(path: str | Path) -> set[str]:
    """Return the keys of finished experiments that read_results can read. It warns of the others."""
    files = open_files(path)

    def look() -> set[str]:
        return set().union(*(part["key"].to_pylist() for part in read_parts(files, ROW_SCHEMA)))

    return retry(files, look)
