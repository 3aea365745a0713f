"""Studies and fast composition: the same configurations as Hydra's own, point by point."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import random
import re
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

from kbit.checks import KbitError
from kbit.cli.hydra.app import compose_requests, register_schema
from kbit.cli.hydra.compose import Composer, check_union
from kbit.cli.hydra.explain import REFUSALS, explain
from kbit.cli.hydra.private import list_combinations
from kbit.experiments.config import RunConfig
from kbit.experiments.identity import find_key

SWEEPS = Path(__file__).parents[3] / "sweeps"
STUDIES = sorted(str(path.relative_to(SWEEPS).with_suffix("")) for path in SWEEPS.rglob("*.yaml"))


@pytest.fixture(scope="module")
def hydra() -> Iterator[Any]:
    with config_store_kept(), initialize_config_module("kbit.conf", version_base="1.3"):
        register_schema()
        yield GlobalHydra.instance().hydra


@pytest.fixture
def config_store() -> Iterator[None]:
    """Hydra as a command finds it and leaves it."""
    instance, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    with config_store_kept():
        yield
    GlobalHydra.instance().hydra = instance


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
    """The last point of each, composed by Hydra alone. Of a united study the first 100."""
    job = [f"+sweeps={study}"]
    config = load(hydra, job)
    if config.study.unite:
        parts = itertools.chain(*(expand(composer, name) for name in config.study.unite))
        assert list(itertools.islice(composer.expand(job), 100)) == list(itertools.islice(parts, 100))
        return
    expanded = expand(composer, study)  # raises on a value that is not allowed
    assert find_key(expanded[0].experiment) != find_key(expanded[-1].experiment)
    points: list[list[str]] = []
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    grids: Any = OmegaConf.to_container(config.study.grids)
    for grid in grids or [{}]:
        texts = [
            f"{key}={','.join(map(write_value, value if isinstance(value, list) else [value]))}"
            for key, value in grid.items()
        ]
        points += list_combinations(parser.parse_overrides(texts))
    if not config.study.exclude:
        assert len(expanded) == len(points)
        assert expanded[-1] == compose_slowly(hydra, [*job, *points[-1]])


@functools.cache
def expand(composer: Composer, study: str) -> list[RunConfig]:
    """Return all points of a study, composed quickly; once, as others unite it."""
    return list(composer.expand([f"+sweeps={study}"]))


def write_value(value: object) -> str:
    """Return a value of a study file as it stands on the command line."""
    if isinstance(value, list | dict):  # as JSON, but that Hydra's keys have no quotes and its text no escapes
        return re.sub(r'"(\w+)": ', r"\1:", json.dumps(value)).replace(r"\\", "\\")
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
    study = {"grids": [], "exclude": [], "unite": ["mine"], "until": {"decided": False}}
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
    jobs = [[f"quant.bits={bits}", f"quant.block_size={size}"] for bits in range(2, 9) for size in range(1, 11)]
    assert len({c.quant for job in jobs for c in composer.expand(job)}) == 70
    assert calls == [()]


# ---- malformed values

KEYS = (
    "model", "model.name", "quant.bits", "quant.data_type", "quant.table", "quant.block_size", "quant.gptq.damping",
    "quant.outlier_fraction", "quant.calibration.text", "eval.tasks", "eval.limit", "eval.perplexity", "eval.features",
    "eval.features.magnitude", "eval.measures", "results", "device", "ray", "ray.num_workers", "ray.gpus_per_worker",
    "fail_fast", "study", "study.grids", "study.exclude", "study.unite",
)  # fmt: skip
VALUES = (
    "'???'", "???", "[[a]]", "[{a:1}]", "'${oc.env:HOME}'", "null", "123", "true", "-1", "1e400", "nan", "''", "{}",
    "[]", "{a:{b:1}}", "'${nowhere}'", "'${quant.bits}'", "'${oc.env:NOT_THERE}'", "[null]", "[1,2]", "a/../b", "0x10",
    "99999999999999999999999", "'${'", "range(0,3)", "int(3.5)", "~", "9" * 400, "a" * 4000,
)  # fmt: skip
REFUSED = (ValueError, OSError, KbitError, *REFUSALS)


@pytest.mark.parametrize("seed", range(3))
def test_malformed_values_are_refused_or_taken(composer: Composer, seed: int) -> None:
    """Never is there an error of another kind. What is taken has a key."""
    chance = random.Random(seed)
    outcomes = collections.Counter[str]()
    for _ in range(30):
        override = f"{chance.choice(KEYS)}={chance.choice(VALUES)}"
        try:
            taken = [find_key(config.experiment) for config in composer.expand([override])]
            outcomes["taken"] += bool(taken)
        except REFUSED as refused:
            outcomes["refused" if explain(refused) else f"{override} without a word"] += 1
        except Exception as error:
            raise AssertionError(override) from error
    assert set(outcomes) == {"refused", "taken"}


def test_where_to_write_may_come_from_the_environment(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_FOLDER", "/tmp/somewhere")
    assert composer.compose(["results='${oc.env:A_FOLDER}'"]).results == "/tmp/somewhere"
    for override in ("eval.perplexity='${results}'", "quant.include='${oc.env:A_FOLDER}'"):
        with pytest.raises(ValueError, match="would be written into every record"):
            composer.compose(["results='${oc.env:A_FOLDER}'", override])


# ---- a user's own folder of configurations


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A group `exp`, studies with a launcher of their own, and one that unites two."""
    files = {
        "exp/a": "quant: {bits: 3}",
        "exp/b": "quant: {bits: 5}",
        "model/mine": "model: {name: nano-neox-332k}\nquant: {bits: 6}",
        "sweeps/basic": "defaults: [{override /hydra/launcher: basic}]\nstudy: {grids: [{quant.bits: [3, 4]}]}",
        "sweeps/kbit": "defaults: [{override /hydra/launcher: kbit}]\nstudy: {grids: [{quant.bits: [5]}]}",
        "sweeps/plain": "study: {grids: [{quant.bits: [6]}]}",
        "sweeps/both": "study: {unite: [basic, plain]}",
        "sweeps/torn": "study: {unite: [basic, kbit]}",
        "sweeps/sweeper": "defaults: [{override /hydra/sweeper: basic}]",
    }
    for name, content in files.items():
        path = tmp_path / "own" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{content}\n")
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("arguments", "engine", "bits"),
    [
        (["+sweeps=basic"], "process", [3, 4]),
        (["+sweeps=basic", "hydra/launcher=kbit"], "ray", [3, 4]),
        (["+sweeps=kbit"], "ray", [5]),
        (["+sweeps=plain"], "ray", [6]),
        (["+sweeps=basic,plain"], "process", [3, 4, 6]),
        (["+sweeps=both"], "process", [3, 4, 6]),
        (["+exp=a,b"], "ray", [3, 5]),
        (["+exp=a", "quant.bits=7,8"], "ray", [7, 8]),
        (["+model=mine"], "ray", [6]),
    ],
    ids=str,
)
def test_a_folder_of_ones_own_has_groups_and_launchers(
    own_folder: Path, config_store: None, arguments: list[str], engine: str, bits: list[int]
) -> None:
    (request,) = compose_requests(["-m", "--config-dir", str(own_folder), *arguments])
    assert (request.engine, [config.quant.bits for config in request.configs]) == (engine, bits)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("+sweeps=basic,kbit", "basic.yaml asks for basic, .*kbit.yaml asks for kbit: choose one with hydra/launcher="),
        ("+sweeps=torn", "choose one with hydra/launcher="),
        ("+sweeps=sweeper", "sweeper.yaml: override /hydra/sweeper: basic has no effect"),
        ("+exq=a", "exq: no key 'exq'"),
        ("+exp=c", "exp=c: there is no exp/c; allowed are a, b"),
    ],
)
def test_what_a_folder_of_ones_own_cannot_ask(own_folder: Path, config_store: None, argument: str, words: str) -> None:
    with pytest.raises(KbitError, match=words):
        compose_requests(["-m", "--config-dir", str(own_folder), argument])
