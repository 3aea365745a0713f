"""Which experiment a worker is given next: its own model's, and of a large model several workers' at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from kbit.experiments.config import Experiment
from kbit.models.config import ModelConfig


class Schedule:
    """The experiments that wait, by model, in the order given: largest model first, each text's together.

    A worker keeps to its model. One whose model is done takes the first that nobody has; where there is none, it helps
    with the model of which most work is left for each worker that has it, from the end: there lies another text, of
    which the 16-bit model's states must be computed anyway. So the experiments of a model are shared as its workers get
    on, which is no worse than halving them, whose sizes are known only roughly.

    Args:
        experiments: as make_plan orders them.
        cost: of an experiment, in any unit; 1 makes all alike.
    """

    def __init__(self, experiments: Iterable[Experiment], cost: Callable[[Experiment], float] = lambda _: 1.0) -> None:
        self._cost = cost
        self._waiting: dict[ModelConfig, list[Experiment]] = {}
        self._left: defaultdict[ModelConfig, float] = defaultdict(float)  # cost
        for experiment in experiments:
            self.add(experiment)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, experiment: Experiment) -> None:
        """Let an experiment wait, after the others of its model."""
        self._waiting.setdefault(experiment.model, []).append(experiment)
        self._left[experiment.model] += self._cost(experiment)

    def take(self, last: Experiment | None, held: Counter[ModelConfig]) -> Experiment:
        """Remove and return the next experiment for a worker.

        Args:
            last: that this worker ran; None if it has no model.
            held: how many workers have each model, this one included.
        """
        if last is not None and last.model in self._waiting:
            waiting = self._waiting[last.model]
            texts = [e.eval.perplexity for e in waiting]
            return self._remove(last.model, texts.index(last.eval.perplexity) if last.eval.perplexity in texts else 0)
        for model in self._waiting:
            if not held[model]:
                return self._remove(model, 0)
        # dividing also by the worker to come, so that it goes where it saves most
        model = max(self._waiting, key=lambda m: self._left[m] / held[m] / (held[m] + 1))
        return self._remove(model, -1)

    def _remove(self, model: ModelConfig, at: int) -> Experiment:
        experiment = self._waiting[model].pop(at)
        self._left[model] -= self._cost(experiment)
        if not self._waiting[model]:
            del self._waiting[model], self._left[model]
        return experiment
