"""Mixes of precisions beside one precision for all matrices, at equal total bits: rules, and allocated budgets."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import Measure, find_cross_entropy, pick_rows
from kbit.analysis.curves.settings import complete_settings, is_missing, make_labels, name_block
from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import LIMIT, MissingResults, PaperFigure, describe_lack, describe_sample
from kbit.analysis.statistics.frontier import Draws, draw_values, find_pareto_frontier, mean_interval
from kbit.analysis.statistics.grades import describe_lead
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = "Do mixes of precisions beat one precision for all matrices at equal total bits?"
UNIFORM: Final = "one precision"
RULES: Final = "rules"
COLUMNS: Final = ["family", "model", "kind", "label", "bits", "total_bits", "value", "low", "high", "key"]
SLACK: Final = 1.005  # a uniform model may be larger by so much: a budget is not spent to the last bit


class Gain(NamedTuple):
    """What mixes of one kind gain in one family, as a mean over them, against the best uniform model of their bits.

    Attributes:
        family, kind: whose mixes they are.
        mixes: how many they are.
        mean, low, high: nats gained, and the 95% interval.
    """

    family: str
    kind: str
    mixes: int
    mean: float
    low: float
    high: float


def draw_allocation(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw cross entropy against total bits, a panel for each family: all experiments, and the frontier of each kind.

    Raises:
        MissingResults: no model has both a mix and a uniform precision of as many bits or less.
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
    note += "A gain is against the best experiment with one precision for all matrices of the same model that takes at "
    note += f"most {SLACK - 1:.1%} more bits, a mean over the mixes."
    notes = (note, f"{describe_sample(results, points['key'], measure)} {LIMIT}")
    return PaperFigure("allocation", sheet.fig, points, CLAIM, verdict, notes)


def _draw_kind(axes: Axes, rows: pd.DataFrame, style: LineStyle) -> None:
    frontier = find_pareto_frontier(rows, higher_is_better=False)
    look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": scale_marker(style)}
    axes.plot(rows["total_bits"], rows["value"], linestyle="none", alpha=0.35, **look)
    axes.plot(frontier["total_bits"], frontier["value"], linestyle=style.dashes, **look)


def tabulate_kinds(results: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return COLUMNS, a row for each quantized experiment of a model that has mixes and uniform precisions.

    The kind is "one precision", "rules", or the objective of an allocated budget ("allocated by kl").
    """
    rows = complete_settings(pick_rows(results, measure.metric, measure.task))
    is_part = rows["include"].notna() | rows["exclude"].notna()
    rows = rows[(rows["bits"] < BASELINE_BITS) & ~is_part]
    if rows.empty or "objective" not in rows:
        return pd.DataFrame()
    kinds = [name_kind(objective, rules) for objective, rules in zip(rows["objective"], rows["rules"], strict=True)]
    blocks = rows["block_size"].map(name_block)
    rows = rows.assign(kind=kinds, label=make_labels(rows) + " " + blocks)
    mixed = set(rows.loc[rows["kind"] != UNIFORM, "model"]) & set(rows.loc[rows["kind"] == UNIFORM, "model"])
    rows = rows[rows["model"].isin(mixed)]
    return rows.sort_values(["family", "total_bits", "kind", "key"], ignore_index=True)[COLUMNS]


def name_kind(objective: object, rules: object) -> str:
    """Return the kind of a quantized model, see tabulate_kinds."""
    if not is_missing(objective):
        return f"allocated by {objective}"
    return UNIFORM if is_missing(rules) else RULES


def measure_gains(points: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Gain]:
    """Return what the mixes of each family and kind gain. Mixes that no uniform precision is as small as are left out.

    The uniform rival is the best by value, so that its luck counts against the mixes.
    """
    gains = []
    for family, own in points.groupby("family", sort=False):
        own = own.reset_index(drop=True)
        draws, rivals = draw_values(own, measure, results), find_rivals(own)
        for kind, places in rivals.groupby(own["kind"], sort=False):
            if kind != UNIFORM and len(places):
                gains.append(_average(str(family), str(kind), places, own, draws))
    return gains


def find_rivals(points: pd.DataFrame) -> pd.Series[int]:
    """Return the place of each mix's rival among the points: the best uniform one of its model and no more bits."""
    uniform = points[points["kind"] == UNIFORM]
    found: dict[Any, Any] = {}
    for place, mix in points[points["kind"] != UNIFORM].iterrows():
        small = (uniform["model"] == mix["model"]) & (uniform["total_bits"] <= SLACK * mix["total_bits"])
        if small.any():
            found[place] = uniform.loc[small, "value"].idxmin()
    return pd.Series(found, dtype="int64")


def _average(family: str, kind: str, rivals: pd.Series[int], points: pd.DataFrame, draws: Draws) -> Gain:
    weights = np.zeros(len(points))
    np.add.at(weights, rivals.to_numpy(), 1 / len(rivals))
    np.add.at(weights, rivals.index.to_numpy(), -1 / len(rivals))
    low, high = mean_interval(draws, weights)
    return Gain(family, kind, len(rivals), float(weights @ points["value"].to_numpy(dtype=np.float64)), low, high)


def describe_gains(gains: list[Gain], measure: Measure) -> str:
    """Say which kinds beat one precision beyond the interval, and each gain."""
    if not gains:
        return "No mix has as many bits as a model with one precision for all matrices."
    won = sum(gain.low > 0 for gain in gains)
    lost = sum(gain.high < 0 for gain in gains)
    head = f"Mixes beat one precision in {won} of {len(gains)} comparisons beyond the interval, and lose in {lost}."
    parts = [
        f"{gain.family}, {gain.kind} ({gain.mixes}): {describe_lead(gain.mean, gain.low, gain.high, measure)}"
        for gain in gains
    ]
    return f"{head} {'; '.join(parts)}."
