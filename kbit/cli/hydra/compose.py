"""Studies as unions of grids, and their configurations composed fast.

Hydra takes 30 ms or more to compose a job's configuration, and spends nearly all of it on choosing files. Here Hydra
composes each distinct choice of files once. Plain values (quant.bits=4) are then set on a copy of that configuration.
OmegaConf still checks each distinct value against the schema and converts it, once, and resolves what depends on them.
Overrides that are not plain values take Hydra's own way.
"""

from __future__ import annotations

import copy
import functools
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kbit.cli.hydra.explain import STUDY_HINT, check_grid, explain
from kbit.cli.hydra.private import list_combinations
from kbit.data.presets import list_presets
from kbit.experiments.check_types import check_types
from kbit.experiments.config import RunConfig, StudyConfig
from kbit.experiments.serialize import Values, from_json
from kbit.methods.options import RUN_TIME
from kbit.numerics.spec import QuantSpec, find_preset

_RECORDED: Final = ("model", "quant", "eval", "train")  # the sections that a record of the store keeps
_OF_UNION: Final = ("sweeps", "study.grids", "study.exclude", "study.unite")  # the studies united have their own
_RUN_TIME_ROLES: Final = tuple(f"quant.{name}" for name in RUN_TIME)


@dataclass(frozen=True)
class Request:
    """What one command asks for: experiments, and how to run them.

    Attributes:
        configs: the configurations of the experiments. Everything but the experiment is taken from the first.
        engine: "ray" runs the experiments on workers. "process" runs them one after the other in this process.
        plan_only: whether to print what would run, and run nothing.
        examine_only: whether to print if all that would be needed can be had here, and run nothing.
    """

    configs: tuple[RunConfig, ...]
    engine: str
    plan_only: bool = False
    examine_only: bool = False


@dataclass(frozen=True)
class _Base:
    """A configuration as Hydra composed it for one choice of files.

    Attributes:
        config: the configuration.
        values: the same as nested dicts.
        interpolates: whether a value depends on others, so that setting one may change two.
    """

    config: DictConfig
    values: Values
    interpolates: bool


class Composer:
    """Composes the configurations of a sweep's jobs.

    Args:
        load: a function that returns Hydra's own composition of overrides, without Hydra's node.
        loader: Hydra's loader, which knows the configuration groups.
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
        """Yield the configuration of one job, or those of the study that it names.

        Keys that the job sets itself keep their values, whatever the study's grids say.

        Args:
            overrides: the job's overrides.
            within: the studies that unite this one.

        Raises:
            ValueError: the schema's checks refuse a value, or a study is not well formed.
            HydraException, OmegaConfBaseException: Hydra refuses these overrides.
        """
        files, _ = self._split(overrides)
        study = self._base(files).values["study"]
        check_study(study)
        if study["unite"]:
            check_union(study, within)
            others = [o for o in overrides if not self._parse(o).key_or_group.startswith(_OF_UNION)]
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
            if not own & {key for grid in study["grids"] for key in grid}:  # else they may concern points not asked for
                _warn_of_unused(unused)
        else:
            yield self.compose(overrides)

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """Return the same configuration as OmegaConf.to_object(Hydra's composition of these overrides).

        It raises what expand raises.
        """
        return _build_point(self._compose_values(overrides), overrides)

    def _compose_values(self, overrides: Sequence[str]) -> Values:
        """Return a configuration's values. They need not be valid together."""
        overrides = [*self._spell_blocks(overrides), *overrides]
        files, plain = self._split(overrides)
        base = self._base(files)
        leaves = [self._leaf(files, override) for override in plain]
        if None in leaves:
            return read_values(self._load(overrides))
        if base.interpolates:
            config = copy.deepcopy(base.config)
            for override in map(self._parse, plain):
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            return read_values(config)
        values = copy_nodes(base.values)
        for path, value in typing.cast(list[tuple[list[str], Any]], leaves):
            node = values
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = value
        return values

    def _spell_blocks(self, overrides: Sequence[str]) -> Iterator[str]:
        """Yield the block size of each named quantizer that is given to a role at run time, and that says none.

        It is meant for the blocks that weights have (nf4), and would have the role's own: one scale for each token.
        """
        for override in map(self._parse, overrides):
            role, name = override.package or "", str(override.value())
            is_named = override.key_or_group == "quant" and role in _RUN_TIME_ROLES and name in list_presets()
            if is_named and "block_size" not in find_preset(name):
                yield f"{role}.block_size={QuantSpec.block_size}"

    def _list_points(self, grid: Mapping[str, Any]) -> list[list[str]]:
        """Return the overrides of each point of a grid. Its values are lists, or text as on Hydra's command line."""
        strings = [f"{key}={_write(value)}" for key, value in grid.items()]
        try:
            points = list_combinations(self._parser.parse_overrides(strings))
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
        return _Base(config, read_values(config), "${" in str(OmegaConf.to_container(config, resolve=False)))

    def _find_leaf(self, files: tuple[str, ...], override: str) -> tuple[list[str], Any] | None:
        """Return the path of an override's key and the value in the schema's type, or None if Hydra refuses it."""
        parsed = self._parse(override)
        section, _, key = parsed.key_or_group.rpartition(".")
        try:
            node = self._base(files).config
            if section and isinstance(inner := OmegaConf.select(node, section), DictConfig):
                node = inner  # its copy knows the whole, and a copy of the whole takes fifty times as long
            else:
                key = parsed.key_or_group
            node = copy.deepcopy(node)
            OmegaConf.update(node, key, parsed.value(), merge=True)
        except OmegaConfBaseException:
            return None  # Hydra's own message names the key and what is allowed
        return parsed.key_or_group.split("."), OmegaConf.select(node, key)


def _build_point(values: Values, point: Sequence[str], hint: str = "") -> RunConfig:
    """Return a point's configuration. The error of a refused one names the point, which may be one of thousands."""
    try:
        return build_config(values)
    except ValueError as error:
        where = f" (at {' '.join(point)}{hint})" if len(point) > 1 else ""
        raise ValueError(f"{error}{where}") from None


def build_config(values: Values) -> RunConfig:
    """Return the configuration with these values.

    Raises:
        ValueError: a value is not of its type, or is refused by the configuration's own checks.
    """
    try:
        check_types(RunConfig, values)
    except TypeError as error:
        raise ValueError(error) from None
    return from_json(RunConfig, values)


def copy_nodes(values: Values) -> Values:
    """Return a copy of nested dicts that shares the values in them."""
    return {key: copy_nodes(value) if isinstance(value, dict) else value for key, value in values.items()}


def read_values(config: DictConfig) -> Values:
    """Return a composed configuration as nested dicts.

    Raises:
        ValueError: records would hold the value of an environment variable.
        OmegaConfBaseException: an interpolation cannot be resolved, or a value is missing.
    """
    check_environment(config)
    return typing.cast(Values, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def check_environment(config: DictConfig) -> None:
    """Raise ValueError if an environment variable is interpolated into what records keep. It may be a secret."""
    values = typing.cast(Values, OmegaConf.to_container(config, resolve=False))
    if "oc.env" not in str(values):
        return
    for section in _RECORDED:
        if "${" in (text := str(values.get(section))) or "oc.env" in text:  # one interpolation may lead to another
            raise ValueError(
                f"{section}: ${{oc.env:...}} would be written into every record, which may be shared; it can stand in "
                "results, device and ray. Where it is no secret, let the shell insert it: model.name=$HOME/model"
            )


def check_study(study: Any) -> None:
    """Raise ValueError if the values of the key `study` are not of their types."""
    try:
        check_types(StudyConfig, study, "study")
    except TypeError as error:
        raise ValueError(f"{error}; {STUDY_HINT}") from None


def check_union(study: Values, within: tuple[str, ...]) -> None:
    """Check a study that unites others.

    Args:
        study: the values of the key `study`.
        within: the names of the studies that unite this one, the outermost first.

    Raises:
        ValueError: the study has points of its own, or unites itself.
    """
    for key in ("grids", "exclude"):
        if study[key]:
            raise ValueError(f"a study with study.unite={study['unite']} has no study.{key}, but here are {study[key]}")
    if study["until"]["decided"]:
        raise ValueError("a study with study.unite has no study.until of its own: give it on the command line")
    if again := sorted(set(study["unite"]) & set(within)):
        raise ValueError(f"study.unite={study['unite']}: {again[0]!r} unites itself, by way of {' > '.join(within)}")


def _warn_of_unused(exclusions: Sequence[Mapping[str, Any]]) -> None:
    for exclusion in exclusions:
        print(f"kbit: warning: study.exclude={dict(exclusion)} leaves out no point of the grids", file=sys.stderr)


def _matches(values: Values, exclusion: Mapping[str, Any]) -> bool:
    """Return whether every key of the exclusion has the excluded value, or one of the excluded values."""
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
    """Return a YAML value as it is written on Hydra's command line. A list becomes a sweep of its items."""
    if isinstance(value, list):
        return ",".join(_write_nested(item) if isinstance(item, list | dict) else _write(item) for item in value)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write_nested(value: Any) -> str:
    """Return a value within a list or mapping. Text is quoted, since a pattern has characters that Hydra reads."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_write_nested(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_write_nested, value))}]"
    return "'" + value.replace("'", "\\'") + "'" if isinstance(value, str) else _write(value)
