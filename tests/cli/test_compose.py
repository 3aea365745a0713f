"""Studies and fast composition: the same configurations as Hydra's own, point by point."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra_state import config_store_kept
from omegaconf import DictConfig, OmegaConf, open_dict

from kbit.cli.compose import Composer, check_union
from kbit.cli.hydra_app import register_schema
from kbit.cli.hydra_private import list_combinations
from kbit.experiments.config import RunConfig
from kbit.experiments.identity import find_key

SWEEPS = Path(__file__).parents[2] / "sweeps"
STUDIES = sorted(str(path.relative_to(SWEEPS).with_suffix("")) for path in SWEEPS.rglob("*.yaml"))


@pytest.fixture(scope="module")
def hydra() -> Iterator[Any]:
    with config_store_kept(), initialize_config_module("kbit.conf", version_base="1.3"):
        register_schema()
        yield GlobalHydra.instance().hydra


@pytest.fixture(scope="module")
def composer(hydra: Any) -> Composer:
    return Composer(lambda overrides: load(hydra, overrides), hydra.config_loader)


def load(hydra: Any, overrides: Sequence[str]) -> DictConfig:
    """Return Hydra's own composition."""
    config: DictConfig = hydra.compose_config("run", list(overrides), RunMode.RUN)
    with open_dict(config):
        config.pop("hydra", None)
    return config


def compose_slowly(hydra: Any, overrides: Sequence[str]) -> RunConfig:
    config = OmegaConf.to_object(load(hydra, overrides))
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quant.bits=3", "quant.data_type=float", "quant.exponent_bits=2"],
        ["quant=nf4_dq", "quant.block_size=null"],
        ["eval=paper", "eval.tasks=[piqa,winogrande]", "eval.limit=7"],
        ["quant.data_type=table", "quant.table=[-1,0,1]", "quant.bits=2"],
        ["model.name=nano-neox-332k", "fail_fast=true", "ray.gpus_per_worker=0.5", "results='a b,c'"],
        ["quant.bits=4", "quant.bits=5"],
        ["+sweeps=nano/bit_level", "quant.block_size=128"],
    ],
)
def test_composition_equals_hydras(hydra: Any, composer: Composer, overrides: list[str]) -> None:
    assert composer.compose(overrides) == compose_slowly(hydra, overrides)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_expands_to_what_hydra_composes(hydra: Any, composer: Composer, study: str) -> None:
    """The first point of each grid and the last of the study, composed by Hydra alone."""
    job = [f"+sweeps={study}"]
    expanded = expand(composer, study)  # raises on a value that is not allowed
    assert find_key(expanded[0].experiment) != find_key(expanded[-1].experiment)
    config = load(hydra, job)
    if config.study.unite:
        parts = [expand(composer, name) for name in config.study.unite]
        assert expanded == list(itertools.chain(*parts))
        return
    points: list[list[str]] = []
    compared: list[int] = []
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    grids: Any = OmegaConf.to_container(config.study.grids)
    for grid in grids or [{}]:
        texts = [
            f"{key}={','.join(map(write_value, value if isinstance(value, list) else [value]))}"
            for key, value in grid.items()
        ]
        compared.append(len(points))
        points += list_combinations(parser.parse_overrides(texts))
    if not config.study.exclude:
        assert len(expanded) == len(points)
        for at in {*compared, len(points) - 1}:
            assert expanded[at] == compose_slowly(hydra, [*job, *points[at]])


@functools.cache
def expand(composer: Composer, study: str) -> list[RunConfig]:
    """Return all points of a study, composed quickly; once, as others unite it."""
    return list(composer.expand([f"+sweeps={study}"]))


def write_value(value: object) -> str:
    """Return a value of a study file as it stands on the command line."""
    return "null" if value is None else str(value)


def study_of(composer: Composer, *overrides: str) -> list[tuple[int, str, int | None]]:
    return [(c.quant.bits, c.quant.data_type, c.quant.exponent_bits) for c in composer.expand(overrides)]


def test_grids_are_united_and_points_excluded(composer: Composer) -> None:
    grids = "study.grids=[{quant.bits:[3,4],quant.data_type:[int,nf]},{quant.bits:'range(3,5)',quant.data_type:float}]"
    points = [(3, "int"), (3, "nf"), (4, "int"), (4, "nf"), (3, "float"), (4, "float")]
    assert [point[:2] for point in study_of(composer, grids)] == points
    exclude = "study.exclude=[{quant.bits:3,quant.data_type:[int,float]}]"
    assert [point[:2] for point in study_of(composer, grids, exclude)] == [
        p for p in points if p not in [(3, "int"), (3, "float")]
    ]


def test_an_excluded_point_need_not_be_valid(composer: Composer) -> None:
    grid = "study.grids=[{quant.data_type:float,quant.bits:[3,4],quant.exponent_bits:[1,2,3]}]"
    with pytest.raises(ValueError, match="exponent_bits=3 does not fit bits=3"):
        study_of(composer, grid)
    exclude = "study.exclude=[{quant.bits:3,quant.exponent_bits:3}]"
    assert [p[::2] for p in study_of(composer, grid, exclude)] == [(3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]


def test_what_the_command_line_sets_stays(composer: Composer) -> None:
    configs = list(composer.expand(["+sweeps=nano/bit_level", "quant.bits=7", "model.name=nano-neox-98k"]))
    assert [(c.quant.bits, c.model.name) for c in configs] == [(7, "nano-neox-98k")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.exclude=[{quant.bit:3}]", "no key 'quant.bit'; allowed are bits, data_type"),
        ("study.exclude=[{quant.bits.x:3}]", "no key 'quant.bits.x'"),
        ("study.unite=[nano/quick]", r"study.unite=\['nano/quick'\] has no study.grids"),
        ("study.grids=[{quant.bits:'range(3,'}]", "grid"),
        ("study.grids=[{quant.bits:[9]}]", "bits=9"),
    ],
)
def test_a_malformed_study_is_refused(composer: Composer, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(composer.expand(["study.grids=[{quant.bits:[3]}]", override]))


def test_a_study_cannot_unite_itself() -> None:
    """As a file that names itself would; the studies that ship do not."""
    study = {"grids": [], "exclude": [], "unite": ["mine"]}
    with pytest.raises(ValueError, match="'mine' unites itself, by way of all > mine"):
        check_union(study, ("all", "mine"))


def test_a_united_study_does_not_see_the_command_lines_union(composer: Composer) -> None:
    configs = list(composer.expand(["+sweeps=nano/all", "study.unite=[nano/quick]", "quant.bits=3"]))
    assert len(configs) == 4


def test_plain_values_are_composed_once(hydra: Any) -> None:
    calls = []

    def count(overrides: Sequence[str]) -> DictConfig:
        calls.append(overrides)
        return load(hydra, overrides)

    composer = Composer(count, hydra.config_loader)
    jobs = [[f"quant.bits={bits}", f"quant.block_size={size}"] for bits in range(2, 9) for size in range(1, 101)]
    assert len({c.quant for job in jobs for c in composer.expand(job)}) == 700
    assert calls == [()]
