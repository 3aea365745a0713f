"""How many bits an optimizer's states need: the loss against the bits of a state's value."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import refuse_mixed_evaluations
from kbit.analysis.curves.optimizers import EXACT, keep_usual, name_states, tabulate_trainings
from kbit.analysis.curves.trainings import describe_seeds
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, describe_lack
from kbit.numerics.spec import QuantSpec
from kbit.training.config import TrainConfig

CLAIM: Final = "How many bits do the states of an optimizer need? The momentum needs more than the variance."
COLUMNS: Final = ["model", "series", "bits", "seed", "diverged", "value", "added", "key"]
TUNED: Final = {"lr": TrainConfig.lr, "beta1": TrainConfig.beta1}  # with the values that fields leave out
EXACT_BITS: Final = 32
USUAL_BLOCK: Final = 256
ARMS: Final[dict[tuple[int, str | None], str]] = {
    (EXACT_BITS, EXACT): "32 bits",
    (4, "both: dynamic"): "4 bits",
}  # that are compared tuned


def draw_states(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw what few bits of a state's value add to the loss, a panel for each model, a line for each role and type.

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
    sheet.label("bits of a state's value", f"nats per token above {EXACT} states")
    draw_legend(sheet.fig.body, styles, page)
    seeds = int(data.groupby(["model", "series", "bits"])["seed"].nunique().min())
    note = (
        f"Each dot is a training less that with {EXACT} states and the same seed, bars are Student's 95% intervals "
        f"over seeds ({seeds} at least). A cross at the upper edge is a training that diverged."
    )
    verdict = judge_states(data) + judge_tuned(trainings)
    return PaperFigure("states", sheet.fig, data, CLAIM, verdict, (note,))


def draw_model(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw the lines of a model over its 32-bit trainings, which are 0."""
    axes.axhline(0, color="0.5", linewidth=0.8)
    for series, line in rows[rows["series"] != EXACT].groupby("series", sort=False):
        style = styles[str(series)]
        axes.plot(line["bits"], line["added"], ".", color=style.color, markersize=3, alpha=0.6)
        points = line.dropna(subset="added").groupby("bits")["added"]
        found = pd.DataFrame([describe_seeds(own) for _, own in points], columns=["mean", "low", "high"])
        error = np.nan_to_num([found["mean"] - found["low"], found["high"] - found["mean"]])
        places = sorted(line.loc[line["added"].notna(), "bits"].unique())
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
    exact = table[table["series"] == EXACT].groupby(["model", "seed"])["value"].mean()
    own = pd.MultiIndex.from_frame(table[["model", "seed"]])
    table = table.assign(added=table["value"] - exact.reindex(own).to_numpy(dtype=np.float64))
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
        worse = []
        for bits, at in own.groupby("bits"):
            gaps = at["added"].dropna()
            if at["diverged"].any():
                worse.append(f"{bits} bits diverge in {int(at['diverged'].sum())} of {len(at)}")
            elif len(gaps) < 2:
                worse.append(f"{bits} bits have one seed, which shows no difference or likeness")
            elif describe_seeds(gaps)[1] > 0:
                worse.append(f"{bits} bits lose {gaps.mean():.3f}")
        shown = ", ".join(worse) if worse else "no bits lose more than seeds differ"
        sentences.append(f"{model}, {series}: {shown}")
    return ". ".join(sentences) + "."


def judge_tuned(trainings: pd.DataFrame) -> str:
    """Compare 4-bit states with 32-bit ones, each at its best learning rate and beta1, or return nothing.

    Both have the recipe that most 4-bit trainings of a model have, and only what both tried counts. What diverged with
    some seed is not the best.
    """
    if trainings.empty:
        return ""
    plain = trainings[~trainings["stable"]]
    fields = [json.loads(cell) for cell in plain["settings"]]
    others = [json.dumps({k: v for k, v in own.items() if k not in TUNED}, sort_keys=True) for own in fields]
    tried = [tuple(own.get(name, default) for name, default in TUNED.items()) for own in fields]
    pairs = list(zip(plain["momentum"], plain["variance"], strict=True))
    arms = [ARMS.get((find_bits(*pair), name_series(*pair))) for pair in pairs]
    columns = {"recipe": others, "tried": tried, "arm": arms}
    own = plain.assign(**{name: pd.Series(cells, plain.index, dtype=object) for name, cells in columns.items()})
    table = own.dropna(subset="arm")
    return "".join(judge_model(str(model), own) for model, own in table.groupby("model"))


def judge_model(model: str, table: pd.DataFrame) -> str:
    """Return the sentence of judge_tuned on one model, or nothing if its arms do not share two settings.

    Args:
        model: its name.
        table: its trainings, with the columns arm, recipe, tried (the values of TUNED), seed and value.

    Raises:
        AmbiguousResults: these trainings were measured in several ways.
    """
    few = table[table["arm"] == "4 bits"]
    if few.empty:
        return ""
    own = table[table["recipe"] == few["recipe"].value_counts().sort_index().idxmax()]
    refuse_mixed_evaluations(own[own["value"].notna()])
    tried = own.pivot_table(
        values="value", index="tried", columns="arm", aggfunc=lambda values: values.mean(skipna=False)
    )
    if tried.shape[1] < len(ARMS) or len(tried := tried.dropna()) < 2:
        return ""
    best: dict[str, Any] = {str(arm): means.idxmin() for arm, means in tried.items()}
    ends = {arm: own[(own["arm"] == arm) & (own["tried"] == at)].set_index("seed")["value"] for arm, at in best.items()}
    mean, low, high = describe_seeds((ends["4 bits"] - ends["32 bits"]).dropna())
    sure = f"{low:+.4f} to {high:+.4f}" if np.isfinite(low) else "one seed"
    where = [f"{arm} at {describe_tuned(at, list(tried.index))}" for arm, at in sorted(best.items())]
    return f" Tuned, 4 bits end {mean:+.4f} ({sure}) from 32 bits on {model}: {', '.join(where)}."


def describe_tuned(best: tuple[float, ...], tried: list[tuple[float, ...]]) -> str:
    """Name the best values of what was tuned, and say of each that is the least or most of those tried that it is."""
    words = []
    for name, value, values in zip(TUNED, best, zip(*tried, strict=True), strict=True):
        at_edge = len(set(values)) > 1 and value in (min(values), max(values))
        words.append(f"{name} {value:g}{' (the edge of what was tried)' if at_edge else ''}")
    return " and ".join(words)
