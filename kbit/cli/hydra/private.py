"""Everything that reaches into private parts of Hydra and OmegaConf, so that an upgrade can break this file alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from kbit.lean_private import replaced


def find_basic_sweeper() -> Any:
    """Return the class of Hydra's own sweeper.

    It is looked up when it is needed, because Hydra imports its plugins a second time when it loads them. A class from
    before is no longer the one whose methods run.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper


def list_combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of each job of a sweep: every combination of the values that the overrides give."""
    batches: list[list[list[str]]] = find_basic_sweeper().split_arguments(list(overrides), None)
    return batches[0]


def make_writable(node: Any) -> None:
    """Lift the read-only flag that OmegaConf puts on frozen dataclasses, so that overrides can be applied."""
    node._set_flag("readonly", None)
    for key in node if isinstance(node, DictConfig) else ():
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            make_writable(child)


def forget_basic_launcher() -> None:
    """Take the schema of Hydra's own basic launcher out of the store of schemas.

    Hydra would check conf/hydra/launcher/basic.yaml against it, which describes a launcher of kbit's. The command line
    calls this when it runs. The modules of hydra_plugins do not, because every Hydra application imports them.
    """
    Plugins.instance()  # registers Hydra's launchers
    ConfigStore.instance().repo["hydra"]["launcher"].pop("basic.yaml", None)


@contextmanager
def composed_once(arguments: Sequence[str]) -> Iterator[None]:
    """Let Hydra compose the configuration of plain arguments once.

    Hydra composes it twice, the first time only to read hydra.mode, which takes a quarter of a second. No argument that
    names neither Hydra nor a study can set this, and then Hydra goes by the flag -m.
    """
    from hydra._internal.hydra import Hydra

    flags = ("-m", "--multirun")
    is_plain = not any(
        (argument.startswith("-") and argument not in flags) or "hydra" in argument or "sweeps" in argument
        for argument in arguments
    )
    with replaced(Hydra, get_mode=lambda *_, **__: None) if is_plain else nullcontext():
        yield
