"""From configuration to finished sweep: the one path that single runs, multiruns and plans share."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NoReturn

from omegaconf import DictConfig, OmegaConf

from kbit.config import RunConfig

if TYPE_CHECKING:  # pandas, which a refused configuration need not wait for
    import pandas as pd

    from kbit.estimate import Estimator
    from kbit.store import Store
    from kbit.sweep import Outcome, Plan


def to_run_config(config: DictConfig) -> RunConfig:
    """Return the composed configuration as plain dataclasses, checked; exits with the reason if it is not valid."""
    try:
        run_config = OmegaConf.to_object(config)
    except ValueError as error:
        fail(str(error))
    assert isinstance(run_config, RunConfig)  # the schema says so
    return run_config


def run_configs(configs: Sequence[RunConfig], *, engine: str, plan_only: bool = False) -> None:
    """Plan and run the experiments of these configurations; everything but the experiments is the first one's.

    Prints the plan, and the failures if there are any. Exits with 1 unless every asked result exists.
    """
    from kbit.estimate import Estimator
    from kbit.files import check_writable
    from kbit.store import Store
    from kbit.sweep import compact_quietly, finish

    settings = configs[0]
    try:
        plan = _make_plan(configs, engine, plan_only=plan_only)
        if plan_only:
            check_writable(settings.results)
        else:
            store = Store(settings.results)
            if engine == "ray" and store.root.startswith("memory://"):
                raise ValueError(f"results={store.root}: no other process sees it; use hydra/launcher=basic")
        print(plan.describe())
        estimator = Estimator(settings.device)
        if plan.to_run and (plan_only or len(configs) > 1):
            print(_estimate(plan, estimator, settings, engine))
    except (ValueError, OSError) as error:
        fail(str(error))
    if plan_only:
        return
    if plan.to_run:
        try:
            outcomes = _start(plan, estimator, settings, engine, store.root)
            finish(outcomes, plan, fail_fast=settings.fail_fast, store=store, estimator=estimator)
        except (ValueError, OSError) as error:
            fail(str(error))
        except KeyboardInterrupt:
            print(f"\nstopped; finished results are kept in {store.root}: the same command goes on", file=sys.stderr)
            sys.exit(130)
        compact_quietly(store)
    _report(configs, settings, store)


def _start(plan: Plan, estimator: Estimator, settings: RunConfig, engine: str, store_path: str) -> Generator[Outcome]:
    """Return the outcomes of a plan as they come; the work begins with the first."""
    from kbit.cluster import run_on_ray
    from kbit.sweep import run_in_process

    if engine == "process":
        return run_in_process(plan.to_run, store_path, settings.device)
    memory = estimator.predict_memory(plan.to_run)
    return run_on_ray(plan.to_run, store_path, settings.device, settings.ray, estimator.cost_of, memory)


def _estimate(plan: Plan, estimator: Estimator, settings: RunConfig, engine: str) -> str:
    """Return what a plan will take, as far as the store's results and the models' sizes tell."""
    workers: int | None = 1
    threads = settings.ray.cpus_per_worker
    if engine == "process":
        import torch  # takes a second; a run needs it anyway

        threads = torch.get_num_threads()
    elif settings.device == "cpu" and settings.ray.address == "local":
        workers = settings.ray.num_workers or max(1, (os.cpu_count() or 1) // threads)
    else:
        workers = settings.ray.num_workers  # how many fit is known only of a running cluster
    estimator.learn_stored(settings.results, plan.to_run, threads)
    return estimator.describe(plan.to_run, None if workers is None else min(workers, len(plan.to_run)))


def _make_plan(configs: Sequence[RunConfig], engine: str, *, plan_only: bool) -> Plan:
    """Return the plan of these configurations, each model, task and text of which is looked for before any work."""
    from kbit.sweep import check_experiment, make_plan
    from kbit.textdata import locate_text, read_documents

    settings = configs[0]
    _check_settings(configs)
    experiments = [config.experiment for config in configs]
    for experiment in {(e.model.name, e.eval, *e.texts): e for e in experiments}.values():
        check_experiment(experiment, planned_only=plan_only)
    for text in dict.fromkeys(text for experiment in experiments for text in experiment.texts):
        if locate_text(text) is not None:  # a text of the hub need not be here to be planned
            read_documents(text)  # not UTF-8, no text, a record without a "text", ...
    plan = make_plan(experiments, settings.results, retry_failed=settings.retry_failed)
    _check_device(settings, engine)
    return plan


def _check_settings(configs: Sequence[RunConfig]) -> None:
    """Raise ValueError if the configurations differ in how to run: a sweep has one store, one device, one cluster."""
    for name in ("results", "device", "ray", "fail_fast", "retry_failed"):
        if len(values := {str(getattr(config, name)): None for config in configs}) > 1:
            raise ValueError(f"{name} must be the same for the whole sweep, not {' and '.join(values)}")


def _check_device(settings: RunConfig, engine: str) -> None:
    """Raise ValueError if the asked device cannot be there; on a cluster the workers check it themselves."""
    if settings.device == "cpu":
        return
    if engine == "ray" and settings.ray.gpus_per_worker == 0:
        raise ValueError(f"device={settings.device} on Ray needs ray.gpus_per_worker > 0, such as 1 or 0.5")
    if engine == "ray" and settings.device != "cuda":
        raise ValueError(f"device={settings.device}: Ray chooses each worker's GPU; use device=cuda")
    if engine == "process" or settings.ray.address == "local":
        from kbit.models import check_device

        check_device(settings.device)


def _report(configs: Sequence[RunConfig], settings: RunConfig, store: Store) -> None:
    """Say what the store now has of what was asked; exit with 1 if not all of it."""
    from kbit.store import read_failures

    distinct = {config.experiment.key: config.experiment for config in configs}
    missing = distinct.keys() - store.finished_keys()
    if not missing:
        if len(distinct) == 1:
            print(describe_results(store.root, next(iter(distinct))))
        print(f"{len(distinct)} of {len(distinct)} asked results are in {store.root}")
        if len(distinct) > 1:
            print(f"see them: kbit figures --results {settings.results}, kbit results --results {settings.results}")
        return
    reasons = read_failures(store.root).set_index("key")["reason"]
    for key in sorted(missing):
        log = store.log_path(key)
        where = f"; its log: {log}" if log is not None and log.exists() else ""
        print(f"no result: {distinct[key].label()} ({key}): {reasons.get(key, 'not run')}{where}", file=sys.stderr)
    fail(f"{len(missing)} of {len(distinct)} asked results are missing; tracebacks are in {store.root}/failures")


def describe_results(store_path: str, key: str) -> str:
    """Return the measurements of one experiment as a table."""
    from kbit.store import read_results

    rows = read_results(store_path).query("key == @key")
    first = rows.iloc[0]
    head = f"{first['model']}: {first['total_bits'] / 1e6:.2f} Mbit in all, {first['bits_per_param']:.2f} bits/param"
    table = rows[["task", "metric", "value", "low", "high", "n"]].to_string(index=False)
    return "\n".join([head, table, *_explain_control(rows), *_describe_features(store_path, key)])


def _explain_control(rows: pd.DataFrame) -> list[str]:
    """Say why features were found and zeroed, but no random dimensions (kbit.features.measure_ablation)."""
    return [
        f"no random control: {count:.0f} of {width} dimensions are features, so that there are not as many others"
        for count, width in rows.loc[rows["metric"] == "features", ["value", "n"]].itertuples(index=False)
        if count > width / 2
    ]


def _describe_features(store_path: str, key: str) -> list[str]:
    """Return the hidden dimensions that are large most often, a line each; none if they were not looked for."""
    from kbit.store import read_features

    rows = read_features(store_path, [key])
    lines = []
    for (dimension, is_feature), places in rows.groupby(["dimension", "is_feature"], sort=False):
        first, top = places.iloc[0], places.sort_values("largest", key=abs).iloc[-1]
        lines.append(
            f"dimension {dimension}{' (feature)' if is_feature else ''}: large in {first['layers']:.0%} of layers, at "
            f"{first['positions']:.2%} of positions; up to {top['largest']:.1f}, layer {top['layer']} {top['input']}"
        )
    return lines


def fail(message: str) -> NoReturn:
    """Print why nothing can be run, and exit with 1."""
    print(f"kbit: error: {message}", file=sys.stderr)
    sys.exit(1)
