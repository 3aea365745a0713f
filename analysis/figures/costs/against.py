"""Quality against what it costs: total bits as counted, memory and time per token as measured.

The k-bit paper compares precisions at equal total bits, as a proxy of memory and time. These figures draw the same
curves against the measured costs, so that one sees whether the same precision is best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import matplotlib
import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import ZERO_SHOT, Floats, Measure, find_cross_entropy, pick_rows
from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import scale_marker
from kbit.analysis.figures.costs.points import STUDIES, choose_variant, gather_costs, style_points
from kbit.analysis.figures.drawing import (
    LIMIT,
    MissingResults,
    PaperFigure,
    describe_lack,
    describe_sample,
)

# column -> label of its axis
COSTS: Final = {
    "total_bits": "total bits",
    "peak_megabytes": "peak memory (MB)",
    "ms_per_token": "ms per token",
}
_BUDGETS: Final = 200  # shares come out to half a percent


@dataclass(frozen=True)
class CostFigure:
    """A figure of quality against cost.

    Attributes:
        name: the figure's name.
        claim: its question.
        of_accuracy: whether quality is the mean zero-shot accuracy instead of the cross entropy.
    """

    name: str
    claim: str
    of_accuracy: bool


COST_FIGURES: Final = (
    CostFigure(
        "cost_accuracy",
        "Is the precision that is most accurate at equal total bits also the best at equal memory and at equal time?",
        of_accuracy=True,
    ),
    CostFigure(
        "cost_loss",
        "By cross entropy, is the best precision at equal total bits also the best at equal memory and at equal time?",
        of_accuracy=False,
    ),
)


def draw_costs(definition: CostFigure, results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw quality against each cost of the smallest batch, a line for each series, a row for each family.

    Raises:
        MissingResults: no experiment has the quality and the costs.
    """
    costs = choose_variant(gather_costs(results, definition.name))
    measure = ZERO_SHOT if definition.of_accuracy else find_cross_entropy(results)
    points = _join(costs.points, results, measure)
    if measure is None or points.empty or points.groupby("family")["series"].nunique().max() < 2:
        what = "mean zero-shot accuracy" if definition.of_accuracy else "cross entropy"
        needs = f"{what}, and measured time and memory of the same experiments (eval.speed.measure=true packed=true)"
        raise MissingResults(describe_lack(definition.name, needs, STUDIES))
    families = list(dict.fromkeys(points["family"]))
    styles = style_points(points)
    sheet = make_sheet(page, len(COSTS) * len(families), (3.2, 2.8), len(COSTS), styles)
    panels = iter(sheet.add_axes(len(COSTS) * len(families)))
    thin = 0.5 * float(matplotlib.rcParams["lines.linewidth"])
    for family in families:
        of_family = points[points["family"] == family]
        for column, label in COSTS.items():
            axes = next(panels)
            for series, curve in of_family.groupby("series"):
                line, style = curve.sort_values(column), styles[str(series)]
                error = np.nan_to_num([line["value"] - line["value_low"], line["value_high"] - line["value"]])
                axes.errorbar(
                    line[column], line["value"], yerr=error, color=style.color, marker=style.marker,
                    linestyle=style.dashes, markersize=scale_marker(style), elinewidth=thin,
                )  # fmt: skip
            set_log_axis(axes, of_family[column], format_bits if column == "total_bits" else "{:g}".format)
            axes.set_xlabel(label)
            sheet.write_title(axes, family)
    sheet.label("", measure.name)
    draw_legend(sheet.fig.body, styles, page)
    batch = int(points["batch"].iloc[0])
    note = (
        f"Costs are of batch {batch}. Shares are of the budgets that all precisions reach, without intervals. {LIMIT}"
    )
    notes = (describe_sample(results, points["key"], measure), note, *costs.notes)
    verdict = judge_costs(points, measure) + costs.warning
    return PaperFigure(definition.name, sheet.fig, points, definition.claim, verdict, notes, short=verdict)


def _join(points: pd.DataFrame, results: pd.DataFrame, measure: Measure | None) -> pd.DataFrame:
    """Return the points of the smallest batch with the quality of the same experiments, and its interval."""
    if measure is None or points.empty:
        return pd.DataFrame()
    points = points[points["batch"] == points["batch"].min()].dropna(subset=["peak_megabytes"])
    quality = pick_rows(results, measure.metric, measure.task).set_index("key")[["value", "low", "high"]]
    quality = quality.rename(columns={"low": "value_low", "high": "value_high"})
    return points.join(quality, on="key", how="inner")


def find_shares(curves: pd.DataFrame, cost: str, *, higher_is_better: bool) -> dict[str, float] | None:
    """Return over which share of the budgets each series is best, or None if no budget is reached by all of them.

    Budgets are evenly spaced in their logarithm. Between two models a curve is linear in the logarithm of its cost. A
    series with one model has no curve, and counts as none.
    """
    lines: dict[str, tuple[Floats, Floats]] = {}
    for series, curve in curves.groupby("series"):
        line = curve.sort_values(cost).drop_duplicates(cost)
        if len(line) > 1:
            lines[str(series)] = np.log(line[cost].to_numpy(float)), line["value"].to_numpy(float)
    if len(lines) < 2:
        return None
    low, high = max(x[0] for x, _ in lines.values()), min(x[-1] for x, _ in lines.values())
    if high <= low:
        return None
    budgets = np.linspace(low, high, _BUDGETS)
    values = np.stack([np.interp(budgets, x, y) for x, y in lines.values()])
    best = values.argmax(0) if higher_is_better else values.argmin(0)
    return {series: float((best == place).mean()) for place, series in enumerate(lines)}


def judge_costs(points: pd.DataFrame, measure: Measure) -> str:
    """Say for each family which precision is best over most budgets, by each cost."""
    parts = []
    for family, curves in points.groupby("family", sort=False):
        words = []
        for column, label in COSTS.items():
            shares = find_shares(curves, column, higher_is_better=measure.higher_is_better)
            if shares is None:
                words.append(f"by {label} no budget is reached by all")
            else:
                best = max(shares, key=lambda series: shares[series])
                words.append(f"by {label} {best} ({shares[best]:.0%})")
        parts.append(f"{family}, best over most budgets: {', '.join(words)}")
    return ". ".join(parts) + "."
