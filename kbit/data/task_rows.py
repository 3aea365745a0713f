"""Check what a task makes of its rows, and say which row, field and file is at fault.

lm-eval asks with whatever a template gives: a null becomes the word None in a prompt, and a row without choices drops
out of the accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import lm_eval.utils
from jinja2 import meta
from lm_eval.api.task import ConfigurableTask

_ASKED = ("doc_to_text", "doc_to_choice", "doc_to_target")


class _NullError(ValueError):
    """A template would write a null as the word None."""


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise _NullError
    return value


# lm-eval's own templates, where a null raises instead of becoming text. Conditions on a null are as they are.
_STRICT = lm_eval.utils.env.overlay(finalize=_refuse_null)


Places = Mapping[str, Sequence[str]]  # for each split the place of each row, such as "d.jsonl, line 3"


def check_rows(task: Any, places: Places, limit: int | None, *, is_own: bool) -> None:
    """Look at the first `limit` rows as the task asks them.

    Args:
        task: lm-eval's task.
        places: where its rows are, as far as that is known.
        limit: the number of rows.
        is_own: whether the task is a user's own. Otherwise only right answers are looked at, so that lm-eval's tasks
            give what they give there.

    Raises:
        ValueError: a row has a null where text is asked for, no choices or an empty one, or a right answer that is none
            of its choices. The message has the row's place, if it is known, and the field.
    """
    if not isinstance(task, ConfigurableTask) or not (is_own or task.OUTPUT_TYPE == "multiple_choice"):
        return
    for number, doc in task.doc_iterator(rank=0, limit=limit, world_size=1):
        try:
            if is_own:
                _check_row(task, doc)
            elif not task.multiple_input:
                _check_answers(task.doc_to_choice(doc), task.doc_to_target(doc), doc)
        except jinja2.UndefinedError as error:
            raise ValueError(
                f"{_locate(task, places, number)}: a template asks for a field that a row has not: {error}"
            ) from error
        except (ValueError, TypeError, AttributeError, LookupError, SyntaxError) as error:
            _refuse([getattr(task.config, name) for name in _ASKED], doc, _locate(task, places, number), error)


def explain_first_row(
    definition: Mapping[str, Any], rows: Mapping[str, Any], places: Places, error: Exception
) -> NoReturn:
    """Raise what lm-eval said of the first row of a task's data, which it looks at when it makes a task.

    Args:
        definition: the task's definition.
        rows, places: the rows of each split, and where they are.
        error: what lm-eval raised.

    Raises:
        ValueError: always.
    """
    split = definition.get("test_split") or definition.get("validation_split") or ""
    doc = rows[split][0]
    place = next(iter(places.get(split, [])), f"the first row of split {split!r}")
    _refuse([definition.get(name) for name in _ASKED], doc, place, error)


def _refuse(templates: Sequence[Any], doc: dict[str, Any], place: str, error: Exception) -> NoReturn:
    odd = [f"the field {name!r} is {doc[name]!r}" for name in _list_fields(templates, doc) if not _is_usable(doc[name])]
    said = "" if isinstance(error, _NullError) else str(error) or type(error).__name__
    reason = "; ".join([*filter(None, [said]), *odd]) or "a template gives null"
    raise ValueError(f"{place}: {reason}") from error


def _is_usable(value: Any) -> bool:
    """Whether a field's value can be asked: no null, and no list without values or with an empty one."""
    if isinstance(value, list):
        return bool(value) and all(_is_usable(part) and part != "" for part in value)
    return value is not None


def _locate(task: Any, places: Places, number: int) -> str:
    """Return the place of a row that the task asks, by its number among them."""
    config = task.config
    split = config.test_split or config.validation_split or ""
    known = places.get(split, []) if config.process_docs is None else []
    return known[number] if number < len(known) else f"item {number + 1} of split {split!r}"


def _list_fields(templates: Sequence[Any], doc: dict[str, Any]) -> Iterator[str]:
    """Yield the fields of a row that templates name. A function's fields are not known: all are yielded."""
    if any(callable(template) for template in templates):
        yield from doc
        return
    names: set[str] = set()
    for template in (template for template in templates if isinstance(template, str)):
        names |= {template} if template in doc else meta.find_undeclared_variables(_STRICT.parse(template))
    yield from (name for name in doc if name in names)


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(_has_null, value)))


def _check_row(task: Any, doc: dict[str, Any]) -> None:
    if _has_null(doc):
        for template in (getattr(task.config, name) for name in _ASKED):
            if isinstance(template, str) and template not in doc:
                _STRICT.from_string(template).render(**doc)
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if text is None or target is None:
        raise _NullError
    if task.OUTPUT_TYPE == "multiple_choice":
        _check_choices(task, doc, target)


def _check_choices(task: Any, doc: dict[str, Any], target: Any) -> None:
    choices = task.doc_to_choice(doc)
    if choices is None:
        raise _NullError
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"doc_to_choice gives {choices!r}, which is no list of choices")
    if wrong := [choice for choice in choices if not isinstance(choice, str) or not choice]:
        raise ValueError(f"doc_to_choice gives {wrong[0]!r} among {choices}, which is no text to score")
    if not task.multiple_input:
        _check_answers(choices, target, doc)


def _check_answers(choices: list[str], target: Any, doc: dict[str, Any]) -> None:
    """Raise ValueError if a right answer is none of the choices. lm-eval would count such an item as wrong."""
    for answer in target if isinstance(target, list) else [target]:
        if not (answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)):
            raise ValueError(f"doc_to_target gives {answer!r}, which is none of {choices}; a row has {', '.join(doc)}")
