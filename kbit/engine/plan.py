"""The plan of a sweep: experiments without repeats and without those that the store has, grouped by model."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kbit.data.task_files import EMBEDDED_TASKS, expand_names, find_local_tasks, list_definitions
from kbit.data.texts import check_text, locate_text, read_documents
from kbit.engine.machine import count_cpus, count_gpus, count_workers
from kbit.experiments.config import Experiment, RunConfig
from kbit.experiments.decidable import check_decidable
from kbit.experiments.identity import check_texts, find_key
from kbit.experiments.requirements import (
    check_download_space,
    check_lengths,
    check_model_files,
    check_not_packed,
    check_packing,
    check_rotation,
    check_stages,
    check_tasks,
)
from kbit.experiments.result import FAILED
from kbit.models.size import find_size
from kbit.store.readers import list_keys
from kbit.store.results import load_failures


@dataclass(frozen=True)
class Plan:
    """What a sweep would do.

    Attributes:
        asked: the number of experiments asked for, repeats included.
        keys: the key of each distinct experiment, in the order asked. Files that change afterwards do not change it.
        done: the number of distinct experiments that have a result.
        failed: the number of distinct experiments that are recorded as failed and will not be tried again.
        crashed: the number of distinct experiments that crashed before and will be tried again.
        to_run: the other experiments, grouped by model, the largest model first.
    """

    asked: int
    keys: Mapping[Experiment, str]
    done: int
    failed: int
    crashed: int
    to_run: tuple[Experiment, ...]

    def describe(self) -> str:
        """Return the plan as one line."""
        failed = f", {self.failed} failed before (retry_failed=true runs them again)" if self.failed else ""
        crashed = f" ({self.crashed} crashed before)" if self.crashed else ""
        done = f"{self.done} done{failed}, {len(self.to_run)} to run{crashed}"
        return f"{self.asked} asked, {len(self.keys)} distinct, {done}"


def make_plan(experiments: Collection[Experiment], store_path: str | Path, *, retry_failed: bool = False) -> Plan:
    """Remove repeats and experiments that the store has, and group the others by model. The store need not exist.

    An experiment that crashed is tried again. One that failed would fail again, and is tried if retry_failed says so.
    """
    distinct = {find_key(experiment): experiment for experiment in experiments}
    finished, failures = list_keys(store_path)
    done, again = finished & distinct.keys(), failures & distinct.keys()
    states = {} if retry_failed or not again else {f.key: f.state for f in load_failures(store_path, again)}
    failed = {key for key, state in states.items() if state == FAILED}  # by themselves: they would fail again
    skip = done | failed
    to_run = [experiment for key, experiment in distinct.items() if key not in skip]
    # a worker keeps one model, and the 16-bit model's states on one text
    to_run.sort(key=lambda e: str(e.model))  # stable below: adapters and revisions of one model stay together
    sizes = {model.name: find_size(model.name, model.size) for model in {experiment.model for experiment in to_run}}
    parameters = {name: 0 if size is None else size.parameters for name, size in sizes.items()}
    to_run.sort(key=lambda e: (-parameters[e.model.name], e.model.name, e.model.dtype, e.eval.perplexity or ""))
    keys = {experiment: key for key, experiment in distinct.items()}
    return Plan(len(experiments), keys, len(done), len(failed), len(states) - len(failed), tuple(to_run))


def check_experiment(experiment: Experiment, *, planned_only: bool = False) -> None:
    """Look for the model, tasks and texts of an experiment before any work.

    Args:
        experiment: the experiment.
        planned_only: whether a text of the hub need not be here, so that a study can be planned offline.

    Raises:
        ValueError, OSError: one of them is unknown or cannot be had.
    """
    check_model_files(experiment.model)
    for text in experiment.texts:
        (locate_text if planned_only else check_text)(text)
    check_texts(experiment)
    check_lengths(experiment)
    check_tasks(experiment)
    if experiment.eval.measures:
        from kbit.evaluation.measures import check_measures  # imports torch, which other studies plan without

        check_measures(experiment.eval)
    names = expand_names(experiment.eval.tasks, experiment.eval.task_path)
    if set(names) - find_local_tasks(experiment.eval.task_path).keys():
        from kbit.data.tasks import load_tasks  # takes seconds, which a study of local tasks need not wait for

        load_tasks(experiment.eval.tasks, experiment.eval.task_path)


def plan_sweep(configs: Sequence[RunConfig], engine: str, *, plan_only: bool) -> Plan:
    """Look for every model, task and text of these configurations, and return the plan.

    Raises:
        ValueError, OSError: a model, task, text or setting is wrong, or cannot be had here.
    """
    settings = configs[0]
    _check_settings(configs)
    _check_device(settings, engine, plan_only=plan_only)  # first, as it takes no time
    experiments = [config.experiment for config in configs]
    if settings.study.until.decided:
        check_decidable(configs)
    check_not_packed(experiments)
    for experiment in experiments:
        check_rotation(experiment)
        check_stages(experiment)
        check_packing(experiment, settings.ray.gpus_per_worker if engine == "ray" else None)
    distinct = {(e.model, e.eval, e.quant.calibration, e.train, *e.texts): e for e in experiments}
    for experiment in distinct.values():
        check_experiment(experiment, planned_only=plan_only)
    for text in dict.fromkeys(text for experiment in experiments for text in experiment.texts):
        if locate_text(text) is not None:  # a text of the hub need not be here to be planned
            read_documents(text)  # not UTF-8, no text, a record without a "text", ...
    plan = make_plan(experiments, settings.results, retry_failed=settings.retry_failed)
    if not plan_only and (engine == "process" or settings.ray.address == "local"):  # a cluster has other disks
        check_download_space(experiment.model for experiment in plan.to_run)
    return plan


def _check_settings(configs: Sequence[RunConfig]) -> None:
    """Raise ValueError if the configurations differ in how to run. A sweep has one store, one device, one cluster."""
    for name in ("results", "device", "ray", "fail_fast", "retry_failed", "study.until"):
        if len(values := {str(operator.attrgetter(name)(config)): None for config in configs}) > 1:
            raise ValueError(f"{name} must be the same for the whole sweep, not {' and '.join(values)}")


def list_own_code(configs: Sequence[RunConfig]) -> list[str]:
    """Return the YAML files of the users' own tasks asked for that run Python code of their own.

    Raises:
        ValueError, FileNotFoundError: see list_definitions.
    """
    asked = {(config.eval.tasks, config.eval.task_path) for config in configs if config.eval.task_path}
    files = {path for names, folder in asked for path in list_definitions(names, folder)}
    own = (path for path in sorted(files) if EMBEDDED_TASKS not in path.parents)
    return [str(path) for path in own if b"!function" in path.read_bytes()]


def _check_device(settings: RunConfig, engine: str, *, plan_only: bool) -> None:
    """Raise ValueError if the asked device or workers cannot be had. A cluster is asked when it is joined."""
    if engine == "ray" and settings.ray.address == "local" and not plan_only:
        gpus = count_gpus() if settings.ray.gpus_per_worker else 0
        count_workers(settings.ray, [{"CPU": count_cpus(), "GPU": gpus}])
    if settings.device == "cpu":
        return
    if engine == "ray" and settings.ray.gpus_per_worker == 0:
        raise ValueError(f"device={settings.device} on Ray needs ray.gpus_per_worker > 0, such as 1 or 0.5")
    if engine == "ray" and settings.device != "cuda":
        raise ValueError(f"device={settings.device}: Ray chooses each worker's GPU; use device=cuda")
    if engine == "process" or settings.ray.address == "local":
        index = int(settings.device.partition(":")[2] or 0)
        if (gpus := count_gpus()) <= index:
            raise ValueError(f"device={settings.device}: there are {gpus} CUDA devices here; use device=cpu")
