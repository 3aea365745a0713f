"""What an experiment measures in a round, and how it joins what earlier rounds measured (see order)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.measurement import TaskRecord
from kbit.evaluation.rounds.order import LAST, Places, list_places


class RoundsError(ValueError):
    """An experiment cannot be measured in rounds, or cannot go on from earlier ones. Without them it is no failure."""


@dataclass(frozen=True)
class SampledPart:
    """How far a part of an evaluation was measured.

    Attributes:
        part: tasks or text.
        rounds: the number of rounds, of which each measures more of the items (order.SHARES).
        totals: the number of all items of each task, or of all windows of the text.
    """

    part: str
    rounds: int
    totals: dict[str, int]


@dataclass(frozen=True)
class Sample:
    """Which items an experiment is to have measured in the end, and what was measured of it before.

    Attributes:
        goals: the number of rounds of each part (order.PARTS). Parts without a goal are measured in full.
        done: the number of rounds of each part that were measured before.
        known: the values measured before, by task and metric, in the order of the items.
        tasks: the records of the tasks measured before, by name.
        weights_hash: the hash of the weights that were measured before. "" is none.
    """

    goals: Mapping[str, int] = field(default_factory=dict)
    done: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[tuple[str, str], NDArray[np.float64]] = field(default_factory=dict)
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)
    weights_hash: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether all items are measured at once, as without rounds."""
        return self.is_last and not any(self.done.values())

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to be measured after this."""
        return all(rounds == LAST for rounds in self.goals.values())

    def list_new(self, part: str, total: int) -> Places:
        """Return the places, ascending, of the items to measure now."""
        before = list_places(total, self.done.get(part, 0))
        return np.setdiff1d(list_places(total, self.goals.get(part, LAST)), before)

    def join(self, part: str, task: str, total: int, values: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
        """Return the values of each metric in the order of the items, those measured before among them.

        Args:
            part: the part that the task belongs to.
            task: the task or text.
            total: the number of all its items.
            values: the values of the items of list_new by metric, none if there are no such items.

        Raises:
            RoundsError: the metrics are not those that were measured before.
        """
        before = {metric: known for (name, metric), known in self.known.items() if name == task}
        places = [list_places(total, self.done.get(part, 0)), self.list_new(part, total)]
        if before and values and before.keys() != values.keys():
            raise RoundsError(f"{task!r} now measures {sorted(values)}, and {sorted(before)} in earlier rounds")
        order = np.argsort(np.concatenate(places))
        joined = {name: [*before.get(name, ()), *values.get(name, ())] for name in before or values}
        return {name: np.asarray(found, dtype=np.float64)[order].tolist() for name, found in joined.items()}

    def describe(self, part: str, totals: dict[str, int]) -> tuple[SampledPart, ...]:
        """Return how far a part is measured, or nothing where no part will be left."""
        return () if self.is_last else (SampledPart(part, self.goals.get(part, LAST), totals),)


WHOLE: Final = Sample()
