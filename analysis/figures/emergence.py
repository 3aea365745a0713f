"""Emergent outlier features against model size and perplexity (LLM.int8(), section 4)."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import AmbiguousResults, prefer_baseline
from kbit.analysis.curves.published import read_published
from kbit.analysis.curves.units import format_count
from kbit.analysis.figures.canvas.axes import set_log_axis, set_value_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack

CLAIM: Final = (
    "Do outlier features (a hidden dimension of magnitude 6 or more in 25% of layers, at 6% of positions) come with "
    "size, or with a lower perplexity? LLM.int8(): smoothly with perplexity, from 6.7 billion parameters in all layers."
)

SHARES: Final = {"layers": "share of layers", "positions": "share of positions"}

# metric of a measurement with task features/<text> (kbit.evaluation.outlier_features) -> column
METRICS: Final = {
    "features": "features",
    "features_one_sided": "one_sided",
    "layers_affected": "layers",
    "positions_affected": "positions",
    "top1_probability": "top1",
    "top1_probability_without_features": "top1_without",
    "top1_probability_without_random": "top1_without_random",
    "cross_entropy_without_features": "loss_without",
    "cross_entropy_without_random": "loss_without_random",
}


def draw_features(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the shares of layers and positions that outliers affect, the paper's models beside ours.

    Raises:
        MissingResults: no model was looked at.
    """
    ours = tabulate_features(results) if len(results) else pd.DataFrame()
    if ours.empty:
        needs = "models that were looked at for outlier features (eval.features.measure=true)"
        raise MissingResults(describe_lack("features", needs, ("nano/features", "paper/table_2")))
    data = pd.concat([ours, read_published("features")], ignore_index=True)
    verdict = name_criteria(ours) + judge_features(ours)
    names = [f"{what}{source}" for source in ("", " (paper)") for what in SHARES.values()]
    styles = style_series(names)
    sheet = make_sheet(page, 2, (4.1, 3.6), 2, styles)
    for axes, x in zip(sheet.add_axes(2), ("parameters", "perplexity"), strict=True):
        for is_paper, rows in data.groupby(data["source"] != "this store"):
            for column, what in SHARES.items():
                style = styles[f"{what}{' (paper)' if is_paper else ''}"]
                axes.plot(rows[x], rows[column], linestyle="none", marker=style.marker, color=style.color)
        set_log_axis(axes, data[x], format_count)
        set_value_axis(axes, -0.04, 1.04)
        axes.set_xlabel("perplexity (per token)" if x == "perplexity" else x)
    sheet.label("", "share affected")
    draw_legend(sheet.fig.body, styles, page, lines=False)
    note = (
        "Shares are of the most frequent dimension. The paper's perplexities are on C4, ours on our text: compare "
        "within a source."
    )
    families, ways = (", ".join(sorted(set(ours[name]))) for name in ("family", "evaluation"))
    sample = f"Data: {count_things(len(ours), 'experiment')}, one of each model, of {families} ({ways})."
    return PaperFigure("features", sheet.fig, data, CLAIM, verdict, (note, sample))


def tabulate_features(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model, from its 16-bit experiment where there is one.

    Returns:
        Columns family, model, bits, parameters, perplexity, METRICS' columns, key, evaluation, criteria (those that
        differ from LLM.int8()'s) and source.

    Raises:
        AmbiguousResults: a family was measured in several ways, or features were found by different criteria.
    """
    is_feature = results["task"].str.startswith("features/") & results["metric"].isin(METRICS)
    if not is_feature.any():
        return pd.DataFrame()
    rows = prefer_baseline(results[is_feature])
    rows = rows[~rows.duplicated(["model", "metric"])]
    wide = rows.assign(column=rows["metric"].map(METRICS)).pivot(
        index=["key", "task"], columns="column", values="value"
    )
    table = wide.reindex(columns=list(METRICS.values())).reset_index()
    about = rows.drop_duplicates("key").set_index("key")
    about = about[["family", "model", "bits", "parameters", *(["evaluation"] if "evaluation" in rows else [])]]
    losses = results[results["metric"] == "cross_entropy"].set_index(["key", "task"])["value"]
    pairs = zip(table["key"], table["task"].str.removeprefix("features/"), strict=True)
    table["perplexity"] = np.exp([float(losses.get(pair, np.nan)) for pair in pairs])
    table = table.join(about, on="key").assign(source="this store")
    # "float32, 16 windows, criteria magnitude 2": criteria that are not the paper's come last
    table["criteria"] = [way.partition("criteria ")[2] for way in table.get("evaluation", [""] * len(table))]
    if table["criteria"].nunique() > 1:
        found = "; ".join(sorted(table["evaluation"].unique()))
        raise AmbiguousResults(f"outlier features were found by different criteria: {found}; keep one with --where")
    return table.drop(columns="task").sort_values(["family", "parameters", "bits"], ignore_index=True)


def name_criteria(ours: pd.DataFrame) -> str:
    """Return how a verdict starts if features were found by other criteria than LLM.int8()'s, or else nothing."""
    criteria = ours["criteria"].iloc[0]
    return f"By other criteria than the paper's ({criteria}): " if criteria else ""


def judge_features(ours: pd.DataFrame) -> str:
    """Say how many models have features, how far the leading dimension goes, and what zeroing features did."""
    counted = ours[ours["features"].notna()]
    some = counted[counted["features"] > 0]
    parts = [f"{len(some)} of {count_things(len(counted), 'model')} have outlier features"]
    placed = ours[["layers", "positions"]].max()
    if placed.notna().all():
        parts.append(
            f"the most frequent dimension is large in up to {placed['layers']:.0%} of layers, at up to "
            f"{placed['positions']:.1%} of positions"
        )
    return "; ".join([*parts, *describe_zeroing(some)]) + "."


def describe_zeroing(some: pd.DataFrame) -> list[str]:
    """Say what zeroing features did in models that have some, beside as many random dimensions where there are any.

    Models of which a number is missing are left out, and counted.
    """
    zeroed = some.dropna(subset=["perplexity", "loss_without", "top1", "top1_without"])
    controlled = zeroed.dropna(subset=["loss_without_random", "top1_without_random"])
    shown = controlled if len(controlled) else zeroed
    if shown.empty:
        return []
    loss = np.log(shown["perplexity"])
    nats = f"zeroing the features adds {(shown['loss_without'] - loss).mean():+.3f} nats on average"
    top1 = f"top-1 probability {shown['top1'].mean():.3f} becomes {shown['top1_without'].mean():.3f}"
    if len(controlled):
        nats += f", as many random dimensions {(shown['loss_without_random'] - loss).mean():+.3f}"
        top1 += f" and {shown['top1_without_random'].mean():.3f}"
    few = f" (of the {len(shown)} of which that is known)" if len(shown) < len(some) else ""
    return [nats + few, top1]
