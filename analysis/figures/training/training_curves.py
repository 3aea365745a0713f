"""The loss of trainings, step by step."""

from __future__ import annotations

from typing import Final

import pandas as pd

from kbit.analysis.curves.trainings import find_trained, read_fields
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.store.items import read_items

CLAIM: Final = "How does the loss fall, and does any training diverge?"
TASK: Final = "training"
COLUMNS: Final = ["model", "training", "seed", "step", "loss", "key"]


def draw_training_curves(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the training loss against the step, a panel for each model, a line for each seed.

    Raises:
        MissingResults: no experiment trained a model.
    """
    data = tabulate_curves(results)
    if data.empty:
        needs = "trained models (train=qat, train=qlora, ...)"
        raise MissingResults(describe_lack("training_curves", needs, ("nano/qat", "nano/qlora")))
    styles = style_series(data["training"])
    models = list(dict.fromkeys(data["model"]))
    sheet = make_sheet(page, len(models), (3.6, 3.0), 3, styles)
    for axes, model in zip(sheet.add_axes(len(models)), models, strict=True):
        for (training, _), line in data[data["model"] == model].groupby(["training", "seed"], sort=False):
            style = styles[str(training)]
            axes.plot(line["step"], line["loss"], color=style.color, linestyle=style.dashes, linewidth=0.9)
        sheet.write_title(axes, model)
    sheet.label("step", "training loss (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    note = (
        "Each point is the mean of a fiftieth of the steps. Each seed has a line. A training that several experiments"
    )
    note = f"{note} share is drawn once."
    return PaperFigure("training_curves", sheet.fig, data, CLAIM, judge_curves(results, data), (note,))


def tabulate_curves(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each point of each training's curve."""
    trained, store = find_trained(results), results.attrs.get("store")
    if trained.empty or store is None:
        return pd.DataFrame()
    trained = trained.drop_duplicates("key")
    trained = trained[~trained.duplicated(["model", "training", "train_seed"])]
    curves = read_items(store, TASK, "curve", set(trained["key"]))
    parts = []
    for row in trained.sort_values(["parameters", "model", "training", "train_seed"]).to_dict("records"):
        if (curve := curves.get(row["key"])) is not None:
            width = read_fields(row["train_fields"])["steps"] / len(curve)
            steps = [width * (place + 0.5) for place in range(len(curve))]
            about = {"model": row["model"], "training": row["training"], "seed": row["train_seed"], "key": row["key"]}
            parts.append(pd.DataFrame({"step": steps, "loss": curve}).assign(**about))
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame()


def judge_curves(results: pd.DataFrame, data: pd.DataFrame) -> str:
    """Say how many trainings there are, and how many of them diverged or had spikes."""
    rows = results[(results["task"] == TASK) & results["key"].isin(data["key"])]
    diverged = int((rows.loc[rows["metric"] == "diverged", "value"] > 0).sum())
    spiked = int((rows.loc[rows["metric"] == "loss_spikes", "value"] > 0).sum())
    count = data["key"].nunique()
    return f"{diverged or 'None'} of {count_things(count, 'training')} diverged. {spiked or 'None'} had a loss spike."
