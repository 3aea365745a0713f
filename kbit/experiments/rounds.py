"""An experiment that is measured in rounds: what a round measures, and how its result joins the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kbit.evaluation.measurement import decode_items
from kbit.evaluation.rounds.order import LAST, TASKS, TEXT
from kbit.evaluation.rounds.sample import WHOLE, Sample
from kbit.experiments.config import Experiment
from kbit.experiments.result import Result


def list_parts(experiment: Experiment) -> list[str]:
    """Return the parts of an experiment's evaluation (order.PARTS)."""
    return [*([TASKS] if experiment.eval.tasks else []), *([TEXT] if experiment.eval.perplexity is not None else [])]


def count_rounds(experiment: Experiment, stopped: Result | None) -> dict[str, int]:
    """Return the rounds that each part of an experiment has been measured in.

    Args:
        experiment: the experiment.
        stopped: what has been measured of it, or None.
    """
    done = {part.part: part.rounds for part in stopped.sampled} if stopped else {}
    return {part: done.get(part, 0) for part in list_parts(experiment)}


def make_sample(experiment: Experiment, goals: Mapping[str, int] | None, stopped: Result | None) -> Sample:
    """Return what is to be measured of an experiment now.

    Args:
        experiment: the experiment.
        goals: the rounds that each part is to have been measured in. None: all. No part goes back.
        stopped: what has been measured of it, or None.
    """
    if goals is None and stopped is None:
        return WHOLE
    done = count_rounds(experiment, stopped)
    asked = {part: LAST if goals is None else max(goals.get(part, 0), rounds) for part, rounds in done.items()}
    if stopped is None:
        return Sample(asked)
    known = {(own.task, own.metric): decode_items(own) for own in stopped.items}
    return Sample(asked, done, known, {task.name: task for task in stopped.tasks})


def join_costs(result: Result, stopped: Result | None) -> Result:
    """Return the result of a round with what the earlier rounds cost.

    Raises:
        ValueError: the earlier rounds measured other weights.
    """
    if stopped is None:
        return result
    if result.weights_hash != stopped.weights_hash:
        raise ValueError(
            f"earlier rounds measured other weights of {result.experiment.label()}, perhaps with another version of "
            f"kbit: without its files stopped/{result.key}-*.json in the store it begins anew"
        )
    summed = ("tokens", "seconds_quantize", "seconds_evaluate")
    costs = {name: getattr(result, name) + getattr(stopped, name) for name in summed}
    return dataclasses.replace(result, **costs)
