"""How many bits an optimizer's states need: the loss against the bits of a state's value."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.optimizers import EXACT, keep_usual, name_states, tabulate_trainings
from kbit.analysis.curves.trainings import describe_seeds
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, describe_lack
from kbit.numerics.spec import QuantSpec

CLAIM: Final = "How many bits do the states of an optimizer need? The momentum needs more than the variance."
COLUMNS: Final = ["model", "series", "bits", "seed", "diverged", "value", "key"]
EXACT_BITS: Final = 32
USUAL_BLOCK: Final = 256


def draw_states(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw cross entropy against the bits of a state's value, a panel for each model, a line for each role and type.

    Raises:
        MissingResults: no model was trained with states of few bits and with 32-bit ones.
    """
    trainings = tabulate_trainings(results)
    data = tabulate_states(trainings)
    if data.empty:
        needs = "models trained with states of few bits and with 32-bit ones"
        raise MissingResults(describe_lack("states", needs, ("nano/optimizer_states",)))
    styles = style_series(data.loc[data["series"] != EXACT, "series"])
    models = list(dict.fromkeys(data["model"]))
    sheet = make_sheet(page, len(models), (3.6, 3.2), 3, styles)
    for axes, model in zip(sheet.add_axes(len(models)), models, strict=True):
        draw_model(axes, data[data["model"] == model], styles)
        sheet.write_title(axes, model)
    sheet.label("bits of a state's value", "cross entropy (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    seeds = int(data.groupby(["model", "series", "bits"])["seed"].nunique().min())
    note = (
        f"Each dot is a training, bars are Student's 95% intervals over seeds ({seeds} at least). The grey band is the "
        "interval of 32-bit states. A cross at the upper edge is a training that diverged."
    )
    verdict = judge_states(data) + judge_tuned(trainings)
    return PaperFigure("states", sheet.fig, data, CLAIM, verdict, (note,))


def draw_model(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw the lines of a model over the band of its 32-bit trainings."""
    exact = rows.loc[rows["series"] == EXACT, "value"].dropna()
    mean, low, high = describe_seeds(exact)
    axes.axhline(mean, color="0.5", linewidth=0.8)
    if np.isfinite(low):
        axes.axhspan(low, high, color="0.9", zorder=0)
    for series, line in rows[rows["series"] != EXACT].groupby("series", sort=False):
        style = styles[str(series)]
        axes.plot(line["bits"], line["value"], ".", color=style.color, markersize=3, alpha=0.6)
        points = line.dropna(subset="value").groupby("bits")["value"]
        found = pd.DataFrame([describe_seeds(own) for _, own in points], columns=["mean", "low", "high"])
        error = np.nan_to_num([found["mean"] - found["low"], found["high"] - found["mean"]])
        places = sorted(line.loc[line["value"].notna(), "bits"].unique())
        axes.errorbar(
            places, found["mean"], yerr=error, color=style.color, marker=style.marker, capsize=2,
            linestyle=style.dashes, markersize=scale_marker(style),
        )  # fmt: skip
    top = axes.get_ylim()[1]
    for series, lost in rows[rows["diverged"]].groupby("series", sort=False):
        axes.plot(lost["bits"], [top] * len(lost), "x", color=styles[str(series)].color, clip_on=False)
    axes.set_xticks(sorted(set(rows["bits"]) - {EXACT_BITS}))


def tabulate_states(trainings: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each training with each model's most frequent settings, without stable embedding."""
    if trainings.empty:
        return trainings
    table = keep_usual(trainings[~trainings["stable"]])
    pairs = list(zip(table["momentum"], table["variance"], strict=True))
    series = pd.Series([name_series(*pair) for pair in pairs], table.index, dtype=object)
    table = table.assign(series=series, bits=[find_bits(*pair) for pair in pairs])
    table = table[table["series"].notna()]
    both = table.groupby("model")["series"].agg(lambda own: EXACT in set(own) and own.nunique() > 1)
    table = table[table["model"].map(both).astype(bool)]
    return table.sort_values(["parameters", "model", "series", "bits", "seed"], ignore_index=True)[COLUMNS]


def name_series(momentum: QuantSpec | None, variance: QuantSpec | None) -> str | None:
    """Return which states are quantized and how, without the bits, or None of states that differ in kind."""
    name = name_states(momentum, variance)
    if name is None or name == EXACT:
        return name
    spec = momentum or variance
    role = "both" if momentum and variance else "momentum" if momentum else "variance"
    block = "" if spec is None or spec.block_size == USUAL_BLOCK else f", block {spec.block_size or 'whole'}"
    return f"{role}: {name}{block}"


def find_bits(momentum: QuantSpec | None, variance: QuantSpec | None) -> int:
    """Return the bits of a quantized state's value."""
    return next((spec.bits for spec in (momentum, variance) if spec is not None), EXACT_BITS)


def judge_states(data: pd.DataFrame) -> str:
    """Say from which bits on each series is level with 32-bit states, paired by seed."""
    sentences = []
    for (model, series), own in data[data["series"] != EXACT].groupby(["model", "series"], sort=False):
        exact = data[(data["model"] == model) & (data["series"] == EXACT)].set_index("seed")["value"]
        worse = []
        for bits, at in own.groupby("bits"):
            gaps = (at.set_index("seed")["value"] - exact).dropna()
            if at["diverged"].any():
                worse.append(f"{bits} bits diverge in {int(at['diverged'].sum())} of {len(at)}")
            elif len(gaps) > 1 and describe_seeds(gaps)[1] > 0:
                worse.append(f"{bits} bits lose {gaps.mean():.3f}")
        shown = ", ".join(worse) if worse else "no bits lose more than seeds differ"
        sentences.append(f"{model}, {series}: {shown}")
    return ". ".join(sentences) + "."


def judge_tuned(trainings: pd.DataFrame) -> str:
    """Compare 4-bit states with 32-bit ones, each at its best learning rate and beta1, or return nothing."""
    plain = trainings[~trainings["stable"] & ~trainings["diverged"]]
    best = {}
    for bits in (EXACT_BITS, 4):
        pairs = zip(plain["momentum"], plain["variance"], strict=True)
        wanted = EXACT if bits == EXACT_BITS else "both: dynamic"
        own = plain[[find_bits(*pair) == bits and name_series(*pair) == wanted for pair in pairs]]
        for model, of_model in own.groupby("model"):
            means = of_model.groupby("settings")["value"].mean()
            if len(means) > 1:
                best[str(model), bits] = of_model[of_model["settings"] == means.idxmin()].set_index("seed")["value"]
    sentences = []
    for model in sorted({model for model, bits in best if bits == 4}):
        if (model, EXACT_BITS) in best:
            mean, low, high = describe_seeds((best[model, 4] - best[model, EXACT_BITS]).dropna())
            sentences.append(f" Tuned, 4 bits end {mean:+.4f} ({low:+.4f} to {high:+.4f}) from 32 bits on {model}.")
    return "".join(sentences)
