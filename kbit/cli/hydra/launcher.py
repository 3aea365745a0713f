"""The Hydra sweeper and launcher of kbit: all jobs of a multirun become one request.

Every Hydra application of the environment imports this module at its start, so that nothing heavy is imported at the
top.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from kbit.checks import KbitError, check_choice
from kbit.cli.hydra.private import find_basic_sweeper


class SweepSweeper(find_basic_sweeper()):  # type: ignore[misc]
    """Hydra's sweeper without its file of the sweep, and without its composition of every job, which the launcher has.

    Args:
        max_batch_size: the number of jobs of a request. None makes one request of all.
        params: see Hydra's sweeper.

    Raises:
        KbitError: max_batch_size is no whole number above 0.
    """

    def __init__(self, max_batch_size: Any = None, params: Any = None) -> None:
        is_count = isinstance(max_batch_size, int) and not isinstance(max_batch_size, bool) and max_batch_size > 0
        if max_batch_size is not None and not is_count:
            raise KbitError(f"hydra.sweeper.max_batch_size={max_batch_size} is not a whole number above 0, or null")
        super().__init__(max_batch_size, params)

    def sweep(self, arguments: Sequence[str]) -> list[Sequence[JobReturn]]:
        """Hand the jobs to the launcher, batch by batch."""
        given = [f"{key}={value}" for key, value in (self.params or {}).items()]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        batches = self.split_arguments(parser.parse_overrides([*given, *arguments]), self.max_batch_size)
        firsts = itertools.accumulate(map(len, batches), initial=0)
        return [self.launcher.launch(batch, first) for batch, first in zip(batches, firsts, strict=False)]


class SweepLauncher(Launcher):
    """Composes a multirun's jobs and hands them to the task function as one kbit.cli.hydra.compose.Request.

    Args:
        engine: "ray" runs the experiments on workers of this machine or a cluster. "process" runs them one after the
            other in this process, without Ray.
        plan_only: whether to print what would run, and run nothing.
        examine_only: whether to print if all that would be needed can be had here, and run nothing.
    """

    def __init__(self, engine: str = "ray", plan_only: bool = False, examine_only: bool = False) -> None:
        check_choice("hydra.launcher.engine", engine, ("ray", "process"))
        self.engine = engine
        self.plan_only = plan_only
        self.examine_only = examine_only
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None
        self._task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self._context = hydra_context
        self._config = config
        self._task_function = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every job's configuration and hand them on.

        Raises:
            KbitError: a value is refused, or no job or experiment is left.
        """
        from kbit.cli.hydra.compose import Composer, Request

        assert self._context is not None  # Hydra calls setup first
        assert self._config is not None
        assert self._task_function is not None
        if not job_overrides:  # of all sweeps only a glob may have no value
            given = [override for override in self._config.hydra.overrides.task if "glob(" in override]
            raise KbitError(
                f"{' '.join(given)}: matches nothing; glob chooses files of config groups only, such as quant=glob(nf*)"
            )
        composer = Composer(self._load, self._context.config_loader)
        try:
            configs = tuple(config for overrides in job_overrides for config in composer.expand(overrides))
        except ValueError as error:
            raise KbitError(str(error)) from error
        if not configs:
            raise KbitError("no experiment is left: study.exclude leaves out every point of the grids")
        self._task_function(Request(configs, self.engine, self.plan_only, self.examine_only))
        return [_completed(overrides) for overrides in job_overrides]

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        """Return a configuration as Hydra composes it, without Hydra's node."""
        assert self._context is not None
        assert self._config is not None
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        if config.hydra.sweeper != self._config.hydra.sweeper or config.hydra.launcher != self._config.hydra.launcher:
            raise KbitError(
                f"{' '.join(overrides)}: a swept choice brings a sweeper or launcher of its own, which "
                "Hydra would ignore; give one study (or launcher) at a time"
            )
        with open_dict(config):
            del config["hydra"]
        return config


def _completed(overrides: Sequence[str]) -> JobReturn:
    job: Any = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    job.return_value = None
    return job  # type: ignore[no-any-return]
