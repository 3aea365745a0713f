"""Configurations from plain values: from Hydra, and from stored JSON."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, TypeVar

from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig


def read_experiment(values: dict[str, Any]) -> Experiment:
    """Return the experiment of a record."""
    quant, evaluation = QuantConfig.from_json(values["quant"]), build(EvalConfig, values["eval"])
    return Experiment(ModelConfig(**values["model"]), quant, evaluation)


T = TypeVar("T")


Values = dict[str, Any]  # of a configuration: nested


def build(cls: type[T], values: Values) -> T:
    """Return a dataclass, nested ones included, from the values of its fields, which its own checks then see."""
    types = _field_types(typing.cast(Any, cls))
    return cls(**{k: build(types[k], v) if dataclasses.is_dataclass(types[k]) else v for k, v in values.items()})


@functools.cache
def _field_types(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)
