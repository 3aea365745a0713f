"""Hydra as kbit uses it: its schema, its command line, and what is refused before Hydra sees it."""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import sys
import tempfile
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from kbit.cli.explain import find_unknown_key, list_files, refuse_several_studies, run_explained
from kbit.experiments.config import RunConfig, StudyConfig


def run_hydra(arguments: list[str], command: str = "run") -> None:
    """Run Hydra on these command-line arguments, as `kbit run` does."""
    register_schema()
    if any(re.match(r"\+{1,2}sweeps(@\w*)?=[^\[]*,", argument) for argument in arguments):
        arguments = as_multirun(arguments)  # several studies are never one run
    flags_first = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))  # argparse insists
    _refuse(arguments)
    sys.argv = [f"kbit {command}", *flags_first]
    run_explained(_hydra_main, "kbit")


def register_schema() -> None:
    """Tell Hydra the schema that every key and value is checked against, and where it may put its own files."""
    schema = OmegaConf.structured(RunConfig)
    _make_writable(schema)
    ConfigStore.instance().store(name="run_schema", node=schema)
    # Hydra would check conf/hydra/launcher/basic.yaml against the schema of its own launcher of that name. Not in
    # hydra_plugins/, which every Hydra application of the environment imports.
    Plugins.instance()  # registers Hydra's launchers
    ConfigStore.instance().repo["hydra"]["launcher"].pop("basic.yaml", None)
    OmegaConf.register_new_resolver("kbit.scratch", _scratch_folder, replace=True)
    OmegaConf.register_new_resolver("kbit.studies", lambda: ", ".join(list_files("sweeps")), replace=True)
    OmegaConf.register_new_resolver("kbit.presets", lambda: ", ".join(list_files("conf/quant")), replace=True)


@hydra.main(version_base="1.3", config_path="pkg://kbit.conf", config_name="run")
def _hydra_main(config: DictConfig) -> None:
    from kbit.cli.run import run_configs, to_run_config

    run_config = to_run_config(config)
    if run_config.study != StudyConfig():
        sys.exit("kbit: error: a study is a multirun: add -m, or `hydra: {mode: MULTIRUN}` to its file")
    run_configs([run_config], engine="process")


def _refuse(arguments: list[str]) -> None:
    """Exit, before Hydra sees them, if a key is unknown or a study is lost; Hydra's own advice is to add the key."""
    hints = [refuse_several_studies(arguments)]
    for argument in arguments:
        key, is_override, _ = argument.partition("=")
        name = key.lstrip("+~")
        if key == "sweeps":
            hints.append(f"{key}: a ready study is added, not set: +{argument}")
        elif is_override and not key.startswith("-") and not name.startswith(("hydra", "sweeps")) and "@" not in name:
            hints.append(find_unknown_key(name))
    if any(hints):
        sys.exit("\n".join(f"kbit: error: {hint}" for hint in hints if hint))


def as_multirun(arguments: list[str]) -> list[str]:
    return arguments if {"-m", "--multirun"} & set(arguments) else ["-m", *arguments]


def _make_writable(node: Any) -> None:
    """Lift the read-only flag that OmegaConf puts on frozen dataclasses, so that overrides can be applied."""
    node._set_flag("readonly", None)
    for key in node if isinstance(node, DictConfig) else ():
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _make_writable(child)


@functools.cache
def _scratch_folder() -> str:
    """Return a temporary folder for the file that Hydra's sweeper insists on writing; removed at exit."""
    folder = tempfile.mkdtemp(prefix="kbit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
