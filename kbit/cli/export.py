"""`kbit results --to wandb|mlflow|trackio`: hand experiments to a tracker, one run an experiment.

A tracker's own settings say where runs go: WANDB_MODE=offline keeps them in ./wandb, MLFLOW_TRACKING_URI names a server
or a database, and trackio writes to TRACKIO_DIR. A run has the experiment's key, so that nothing is there twice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import math
import posixpath
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kbit.checks import KbitError

if TYPE_CHECKING:
    from kbit.experiments.result import Result

_KEY: Final = "kbit.key"  # the tag by which a run of MLflow is found again
_COSTS: Final = ("total_bits", "bits_per_param", "parameters", "weight_rmse", "seconds_quantize", "seconds_evaluate")
_PARAM_LENGTH: Final = 6000  # MLflow's limit
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Run:
    """An experiment as a tracker takes it.

    Attributes:
        key: the experiment's key.
        name: its label.
        group: the model's family.
        config: the full configuration: model, quant and eval, nested.
        numbers: every measured number by task/metric, the ends of its interval, and what the model costs.
        ended: the seconds since 1970 at its end.
    """

    key: str
    name: str
    group: str
    config: Mapping[str, Any]
    numbers: Mapping[str, float]
    ended: float


Writer = Callable[[Run], bool]  # writes a run and returns True, or False for one that the tracker has already


def add_tracker(parser: argparse.ArgumentParser) -> None:
    """Let a command take the name of a tracker to export to."""
    text = "write one run for each experiment that has a row to this tracker (pip install 'kbit[NAME]')"
    parser.add_argument("--to", choices=tuple(TRACKERS), help=text)
    parser.add_argument("--project", metavar="NAME", help="the tracker's project for --to (default: kbit)")


def export_results(options: argparse.Namespace, keys: Collection[str]) -> None:
    """Write experiments of a store to a tracker and print how many.

    Args:
        options: the options of `kbit results`.
        keys: the keys of the experiments.

    Raises:
        ValueError: another option asks for something else.
        KbitError: the tracker is not installed, or refuses the runs.
        FileNotFoundError: there is no store.
    """
    from tqdm import tqdm

    from kbit.store.results import load_results

    if options.to is None:
        raise ValueError(f"--project {options.project} goes with --to TRACKER")
    tracker, project = options.to, options.project or "kbit"
    if given := [f"--{name}" for name in ("failures", "csv", "parquet") if getattr(options, name)]:
        raise ValueError(f"--to goes without {' '.join(given)}")
    try:
        library = import_module(tracker)
    except ImportError as error:
        raise KbitError(f"--to {tracker}: {error}; pip install 'kbit[{tracker}]' brings it") from None
    write = _ask(tracker, TRACKERS[tracker], library, project)
    count, written = 0, 0
    for result in tqdm(load_results(options.results, keys), total=len(keys), unit="run", disable=None):
        count += 1
        written += _ask(tracker, write, describe_run(result))
    there = f", which has the other {count - written} already" if written < count else ""
    left = f"; {len(keys) - count} cannot be read" if count < len(keys) else ""
    print(f"{written} experiments written to the {tracker} project {project!r}{there}{left}")


def _ask(tracker: str, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """Return what a function of a tracker returns.

    Raises:
        KbitError: the tracker refuses.
    """
    try:
        return function(*arguments)
    except Exception as error:  # each tracker has errors of its own
        raise KbitError(f"--to {tracker}: {type(error).__name__}: {str(error).strip()}") from error


def describe_run(result: Result) -> Run:
    """Return a result as a run. A number that is missing (NaN) is left out."""
    numbers: dict[str, float | None] = {name: getattr(result, name) for name in _COSTS}
    for one in result.measurements:
        name = f"{one.task}/{one.metric}"
        numbers |= {name: one.value, f"{name}/low": one.low, f"{name}/high": one.high}
    experiment = result.experiment
    return Run(
        result.key,
        experiment.label(),
        result.family,
        dataclasses.asdict(experiment),
        {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)},
        datetime.fromisoformat(result.finished).timestamp(),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested mappings with its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _open_wandb(wandb: Any, project: str) -> Writer:
    """Write runs whose id is the experiment's key: a run that is there is resumed, and step 0 is written once."""
    about: Any = {"project": project, "resume": "allow", "settings": wandb.Settings(silent=True, console="off")}

    def write(run: Run) -> bool:
        config = {**run.config, "key": run.key}
        made = wandb.init(id=run.key, name=run.name, group=run.group, config=config, **about)
        made.log(dict(run.numbers), step=0)
        made.finish()
        return True

    return write


def _open_mlflow(mlflow: Any, project: str) -> Writer:
    """Write runs that MLflow's experiment of this name lacks. A run of an export that was interrupted is completed."""
    for name in ("mlflow", "alembic"):  # which tell of every table that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    client, entities = mlflow.MlflowClient(), mlflow.entities
    found = client.get_experiment_by_name(project)
    place = found.experiment_id if found else client.create_experiment(project)

    def write(run: Run) -> bool:
        there = client.search_runs([place], filter_string=f"tags.`{_KEY}` = '{run.key}'")
        if any(one.info.status == "FINISHED" for one in there):
            return False
        ended, tags = round(1000 * run.ended), {_KEY: run.key, "family": run.group}
        made = there[0] if there else client.create_run(place, start_time=ended, run_name=run.name, tags=tags)
        params = [entities.Param(name, str(value)[:_PARAM_LENGTH]) for name, value in flatten(run.config)]
        numbers = [entities.Metric(name_metric(name), value, ended, 0) for name, value in run.numbers.items()]
        client.log_batch(made.info.run_id, metrics=numbers, params=params)
        client.set_terminated(made.info.run_id, end_time=ended)
        return True

    return write


def name_metric(name: str) -> str:
    """Return a name as MLflow takes one of a metric: the signs that it knows, and a relative path."""
    return posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", name)).lstrip("./")


def _open_trackio(trackio: Any, project: str) -> Writer:
    """Write runs that trackio's project lacks. It lists a run when the run's numbers, which come at once, are there."""
    there = set()
    with contextlib.suppress(ValueError):  # there is no such project yet
        there = {run.name for run in trackio.Api().runs(project)}
    still = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}

    def write(run: Run) -> bool:
        name = f"{run.name} ({run.key})"
        if name in there:
            return False
        with contextlib.redirect_stdout(io.StringIO()):  # several lines for each run
            config = {**run.config, "key": run.key}
            trackio.init(project, name, run.group, config=config, resume="allow", **still)
            trackio.log(dict(run.numbers))
            trackio.finish()
        return True

    return write


# What opens a project of each tracker, by the tracker's name.
TRACKERS: Final[Mapping[str, Callable[[Any, str], Writer]]] = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}
