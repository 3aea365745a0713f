"""Names of experiments for people: the label, and what else tells experiments apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from kbit.checks import non_defaults
from kbit.evaluation.config import EvalConfig, FeatureConfig, SpeedConfig
from kbit.experiments.config import Experiment


def name_experiment(experiment: Experiment, varied: Iterable[str]) -> str:
    """Return the label of an experiment, with the settings of its evaluation that are named in `varied`."""
    values = {name: getattr(experiment.eval, name) for name in varied}
    return experiment.label() + "".join(f" {name}={show_value(value)}" for name, value in values.items())


def find_varied(experiments: Iterable[Experiment]) -> list[str]:
    """Return the fields of the evaluation that tell experiments apart and that their labels leave out."""
    evaluations = {experiment.eval for experiment in experiments}
    told = ("task_path", "batch_size")  # the label has the path, and the batch size is no part of the key
    names = [field.name for field in dataclasses.fields(EvalConfig) if field.name not in told]
    return [name for name in names if len({getattr(evaluation, name) for evaluation in evaluations}) > 1]


def show_value(value: object) -> str:
    """Return a value of a configuration in a few characters: the items of a list, the non-defaults of a section."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, FeatureConfig | SpeedConfig):
        return ",".join(f"{name}={item}" for name, item in non_defaults(value, type(value)()).items()) or "default"
    return str(value)
