"""Every YAML of conf/ and sweeps/ composes, is valid, and says the same as the code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from hydra_state import config_store_kept
from omegaconf import DictConfig, OmegaConf

from kbit.cli.hydra.app import register_schema
from kbit.cli.hydra.arguments import find_launchers
from kbit.experiments.config import RunConfig
from kbit.numerics.quantizer import fake_quantize

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted(path.relative_to(ROOT / "sweeps").with_suffix("") for path in (ROOT / "sweeps").rglob("*.yaml"))
QUANTS = sorted(path.stem for path in (ROOT / "conf" / "quant").glob("*.yaml"))
TRAININGS = sorted(path.stem for path in (ROOT / "conf" / "train").glob("*.yaml"))
EVALS = sorted(path.stem for path in (ROOT / "conf" / "eval").glob("*.yaml"))
SWEEPERS = sorted(path.stem for path in (ROOT / "conf" / "hydra" / "sweeper").glob("*.yaml"))
LAUNCHERS = sorted(path.stem for path in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
HELPS = sorted(path.stem for path in (ROOT / "conf" / "hydra" / "help").glob("*.yaml"))
TESTED = {"run", *(f"eval/{n}" for n in EVALS), *(f"hydra/launcher/{n}" for n in LAUNCHERS)} | {
    *(f"hydra/help/{n}" for n in HELPS),
    *(f"hydra/sweeper/{n}" for n in SWEEPERS),
    *(f"quant/{n}" for n in QUANTS),
    *(f"train/{n}" for n in TRAININGS),
    "quant/train/weights",
}


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    """Hydra as `kbit run` starts it."""
    with config_store_kept(), initialize_config_module(version_base="1.3", config_module="kbit.conf"):
        register_schema()
        yield


def compose_config(*overrides: str) -> DictConfig:
    """Compose as the command line does."""
    return compose("run", list(overrides))


def to_run_config(config: DictConfig) -> RunConfig:
    """Convert as kbit.cli.run does, but raise."""
    run_config = OmegaConf.to_object(config)
    assert isinstance(run_config, RunConfig)
    return run_config


def test_every_yaml_of_conf_is_tested_here() -> None:
    found = {str(path.relative_to(ROOT / "conf").with_suffix("")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert found == TESTED


def test_there_are_studies() -> None:
    assert SWEEPS


def test_defaults_are_those_of_the_code() -> None:
    assert to_run_config(compose_config()) == RunConfig()


def test_run_yaml_names_every_key() -> None:
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "run.yaml"))
    assert isinstance(written, dict)
    written["quant"] = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "quant" / "default.yaml"))
    written["train"] = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "train" / "none.yaml"))
    named = {key for key in written if key not in {"defaults", "hydra"}} | {"eval"}
    assert named == {field.name for field in dataclasses.fields(RunConfig)}
    for section in ("model", "quant", "train", "ray", "study"):
        assert set(written[section]) == {f.name for f in dataclasses.fields(getattr(RunConfig(), section))}


@pytest.mark.parametrize("name", QUANTS)
def test_every_preset_quantizes_as_its_file_says(name: str) -> None:
    config = to_run_config(compose_config(f"quant={name}"))
    composed = json.loads(json.dumps(dataclasses.asdict(config.quant)))
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "quant" / f"{name}.yaml"))
    assert isinstance(written, dict)
    for key, value in written.items():
        ours = composed[str(key)]
        assert ({part: ours[part] for part in value} if isinstance(value, dict) else ours) == value
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    error = (fake_quantize(x, config.quant.spec) - x).pow(2).mean().sqrt().item()
    assert error < 0.5 * 2.0 ** (3 - config.quant.bits)  # each further bit halves the error of 3-bit, at worst 0.5


@pytest.mark.parametrize("name", TRAININGS)
def test_training_composes(name: str) -> None:
    train = to_run_config(compose_config(f"train={name}")).train
    assert bool(train.steps) == (name != "none")


@pytest.mark.parametrize("name", EVALS)
def test_evaluation_composes(name: str) -> None:
    assert to_run_config(compose_config(f"eval={name}")).eval.tasks


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_composes_and_is_kbits(name: str) -> None:
    config = compose("run", [f"hydra/launcher={name}"], return_hydra_config=True)
    assert config.hydra.launcher._target_ == "hydra_plugins.kbit_launcher.KbitLauncher"


@pytest.mark.parametrize(("launcher", "engine"), [("kbit", "ray"), ("basic", "process")])
def test_launchers_differ_in_their_engine(launcher: str, engine: str) -> None:
    config = compose("run", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert (config.hydra.launcher.engine, config.hydra.launcher.plan_only) == (engine, False)


@pytest.mark.parametrize("name", SWEEPERS)
def test_sweeper_composes_and_is_kbits(name: str) -> None:
    config = compose("run", [f"hydra/sweeper={name}"], return_hydra_config=True)
    assert config.hydra.sweeper._target_ == "hydra_plugins.kbit_launcher.KbitSweeper"


@pytest.mark.parametrize("name", HELPS)
def test_help_composes(name: str) -> None:
    assert "kbit run" in compose("run", [f"hydra/help={name}"], return_hydra_config=True).hydra.help.header


@pytest.mark.parametrize(
    "override",
    ["quant.bitz=4", "modle.name=x", "eval.task=piqa", "ray.workers=2", "result=x", "seeds=1"],
)
def test_unknown_key_is_refused(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=override.partition("=")[0]):
        compose_config(override)


@pytest.mark.parametrize(
    "override",
    ["quant.bits=four", "quant.bits=4.5", "eval.limit=all", "ray.num_workers=two", "fail_fast=maybe", "eval.tasks=3"],
)
def test_wrong_type_is_refused(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=override.partition("=")[0]):
        compose_config(override)


@pytest.mark.parametrize("override", ["quant.data_type=flaot", "quant.bits=9", "device=gpu", "eval.limit=0"])
def test_wrong_value_is_refused_when_converted(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"{key.rpartition('.')[2]}='?{value}"):
        to_run_config(compose_config(override))


def test_null_is_the_whole_tensor() -> None:
    assert to_run_config(compose_config("quant.block_size=null")).quant.block_size is None


@pytest.mark.parametrize("name", SWEEPS, ids=str)
def test_study_is_a_multirun_on_workers_or_one_at_a_time(name: Path) -> None:
    """Hydra alone ignores a launcher chosen in a file of sweeps/. kbit applies it, and only a study of time has one."""
    config = compose("run", [f"+sweeps={name}"], return_hydra_config=True)
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.study.grids or config.study.unite
    chosen = find_launchers([f"+sweeps={name}"])
    assert set(chosen.values()) == ({"basic"} if config.eval.speed.measure else set())
