"""What quant.allocation asks for: a budget of bits, the precisions to choose from, and what counts as a loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kbit.checks import check_choice, read_bytes, suggest
from kbit.data.presets import list_presets, read_preset
from kbit.methods.selection.rules import Rule

if TYPE_CHECKING:
    from kbit.methods.config import QuantConfig

OBJECTIVES: Final = ("kl", "fisher", "error")
UNITS: Final = ("tensor", "layer")
_BUDGETS: Final = ("bits", "total_bits", "memory")
_BYTE: Final = 8  # bits


@dataclass(frozen=True)
class AllocationConfig:
    """A budget of bits to distribute over the tensors, so that the model loses least. Without a budget there is none.

    Each tensor that no rule is for gets one of the choices. An integer programme finds the map with the smallest sum of
    losses that the budget allows.

    Attributes:
        bits: budget in bits per quantized parameter, with scales. A tensor that a choice leaves at 16 bits counts.
        total_bits: budget in bits of the whole model, with what is not quantized.
        memory: budget in bytes of the whole model's weights, such as 6GB (10^9) or 6GiB (2^30).
        choices: precisions, which change quant.bits alone, named quantizers of conf/quant, and mappings of bits and
            other fields, such as {bits: 3, block_size: 32}.
        objective: what a choice loses, with activations and cache at 16 bits. kl is the divergence from the 16-bit
            model in nats per token of quant.calibration.text, with one unit quantized at a time. fisher is the squared
            error weighted by squared gradients on that text, with one backward pass for each window, of tokens that are
            drawn from the model's own predictions. error is the squared error of the weights alone.
        unit: what is chosen for at once: tensor, or layer, for which kl needs fewer passes.
    """

    bits: float | None = None
    total_bits: int | None = None
    memory: str | None = None
    choices: tuple[Any, ...] = (2, 3, 4, 5, 6, 8)
    objective: str = "kl"
    unit: str = "tensor"

    def __post_init__(self) -> None:
        choices = sorted(set(map(_read_choice, self.choices)), key=_rank_choice)
        object.__setattr__(self, "choices", tuple(choices))
        check_choice("quant.allocation.objective", self.objective, OBJECTIVES)
        check_choice("quant.allocation.unit", self.unit, UNITS)
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"quant.allocation has one budget, and {' and '.join(given)} are given")
        if self.budget_bits is not None and not 0 < self.budget_bits < math.inf:
            raise ValueError(f"quant.allocation.{given[0]}={getattr(self, given[0])} is not a finite number > 0")
        if self.bits is not None:  # 3 and 3.0 are one budget, with one key
            object.__setattr__(self, "bits", float(self.bits))
        if self.total_bits is not None:
            object.__setattr__(self, "total_bits", math.floor(self.total_bits))
        if len(choices) < 2:
            raise ValueError(f"quant.allocation.choices={choices} leaves nothing to choose: give two or more")

    @property
    def budget_bits(self) -> float | None:
        """The budget in bits: per quantized parameter if `bits` gives it, else of the whole model."""
        if self.memory is None:
            return self.bits if self.bits is not None else self.total_bits
        if (size := read_bytes(self.memory)) is None:
            raise ValueError(f"quant.allocation.memory={self.memory!r} is no number of KB, MB, GB, TB or KiB, MiB, ...")
        return math.floor(size * _BYTE)

    @property
    def needs_text(self) -> bool:
        """Whether a budget is to be distributed by what the model says of a text."""
        return self.budget_bits is not None and self.objective != "error"

    def identify(self, quant: QuantConfig) -> dict[str, Any]:
        """Return what decides the map, canonical, with each choice by what it is and not by its name."""
        budget = {"bits": self.bits} if self.bits is not None else {"total_bits": self.budget_bits}
        choices = sorted((describe_choice(quant, choice) for choice in self.choices), key=str)
        fields = {"objective": self.objective, "choices": choices} | budget
        return fields | ({"unit": self.unit} if self.unit != "tensor" else {})

    def check_quantizer(self, quant: QuantConfig) -> None:
        """Raise ValueError if the budget cannot be distributed over what this configuration quantizes."""
        if self.budget_bits is None:
            return
        if quant.is_baseline:
            raise ValueError("quant.bits=16 quantizes nothing, so that quant.allocation has nothing to distribute")
        if quant.scheme is not None:
            raise ValueError(f"quant.method={quant.method} decides the quantizer: it has no quant.allocation")
        if quant.outlier_zscore is not None:
            raise ValueError(
                "quant.outlier_zscore takes bits that only the weights' values tell, so that no budget is kept with "
                "it: quant.outlier_fraction says how many"
            )
        for choice in self.choices:
            try:
                _check_choice(quant, choice)
            except (ValueError, TypeError) as error:
                raise ValueError(f"quant.allocation.choices: {name_choice(choice)}: {error}") from None

    def label(self) -> str:
        """Return the budget and what it is distributed by, such as "3.25 bits by kl of 2, 3, 4"."""
        if self.memory is not None:
            budget = self.memory
        else:
            budget = f"{self.budget_bits:g} bits" if self.bits is not None else f"{self.total_bits:,} bits in all"
        units = f" by {self.unit}" if self.unit != "tensor" else ""
        return f"{budget} by {self.objective} of {', '.join(map(name_choice, self.choices))}{units}"


Choice = int | str | Rule


def _read_choice(choice: Any) -> Choice:
    """Return a choice as a precision, a name or a mapping that can be hashed.

    Raises:
        ValueError: it is none of them, or a name stands for a mix of quantizers.
    """
    if isinstance(choice, Mapping):
        return Rule({name: tuple(value) if isinstance(value, list) else value for name, value in choice.items()})
    if str(choice).isdigit():
        if int(choice) not in (*range(2, 9), 16):
            raise ValueError(f"quant.allocation.choices: {choice} is not in 2..8, nor 16")
        return int(choice)
    check_choice("quant.allocation.choices", choice, tuple(list_presets()))
    if read_preset(choice).get("rules"):
        raise ValueError(f"quant.allocation.choices: {choice} is a mix of quantizers, and a tensor has one")
    return str(choice)


def _rank_choice(choice: Choice) -> tuple[int, int, str]:
    """Return the place of a choice among others: precisions first, then names, then mappings."""
    kind = (int, str, Rule).index(type(choice))
    return kind, choice if isinstance(choice, int) else 0, name_choice(choice)


def name_choice(choice: Choice) -> str:
    """Return a choice in a few words, such as "3", "nf4_dq" or "(bits=3 block_size=32)"."""
    if isinstance(choice, Rule):
        return f"({' '.join(f'{name}={value}' for name, value in sorted(choice.items()))})"
    return str(choice)


def find_changes(quant: QuantConfig, choice: Choice) -> dict[str, Any]:
    """Return the fields that a choice sets: a precision's bits, every field of a named quantizer, or a mapping's."""
    if isinstance(choice, int):
        return {"bits": choice}
    if isinstance(choice, Rule):
        return dict(choice)
    spec = quant.from_name(choice).spec
    changes = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return changes | {name: value for name, value in read_preset(choice).items() if name == "method"}


def drop_method(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the fields without `method` if it is this one, which a configuration has anyway."""
    return {name: value for name, value in fields.items() if (name, value) != ("method", method)}


def choose(quant: QuantConfig, choice: Choice) -> QuantConfig:
    """Return the quantizer of the tensors that get this choice."""
    return dataclasses.replace(quant, allocation=AllocationConfig(), rules=(), **find_changes(quant, choice))


def _check_choice(quant: QuantConfig, choice: Choice) -> None:
    """Raise ValueError or TypeError if a tensor cannot have this choice."""
    allowed = (*(field.name for field in dataclasses.fields(quant.spec)), "method")
    for name in choice if isinstance(choice, Rule) else ():
        if name not in allowed:
            raise ValueError(f"{name!r} is no field of a tensor's quantizer; {suggest(str(name), allowed)}")
    if isinstance(choice, Rule) and "bits" not in choice:
        raise ValueError("it has no bits, and quant.bits means nothing to the tensors of an allocation: give bits")
    chosen = choose(quant, choice)
    if chosen.method != quant.method and (chosen.traits.needs_text or chosen.scheme is not None):
        raise ValueError(f"method={chosen.method} is for a whole model; allowed are rtn, mse, hqq and {quant.method}")


def describe_choice(quant: QuantConfig, choice: Choice) -> dict[str, Any]:
    """Return what a choice does to a tensor, canonical."""
    others = ("calibration", "include", "exclude")
    fields = choose(quant, choice).identity_fields
    return {name: fields[name] for name in sorted(fields) if name not in others}
