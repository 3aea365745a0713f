"""From configuration to finished sweep: the one path that single runs, multiruns and plans share."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from kbit.cli.errors import fail
from kbit.cli.summary import report_results
from kbit.engine.plan import plan_sweep
from kbit.experiments.config import RunConfig

if TYPE_CHECKING:
    from kbit.engine.estimate import Estimator
    from kbit.engine.plan import Outcome, Plan


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
    from kbit.engine.estimate import Estimator
    from kbit.engine.progress import compact_quietly, finish
    from kbit.store.filesystem import check_writable
    from kbit.store.store import Store

    settings = configs[0]
    try:
        plan = plan_sweep(configs, engine, plan_only=plan_only)
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
    report_results(plan, settings, store)


def _start(plan: Plan, estimator: Estimator, settings: RunConfig, engine: str, store_path: str) -> Generator[Outcome]:
    """Return the outcomes of a plan as they come; the work begins with the first."""
    from kbit.engine.ray_cluster import run_on_ray
    from kbit.engine.worker import run_in_process

    if engine == "process":
        return run_in_process(plan, store_path, settings.device)
    memory = estimator.predict_memory(plan.to_run)
    return run_on_ray(plan, store_path, settings.device, settings.ray, estimator.cost_of, memory)


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
