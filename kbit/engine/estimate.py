"""Estimates of what a study takes: tokens to score, memory and time. Time is learned from finished experiments.

    cost = (tokens + 3 x trained tokens + allocation's tokens) x parameters
    seconds = median of alike experiments, or that of the nearest cost, in proportion

Experiments are alike if model, evaluation, method, allocation and training are the same. Without a finished one time is
unknown.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

from kbit.data.task_files import EMBEDDED_TASKS, find_local_tasks
from kbit.data.texts import locate_text, read_documents
from kbit.engine.estimate_passes import (
    BACKWARD,
    BYTES,
    USUAL_VOCABULARY,
    AllocationClass,
    estimate_allocation,
    estimate_training,
)
from kbit.evaluation.config import TOKENS_PER_SEQUENCE, EvalConfig
from kbit.experiments.config import Experiment
from kbit.methods.config import QuantConfig
from kbit.models.catalog import family_of
from kbit.models.config import MAX_WINDOW, ModelConfig
from kbit.models.size import STATES_PER_TOKEN, ModelSize, find_size
from kbit.store.filesystem import is_url
from kbit.store.readers import read_results
from kbit.store.results import load_results
from kbit.store.rows import name_model
from kbit.training.config import TrainConfig

_KEPT: Final = 32  # latest durations of alike experiments that count, as a machine's load changes
_ALIKE: Final = ("model", "dtype", "method", "objective", "evaluation", "training")  # columns that tell classes apart
_STORED: Final = 4  # results of alike experiments that are read from a store
# Bytes that a worker takes beside its model. CPU: 0.72 to 0.82 GB, measured with models of 0.2 to 8 million parameters.
# GPU: the driver's context and the libraries' workspaces. This is assumed, because no GPU has been measured.
_PROCESS_BYTES: Final = {"cpu": 800_000_000, "cuda": 1_000_000_000}
# Measured with PIQA and HellaSwag: 5.8 and 6.2 KB for lm-eval's request and its row, 31 and 47 bytes for a token of it
# in the lists that the scorer keeps.
_REQUEST_BYTES, _TOKEN_BYTES = 6_300, 48
# Of each element of a matrix that GPTQ inverts (kbit.methods.gptq.factor_inverse): five copies in float64, three in
# float32.
_FACTOR_BYTES: Final = 5 * 8 + 3 * 4


def estimate_memory(size: ModelSize, experiment: Experiment, device: str) -> int:
    """Estimate the bytes that a worker needs for a model at most, on the GPU if the device is one.

        process + (parameters + embedding) x dtype + tokens at once x states

    On a CPU the parameters count twice, as the weights to restore lie there, and the tasks' requests and the states of
    a calibration text are added. The embedding is copied when the weights are hashed, and calibration adds up products
    of inputs. A training adds what estimate_training says, and an allocation what estimate_allocation says. The
    estimate leaves out a quantizer's own work on one tensor (GPTQ's excepted), and tasks that do not ship with kbit.

    With packed=true the parameters count as _estimate_packed says, and none are kept to be restored.
    """
    kind = device.partition(":")[0]
    width = BYTES[experiment.model.dtype]
    window = min(size.context, MAX_WINDOW)
    tokens = max(window, experiment.eval.batch_size * TOKENS_PER_SEQUENCE[kind])
    copies, beside = 1, 0
    if kind == "cpu":
        copies, beside = 2, _estimate_requests(experiment.eval, size) + _estimate_calibration(experiment, size)
    weights = width * copies * size.parameters
    if experiment.packed_as is not None:
        weights = _estimate_packed(size, experiment.packed_as, width)
    states = width * (_count_embedding(size) + STATES_PER_TOKEN * tokens * size.hidden)
    more = _estimate_sums(experiment.quant, size) + estimate_training(size, experiment.train)
    more += estimate_allocation(size, experiment.quant, width)
    return _PROCESS_BYTES[kind] + weights + states + beside + more


def _count_embedding(size: ModelSize) -> int:
    return size.hidden * (size.vocabulary or USUAL_VOCABULARY)


def _estimate_packed(size: ModelSize, quant: QuantConfig, width: int) -> int:
    """Estimate the bytes of a model that is packed while it is loaded, and of two tensors at hand.

    What has a row for each token stays in the model's dtype, and all else is packed. Of a model that is not here, the
    head counts as one of its own. Methods that see a text, and outlier columns, hold the whole model before it is
    packed. What quant.exclude leaves out is not looked at.

    Args:
        size: the model's size.
        quant: the quantizer.
        width: the bytes of a number in the model's dtype.
    """
    plain = min(size.parameters, 2 * _count_embedding(size) if size.embedded is None else size.embedded)
    bits = Fraction(quant.count_bits((size.hidden, size.hidden)), size.hidden**2)
    packed = math.ceil((size.parameters - plain) * bits / 8) + width * plain
    if quant.needs_whole_model:
        return width * size.parameters + packed
    return packed + 2 * width * (size.largest or max(_count_embedding(size), 4 * size.hidden**2))


def _estimate_requests(evaluation: EvalConfig, size: ModelSize) -> int:
    """Estimate the bytes of the shipped tasks' requests, as lm-eval makes them and the scorer keeps them."""
    total, column = 0.0, _choose_column(size)
    for row in filter(None, map(_shipped_tasks().get, evaluation.tasks)):
        share = min(evaluation.limit or int(row["items"]), int(row["items"])) / int(row["items"])
        total += share * (_REQUEST_BYTES * int(row["requests"]) + _TOKEN_BYTES * int(row[column]))
    return round(total)


def _estimate_calibration(experiment: Experiment, size: ModelSize) -> int:
    """Return the bytes of the hidden states that enter a decoder layer and leave it, for a calibration text."""
    quant, text = experiment.quant, experiment.quant.calibration
    if quant.is_baseline or not quant.traits.needs_text:
        return 0
    length = text.length or min(size.context, MAX_WINDOW)
    return 2 * text.samples * length * size.hidden * BYTES[experiment.model.dtype]


def _estimate_sums(quant: QuantConfig, size: ModelSize) -> int:
    """Return the bytes of a calibration's sums over the inputs of a decoder layer, and of GPTQ's work on the largest.

    A sum over products of inputs is [in, in] in float32. Six matrices have the hidden size as inputs, and one has the
    inner layer's.
    """
    if quant.is_baseline or not quant.traits.needs_text:
        return 0
    inner = size.inner or 4 * size.hidden
    factor = _FACTOR_BYTES * inner**2 if quant.method == "gptq" else 0
    return 4 * (6 * size.hidden**2 + inner**2) + factor


_UNTRAINED: Final = TrainConfig()


class CostClass(NamedTuple):
    """The properties that decide how long an experiment takes. Alike experiments have the same.

    Attributes:
        model: the model.
        evaluation: the evaluation.
        method: the quantization method. The baseline counts as "rtn", rounding to nearest without the rounding.
        train: the training. Seeds and learning rates do not count.
        allocation: what measures the losses of an allocation. Budgets do not count.
    """

    model: ModelConfig
    evaluation: EvalConfig
    method: str
    train: TrainConfig = _UNTRAINED
    allocation: AllocationClass | None = None

    @staticmethod
    def of(experiment: Experiment) -> CostClass:
        """Return the class of an experiment."""
        quant = experiment.quant
        train = _UNTRAINED
        if experiment.train.steps:
            train = dataclasses.replace(experiment.train, seed=0, lr=_UNTRAINED.lr)
        method = "rtn" if quant.is_baseline else quant.method
        return CostClass(experiment.model, experiment.eval, method, train, AllocationClass.of(quant))


class Estimator:
    """Predicts what experiments take from their models' sizes and from what others took.

    Args:
        device: the device that they run on.

    Attributes:
        classify: the function that returns the cost class of an experiment.
        learned: how many durations have been learned.
    """

    classify = staticmethod(CostClass.of)

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._size = functools.cache(find_size)
        self._tokens = functools.cache(estimate_tokens)
        self._seconds: dict[CostClass, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._counted: dict[tuple[str, EvalConfig], int] = {}  # tokens, by family, whose models share a tokenizer
        self.learned = 0

    def learn(self, experiment: Experiment, seconds: float, tokens: int = 0) -> None:
        """Remember what an experiment took, and its tokens if they were counted."""
        self._seconds[self.classify(experiment)].append(seconds)
        self.learned += 1
        if tokens:
            self._counted[family_of(experiment.model.name), experiment.eval] = tokens

    def learn_stored(self, store_path: str, experiments: Iterable[Experiment], threads: int) -> None:
        """Learn from a store's results of these experiments' models, or from other results if there are none.

        Results count if they come from the same kind of device and, on a CPU, the same number of threads. A store
        behind a URL is not read, because each result may be a request there.
        """
        if is_url(store_path):
            return
        try:
            table = read_results(store_path).drop_duplicates("key")
            mine = table[table["model"].isin({name_model(experiment.model) for experiment in experiments})]
            alike = (table if mine.empty else mine).groupby([*_ALIKE], dropna=False)
            results = list(load_results(store_path, set(alike.tail(_STORED)["key"])))
        except (ValueError, OSError):  # there is no store yet, or a damaged file, which readers of the store will name
            return
        for result in results:
            on_cpu = result.device.endswith("threads")
            if on_cpu == (self._device == "cpu") and (result.threads == threads or not on_cpu):
                self.learn(result.experiment, result.seconds_quantize + result.seconds_evaluate, result.tokens)

    def count_tokens(self, alike: CostClass) -> int | None:
        """Return the number of tokens that an experiment sends to the model, or None if it cannot be told."""
        counted = self._counted.get((family_of(alike.model.name), alike.evaluation))
        size = self._size(alike.model.name, alike.model.size)
        return counted or (None if size is None else self._tokens(alike.evaluation, size))

    def cost(self, alike: CostClass) -> float:
        """Return (tokens + 3 x trained tokens + allocation's tokens) x parameters. An unknown factor counts as 1."""
        tokens = (self.count_tokens(alike) or 1) + BACKWARD * self.count_trained(alike)
        size = self._size(alike.model.name, alike.model.size)
        tokens += alike.allocation.count_tokens(size) if alike.allocation and size else 0
        return tokens * self.count_parameters(alike.model)

    def count_trained(self, alike: CostClass) -> int:
        """Return the number of tokens that an experiment trains on."""
        size = self._size(alike.model.name, alike.model.size)
        context = alike.train.context or (MAX_WINDOW if size is None else min(MAX_WINDOW, size.context))
        return alike.train.steps * alike.train.batch_size * context

    def cost_of(self, experiment: Experiment) -> float:
        """Return the cost of an experiment."""
        return self.cost(self.classify(experiment))

    def count_parameters(self, model: ModelConfig) -> int:
        """Return the number of a model's parameters, or 1 if it is unknown."""
        size = self._size(model.name, model.size)
        return 1 if size is None else size.parameters

    def predict_memory(self, experiments: Iterable[Experiment]) -> int | None:
        """Return the bytes that a worker needs for the largest experiment, or None if a model's size is unknown."""
        largest = 0
        for experiment in {
            (CostClass.of(e), e.quant.calibration, e.packed_as, e.train): e for e in experiments
        }.values():
            if (size := self._size(experiment.model.name, experiment.model.size)) is None:
                return None
            largest = max(largest, estimate_memory(size, experiment, self._device))
        return largest

    def predict_seconds(self, alike: CostClass) -> float | None:
        """Return how long an experiment takes a worker, or None before one of its method was measured."""
        if alike in self._seconds:
            return statistics.median(self._seconds[alike])
        cost = self.cost(alike)
        ratios = {a: cost / self.cost(a) for a in self._seconds if a.method == alike.method}
        if not ratios:
            return None
        nearest = min(ratios, key=lambda a: abs(math.log(ratios[a])))
        return ratios[nearest] * statistics.median(self._seconds[nearest])

    def predict_time(
        self,
        left: Counter[CostClass],
        workers: int,
        running: Sequence[tuple[CostClass, float]] = (),
        start: float = 0.0,
        share: float = 1.0,
    ) -> str:
        """Return how long workers take for experiments, such as 'about 12 min', or '' if that is unknown.

        Args:
            left: the number of experiments of each class that have not ended.
            workers: the number of workers that share them.
            running: the class of each experiment of `left` that a worker is at, and the seconds since it began.
            start: the seconds until the first experiment begins.
            share: the share of its items that is measured of each experiment.
        """
        waiting = left - Counter(alike for alike, _ in running)
        parts = [(alike, count, 0.0) for alike, count in waiting.items()]
        parts += [(alike, 1, elapsed) for alike, elapsed in running]
        total, longest, unknown = 0.0, 0.0, False
        for alike, count, elapsed in parts:
            seconds = self.predict_seconds(alike)
            unknown |= seconds is None
            remaining = max((seconds or 0.0) * share - elapsed, 0.0)
            total += count * remaining
            longest = max(longest, remaining)
        if not total:
            return ""
        return f"{'at least' if unknown else 'about'} {format_seconds(start + max(total / workers, longest))}"

    def describe(self, experiments: Sequence[Experiment], workers: int | None, start: float = 0.0) -> str:
        """Return what experiments will take, as one line.

        Args:
            experiments: the experiments to run.
            workers: the number of workers that share them, or None if it is not known yet.
            start: the seconds until the first experiment begins.
        """
        left = Counter(map(self.classify, experiments))
        counts = {alike: self.count_tokens(alike) for alike in left}
        tokens = "unknown until the first result"
        if None not in counts.values():
            tokens = f"about {format_count(sum(left[a] * (count or 0) for a, count in counts.items()))}"
        trained = sum(count * self.count_trained(alike) for alike, count in left.items())
        tokens += f", to train on: about {format_count(trained)}" if trained else ""
        time = self.predict_time(left, workers or 1, start=start) or "unknown until the first result"
        if self.learned:
            on = f"{workers or 1} worker{'s' if workers and workers > 1 else ''}"
            begun = f", {format_seconds(start)} of it to start" if start else ""
            time = f"{time} on {on}{begun}, by {self.learned} stored result{'s' if self.learned > 1 else ''}"
        memory = self.predict_memory(experiments)
        space = f"about {memory / 1e9:.1f} GB a worker, by parameters and batch size" if memory else "unknown"
        return f"tokens to score: {tokens}; time: {time}; memory: {space}"


def estimate_tokens(evaluation: EvalConfig, size: ModelSize) -> int | None:
    """Estimate how many tokens are sent to a model. None if a task does not ship with kbit or a text is not here."""
    if evaluation.tasks and (evaluation.num_fewshot or evaluation.apply_chat_template):  # counted without either
        return None
    column = _choose_column(size)
    total = 0.0
    for name in evaluation.tasks:
        row = _shipped_tasks().get(name)
        if row is None or EMBEDDED_TASKS not in find_local_tasks(evaluation.task_path)[name].parents:
            return None
        items = int(row["items"])
        total += int(row[column]) * min(evaluation.limit or items, items) / items
    if evaluation.perplexity is not None:
        of_text = _estimate_text(evaluation, size, column)
        if of_text is None:
            return None
        total += of_text
    return round(total)


def _estimate_text(evaluation: EvalConfig, size: ModelSize, column: str) -> float | None:
    """Estimate how many tokens of the text are sent to a model."""
    most = math.inf
    if evaluation.perplexity_kind == "windows" and evaluation.perplexity_windows is not None:
        most = evaluation.perplexity_windows * min(size.context, MAX_WINDOW)
    if locate_text(str(evaluation.perplexity)) is None:  # assume that a text of the hub is as long as asked for
        return None if math.isinf(most) else most
    return min(most, _count_characters(str(evaluation.perplexity)) / _characters_per_token(column))


@functools.lru_cache(maxsize=64)
def _count_characters(text: str) -> int:
    return sum(map(len, read_documents(text)[0]))


@functools.cache
def _shipped_tasks() -> dict[str, dict[str, str]]:
    """Return the sizes of the shipped tasks with two tokenizers, of 1,024 tokens (nano) and 49,152 (SmolLM2)."""
    with Path(EMBEDDED_TASKS / "tokens.csv").open() as file:
        return {row["task"]: row for row in csv.DictReader(file)}


def _choose_column(size: ModelSize) -> str:
    """Return the column of the nearer tokenizer, or of the large one for a model that is not here."""
    return "tokens_1024" if size.vocabulary and size.vocabulary < math.sqrt(1024 * 49152) else "tokens_49152"


@functools.cache
def _characters_per_token(column: str) -> float:
    rows = _shipped_tasks().values()
    return sum(int(row["characters"]) for row in rows) / sum(int(row[column]) for row in rows)


def format_seconds(seconds: float) -> str:
    """Return a duration in the unit that makes it a number of two digits: 45 s, 12 min, 30 h, 5 days."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{max(seconds / length, 1):.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def format_count(count: int) -> str:
    """Return a count in two or three digits: 950, 31 thousand, 4.2 million."""
    for name, unit in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)
