"""The order of a sweep: which experiment a worker is given next. Several workers may share a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from kbit.experiments.config import Experiment
from kbit.models.config import ModelConfig


class Schedule:
    """The experiments that wait, by model, in the order given: largest model first, each text's together.

    A worker keeps its model as long as an experiment of it waits. Then it takes the first model that no worker holds.
    If there is none, it joins the model with the most remaining cost per worker and starts from the end of its queue.
    There lies another text, for which the 16-bit model's states must be computed anyway. The workers of a model thus
    share its experiments as they get on. That is no worse than halving the queue, because costs are known only roughly.

    Args:
        experiments: the experiments in the order of make_plan.
        cost: a function that returns the cost of an experiment in any unit. By default all cost the same.
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
        """Append an experiment to those of its model."""
        self._waiting.setdefault(experiment.model, []).append(experiment)
        self._left[experiment.model] += self._cost(experiment)

    def take(self, last: Experiment | None, held: Counter[ModelConfig]) -> Experiment:
        """Remove and return the next experiment for a worker.

        Args:
            last: the experiment that this worker ran last, or None if it holds no model.
            held: the number of workers that hold each model, this one included.
        """
        if last is not None and last.model in self._waiting:
            waiting = self._waiting[last.model]
            texts = [e.eval.perplexity for e in waiting]
            return self._remove(last.model, texts.index(last.eval.perplexity) if last.eval.perplexity in texts else 0)
        for model in self._waiting:
            if not held[model]:
                return self._remove(model, 0)
        # the division by the number after it joined sends the worker where it saves most
        model = max(self._waiting, key=lambda m: self._left[m] / held[m] / (held[m] + 1))
        return self._remove(model, -1)

    def _remove(self, model: ModelConfig, at: int) -> Experiment:
        experiment = self._waiting[model].pop(at)
        self._left[model] -= self._cost(experiment)
        if not self._waiting[model]:
            del self._waiting[model], self._left[model]
        return experiment
