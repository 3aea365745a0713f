"""Mixes of precisions beside one precision for all matrices, at equal total bits: rules, and allocated budgets."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import Measure, find_cross_entropy, pick_rows
from kbit.analysis.curves.settings import complete_settings, is_missing, make_labels, name_variant
from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import LIMIT, MissingResults, PaperFigure, describe_lack, describe_sample
from kbit.analysis.figures.mixes.gains import ALLOCATED, RULES, UNIFORM, describe_gains, measure_gains
from kbit.analysis.statistics.frontier import find_pareto_frontier
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = "Do mixes of precisions beat one precision for all matrices at equal total bits?"
COLUMNS: Final = ["family", "model", "kind", "budget", "label", "bits", "total_bits", "value", "low", "high", "key"]


def draw_allocation(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw cross entropy against total bits, a panel for each family: all experiments, and the frontier of each kind.

    Raises:
        MissingResults: no model has both a mix and an experiment with one precision.
    """
    measure = find_cross_entropy(results)
    points = pd.DataFrame() if measure is None else tabulate_kinds(results, measure)
    if measure is None or points.empty:
        needs = "models that were quantized by one precision, and by rules or an allocated budget"
        raise MissingResults(describe_lack("allocation", needs, ("nano/allocation", "nano/rules")))
    kinds = sorted(set(points["kind"]), key=lambda kind: (kind != UNIFORM, kind != RULES, kind))
    styles = style_series(kinds)
    families = list(dict.fromkeys(points["family"]))
    sheet = make_sheet(page, len(families), (3.6, 3.2), 3, styles)
    for axes, family in zip(sheet.add_axes(len(families)), families, strict=True):
        own = points[points["family"] == family]
        for kind in kinds:
            _draw_kind(axes, own[own["kind"] == kind], styles[kind])
        set_log_axis(axes, own["total_bits"], format_bits)
        sheet.write_title(axes, family)
    sheet.label("total model bits", "cross entropy (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    gains = measure_gains(points, measure, results)
    verdict = describe_gains(gains, measure)
    note = "Markers: experiments. Lines: the frontier of each kind, which no other experiment of the kind beats. "
    note += "Left out: experiments with exclude, and those with one precision that include other tensors. A gain is a "
    note += "mean over mixes, against one precision for all matrices of the same model at the mix' total bits. That is "
    note += "the frontier of these experiments, and between two of them a straight line in log bits, which flatters a "
    note += "mix where losses fall ever more slowly. A mix that is smaller, or larger, than all of them has no gain."
    notes = (note, f"{describe_sample(results, points['key'], measure)} {LIMIT}")
    return PaperFigure("allocation", sheet.fig, points, CLAIM, verdict, notes)


def _draw_kind(axes: Axes, rows: pd.DataFrame, style: LineStyle) -> None:
    frontier = find_pareto_frontier(rows, higher_is_better=False)
    look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": scale_marker(style)}
    axes.plot(rows["total_bits"], rows["value"], linestyle="none", alpha=0.35, **look)
    axes.plot(frontier["total_bits"], frontier["value"], linestyle=style.dashes, **look)


def tabulate_kinds(results: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return COLUMNS, a row for each quantized experiment of a model that has mixes and uniform precisions.

    The kind is "one precision", "rules", or the objective of an allocated budget ("allocated by kl"). The budget is as
    it was asked for ("3.25 bits"), and of rules the precision that they change ("3 bits"). Parts of a model are left
    out: whatever has an exclude, and uniform precisions with an include, which mixes may have.
    """
    rows = complete_settings(pick_rows(results, measure.metric, measure.task))
    rows = rows[(rows["bits"] < BASELINE_BITS) & rows["exclude"].isna()]
    if rows.empty or "objective" not in rows:
        return pd.DataFrame()
    kinds = [name_kind(objective, rules) for objective, rules in zip(rows["objective"], rows["rules"], strict=True)]
    labels = [name_variant(*row) for row in zip(make_labels(rows), rows["block_size"], rows["allocation"], strict=True)]
    budgets = [name_budget(*row) for row in zip(rows["allocation"], rows["bits"], strict=True)]
    rows = rows.assign(kind=kinds, label=labels, budget=budgets)
    rows = rows[(rows["kind"] != UNIFORM) | rows["include"].isna()]
    mixed = set(rows.loc[rows["kind"] != UNIFORM, "model"]) & set(rows.loc[rows["kind"] == UNIFORM, "model"])
    rows = rows[rows["model"].isin(mixed)]
    return rows.sort_values(["family", "total_bits", "kind", "key"], ignore_index=True)[COLUMNS]


def name_kind(objective: object, rules: object) -> str:
    """Return the kind of a quantized model, see tabulate_kinds."""
    if not is_missing(objective):
        return f"{ALLOCATED}{objective}"
    return UNIFORM if is_missing(rules) else RULES


def name_budget(allocation: object, bits: object) -> str:
    """Return the budget of a quantized model, see tabulate_kinds."""
    return f"{bits} bits" if is_missing(allocation) else str(allocation).partition(" by ")[0]
