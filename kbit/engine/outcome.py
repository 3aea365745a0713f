"""How an experiment ended, as a worker tells it to whoever runs the sweep."""

from __future__ import annotations

from dataclasses import dataclass

from kbit.experiments.config import Experiment


@dataclass(frozen=True)
class Outcome:
    """How one experiment ended.

    Attributes:
        experiment: the experiment that ended.
        error: the reason of its failure, or "" if its result is in the store.
        stored: whether the store took the result or the failure. If not, going on would waste work.
        working: the experiments that other workers are at.
        seconds: the time that it took, with the loading of the model if that was needed. 0 if it was not run.
        tokens: the number of tokens that were sent to the model (see Result).
    """

    experiment: Experiment
    error: str
    stored: bool = True
    working: tuple[Experiment, ...] = ()
    seconds: float = 0.0
    tokens: int = 0
