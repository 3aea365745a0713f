"""Rules of a quantizer: other fields for the tensors whose names match a pattern (quant.rules)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kbit.checks import suggest

if TYPE_CHECKING:
    from kbit.methods.config import QuantConfig

PATTERN: Final = "match"


class Rule(dict[str, Any]):
    """A pattern and the fields that it changes, such as {"match": "lm_head", "bits": 6}.

    A configuration with rules is hashable, so a rule is, too. It must not be changed.
    """

    def __hash__(self) -> int:  # type: ignore[override]  # dict says None
        return hash(json.dumps(self, sort_keys=True))


def list_changes(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the quantizer that a rule changes."""
    return {name: value for name, value in rule.items() if name != PATTERN}


def finds_any(rule: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a rule's pattern finds one of a tensor's names."""
    return any(re.search(rule[PATTERN], name) for name in names)


def write_rule(rule: Mapping[str, Any]) -> str:
    """Return a rule in a line for people and tables, such as "mlp: bits=3 data_type=int"."""
    return " ".join([f"{rule[PATTERN]}:", *(f"{name}={value}" for name, value in list_changes(rule).items())])


def read_rules(values: Sequence[Mapping[str, Any]], fields: Collection[str]) -> tuple[Rule, ...]:
    """Return rules from plain mappings, as YAML, JSON and Python give them.

    Args:
        values: the mappings. Each has `match`, a regular expression of tensor names, and fields to change.
        fields: the names of the fields that a rule may change.

    Raises:
        ValueError: an entry is no mapping, has no pattern or an impossible one, or names an unknown field.
    """
    return tuple(_read_rule(f"quant.rules[{number}]", value, fields) for number, value in enumerate(values))


def _read_rule(where: str, value: Mapping[str, Any], fields: Collection[str]) -> Rule:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} is no mapping such as {{match: lm_head, bits: 6}}")
    pattern = value.get(PATTERN)
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{where}={dict(value)} lacks `match`, the regular expression of the tensors that it is for")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: match={pattern!r} is not a regular expression: {error}") from None
    for name in value:
        if name != PATTERN and name not in fields:
            raise ValueError(f"{where}: {name!r} is no field that a rule can change; {suggest(str(name), fields)}")
    return Rule({name: tuple(item) if isinstance(item, list) else item for name, item in value.items()})


def write_rules(rules: Iterable[Mapping[str, Any]]) -> str:
    """Return rules in a line, such as "lm_head: bits=6; mlp: bits=3 data_type=int"."""
    return "; ".join(map(write_rule, rules))


def check_rules(quant: QuantConfig) -> None:
    """Raise ValueError if a configuration's rules do not go with the rest of it."""
    if not quant.rules:
        return
    if quant.is_baseline:
        raise ValueError("quant.bits=16 quantizes nothing, so that quant.rules have nothing to change")
    if quant.scheme is not None:
        raise ValueError(f"quant.method={quant.method} decides the quantizer of every weight: it has no quant.rules")
    for number, rule in enumerate(quant.rules):
        try:
            changed = quant.follow(number)
        except (ValueError, TypeError) as error:
            raise ValueError(f"quant.rules[{number}] ({write_rule(rule)}): {error}") from None
        if changed.method != quant.method and (changed.traits.needs_text or changed.scheme is not None):
            raise ValueError(
                f"quant.rules[{number}]: method={changed.method} needs a calibration text or multiplies int8 by "
                f"int8, which one method does for a whole model. Allowed are rtn, mse, hqq and {quant.method}"
            )
