"""Hydra as kbit uses it: its schema, its command line, and the configurations that it composes.

Hydra only composes here. What is asked for is returned as requests, and the work begins when Hydra is done.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from kbit.checks import KbitError
from kbit.cli.hydra.arguments import find_launchers, refuse_arguments
from kbit.cli.hydra.compose import Request, build_config, read_values
from kbit.cli.hydra.explain import REFUSALS, explained, list_files
from kbit.cli.hydra.options import write_help
from kbit.cli.hydra.private import composed_once, forget_basic_launcher, make_writable
from kbit.data.presets import list_presets
from kbit.experiments.config import RunConfig, StudyConfig


def compose_requests(arguments: Sequence[str], command: str = "run") -> list[Request]:
    """Return what command-line arguments ask for: one request, or none if they ask for Hydra's help or information.

    There are several requests only if hydra.sweeper.max_batch_size divides a multirun.

    Args:
        arguments: the arguments of `kbit run`.
        command: the command that Hydra's messages name.

    Raises:
        KbitError: Hydra or kbit refuses a key, value, study or group.
        ValueError: a check of the configuration refuses a value.
    """
    register_schema()
    if any(re.match(r"\+{1,2}sweeps(@\w*)?=[^\[]*,", argument) for argument in arguments):
        arguments = as_multirun(arguments)  # several studies are never one run
    refuse_arguments(arguments)
    with explained():
        arguments = [*arguments, *choose_launcher(arguments)]
    flags_first = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))  # argparse insists
    sys.argv = [f"kbit {command}", *flags_first]
    requests: list[Request] = []
    refused: list[Exception] = []

    @hydra.main(version_base="1.3", config_path="pkg://kbit.conf", config_name="run")
    def receive(composed: DictConfig | Request) -> None:
        try:
            requests.append(composed if isinstance(composed, Request) else _request_one(composed))
        except (ValueError, KbitError, *REFUSALS) as error:  # Hydra would print "Error executing job" as well
            refused.append(error)

    with explained(), composed_once(arguments):
        receive()
        for error in refused:
            raise error
    return requests


def choose_launcher(arguments: Sequence[str]) -> list[str]:
    """Return the argument that chooses the launcher that the studies ask for, if the user chooses none.

    Raises:
        KbitError: two studies ask for different launchers.
    """
    asked = find_launchers(arguments)
    if not asked or any(argument.startswith("hydra/launcher=") for argument in arguments):
        return []
    if len(set(asked.values())) > 1:
        choices = ", ".join(f"{path} asks for {launcher}" for path, launcher in sorted(asked.items()))
        raise KbitError(f"{choices}: choose one with hydra/launcher=NAME")
    return [f"hydra/launcher={next(iter(asked.values()))}"]


def as_multirun(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with Hydra's flag -m."""
    return [*([] if {"-m", "--multirun"} & set(arguments) else ["-m"]), *arguments]


def quote_value(text: str) -> str:
    """Return a text as a value on Hydra's command line, where some signs and words stand for something else."""
    if re.fullmatch(r"[A-Za-z_./][\w./:-]*", text) and text.lower() not in ("null", "true", "false", "inf", "nan"):
        return text
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def register_schema() -> None:
    """Give Hydra the schema of every key and value, and the resolvers that the files of conf/ use."""
    schema = OmegaConf.structured(RunConfig)
    make_writable(schema)
    ConfigStore.instance().store(name="run_schema", node=schema)
    forget_basic_launcher()
    OmegaConf.register_new_resolver("kbit.studies", lambda: ", ".join(list_files("sweeps")), replace=True)
    OmegaConf.register_new_resolver("kbit.keys", _describe_keys, replace=True)
    OmegaConf.register_new_resolver("kbit.presets", lambda: ", ".join(list_presets()), replace=True)
    OmegaConf.register_new_resolver("kbit.trainings", lambda: ", ".join(list_files("conf/train")), replace=True)


def _describe_keys(*, _root_: DictConfig) -> str:
    """Return every key with its value in a composed configuration, as text of a template in which $ is special."""
    keys = OmegaConf.create({field.name: _root_[field.name] for field in dataclasses.fields(RunConfig)})
    values: Any = OmegaConf.to_container(keys, resolve=True)
    return write_help(values).replace("$", "$$")


def _request_one(config: DictConfig) -> Request:
    """Return the request for the one experiment of a composed configuration, whose values are checked here."""
    run_config = build_config(read_values(config))
    if run_config.study != StudyConfig():
        raise KbitError("a study is a multirun: add -m, or `hydra: {mode: MULTIRUN}` to its file")
    return Request((run_config,), engine="process")
