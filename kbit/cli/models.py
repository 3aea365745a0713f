"""`kbit models`: the models that have a short name."""

from __future__ import annotations

import argparse


def add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit models`."""
    parser = commands.add_parser(
        "models",
        help="list the models that have a short name",
        description="List the models that have a short name.",
    )
    parser.set_defaults(run=list_models)


def list_models(options: argparse.Namespace) -> None:
    """Print each short name with its family and the place of its weights."""
    from kbit.models.catalog import STUDIED

    for model in STUDIED.values():
        print(f"{model.name:24} {model.family:14} {model.hub_id or 'embedded'}")
