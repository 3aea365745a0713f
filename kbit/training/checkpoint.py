"""Checkpoints of trainings: one file, which is replaced as a whole and belongs to one configuration."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_checkpoint(path: Path, values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write tensors and plain values, so that an interruption at any moment leaves a whole checkpoint.

    Args:
        path: the file.
        values: what read_checkpoint returns.
        config: the settings that decide the training.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may be at the same training
    torch.save({**values, "config": dict(config)}, part)
    part.replace(path)


def read_checkpoint(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was written, or None if there is no file.

    Raises:
        ValueError: the file is damaged, or belongs to another configuration.
    """
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:  # of a file that was cut
        raise ValueError(f"{path} is damaged ({error}): remove it to train from the start") from error
    if saved.get("config") != config:
        raise ValueError(f"{path} is the checkpoint of {saved.get('config')}, not of {config}: remove one of them")
    return saved
