"""The Hydra sweeper and launcher: all jobs of a multirun go to the sweep engine at once.

Hydra imports this at every start, so nothing heavy is imported here at the top.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class SweepSweeper(BasicSweeper):
    """Hydra's sweeper, less its composing every job's configuration once before the launcher does."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leave it to the launcher, which composes all configurations before any work."""


class SweepLauncher(Launcher):
    """Runs a multirun's jobs as one sweep.

    Args:
        engine: ray (workers on this machine or a cluster) or process (one after the other, here, without Ray).
        plan_only: print what would run, and run nothing.
        examine_only: say whether all that would be needed can be had here, and run nothing.
    """

    def __init__(self, engine: str = "ray", plan_only: bool = False, examine_only: bool = False) -> None:
        self.engine = engine
        self.plan_only = plan_only
        self.examine_only = examine_only
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives; the task function is the single run's and not used."""
        self._context = hydra_context
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every job's configuration and run them; exits with 1 unless every asked result exists."""
        from kbit.cli.compose import Composer
        from kbit.cli.errors import fail
        from kbit.cli.run import run_configs

        assert self._context is not None  # Hydra calls setup first
        assert self._config is not None
        if not job_overrides:  # of all sweeps only a glob may have no value
            given = [override for override in self._config.hydra.overrides.task if "glob(" in override]
            fail(
                f"{' '.join(given)}: matches nothing; glob chooses files of config groups only, such as quant=glob(nf*)"
            )
        composer = Composer(self._load, self._context.config_loader)
        try:
            configs = [config for overrides in job_overrides for config in composer.expand(overrides)]
        except ValueError as error:
            fail(str(error))
        if not configs:
            fail("no experiment is left: study.exclude leaves out every point of the grids")
        if self.examine_only:
            from kbit.cli.doctor import examine

            examine(configs)
        else:
            run_configs(configs, engine=self.engine, plan_only=self.plan_only)
        return [_completed(overrides) for overrides in job_overrides]

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        """Return a configuration as Hydra composes it, without Hydra's node."""
        assert self._context is not None
        assert self._config is not None
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        if config.hydra.sweeper != self._config.hydra.sweeper or config.hydra.launcher != self._config.hydra.launcher:
            sys.exit(
                f"kbit: error: {' '.join(overrides)}: a swept choice brings a sweeper or launcher of its own, which "
                "Hydra would ignore; give one study (or launcher) at a time"
            )
        with open_dict(config):
            del config["hydra"]
        return config


def _completed(overrides: Sequence[str]) -> JobReturn:
    job: Any = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    job.return_value = None
    return job  # type: ignore[no-any-return]
