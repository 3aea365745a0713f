"""Distribute a budget of bits over the tensors of a model (quant.allocation), as rules for each of them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from kbit.data.windows import Windows
from kbit.methods.allocation.config import Choice, choose, describe_choice, drop_method, find_changes, name_choice
from kbit.methods.allocation.kept import hash_content, keep_losses, read_losses
from kbit.methods.allocation.losses import Candidate, Losses, measure_divergences, measure_errors, weigh_errors
from kbit.methods.allocation.programme import choose_least_loss
from kbit.methods.calibration import draw_windows
from kbit.methods.config import QuantConfig
from kbit.methods.options import TOKENS_AT_ONCE
from kbit.methods.selection.rules import PATTERN, Rule
from kbit.methods.weight import Codes, Job, Weight
from kbit.models.parameters import hash_weights

if TYPE_CHECKING:
    from kbit.methods.report import QuantizationReport, TensorReport

log = logging.getLogger(__name__)
Plan = Callable[[nn.Module, QuantConfig], "QuantizationReport"]
FindWeights = Callable[[nn.Module, "QuantizationReport", QuantConfig], list[Weight]]
RunMethods = Callable[[Job], Iterator[tuple[Weight, Codes]]]
_ALWAYS_TRUE: Final = ("signed", "zero")  # of a model's weights


@dataclass(frozen=True)
class Allocation:
    """The quantizer of each tensor that a budget leads to.

    Attributes:
        quant: the configuration with rules in place of its allocation. Its min_coverage is 0, as allocate_bits
            checks it before, and what a choice leaves at 16 bits is no lack.
        losses: what each unit loses with each choice, by the objective.
        notes: the record: budget, what is left of it, the sum of losses, the choices whose losses were kept from
            before, and the rules.
    """

    quant: QuantConfig
    losses: Losses
    notes: dict[str, Any]

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The map as quant.rules takes it, in YAML, JSON and Python."""
        return [dict(rule) for rule in self.quant.rules]


@dataclass(frozen=True)
class _Problem:
    """What is to be distributed over what.

    Attributes:
        model, quant, tokenizer: as quantize_model is given them.
        make_plan: plan_quantization.
        plan: the plan without allocation.
        units: the tensors of each unit.
    """

    model: nn.Module
    quant: QuantConfig
    tokenizer: PreTrainedTokenizerBase | None
    make_plan: Plan
    plan: QuantizationReport
    units: list[list[TensorReport]]

    @property
    def names(self) -> list[list[str]]:
        """The names of each unit's parameters."""
        return [[_name(tensor) for tensor in unit] for unit in self.units]

    def apply(self, chosen: Mapping[Choice, Sequence[str]]) -> QuantConfig:
        """Return the configuration in which the parameters of these names have these choices."""
        rules = tuple(_write_rule(self.quant, choice, names) for choice, names in chosen.items() if names)
        return self.quant.without_allocation(rules)

    def plan_choices(self) -> dict[Choice, QuantizationReport]:
        """Return the plan in which all units have one choice, for each choice."""
        names = [name for unit in self.names for name in unit]
        return {
            choice: self.make_plan(self.model, self.apply({choice: names})) for choice in self.quant.allocation.choices
        }


def allocate(
    model: nn.Module,
    quant: QuantConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    make_plan: Plan,
    find_weights: FindWeights,
    run_methods: RunMethods,
) -> Allocation:
    """Measure what each unit loses with each choice, and choose. The model is as it was afterwards.

    Args:
        model, quant, tokenizer: see quantize_model.
        make_plan: plan_quantization.
        find_weights, run_methods: the functions of kbit.methods.quantize_model, which imports this module.

    Raises:
        ValueError: nothing is to be quantized, the budget is below the smallest choices or above the largest, or see
            plan_quantization and draw_windows. A loss that is not finite is found once it is measured.
    """
    plan = make_plan(model, quant.without_allocation())
    problem = _Problem(model, quant, tokenizer, make_plan, plan, _group_units(plan, quant.allocation.unit))
    plans = problem.plan_choices()
    bits = np.array([[_count_bits(choice, unit) for choice in plans.values()] for unit in problem.names])
    budget, apart = _find_budget(problem)
    _check_budget(problem, bits, budget, apart)
    windows = draw_windows(model, quant, tokenizer) if quant.allocation.needs_text else None
    losses, kept = _find_losses(problem, plans, windows, find_weights, run_methods)
    chosen = choose_least_loss(losses, bits, budget)
    groups: dict[Choice, list[str]] = {choice: [] for choice in plans}
    for names, choice in zip(problem.names, chosen, strict=True):
        groups[quant.allocation.choices[choice]] += names
    taken, loss = (float(np.take_along_axis(table, chosen[:, None], 1).sum()) for table in (bits, losses))
    final = dataclasses.replace(problem.apply(groups), min_coverage=0.0)
    notes: dict[str, Any] = {
        "objective": quant.allocation.objective,
        "budget_bits": budget + apart,
        "left_bits": budget - int(taken),
        "kept": [name_choice(choice) for choice in kept],
    }
    notes |= {"loss": loss, "rules": [dict(rule) for rule in final.rules]} | _describe_text(windows)
    return Allocation(final, losses, notes)


def _describe_text(windows: Windows | None) -> dict[str, Any]:
    if windows is None:
        return {}
    samples, length = windows.tokens.shape
    return {"text": {"text": windows.name, "sha256": windows.sha256, "samples": samples, "length": length}}


def _name(tensor: TensorReport) -> str:
    return tensor.name.split(" = ")[0]


def _group_units(plan: QuantizationReport, unit: str) -> list[list[TensorReport]]:
    """Return the quantized tensors that no rule is for, alone or by their layer. What is in none stays alone.

    Raises:
        ValueError: there are none.
    """
    groups: dict[str, list[TensorReport]] = {}
    for tensor in plan.tensors:
        if tensor.quantized and tensor.rule is None:
            layer = re.match(r".*?\.\d+(?=\.)", _name(tensor)) if unit == "layer" else None
            groups.setdefault(layer[0] if layer else _name(tensor), []).append(tensor)
    if not groups:
        raise ValueError("quant.allocation: there are no tensors to distribute bits over, or rules are for all of them")
    return list(groups.values())


def _write_rule(quant: QuantConfig, choice: Choice, names: Sequence[str]) -> dict[str, Any]:
    """Return the rule that gives some parameters a choice: its whole quantizer, so that it serves beside any other."""
    chosen = choose(quant, choice)
    spec = chosen.spec.canonical()
    fields: dict[str, Any] = {PATTERN: f"^({'|'.join(map(re.escape, names))})$", "bits": spec.bits}
    if spec.is_baseline:
        return fields
    for name, value in dataclasses.asdict(spec).items():
        if name not in _ALWAYS_TRUE and (value is not None or name == "block_size"):
            fields[name] = value
    return fields | ({"method": chosen.method} if chosen.method != quant.method else {})


def _count_bits(plan: QuantizationReport, names: Sequence[str]) -> int:
    return sum(tensor.bits for tensor in plan.tensors if _name(tensor) in names)


def _find_budget(problem: _Problem) -> tuple[int, int]:
    """Return the bits for the units, and those of what else counts towards the budget.

    Raises:
        ValueError: there is no budget.
    """
    config, plan = problem.quant.allocation, problem.plan
    if config.budget_bits is None:
        raise ValueError("quant.allocation has no budget: give bits, total_bits or memory")
    own = {_name(tensor) for unit in problem.units for tensor in unit}
    counted = [tensor for tensor in plan.tensors if tensor.quantized or config.bits is None]
    apart = sum(tensor.bits for tensor in counted if _name(tensor) not in own)
    if config.bits is not None:
        return math.floor(config.bits * plan.quantized_parameters) - apart, apart
    return math.floor(config.budget_bits) - apart, apart


def _check_budget(problem: _Problem, bits: Any, budget: int, apart: int) -> None:
    """Raise ValueError if the smallest choices take more than the budget, or the largest less."""
    config = problem.quant.allocation
    least, most = (int(total) + apart for total in (bits.min(axis=1).sum(), bits.max(axis=1).sum()))
    if least <= budget + apart <= most:
        return
    asked = {"bits": config.bits, "total_bits": config.total_bits, "memory": config.memory}
    ((name, value),) = [(name, value) for name, value in asked.items() if value is not None]
    scale = problem.plan.quantized_parameters if config.bits is not None else 1
    unit = "bits per quantized parameter" if config.bits is not None else "bits of the whole model"
    shown = f"{least / scale:.6g} to {most / scale:.6g}" if scale > 1 else f"{least:,} to {most:,}"
    total = "" if scale > 1 else f" ({budget + apart:,} bits)"
    raise ValueError(
        f"quant.allocation.{name}={value}{total} is {'below' if budget + apart < least else 'above'} what the choices "
        f"{', '.join(map(name_choice, config.choices))} can take, which is {shown} {unit}"
    )


def _find_losses(
    problem: _Problem,
    plans: Mapping[Choice, QuantizationReport],
    windows: Windows | None,
    find_weights: FindWeights,
    run_methods: RunMethods,
) -> tuple[Losses, list[Choice]]:
    """Return what each unit loses with each choice, kept from before or measured, and the choices that were kept.

    A method with calibration data is measured by round to nearest, since it sees all weights at once. Nothing is lost
    with 16 bits.

    Raises:
        ValueError: a loss is not finite.
    """
    content = _describe_content(problem, windows)
    rounded = _round_to_nearest(problem.quant)
    columns = {choice: [0.0] * len(problem.units) for choice in plans if choose(rounded, choice).is_baseline}
    names: dict[Choice, str] = {}
    kept: list[Choice] = []
    for choice in plans:
        changes = Rule(drop_method(find_changes(problem.quant, choice), problem.quant.method))
        names[choice] = hash_content(content | {"choice": describe_choice(rounded, changes)})
        if choice not in columns and (before := read_losses(names[choice], len(problem.units))) is not None:
            columns[choice] = before
            kept.append(choice)
    missing = [choice for choice in plans if choice not in columns]
    if missing:
        candidates = [_make_candidate(problem, plans[choice], choice, find_weights, run_methods) for choice in missing]
        measured = _measure(problem, candidates, windows)
        if not np.isfinite(measured).all():
            unit, choice = np.argwhere(~np.isfinite(measured))[0]
            raise ValueError(
                f"quant.allocation: {problem.names[unit][0]} as {name_choice(missing[choice])} loses a number that "
                f"is not finite by {problem.quant.allocation.objective}; model.dtype=float32 has the widest range"
            )
        for choice, values in zip(missing, measured.T.tolist(), strict=True):
            columns[choice] = values
            keep_losses(names[choice], values)
    losses = np.array([columns[choice] for choice in plans]).T
    _warn_of_unreached(problem, losses)
    return losses, kept


def _warn_of_unreached(problem: _Problem, losses: Losses) -> None:
    """Tell which units lose nothing with any choice, as an expert does that the text never reaches."""
    free = [names[0] for names, row in zip(problem.names, losses, strict=True) if not row.any()]
    if free:
        log.warning(
            f"quant.allocation: {len(free)} of {len(problem.units)} units, such as {free[0]}, lose nothing with any "
            "choice and get the smallest: they are 0, or the text does not reach them (quant.calibration.samples)"
        )


def _round_to_nearest(quant: QuantConfig) -> QuantConfig:
    """Return the configuration by which losses are measured. Its rules name no method that sees a text either."""
    if not quant.traits.needs_text:
        return quant.without_allocation()
    rules = tuple(drop_method(rule, quant.method) for rule in quant.rules)
    return dataclasses.replace(quant.without_allocation(), method="rtn", rules=rules)


def _describe_content(problem: _Problem, windows: Windows | None) -> dict[str, Any]:
    """Return what decides the losses, beside the choice."""
    quant = problem.quant
    config: Any = getattr(problem.model, "config", None)
    outliers = (quant.outlier_fraction, quant.outlier_selection, quant.seed) if quant.keeps_outliers else ()
    return {
        "objective": quant.allocation.objective,
        "units": problem.names,
        "weights": hash_weights(problem.model),
        "config": config.to_json_string() if hasattr(config, "to_json_string") else "",
        "outliers": outliers,
        "tokens": None if windows is None else hashlib.sha256(windows.tokens.numpy().tobytes()).hexdigest(),
        "seed": quant.calibration.seed if quant.allocation.objective == "fisher" else None,
    } | ({"rotation": rotation} if (rotation := quant.rotation_words) else {})


def _make_candidate(
    problem: _Problem,
    plan: QuantizationReport,
    choice: Choice,
    find_weights: FindWeights,
    run_methods: RunMethods,
) -> Candidate:
    names = problem.names
    quant = _round_to_nearest(problem.apply({choice: [name for unit in names for name in unit]}))
    weights: dict[str, list[Weight]] = {}
    for weight in find_weights(problem.model, plan, quant):
        weights.setdefault(weight.name, []).append(weight)
    units = [[weight for name in unit for weight in weights.get(name, [])] for unit in names]
    job = Job(problem.model, [], quant, problem.tokenizer)

    def quantize(of_unit: Sequence[Weight]) -> Iterator[tuple[Weight, Codes]]:
        return run_methods(dataclasses.replace(job, weights=of_unit))

    return Candidate(units, quantize)


def _measure(problem: _Problem, candidates: Sequence[Candidate], windows: Windows | None) -> Losses:
    """Return what each unit loses with each of these choices."""
    if windows is None:
        return measure_errors(candidates)
    if problem.quant.allocation.objective == "kl":
        return measure_divergences(problem.model, candidates, windows, TOKENS_AT_ONCE)
    return weigh_errors(problem.model, candidates, windows, problem.quant.calibration.seed)
