"""Whether a study can stop when it knows (study.until.decided): is there a verdict, by means over items, alike for all?

All of this is known before anything is measured, so that no round is measured for nothing.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kbit.data.task_files import find_local_groups, find_local_tags, find_local_tasks, read_plainly
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment, RunConfig, UntilConfig
from kbit.models.catalog import family_of
from kbit.numerics.spec import BASELINE_BITS

# lm-eval's metrics whose value of an item is no number, so that only all items together give one.
_NO_MEANS: Final = (
    "f1", "mcc", "bleu", "chrf", "ter", "brier_score", "likelihood", "word_perplexity", "byte_perplexity",
    "bits_per_byte",
)  # fmt: skip
# What lm-eval measures where a task names no metric.
_DEFAULTS: Final[Mapping[str, tuple[str, ...]]] = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
_MODE: Final = "study.until.decided=true"
_OF_A_POINT: Final = ("bits", "exponent_bits", "float_bias", "seed")  # in which the precisions of a variant may differ
NO_CONTEST: Final = (
    "nothing competes. A contest needs two curves (precisions, data types) of one family, each of two sizes or more"
)


def check_decidable(configs: Sequence[RunConfig]) -> None:
    """Raise ValueError if a study cannot stop when it knows. The message says why, and what to do."""
    experiments, until = [config.experiment for config in configs], configs[0].study.until
    for experiment in experiments:
        if experiment.train.steps:
            raise ValueError(
                f"{_MODE} measures a part of the items, and a training takes its time whatever is measured "
                f"({experiment.label()}): study.until.decided=false"
            )
    for evaluation in dict.fromkeys(experiment.eval for experiment in experiments):
        if why := _find_indivisible(evaluation):
            raise ValueError(f"{_MODE} measures a part of the items, and {why}")
        _check_waited_for(evaluation, until)
    quants, models = {e.quant for e in experiments}, {e.model for e in experiments}
    if len(quants) < 2 or len(models) < 2:
        raise ValueError(
            f"{_MODE} needs something to decide: two quantizers and two sizes of a model, not {len(quants)} and "
            f"{len(models)}"
        )
    _check_alike(experiments)
    _check_contests(experiments, until)


def _find_indivisible(evaluation: EvalConfig) -> str:
    """Return which measure of an evaluation needs all items, and what to do, or nothing."""
    keys = {
        "eval.features.measure": evaluation.features.measure,
        "eval.speed.measure": evaluation.speed.measure,
        "eval.measures": bool(evaluation.measures),
    }
    found = [name for name, is_asked in keys.items() if is_asked]
    if found:
        return f"{found[0]} is no mean over them: leave it out, or study.until.decided=false"
    if evaluation.perplexity is not None and evaluation.perplexity_kind == "rolling":
        return "eval.perplexity_kind=rolling is not divided into windows: eval.perplexity_kind=windows"
    for name, metrics in _list_metrics(evaluation).items():
        if metrics is None:
            return f"the group {name!r} has a mean of its own: name its tasks in eval.tasks instead"
        if found := [metric for metric in metrics if metric in _NO_MEANS]:
            return f"{found[0]} of the task {name!r} is no mean over them: leave it out, or study.until.decided=false"
    return ""


def _list_metrics(evaluation: EvalConfig) -> dict[str, tuple[str, ...] | None]:
    """Return the names of each task's metrics, as far as its definition tells. A group or tag has None."""
    path = evaluation.task_path
    local, groups = find_local_tasks(path), {*find_local_groups(path), *find_local_tags(path)}
    found: dict[str, tuple[str, ...] | None] = {}
    for name in evaluation.tasks:
        if name in groups:
            found[name] = None
        elif name in local:
            found[name] = _read_metrics(read_plainly(local[name]))
        else:
            from kbit.data.tasks import load_tasks  # takes seconds, and check_experiment needs it for such a task, too

            for task in load_tasks([name], path):
                found[task.asked] = None if task.groups else tuple(task.task.aggregation())
    return found


def _read_metrics(definition: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the metrics of a task's definition. Those of one's own code are not known: acc among them."""
    if "class" in definition or "process_results" in definition:
        return ("acc",)
    named = definition.get("metric_list")
    if named is None:
        return _DEFAULTS.get(str(definition.get("output_type", "generate_until")), ())
    return tuple(str(entry.get("metric")) for entry in named)


def _check_waited_for(evaluation: EvalConfig, until: UntilConfig) -> None:
    """Raise ValueError if an evaluation has no value that a verdict is to be known by.

    The verdict by accuracies is that of their mean, which one task alone does not have.
    """
    if "cross_entropy" in until.metrics and evaluation.perplexity is None:
        raise ValueError(f"{_MODE} waits for study.until.metrics=[cross_entropy], and eval.perplexity=null has none")
    if "acc" not in (until.metrics or ("acc",)) or (not evaluation.tasks and not until.metrics):
        return
    having = [name for name, metrics in _list_metrics(evaluation).items() if metrics and "acc" in metrics]
    if len(having) < 2:
        other = "study.until.decided=false" if evaluation.perplexity is None else "study.until.metrics=[cross_entropy]"
        raise ValueError(
            f"{_MODE} decides tasks by the mean of two accuracies (acc) or more, and eval.tasks="
            f"[{','.join(evaluation.tasks)}] has {len(having)}: name more tasks, or {other}"
        )


def _check_alike(experiments: Sequence[Experiment]) -> None:
    """Raise ValueError if experiments of one family are measured in several ways: they cannot be compared."""
    names = [field.name for field in dataclasses.fields(EvalConfig) if field.name != "batch_size"]
    for family, members in _group_families(experiments).items():
        ways = {f"eval.{name}": {str(getattr(e.eval, name)): None for e in members} for name in names}
        ways["model.dtype"] = {str(e.model.dtype): None for e in members}
        for name, values in ways.items():
            if len(values) > 1:
                raise ValueError(
                    f"{_MODE} compares experiments that are measured alike, and those of {family} have {name}="
                    f"{' and '.join(values)}: run them one after the other"
                )


def _check_contests(experiments: Sequence[Experiment], until: UntilConfig) -> None:
    """Raise ValueError if nothing competes, whatever sizes the models turn out to have."""
    if any(e.quant.rules or e.quant.allocation != type(e.quant.allocation)() for e in experiments):
        return  # which curve they are on is known once they are quantized
    for members in _group_families(experiments).values():
        sizes: dict[tuple[str, int], set[str]] = defaultdict(set)  # of each curve: a variant at a precision
        for experiment in members:
            sizes[_name_variant(experiment), experiment.quant.bits].add(experiment.model.name)
        curves = [curve for curve, models in sizes.items() if len(models) > 1]
        quantized = [(variant, bits) for variant, bits in curves if bits < BASELINE_BITS]
        competing = {
            "precision": len(quantized) > len({variant for variant, _ in quantized}),
            "setting": len(quantized) > len({bits for _, bits in quantized}),
            "frontier": len(curves) > 1,
        }
        if any(competing[claim] for claim in until.claims):
            return
    raise ValueError(f"{_MODE}: study.until.claims=[{','.join(until.claims)}]: {NO_CONTEST}")


def _group_families(experiments: Sequence[Experiment]) -> dict[str, list[Experiment]]:
    families: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        families[family_of(experiment.model.name, experiment.model.family, experiment.model.parts)].append(experiment)
    return families


def _name_variant(experiment: Experiment) -> str:
    """Return what is the same for all precisions of a variant. The exponent bits of float differ with the precision."""
    if experiment.quant.bits == BASELINE_BITS:
        return ""
    return str({name: value for name, value in vars(experiment.quant).items() if name not in _OF_A_POINT})
