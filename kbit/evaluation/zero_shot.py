"""Evaluate a model on lm-eval tasks, zero-shot or after examples, and measure from the items, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kbit.data.lm_eval_private import apply_filters
from kbit.data.task_groups import TaskGroup
from kbit.data.task_rows import check_rows
from kbit.data.tasks import LoadedTask, errors_named, load_tasks
from kbit.evaluation.measure import Measure, Measured, Subject, check_read
from kbit.evaluation.measurement import (
    ItemValues,
    Measurement,
    TaskRecord,
    average,
    encode_items,
    exponentiate,
    mean_accuracy,
    measure_accuracy,
    measure_mean,
)
from kbit.evaluation.rounds.order import TASKS
from kbit.evaluation.rounds.sample import WHOLE, RoundsError, Sample
from kbit.evaluation.scorer import Asked, Scorer
from kbit.models.hflm_private import Request
from kbit.silence import silence_libraries

# So many tokens of a task's first request are recorded: enough to see a tokenizer's or a prompt's fault.
FIRST_TOKENS: Final = 64


@dataclass(frozen=True)
class PreparedTask:
    """A task with its prompts rendered, so that every variant of a model is asked the same.

    Attributes:
        loaded: the task.
        instances: lm-eval's requests, in order.
    """

    loaded: LoadedTask
    instances: list[Any]

    def list_items(self) -> list[int]:
        """Return the number of each item within the task's documents, in order."""
        return list(dict.fromkeys(instance.doc_id for instance in self.instances))


@dataclass(frozen=True)
class Prompting:
    """How tasks are asked.

    Attributes:
        num_fewshot: the number of examples before each question. None leaves it to the task.
        chat: the chat template of the model's tokenizer, which every prompt goes through. None: none.
    """

    num_fewshot: int | None = None
    chat: str | None = None


@dataclass
class PreparedTasks:
    """The tasks and tokens that the models of a study share.

    Attributes:
        tasks: the tasks by (names, what identifies their content, limit, how they are asked).
        tokenizer: the tokenizer that made the tokens, see Scorer.identify_tokenizer. Only the last one's tokens are
            kept, as they may take gigabytes.
        tokens: see Scorer.
    """

    tasks: dict[tuple[tuple[str, ...], tuple[str, ...], int | None, Prompting], list[PreparedTask]] = field(
        default_factory=dict
    )
    tokenizer: str = ""
    tokens: dict[Asked, list[Request]] = field(default_factory=dict)

    def tokens_of(self, tokenizer: str) -> dict[Asked, list[Request]]:
        """Return the tokens kept for a tokenizer: none yet if it is unknown, or another one than the last."""
        if tokenizer != self.tokenizer or not tokenizer:
            self.tokenizer, self.tokens = tokenizer, {}
        return self.tokens


@dataclass(frozen=True)
class TaskScores:
    """What was measured on tasks.

    Attributes:
        measurements: every metric of every task, then of every group, then the mean accuracy if several tasks have one.
        items: the correctness of each item, for each accuracy. Of tasks that are not measured in full, the value of
            each measured item for each metric, to go on from.
        truncated: task name -> the number of its requests that lost tokens to the model's context length.
        first_tokens: task name -> the tokens that were sent for its first request. A generation task has none.
    """

    measurements: list[Measurement]
    items: list[ItemValues]
    truncated: dict[str, int]
    first_tokens: dict[str, tuple[int, ...]]


class ZeroShot(Measure):
    """lm-eval's tasks, asked without examples unless eval.num_fewshot or a task says otherwise."""

    name = "zero_shot"
    fields = ("tasks", "limit", "task_path", "num_fewshot", "apply_chat_template")

    def run(self, subject: Subject) -> Measured:
        """Score the tasks of eval.tasks.

        Raises:
            ValueError: the folder of tasks was changed while it was read, or see load_tasks and prepare_task.
            NonFiniteError: a log-likelihood is NaN or infinite.
        """
        if not subject.config.tasks:
            return Measured(records={"tasks": (), "truncated": 0})
        scorer, prepared = subject.scorer, subject.lasting.recall(PreparedTasks)
        scorer.tokens = prepared.tokens_of(scorer.identify_tokenizer())
        tasks, sent_before = _prepare_tasks(subject, prepared), scorer.sent
        scores = score_tasks(scorer, tasks, subject.sample)
        records = tuple(_record_task(task, scores, subject.sample) for task in tasks)
        return Measured(
            scores.measurements,
            scores.items,
            scorer.sent - sent_before,
            {"tasks": records, "truncated": sum(record.truncated for record in records)},
            sampled=subject.sample.describe(TASKS, {task.loaded.name: len(task.list_items()) for task in tasks}),
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    batch_size: int = 32,
    limit: int | None = None,
    task_path: str | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> list[Measurement]:
    """Score a model on tasks. With more than one accuracy, their mean comes last.

    A task may have several filters (ways to read an answer). The first filter's metrics have their own names, and the
    others' also have the filter's, as lm-eval writes it: exact_match, "exact_match,flexible-extract".

    Args:
        model: a Hugging Face causal language model.
        tokenizer: the model's tokenizer.
        tasks: one name or several, of tasks, groups or tags. A task is shipped with kbit, in task_path, or lm-eval's
            own when online.
        batch_size: see EvalConfig.
        limit: the number of items of each task, counted from its first item.
        task_path: a folder with the user's own task YAMLs.
        num_fewshot: the number of examples before each question. None asks as the task says, else without.
        apply_chat_template: whether prompts go through the chat template of the tokenizer, as in lm-eval.

    Raises:
        ValueError, FileNotFoundError: see load_tasks and prepare_task.
        NonFiniteError: a log-likelihood is NaN or infinite.
    """
    silence_libraries()
    names = [tasks] if isinstance(tasks, str) else tasks
    scorer = Scorer(model, tokenizer, batch_size)
    chat = scorer if apply_chat_template else None
    prepared = [prepare_task(task, limit, num_fewshot, chat) for task in load_tasks(names, task_path)]
    return score_tasks(scorer, prepared).measurements


def _prepare_tasks(subject: Subject, prepared: PreparedTasks) -> list[PreparedTask]:
    """Return the tasks with their requests. Kept tasks are found by their content, as the experiment's key has it."""
    config, identity = subject.config, subject.identity["tasks"]
    chat = subject.scorer if config.apply_chat_template else None
    asked = Prompting(config.num_fewshot, None if chat is None else find_chat_template(chat))
    wanted = (config.tasks, tuple(identity), config.limit, asked)
    if wanted not in prepared.tasks:
        loaded = load_tasks(config.tasks, config.task_path) if config.tasks else []
        tasks = [prepare_task(task, config.limit, config.num_fewshot, chat) for task in loaded]
        found = subject.names.identify_tasks(config.tasks, config.task_path)
        check_read(f"eval.task_path={config.task_path}", found, identity)
        prepared.tasks[wanted] = tasks
    return prepared.tasks[wanted]


def _record_task(prepared: PreparedTask, scores: TaskScores, sample: Sample) -> TaskRecord:
    """Return the record of a task, in which the requests of earlier rounds count, too."""
    task = prepared.loaded
    sent = scores.first_tokens[task.name][:FIRST_TOKENS]
    truncated = scores.truncated[task.name]
    if before := sample.tasks.get(task.name):
        has_first = 0 in sample.list_new(TASKS, len(prepared.list_items()))
        sent, truncated = sent if has_first else before.first_tokens, truncated + before.truncated
    identity = (task.name, task.version, task.source, task.sha256, task.fingerprint)
    return TaskRecord(*identity, truncated, sent, task.definition_sha256, tuple(group.name for group in task.groups))


def find_chat_template(scorer: Scorer) -> str:
    """Return the chat template of the model's tokenizer.

    Raises:
        ValueError: the tokenizer has none.
    """
    if not getattr(scorer.tokenizer, "chat_template", None):
        raise ValueError(
            f"eval.apply_chat_template: the tokenizer of {scorer.tokenizer.name_or_path} has no chat template"
        )
    return str(scorer.chat_template(True))


def prepare_task(
    loaded: LoadedTask, limit: int | None = None, num_fewshot: int | None = None, chat: Scorer | None = None
) -> PreparedTask:
    """Render the prompts of a task's first `limit` items (None: all), as lm-eval does.

    Args:
        loaded: the task.
        limit: the number of items.
        num_fewshot: the number of examples before each question. None: as many as the task says, or none.
        chat: whose tokenizer's chat template prompts go through, each example as a turn of its own. None: no template.

    Raises:
        ValueError: limit is less than 1, the tokenizer has no chat template, there are not so many examples, or a row
            cannot be asked. The message names the task, the file, the line and the field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not >= 1 (None: all items)")
    task = loaded.task
    with errors_named(loaded.definition):
        check_rows(task, loaded.data.places if loaded.data else {}, limit, is_own=bool(loaded.definition_sha256))
        _set_examples(loaded, num_fewshot)
        task.build_all_requests(
            limit=limit,
            rank=0,
            world_size=1,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=chat is not None,  # lm-eval's default
            chat_template=None if chat is None else chat.apply_chat_template,
            tokenizer_name="" if chat is None else find_chat_template(chat),
        )
    return PreparedTask(loaded, task.instances)


def _set_examples(loaded: LoadedTask, asked: int | None) -> None:
    """Let a task ask after so many examples, which are drawn with lm-eval's default seed.

    Raises:
        ValueError: the task has no examples beside its items, or not so many.
    """
    task, said = loaded.task, loaded.task.get_config("num_fewshot")
    if asked and said == 0:
        raise ValueError(f"eval.num_fewshot={asked}: the task {loaded.name!r} says num_fewshot: 0 in its definition")
    count = said or 0 if asked is None else asked
    if count:
        _check_examples(loaded, count)
    task.set_config(key="num_fewshot", value=count)
    task.set_fewshot_seed(seed=1234)  # lm-eval's default


def _check_examples(loaded: LoadedTask, count: int) -> None:
    config = loaded.task.config
    has_own = config.fewshot_config.split or config.fewshot_config.samples or config.training_split
    if not has_own and config.test_split and not config.validation_split:
        raise ValueError(
            f"eval.num_fewshot={count}: the task {loaded.name!r} has no examples (fewshot_split, training_split or "
            "validation_split), and its items would be among their own"
        )
    there = len(loaded.task.sampler.df)
    if there <= count:
        raise ValueError(f"eval.num_fewshot={count}: the task {loaded.name!r} has {there} examples to draw from")


def score_tasks(scorer: Scorer, tasks: Sequence[PreparedTask], sample: Sample = WHOLE) -> TaskScores:
    """Score the items of a sample of prepared tasks and measure each task and its groups.

    If several have the metric "acc", its mean comes last. In the mean a group that measures acc counts as one task.

    Raises:
        ValueError: see _score_task, or a metric that is no mean over items would be measured on some of them.
    """
    values: list[tuple[LoadedTask, str, list[Any]]] = []
    truncated: dict[str, int] = {}
    first_tokens: dict[str, tuple[int, ...]] = {}
    for task in tasks:
        scorer.truncated, scorer.first_tokens = 0, ()
        found = _score_task(scorer, task, task.instances) if sample.is_whole else _score_sample(scorer, task, sample)
        values += [(task.loaded, metric, of_items) for metric, of_items in found.items()]
        truncated[task.loaded.name], first_tokens[task.loaded.name] = scorer.truncated, scorer.first_tokens
    measurements = [measurement for value in values for measurement in _measure(*value)]
    groups = {group.name: group for task in tasks for group in task.loaded.groups}.values()
    measurements += [measurement for group in groups for measurement in _measure_group(group, measurements)]
    counted = _list_counted([task.loaded for task in tasks], measurements)
    accuracies = [m for m in measurements if m.metric == "acc" and m.task in counted]
    if len(accuracies) > 1:
        measurements.append(mean_accuracy(accuracies))
    exactly = not sample.is_last
    kept = [value for value in values if exactly or _is_accuracy(*value[1:])]
    items = [encode_items(task.name, metric, of_items, exactly=exactly) for task, metric, of_items in kept]
    return TaskScores(measurements, items, truncated, first_tokens)


def _list_counted(tasks: Sequence[LoadedTask], measurements: Sequence[Measurement]) -> set[str]:
    """Return the names whose accuracies the mean is of: each task, or the outermost group of its that has one."""
    having = {m.task for m in measurements if m.metric == "acc"}
    return {next((g.name for g in task.groups if g.name in having), task.name) for task in tasks}


def _measure_group(group: TaskGroup, measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the mean over a group's tasks of each metric that the group aggregates, for every filter of it."""
    mine, found = [m for m in measurements if m.task in group.tasks], []
    for metric, by_size in group.metrics:
        for name in dict.fromkeys(m.metric for m in mine if m.metric.partition(",")[0] == metric):
            parts = [m for m in mine if m.metric == name]
            found.append(average(group.name, name, parts, [m.n if by_size else 1 for m in parts]))
    return found


def _score_sample(scorer: Scorer, prepared: PreparedTask, sample: Sample) -> dict[str, list[Any]]:
    """Score the items that a sample adds, and return each metric's values of all items measured so far."""
    numbers, name = prepared.list_items(), prepared.loaded.name
    if prepared.loaded.groups:
        group = prepared.loaded.groups[0].name
        raise RoundsError(f"the group {group!r} has a mean of its own: in rounds, name its tasks in eval.tasks instead")
    asked = {numbers[place] for place in sample.list_new(TASKS, len(numbers))}
    instances = [instance for instance in prepared.instances if instance.doc_id in asked]
    values = _score_task(scorer, prepared, instances) if asked else {}
    for metric, of_items in values.items():
        if not _are_numbers(of_items):
            raise RoundsError(f"{metric} of the task {name!r} is no mean over items: study.until.decided=false")
    return dict(sample.join(TASKS, name, len(numbers), values))


def _score_task(scorer: Scorer, prepared: PreparedTask, asked: list[Any]) -> dict[str, list[Any]]:
    """Ask the model, let lm-eval filter and judge each item, and return each metric's values in item order.

    Args:
        scorer: the model.
        prepared: the task.
        asked: the task's requests to ask, all those of an item or none.

    Raises:
        ValueError: the task has no metric.
    """
    by_type: dict[str, list[Any]] = defaultdict(list)
    for instance in asked:
        instance.resps = []  # those of an earlier variant are dropped
        by_type[instance.request_type] += [instance] * instance.repeats
    for request_type, instances in by_type.items():
        responses = getattr(scorer, request_type)(instances, disable_tqdm=True)
        for instance, response in zip(instances, responses, strict=True):
            instance.resps.append(response)
    task = prepared.loaded.task
    apply_filters(task, asked)
    items: dict[int, list[Any]] = defaultdict(list)
    for instance in asked:
        items[instance.doc_id].append(instance)
    values: dict[str, list[Any]] = defaultdict(list)
    for number, name in enumerate(asked[0].filtered_resps):
        suffix = f",{name}" if number else ""
        for instances in items.values():
            responses = [instance.filtered_resps[name] for instance in instances]
            for metric, value in task.process_results(instances[0].doc, responses).items():
                values[metric + suffix].append(value)
    if not values:
        raise ValueError(f"the task {prepared.loaded.name!r} measures nothing: its metric_list is empty")
    return values


def _measure(loaded: LoadedTask, metric: str, values: list[Any]) -> list[Measurement]:
    """Return a metric's measurement: proportions with Wilson, perplexities in log space, other numbers as a mean.

    A perplexity that float64 cannot hold has none.
    """
    kind = metric.partition(",")[0]  # without a filter
    if not _are_numbers(values):  # such as F1, which only lm-eval can aggregate
        try:
            value = float(loaded.task.aggregation()[kind](values))
        except OverflowError:  # lm-eval's word_perplexity is an exp, too
            return []
        return [Measurement(loaded.name, metric, value, math.nan, math.nan, len(values))]
    if _is_accuracy(metric, values):
        return [measure_accuracy(loaded.name, metric, values)]
    if kind == "perplexity":  # lm-eval keeps the log-likelihood of each item
        return exponentiate(measure_mean(loaded.name, metric, [-value for value in values]), metric)
    return [measure_mean(loaded.name, metric, values)]


def _is_accuracy(metric: str, values: list[Any]) -> bool:
    return metric.startswith("acc") and _are_numbers(values)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)
