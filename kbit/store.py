"""The store: one JSON file per experiment, named by the experiment's key, written whole or not at all.

results/experiments/<key>.json    a finished experiment: a Result
results/failures/<key>.json       an experiment that failed: its reason and traceback, never a number
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kbit.config import CALIBRATED, Experiment, QuantConfig
from kbit.measurement import ItemValues, decode_items
from kbit.spec import QuantSpec

if TYPE_CHECKING:  # the store is read without loading torch
    from kbit.experiment import Result

SCHEMA_VERSION: Final = 1

_NULLABLE_INTEGERS: Final = ("exponent_bits", "block_size")
_COLUMNS: Final = (
    "key", "model", "family", "architecture", "parameters", "quantized_parameters", "dtype",
    "bits", "data_type", "exponent_bits", "float_bias", "block_size", "layout", "normalization", "centering",
    "scale_format", "rounding", "seed", "method", "method_options", "include", "exclude", "evaluation",
    "bits_per_param", "total_bits", "weight_rmse", "task", "metric", "value", "low", "high", "n",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """An experiment without a result, and why."""

    key: str
    experiment: Experiment
    reason: str
    traceback: str
    finished: str


class Store:
    """A folder of results. Several processes may write to it at once: the first result of a key stays.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._experiments = self.path / "experiments"
        self._failures = self.path / "failures"
        try:
            for folder in (self._experiments, self._failures):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._experiments):
                pass
        except OSError as error:
            raise OSError(f"results={path}: cannot write to {self.path}: {error.strerror}") from error

    def finished_keys(self) -> set[str]:
        """Return the keys of experiments that have a result."""
        return {path.stem for path in self._experiments.glob("*.json")}

    def failed_keys(self) -> set[str]:
        """Return the keys of experiments recorded as failed."""
        return {path.stem for path in self._failures.glob("*.json")}

    def write(self, result: Result) -> None:
        """Write a result and forget an earlier failure of the same experiment."""
        _write_once(self._experiments / f"{result.key}.json", dataclasses.asdict(result))
        (self._failures / f"{result.key}.json").unlink(missing_ok=True)

    def write_failure(self, experiment: Experiment, reason: str, traceback: str) -> None:
        """Record that an experiment failed; a later failure replaces an earlier one."""
        path = self._failures / f"{experiment.key}.json"
        path.unlink(missing_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _write_once(path, dataclasses.asdict(Failure(experiment.key, experiment, reason, traceback, now)))


def read_results(path: str | Path = "results") -> pd.DataFrame:
    """Return the store as a table, one row for each measurement of each finished experiment.

    Columns: key, model, family, architecture, parameters, quantized_parameters, dtype, the quantizer's fields
    (block_size missing: whole tensor; all missing for the 16-bit baseline), method, method_options (what is not at
    its default, as text), include, exclude, evaluation (values compare only where it is equal), bits_per_param,
    total_bits, weight_rmse (relative error of the quantized weights), task, metric, value, low, high (95% interval), n.
    The table's attrs["store"] is the path, for those who need the items behind a value (read_items).

    Raises:
        FileNotFoundError: there is no store at path.
    """
    rows = [row for record in _read_records(path, "experiments") for row in _rows(record)]
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    table = table.astype(dict.fromkeys(_NULLABLE_INTEGERS, "Int64"))
    table.attrs["store"] = str(path)
    return table


def read_failures(path: str | Path = "results") -> pd.DataFrame:
    """Return the failed experiments: key, model, bits, data_type, block_size, reason, finished."""
    rows = [
        {
            "key": record["key"],
            "model": record["experiment"]["model"]["name"],
            **{name: record["experiment"]["quant"][name] for name in ("bits", "data_type", "block_size")},
            "reason": record["reason"],
            "finished": record["finished"],
        }
        for record in _read_records(path, "failures")
    ]
    columns = ["key", "model", "bits", "data_type", "block_size", "reason", "finished"]
    return pd.DataFrame(rows, columns=columns).astype({"block_size": "Int64"})


def read_provenance(path: str | Path = "results") -> pd.DataFrame:
    """Return where the results come from: git_commit, device, versions, experiments, first, last; one row per origin.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    rows = [
        {name: record[name] for name in ("git_commit", "device", "finished")}
        | {"versions": ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))}
        for record in _read_records(path, "experiments")
    ]
    table = pd.DataFrame(rows, columns=["git_commit", "device", "versions", "finished"])
    origins = table.groupby(["git_commit", "device", "versions"], dropna=False)["finished"]
    return origins.agg(experiments="size", first="min", last="max").reset_index()


def read_items(
    path: str | Path, task: str, metric: str, keys: Collection[str] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return the value of each item [n] by experiment key, in item order: 0 or 1 for acc, nats for cross_entropy.

    Experiments without such items are left out: another task, or a store from before items were kept.

    Args:
        path: of the store.
        task, metric: as in read_results; metrics with items are acc, acc_norm, acc_bytes, and those of windows.
        keys: of the experiments to read; None is all.

    Raises:
        FileNotFoundError: there is no store at path.
    """
    found = {}
    for record in _read_records(path, "experiments", keys):
        for items in record.get("items", ()):
            if (items["task"], items["metric"]) == (task, metric):
                found[record["key"]] = decode_items(ItemValues(**items))
    return found


def _read_records(path: str | Path, kind: str, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of these keys that are there; None: all."""
    folder = Path(path) / kind
    if not folder.is_dir():
        raise FileNotFoundError(f"no results at {Path(path).absolute()}: start with `kbit run`")
    wanted = folder.glob("*.json") if keys is None else (folder / f"{key}.json" for key in keys)
    for file in sorted(file for file in wanted if file.exists()):
        try:
            record = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and its experiment will run again") from None
        if record["schema_version"] > SCHEMA_VERSION:
            raise ValueError(f"{file} was written by a newer kbit (schema {record['schema_version']})")
        yield record


def _rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Flatten one stored result into a row per measurement."""
    experiment, quant = record["experiment"], record["experiment"]["quant"]
    shared: dict[str, Any] = {name: record[name] for name in _COLUMNS if name in record}
    shared |= {"model": experiment["model"]["name"], "dtype": experiment["model"]["dtype"], "bits": quant["bits"]}
    spec = QuantSpec.from_json(quant).canonical()
    if not spec.is_baseline:
        shared |= dataclasses.asdict(spec) | {name: quant[name] for name in ("method", "include", "exclude")}
        shared |= {"method_options": _describe_options(quant)}
        shared |= {} if spec.data_type == "float" else {"float_bias": None}
    for measurement in record["measurements"]:
        yield shared | measurement | {"evaluation": _describe_evaluation(experiment, measurement["task"])}


def _describe_options(quant: dict[str, Any]) -> str:
    """Return the options that mean something to the method and are not at their default; see config.method_options."""
    groups = ["calibration"] if quant["method"] in CALIBRATED else []
    groups += ["gptq"] if quant["method"] == "gptq" else []
    default = dataclasses.asdict(QuantConfig())
    changed = [(g, name, value) for g in groups for name, value in quant[g].items() if value != default[g][name]]
    return " ".join(
        f"{name if group == quant['method'] else f'{group}.{name}'}={value}" for group, name, value in changed
    )


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


def _write_once(path: Path, record: dict[str, Any]) -> None:
    """Write JSON so that readers see the whole file or none, and a file that exists stays as it is."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}")
    try:
        with temporary.open("w") as file:
            json.dump(record | {"schema_version": SCHEMA_VERSION}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # atomic, and refuses to overwrite
    except FileExistsError:
        pass  # another process finished the same experiment first
    finally:
        temporary.unlink(missing_ok=True)
