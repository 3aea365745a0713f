"""What a store holds, as tables and arrays."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa

from kbit.store.filesystem import open_files
from kbit.store.records import list_finished, open_existing, retry
from kbit.store.results import load_failures, load_results, read_parts
from kbit.store.rows import ROW_SCHEMA, drop_repeated, list_measurements

_NULLABLE_INTEGERS: Final = ("exponent_bits", "block_size")


def list_keys(path: str | Path) -> tuple[set[str], set[str]]:
    """Return the keys of finished and of failed experiments; none of either if there is no store yet."""
    files = open_files(path)
    failed = {Path(name).stem for name in files.names("failures", ".json")}
    finished = retry(lambda: list_finished(files, {}))
    return finished, failed - finished


def read_results(path: str | Path = "results") -> pd.DataFrame:
    """Return the store as a table, one row for each measurement of each finished experiment.

    Columns: key, model, family, architecture, parameters, quantized_parameters, dtype, the quantizer's fields
    (block_size missing: whole tensor; table as text; all missing for the 16-bit baseline), method, method_options
    (what is not at its default, as text), outlier_fraction, outlier_selection, outlier_zscore and
    activation_threshold (what stays at 16 bits), include, exclude, evaluation (values compare only where it is
    equal: dtype, items or windows, and the beginning of a hash of their content), bits_per_param, total_bits,
    weight_rmse (relative error of the quantized weights), task, metric, value, low, high (95% interval), n. The table's
    attrs["store"] is the path, for those who need the items behind a value (read_items).

    Raises:
        FileNotFoundError: there is no store at path.
        ValueError: a file of it is damaged, or of a newer kbit.
    """
    files = open_existing(path)
    rows = retry(lambda: pa.concat_tables([ROW_SCHEMA.empty_table(), *read_parts(files, ROW_SCHEMA)]))
    table: pd.DataFrame = list_measurements(drop_repeated(rows).sort_by("key")).to_pandas()
    table = table.astype(dict.fromkeys(_NULLABLE_INTEGERS, "Int64"))
    table.attrs["store"] = str(path)
    return table


def read_failures(path: str | Path = "results") -> pd.DataFrame:
    """Return the failed experiments, one a row: key, label, model, bits, data_type, block_size, reason, finished."""
    rows = [
        {
            **{name: getattr(failure, name) for name in ("key", "label", "reason", "finished")},
            "model": failure.experiment.model.name,
            **{name: getattr(failure.experiment.quant, name) for name in ("bits", "data_type", "block_size")},
        }
        for failure in load_failures(path)
    ]
    columns = ["key", "label", "model", "bits", "data_type", "block_size", "reason", "finished"]
    return pd.DataFrame(rows, columns=columns).astype({"block_size": "Int64"})


def read_provenance(path: str | Path = "results") -> pd.DataFrame:
    """Return where the results come from: git_commit, device, versions, experiments, first, last; one row per origin.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    rows = [
        {name: getattr(result, name) for name in ("git_commit", "device", "finished")}
        | {"versions": ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))}
        for result in load_results(path)
    ]
    table = pd.DataFrame(rows, columns=["git_commit", "device", "versions", "finished"])
    origins = table.groupby(["git_commit", "device", "versions"], dropna=False)["finished"]
    return origins.agg(experiments="size", first="min", last="max").reset_index()


def read_features(path: str | Path, keys: Collection[str] | None = None) -> pd.DataFrame:
    """Return the hidden dimensions that are large most often, a row for each dimension, layer and input.

    Columns: key, model, dimension, is_feature, layers and positions (shares of the whole model), one_sided, layer,
    input, share (of the positions of this input), largest; see kbit.evaluation.outlier_features.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    of_feature = ("dimension", "is_feature", "layers", "positions", "one_sided")
    rows = []
    for result in load_results(path, keys):
        about = {"key": result.key, "model": result.experiment.model.name}
        for feature in result.features:
            own = {name: getattr(feature, name) for name in of_feature}
            rows += [about | own | vars(place) for place in feature.by_layer]
    return pd.DataFrame(rows, columns=["key", "model", *of_feature, "layer", "input", "share", "largest"])
