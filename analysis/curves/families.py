"""The curves of several families, and of results that many figures are drawn of, worked out together and once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Final, TypeVar

import pandas as pd

from kbit.analysis.curves.curves import AmbiguousResults, Measure, precision_curves

Made = TypeVar("Made")
_KEPT: Final[dict[int, dict[tuple[str, str], pd.DataFrame]]] = {}  # the curves by the identity of their results


def keep_curves(results: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the same values, of which find_curves works each measure's curves out once.

    It must not be changed. What happens to `results` itself does not matter.
    """
    table = results.copy()
    table.attrs = results.attrs
    _KEPT[id(table)] = {}
    weakref.finalize(table, _KEPT.pop, id(table))
    return table


def find_curves(results: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """Return precision_curves of the results, which are worked out again unless these come from keep_curves."""
    kept = _KEPT.get(id(results))
    if kept is None:
        return precision_curves(results, metric, task)
    if (metric, task) not in kept:
        kept[metric, task] = precision_curves(results, metric, task)
    return kept[metric, task].copy()


def take_family(
    results: pd.DataFrame, family: object, measure: Measure, known: dict[Measure, pd.DataFrame | None]
) -> pd.DataFrame:
    """Return the points of one family's curves, as precision_curves does of the family's rows.

    All families take little longer than one, so that those of a measure are worked out together.

    Args:
        results: long form, of all families.
        family: the family.
        measure: the measure that the curves show.
        known: what was worked out of these results before, to which the measure is added.

    Raises:
        AmbiguousResults: this family's results are ambiguous.
    """
    if measure not in known:
        try:
            known[measure] = find_curves(results, measure.metric, measure.task)
        except AmbiguousResults:  # of whichever family: each is then looked at by itself
            known[measure] = None
    whole = known[measure]
    own = pd.DataFrame() if whole is None else whole[whole["family"] == family].reset_index(drop=True)
    if own.empty:  # or the family is several by architecture
        return precision_curves(results[results["family"] == family], measure.metric, measure.task)
    return own


def leave_out_ambiguous(make: Callable[[pd.DataFrame], Made], results: pd.DataFrame) -> tuple[Made, dict[str, str]]:
    """Return what can be made of the results without their ambiguous families, and of these each one's reason.

    Raises:
        AmbiguousResults: every family is ambiguous, or nothing can be made of the others.
    """
    ambiguous: dict[str, AmbiguousResults] = {}
    while True:
        try:
            return make(results), {family: str(error) for family, error in ambiguous.items()}
        except AmbiguousResults as error:
            kept = results["family"].astype(str) != error.family
            if error.family is None or kept.all() or not kept.any():
                raise next(iter(ambiguous.values()), error) from None
            ambiguous[error.family] = error
            results = results[kept]
        except ValueError:
            if ambiguous:  # the others lack something: the ambiguous family is the reason that matters
                raise next(iter(ambiguous.values())) from None
            raise
