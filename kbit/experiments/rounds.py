"""An experiment that is measured in rounds: what a round measures, and how its result joins the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kbit.evaluation.measurement import decode_items
from kbit.evaluation.rounds.order import LAST, TASKS, TEXT
from kbit.evaluation.rounds.sample import WHOLE, RoundsError, Sample
from kbit.experiments.config import Experiment
from kbit.experiments.result import Result

Goals = Mapping[str, int]  # the rounds that each part of an evaluation is to have been measured in


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


def is_reached(experiment: Experiment, goals: Goals, done: Sequence[int] | None) -> bool:
    """Whether an experiment has been measured in these rounds.

    Args:
        experiment: the experiment, which is not finished.
        goals: the rounds.
        done: the rounds that each of its parts has been measured in. None: none of it has been measured.
    """
    rounds = dict(zip(list_parts(experiment), done or (), strict=done is not None))
    return all(rounds.get(part, 0) >= goal for part, goal in goals.items())


def make_sample(experiment: Experiment, goals: Goals | None, stopped: Result | None) -> Sample:
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
    return Sample(asked, done, known, {task.name: task for task in stopped.tasks}, stopped.weights_hash)


def join_costs(result: Result, stopped: Result | None) -> Result:
    """Return the result of a round with what the earlier rounds cost, and with all that measured it."""
    if stopped is None:
        return result
    summed = ("tokens", "seconds_quantize", "seconds_evaluate")
    costs = {name: getattr(result, name) + getattr(stopped, name) for name in summed}
    return dataclasses.replace(
        result,
        **costs,
        peak_memory_bytes=max(result.peak_memory_bytes, stopped.peak_memory_bytes),
        device=_join_words(stopped.device, result.device),
        versions={
            name: _join_words(stopped.versions.get(name, version), version) for name, version in result.versions.items()
        },
    )


def check_weights(experiment: Experiment, key: str, sample: Sample, weights_hash: str) -> None:
    """Raise RoundsError if the earlier rounds of an experiment measured other weights than it has now."""
    if sample.weights_hash not in ("", weights_hash):
        raise RoundsError(
            f"earlier rounds measured other weights of {experiment.label()}, perhaps with another version of kbit: it "
            f"begins anew after `kbit results delete --where \"key == '{key}'\"`"
        )


def _join_words(earlier: str, now: str) -> str:
    """Return what earlier rounds were measured with, and this one, such as "cpu and cuda"."""
    return earlier if now in earlier.split(" and ") else f"{earlier} and {now}"
