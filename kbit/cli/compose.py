"""Studies as unions of grids, and their configurations composed fast.

Hydra composes a job's configuration in 30 ms and more, nearly all of it spent on choosing files. Here each distinct
choice of files is composed once, by Hydra; plain values (quant.bits=4) are then set on a copy of it. Each distinct
value is still checked and converted by OmegaConf against the schema, once. What is not a plain value goes Hydra's way.
"""

from __future__ import annotations

import copy
import functools
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kbit.cli.explain import check_grid, explain
from kbit.experiments.config import RunConfig
from kbit.experiments.serialize import Values, from_json


@dataclass(frozen=True)
class _Base:
    """A configuration as Hydra composed it for one choice of files."""

    config: DictConfig
    values: Values
    interpolates: bool  # a value depends on others, so that setting one may change two


class Composer:
    """Composes the configurations of a sweep's jobs.

    Args:
        load: Hydra's own way from overrides to a configuration, without Hydra's node.
        loader: Hydra's, which knows the configuration groups.
    """

    def __init__(self, load: Callable[[Sequence[str]], DictConfig], loader: ConfigLoader) -> None:
        self._load = load
        self._loader = loader
        self._parser = OverridesParser.create(config_loader=loader)
        self._parse = functools.cache(self._parser.parse_override)
        self._is_plain = functools.cache(self._find_whether_plain)
        self._base = functools.cache(self._compose_base)
        self._leaf = functools.cache(self._find_leaf)

    def expand(self, overrides: Sequence[str], within: tuple[str, ...] = ()) -> Iterator[RunConfig]:
        """Yield the configurations of one job: its own, or those of the study that it names.

        Keys that the job sets itself stay as it sets them, whatever the study's grids say.

        Args:
            overrides: of the job.
            within: the studies that unite this one.

        Raises:
            ValueError: a value that the schema's checks refuse, or a study that is not well formed.
            HydraException, OmegaConfBaseException: what Hydra raises for these overrides.
        """
        files, _ = self._split(overrides)
        study = self._base(files).values["study"]
        if study["unite"]:
            _check_union(study, within)
            others = [o for o in overrides if self._parse(o).key_or_group.partition(".")[0] not in ("sweeps", "study")]
            for name in study["unite"]:
                yield from self.expand([f"+sweeps={name}", *others], (*within, name))
        elif study["grids"]:
            own = {self._parse(o).key_or_group for o in overrides}
            unused = list(study["exclude"])
            for grid in study["grids"]:
                check_grid(grid)
                for point in self._list_points({key: v for key, v in grid.items() if key not in own}):
                    values = self._compose_values([*overrides, *point])
                    matching = [exclusion for exclusion in study["exclude"] if _matches(values, exclusion)]
                    unused = [exclusion for exclusion in unused if exclusion not in matching]
                    if not matching:
                        yield _build_point(values, point, hint="; study.exclude leaves points out")
            if not own & {key for grid in study["grids"] for key in grid}:  # else they may be for what was not asked
                _warn_of_unused(unused)
        else:
            yield self.compose(overrides)

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """Return what OmegaConf.to_object(Hydra's composition of these overrides) is.

        Raises:
            see expand.
        """
        return _build_point(self._compose_values(overrides), overrides)

    def _compose_values(self, overrides: Sequence[str]) -> Values:
        """Return a configuration's values, which may not be valid together yet."""
        files, plain = self._split(overrides)
        base = self._base(files)
        leaves = [self._leaf(files, override) for override in plain]
        if base.interpolates or None in leaves:
            return _to_values(self._load(overrides))
        values = copy_nodes(base.values)
        for path, value in typing.cast(list[tuple[list[str], Any]], leaves):
            node = values
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = value
        return values

    def _list_points(self, grid: Mapping[str, Any]) -> list[list[str]]:
        """Return the overrides of each point of a grid; its values are written as on Hydra's command line, or lists."""
        strings = [f"{key}={_write(value)}" for key, value in grid.items()]
        try:
            points = BasicSweeper.split_arguments(self._parser.parse_overrides(strings), None)[0]
        except HydraException as error:
            raise ValueError(f"grid {dict(grid)}: {explain(error)}") from None
        if not points:  # of all sweeps only a glob may have no value
            raise ValueError(f"grid {dict(grid)}: a glob matches nothing; it chooses files of config groups only")
        return points

    def _split(self, overrides: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """Divide overrides into those that Hydra must compose and plain values."""
        files = tuple(o for o in overrides if not self._is_plain(o))
        return files, [o for o in overrides if self._is_plain(o)]

    def _find_whether_plain(self, override: str) -> bool:
        parsed = self._parse(override)
        if parsed.type != OverrideType.CHANGE or parsed.package is not None:
            return False
        value = parsed.value()
        if isinstance(value, list | dict) or (isinstance(value, str) and "${" in value):
            return False
        return not self._loader.get_group_options(parsed.key_or_group)

    def _compose_base(self, files: tuple[str, ...]) -> _Base:
        config = self._load(files)
        return _Base(config, _to_values(config), "${" in OmegaConf.to_yaml(config))

    def _find_leaf(self, files: tuple[str, ...], override: str) -> tuple[list[str], Any] | None:
        """Return where an override puts which value, converted to the schema's type; None: let Hydra do it."""
        parsed = self._parse(override)
        config = copy.deepcopy(self._base(files).config)
        try:
            OmegaConf.update(config, parsed.key_or_group, parsed.value(), merge=True)
        except OmegaConfBaseException:
            return None  # Hydra's own message names the key and what is allowed
        return parsed.key_or_group.split("."), OmegaConf.select(config, parsed.key_or_group)


def _build_point(values: Values, point: Sequence[str], hint: str = "") -> RunConfig:
    """Return a point's configuration; one that is refused is named, since it may be one of thousands."""
    try:
        return from_json(RunConfig, values)
    except ValueError as error:
        where = f" (at {' '.join(point)}{hint})" if len(point) > 1 else ""
        raise ValueError(f"{error}{where}") from None


def copy_nodes(values: Values) -> Values:
    """Copy nested dicts, not what is in them."""
    return {key: copy_nodes(value) if isinstance(value, dict) else value for key, value in values.items()}


def _to_values(config: DictConfig) -> Values:
    return typing.cast(Values, OmegaConf.to_container(config, resolve=True))


def _check_union(study: Values, within: tuple[str, ...]) -> None:
    """Raise ValueError if a study that unites others has points of its own, or unites itself."""
    for key in ("grids", "exclude"):
        if study[key]:
            raise ValueError(f"a study with study.unite={study['unite']} has no study.{key}, but here are {study[key]}")
    if again := sorted(set(study["unite"]) & set(within)):
        raise ValueError(f"study.unite={study['unite']}: {again[0]!r} unites itself, by way of {' > '.join(within)}")


def _warn_of_unused(exclusions: Sequence[Mapping[str, Any]]) -> None:
    for exclusion in exclusions:
        print(f"kbit: warning: study.exclude={dict(exclusion)} leaves out no point of the grids", file=sys.stderr)


def _matches(values: Values, exclusion: Mapping[str, Any]) -> bool:
    """Whether every key of the exclusion has its value, or one of its list of values."""
    for key, wanted in exclusion.items():
        value: Any = values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                allowed = f"; allowed are {', '.join(value)}" if isinstance(value, dict) else ""
                raise ValueError(f"study.exclude={dict(exclusion)}: no key {key!r}{allowed}")
            value = value[part]
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _write(value: Any) -> str:
    """Return a YAML value as Hydra's command line has it; a list is a sweep."""
    if isinstance(value, list):
        return ",".join(_write(item) for item in value)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
