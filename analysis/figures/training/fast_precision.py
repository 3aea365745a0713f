"""What products in few bits cost a training, and where FAST's rule takes the high precision."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.trainings import describe_seeds
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.figures.training.formats import (
    PLAIN,
    TASK,
    describe_difference,
    describe_left_out,
    draw_formats,
    find_differences,
    name_products,
    tabulate_formats,
)
from kbit.store.items import read_items
from kbit.training.config import PRODUCTS

CLAIM: Final = (
    "What do products in few bits cost a training, and does FAST's rule save passes? Zhang et al. 2022 let the "
    "precision of each tensor follow its values, its layer and the step."
)
FORMAT_FIELDS: Final = frozenset({"fast", "include", *PRODUCTS})
PERIODS: Final = 20  # parts of a training whose choices are counted together (kbit.training.products.fast)
SHARES: Final = ["format", "role", "layer", "period", "share"]


def draw_fast_precision(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw cross entropy against passes, and a map of FAST's share of high precision for each role.

    Raises:
        MissingResults: no two trainings differ in the formats of their products.
    """
    data = tabulate_formats(results, "passes_per_mac", name_products, FORMAT_FIELDS)
    if data["cost"].notna().sum() == 0:
        needs = "trainings with quantized products (train=fast, quant@train.gradients=...)"
        raise MissingResults(describe_lack("fast_precision", needs, ("nano/fast", "nano/product_precision")))
    shares = tabulate_shares(results, data)
    maps = list(shares.groupby(["format", "role"], sort=False))
    styles = style_series(data["format"])
    sheet = make_sheet(page, 1 + len(maps), (3.4, 3.0), 4, styles)
    first, *others = sheet.add_axes(1 + len(maps))
    draw_formats(first, data, styles)
    set_log_axis(first, data["cost"].dropna(), "{:g}".format)
    first.set_xlabel("passes per multiply-accumulate")
    for axes, ((name, role), group) in zip(others, maps, strict=True):
        draw_map(axes, group)
        sheet.write_title(axes, f"{name}: {role}")
    draw_legend(sheet.fig.body, styles, page, lines=False)
    notes = (*describe(data, shares), describe_left_out(results, data, name_products))
    verdict = judge_products(data, shares)
    return PaperFigure("fast_precision", sheet.fig, data, CLAIM, verdict, tuple(filter(None, notes)))


def tabulate_shares(results: pd.DataFrame, data: pd.DataFrame) -> pd.DataFrame:
    """Return SHARES, FAST's share of high precision by role, layer and period, the mean over seeds."""
    store = results.attrs.get("store")
    fast = data[data["format"].str.startswith("FAST")]
    parts = []
    for role in PRODUCTS if len(fast) else ():
        if store is None:
            break
        found = read_items(store, TASK, f"high_share/{role}", set(fast["key"]))
        for name, group in fast.groupby("format", sort=False):
            values = [found[key] for key in group["key"] if key in found]
            if not values:
                continue
            grid = np.mean(values, axis=0).reshape(-1, min(PERIODS, int(group["steps"].iloc[0])))
            layer, period = np.indices(grid.shape)
            part = {"layer": layer.ravel(), "period": period.ravel(), "share": grid.ravel()}
            parts.append(pd.DataFrame(part).assign(format=name, role=role))
    shares = pd.concat(parts, ignore_index=True)[SHARES] if parts else pd.DataFrame(columns=SHARES)
    return shares.sort_values(["format", "layer", "period"], kind="stable", ignore_index=True)


def draw_map(axes: Axes, shares: pd.DataFrame) -> None:
    """Draw the share of high precision by layer and time, white for none and dark for all."""
    grid = shares.pivot(index="layer", columns="period", values="share")
    axes.imshow(
        grid, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, extent=(0, 100, -0.5, len(grid) - 0.5)
    )
    axes.set_yticks(sorted({0, len(grid) - 1}))
    axes.set_xlabel("share of the training (%)")
    axes.set_ylabel("layer")
    axes.grid(visible=False)


def judge_products(data: pd.DataFrame, shares: pd.DataFrame) -> str:
    """Say what each format loses to float32, and how the share of high precision goes with time."""
    parts = []
    if len(shares):
        last = shares["period"].max()
        for name, group in shares.groupby("format", sort=False):
            early, late = (group.loc[group["period"] == period, "share"].mean() for period in (0, last))
            parts.append(f"{name} takes the high precision in {early:.0%} of uses at first and {late:.0%} at last")
    lost = find_differences(data)
    if lost.empty:
        parts.append("There is no training in float32 to compare with")
    else:
        words = [describe_difference(str(name), row, "passes") for name, row in lost.iterrows()]
        parts += [*name_least_lost(lost), f"Nats lost against {PLAIN}: {'; '.join(words)}"]
    return ". ".join([*parts, *compare_with_fixed(data)]) + "."


def name_least_lost(lost: pd.DataFrame) -> list[str]:
    """Name the formats that lose less, on average over seeds, than every other one with as few passes or fewer.

    There is no sentence of one format.

    Args:
        lost: from find_differences.
    """
    least, named = np.inf, []
    counted = lost[lost["cost"].notna()]
    for name, row in counted.sort_values(["cost", "mean"], kind="stable").iterrows():
        if row["mean"] < least:
            least = row["mean"]
            named.append(f"{name} ({row['cost']:.2f})")
    return [f"Least is lost for their passes, on average over seeds, by {'; '.join(named)}"] if len(counted) > 1 else []


def compare_with_fixed(data: pd.DataFrame) -> list[str]:
    """Say how each rule ends beside the fixed format whose passes are nearest, paired by seed."""
    costs = data[data["cost"].notna()].groupby("format")["cost"].mean()
    fixed = costs[~costs.index.str.startswith("FAST")]
    sentences = []
    for name in costs.index.difference(fixed.index):
        if fixed.empty:
            break
        near = np.abs(np.log(fixed / costs[name])).idxmin()
        own, other = (data[data["format"] == which].set_index("seed")["value"] for which in (name, near))
        mean, low, high = describe_seeds((own - other).dropna())
        interval = f"{low:+.4f} to {high:+.4f}" if np.isfinite(low) else "one seed"
        sentences.append(
            f"{name} ends {mean:+.4f} ({interval}) from {near}, which is fixed, with {costs[name] / fixed[near]:.2f} "
            "times its passes"
        )
    return sentences


def describe(data: pd.DataFrame, shares: pd.DataFrame) -> tuple[str, ...]:
    """Return the notes: what is drawn, and how much it rests on."""
    counts = f"{count_things(len(data), 'training')} of {data['model'].iloc[0]}, {data['seed'].nunique()} seeds"
    maps = (
        "Maps show the share of uses with high precision, the mean over seeds: white is none, dark blue is all. "
        if len(shares)
        else ""
    )
    return (
        f"Marks are means over seeds of the difference to {PLAIN} with the same seed, dots are seeds, bars are "
        f"Student's 95% intervals over seeds. {maps}",
        "A pass multiplies a pair of 2-bit chunks: an operand of m magnitude bits has ceil(m / 2).",
        f"Data: {counts}. FAST's alpha and beta are from a summary of the paper. The trained weights are measured in "
        "float32.",
    )
