"""Which tensor of a training deserves the bits: loss against the bits of each role, and a law of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import Floats
from kbit.analysis.curves.roles import LAW_ROLES, tabulate_roles
from kbit.analysis.curves.trainings import describe_seeds
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.statistics.laws import TooFewPoints
from kbit.analysis.statistics.training_law import (
    DECAYS,
    TrainingLaw,
    compare_equal_work,
    describe_law,
    find_gains,
    fit_seeds,
    predict_mean,
)
from kbit.training.config import PRODUCTS

CLAIM: Final = (
    "Which tensor of a training deserves the bits? The law is Kumar et al. 2024's effective parameters, without the "
    "second constant that they fit to each tensor: bits by which a loss falls are not to be compared with theirs."
)
ALL_PRODUCTS, ALL_ROLES, MIXED = "all products", "all roles", "mixed"
SERIES: Final = (*LAW_ROLES, ALL_PRODUCTS, ALL_ROLES)
GAIN_BITS: Final = 3  # one more bit is compared from here on
POOR: Final = 1 / 3  # a law that misses more than this share of what few bits add says little
LEAST_LOSS: Final = 1e-3  # nats. A role that loses less at its fewest bits does not tell how it falls with bits
Laws = Mapping[int, TrainingLaw]


def draw_training_law(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the training loss against the bits of a role, a panel for each model, a line of the law for each role.

    A last panel has the measured loss of each format against that of the law.

    Raises:
        MissingResults: no trainings of one recipe differ in the bits of a role.
    """
    points = tabulate_roles(results)
    points = subtract_exact(
        points.assign(
            series=pd.Series([name_series(row) for row in points.to_dict("records")], points.index, dtype=object)
        )
    )
    if points.loc[points["added"].notna(), "series"].nunique() < 2:
        needs = "trainings in float32, and with few bits of weights, activations, gradients or states"
        raise MissingResults(describe_lack("training_law", needs, ("nano/training_law", "nano/product_precision")))
    laws, reason = try_law(points)
    models = list(dict.fromkeys(points["model"]))
    styles = style_series([name for name in SERIES if name in set(points["series"])])
    sheet = make_sheet(page, len(models) + bool(laws), (3.4, 3.2), 3, styles)
    axes_of_all = sheet.add_axes(len(models) + bool(laws))
    for axes, model in zip(axes_of_all, models, strict=False):
        draw_model(axes, points[points["model"] == model], styles, laws)
        sheet.write_title(axes, model)
        axes.set_xlabel("bits of the quantized roles")
    axes_of_all[0].set_ylabel("added by few bits (nats per token)")
    if laws:
        draw_fit(axes_of_all[-1], points, laws)
        sheet.write_title(axes_of_all[-1], "the law beside what was measured")
    draw_legend(sheet.fig.body, styles, page)
    data = points.assign(law=predict_added(laws, points) if laws else np.nan)
    verdict = " ".join([*judge_law(data, laws, reason), *judge_equal_work(points)])
    return PaperFigure("training_law", sheet.fig, data, CLAIM, verdict, describe(points, laws))


def name_series(row: Mapping[Any, Any]) -> str | None:
    """Return the role that alone has few bits, or all products, or all roles if they have as many, or mixed.

    None is of a training without quantized roles.
    """
    quantized = [role for role in LAW_ROLES if np.isfinite(row[role])]
    if not quantized:
        return None
    if len(quantized) == 1:
        return quantized[0]
    alike = len({row[role] for role in quantized}) == 1
    names = {PRODUCTS: ALL_PRODUCTS, LAW_ROLES: ALL_ROLES}
    return names.get(tuple(quantized), MIXED) if alike else MIXED


def try_law(points: pd.DataFrame) -> tuple[Laws, str]:
    """Return the law of each seed, or none and the reason."""
    try:
        return fit_seeds(points), ""
    except TooFewPoints as error:
        return {}, str(error)


def subtract_exact(points: pd.DataFrame) -> pd.DataFrame:
    """Return points with the column added: the loss above that of the model's float32 training of the same seed."""
    exact = points[points["series"].isna()].groupby(["model", "seed"])["value"].mean()
    own = pd.MultiIndex.from_frame(points[["model", "seed"]])
    return points.assign(added=points["value"] - exact.reindex(own).to_numpy(dtype=np.float64))


def draw_model(axes: Axes, points: pd.DataFrame, styles: Mapping[str, LineStyle], laws: Laws) -> None:
    """Draw what few bits add to a model's loss: dots for seeds, means with bars over seeds, and the law as lines."""
    axes.axhline(0, color="0.5", linewidth=0.8)
    drawn = points[points["series"].isin(list(styles)) & points["added"].notna()]
    bits = drawn[list(LAW_ROLES)].min(axis=1)
    for place, (series, style) in enumerate(styles.items()):
        own = drawn[drawn["series"] == series]
        if own.empty:
            continue
        shift = 0.06 * (place - (len(styles) - 1) / 2)  # so that bars stand side by side
        axes.plot(bits[own.index] + shift, own["added"], ".", color=style.color, markersize=3, alpha=0.6)
        found = [(k, *describe_seeds(values)) for k, values in own["added"].groupby(bits[own.index])]
        places, means, lows, highs = np.array(found).T
        error = np.nan_to_num([means - lows, highs - means])
        axes.errorbar(
            places + shift, means, yerr=error, color=style.color, marker=style.marker, capsize=2, linestyle="none",
            markersize=scale_marker(style),
        )  # fmt: skip
        if laws:
            line = make_line(own, np.linspace(places.min(), places.max(), 30))
            axes.plot(line["at"] + shift, predict_added(laws, line), color=style.color, linestyle=style.dashes)
    axes.set_xticks(sorted(bits.unique()))


def predict_added(laws: Laws, points: pd.DataFrame) -> Floats:
    """Return what few bits add to the loss by the law, the mean over the seeds' laws."""
    exact = points.assign(**dict.fromkeys(LAW_ROLES, np.inf))
    return predict_mean(laws, points) - predict_mean(laws, exact)


def make_line(own: pd.DataFrame, at: Floats) -> pd.DataFrame:
    """Return points of a series at any bits, with the column at."""
    first = own.iloc[0]
    roles = {role: at if np.isfinite(first[role]) else np.full(len(at), np.inf) for role in LAW_ROLES}
    return pd.DataFrame(roles).assign(parameters=first["parameters"], at=at)


def draw_fit(axes: Axes, points: pd.DataFrame, laws: Laws) -> None:
    """Draw what each format adds to its model's loss, as it was measured, against what the law says."""
    added = tabulate_added(points, laws)
    axes.plot(added["law"], added["measured"], "o", color="0.3", markersize=4, alpha=0.7)
    ends = [min(added["law"].min(), added["measured"].min()), max(added["law"].max(), added["measured"].max())]
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    axes.set_xlabel("added by few bits: law (nats)")
    axes.set_ylabel("measured (nats)")


def tabulate_added(points: pd.DataFrame, laws: Laws) -> pd.DataFrame:
    """Return a row for each format of each model: what few bits add to the loss, measured and by the law, in nats.

    Both are means over the seeds that the law was fitted to.
    """
    own = points[points["seed"].isin(list(laws)) & points["added"].notna() & points["series"].notna()]
    own = own.assign(law=predict_added(laws, own), measured=own["added"])
    return own.groupby(["model", *LAW_ROLES], as_index=False)[["measured", "law"]].mean()


def judge_law(data: pd.DataFrame, laws: Laws, reason: str) -> list[str]:
    """Say what the law has found, how well it fits, and which operand one more bit is for."""
    if not laws:
        return [f"No law: {reason}."]
    table = {str(name): row for name, row in describe_law(laws).iterrows()}
    exponent, added, lost = table.pop("exponent"), tabulate_added(data, laws), find_losses(data, laws)
    named = ", ".join(
        f"{role} {show_decay(row, [law.decays[role] for law in laws.values()], lost[role])}"
        for role, row in table.items()
    )
    miss = float(np.sqrt(np.mean((added["measured"] - added["law"]) ** 2)))
    spread = float(np.sqrt(np.mean(added["measured"] ** 2)))
    largest = float(data["parameters"].max())
    gains = find_gains(laws, GAIN_BITS, largest)
    sentences = [] if len(gains) < 2 else [judge_gains(gains, largest)]
    if miss > POOR * spread:
        sentences.insert(0, "The law fits poorly: what is said by it is weak.")
    return [
        *sentences,
        f"Bits by which a role's loss falls by e: {named}. The exponent of the effective parameters is "
        f"{show(exponent)}.",
        f"The law misses what few bits add by {miss:.3f} nats, and that is {spread:.3f} (roots of mean squares).",
    ]


def find_losses(data: pd.DataFrame, laws: Laws) -> dict[str, float]:
    """Return what each role alone loses by the law at its fewest bits, on the smallest model."""
    exact = dict.fromkeys(LAW_ROLES, np.inf) | {"parameters": float(data["parameters"].min())}
    roles = next(iter(laws.values())).decays
    fitted = data[data["value"].notna() & data["seed"].isin(list(laws))]
    return {role: float(predict_added(laws, pd.DataFrame([exact | {role: fitted[role].min()}]))[0]) for role in roles}


def show_decay(row: pd.Series[float], decays: Sequence[float], lost: float) -> str:
    """Return the g of a role with its interval, or why there is none."""
    if lost <= LEAST_LOSS:
        return "none, as nothing is lost"
    unknown = sum(not 1.01 * DECAYS[0] < decay < DECAYS[1] / 1.01 for decay in decays)
    return f"not known, as {unknown} of {len(decays)} seeds have it at a bound of the fit" if unknown else show(row)


def judge_gains(gains: pd.DataFrame, parameters: float) -> str:
    """Say which operand gains most from a fourth bit, and whether seeds tell it from the next one."""
    first, second = gains.index[:2]
    lead, low, high = gains.loc[second, ["lead", "lead_low", "lead_high"]]
    sure = f"{lead:+.4f} nats ({low:+.4f} to {high:+.4f})" if np.isfinite(low) else f"{lead:+.4f} nats (one seed)"
    head = f"By the law {first} deserve the bits" if low > 0 else "By the law no operand is shown to deserve the bits"
    return (
        f"{head}: from {GAIN_BITS} bits in all products one more in {first} gains {gains.loc[first, 'mean']:.4f} nats "
        f"at {parameters:,.0f} parameters, {sure} more than in {second}."
    )


def judge_equal_work(points: pd.DataFrame) -> list[str]:
    """Say which format of the largest model is best at equal bit operations, a sentence for each set of bits."""
    found = compare_equal_work(points[points["parameters"] == points["parameters"].max()])
    sentences = []
    for (model, _), group in found.groupby(["model", "work"], sort=False):
        best, *others = group.to_dict("records")
        kinds: dict[str, list[str]] = {"worse": [], "not told apart from it": []}
        for row in others:
            words = f"{row['format']} {row['mean']:+.4f}{show_range(row['low'], row['high'])}"
            kinds["worse" if row["low"] > 0 else "not told apart from it"].append(words)
        said = ", and ".join(f"{kind}: {', '.join(named)}" for kind, named in kinds.items() if named)
        sentences.append(
            f"At {best['operations']:.0f} bit operations on {model} {best['format']} has the lowest mean, {said}."
        )
    return sentences


def show(row: pd.Series[float]) -> str:
    """Return a value with its interval, as 0.92 (0.85 to 0.99)."""
    return f"{row['mean']:.2f}{show_range(row['low'], row['high'], '.2f')}"


def show_range(low: float, high: float, how: str = "+.4f") -> str:
    """Return an interval in brackets, or that there is one seed."""
    return f" ({low:{how}} to {high:{how}})" if np.isfinite(low) else " (one seed)"


def describe(points: pd.DataFrame, laws: Laws) -> tuple[str, ...]:
    """Return the notes: what is drawn, and how much it rests on."""
    lines = "Lines are the law, as the mean over seeds, each fitted by itself. " if laws else ""
    mixed = "Formats with other bits in each role have no mark." * bool((points["series"] == MIXED).any())
    lost = int(points["diverged"].sum())
    diverged = f" {count_things(lost, 'training')} diverged and left out." if lost else ""
    seeds = sorted(map(int, points["seed"].unique()))
    kept = (
        f" The law is of seeds {', '.join(map(str, laws))}, which have all formats." if laws.keys() < {*seeds} else ""
    )
    return (
        "The loss is that of the training in its own arithmetic, the mean of the last twentieth of the steps, less "
        "that of the float32 training of the same seed. Marks are means over seeds, dots are seeds, bars are "
        f"Student's 95% intervals over seeds. {lines}{mixed}".strip(),
        "Bit operations are those of a multiply-accumulate, the mean of a layer's three products. A role without a "
        "quantizer counts 16 bits. Of several recipes, learning rates of a model or kinds of quantizer of a role the "
        "most frequent one is drawn.",
        f"Data: {count_things(len(points), 'training')} on {count_things(points['model'].nunique(), 'model')}, "
        f"{count_things(len(seeds), 'seed')}.{diverged}{kept}",
    )
