"""The loss of trainings, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.trainings import TASK, find_trained, name_bases, read_fields
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.store.items import read_items

CLAIM: Final = "How does the loss fall, and does any training diverge?"
COLUMNS: Final = ["model", "training", "seed", "step", "loss", "diverged", "key"]
CHOICE: Final = ("include", "exclude", "rules")  # of the tensors that quantization-aware training rounds


def draw_training_curves(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the training loss against the step, a panel for each model, a line for each seed.

    Raises:
        MissingResults: no experiment trained a model, or no training has a curve.
    """
    trainings = list_trainings(results)
    data = tabulate_curves(trainings, results.attrs.get("store"))
    if data.empty:
        needs = "trained models (train=qat, train=qlora, ...)"
        if len(trainings):
            needs = f"trainings with a curve ({judge_curves(trainings)})"
        raise MissingResults(describe_lack("training_curves", needs, ("nano/qat", "nano/qlora")))
    styles = style_series(data["training"])
    models = list(dict.fromkeys(data["model"]))
    sheet = make_sheet(page, len(models), (3.6, 3.0), 3, styles)
    for axes, model in zip(sheet.add_axes(len(models)), models, strict=True):
        for (training, _), line in data[data["model"] == model].groupby(["training", "seed"], sort=False):
            style = styles[str(training)]
            axes.plot(line["step"], line["loss"], color=style.color, linestyle=style.dashes, linewidth=0.9)
            if line["diverged"].any():
                axes.plot(line["step"].iloc[-1:], line["loss"].iloc[-1:], "x", color=style.color)
        sheet.write_title(axes, model)
    sheet.label("step", "training loss (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    note = (
        "Each point is the mean of a fiftieth of the steps. Each seed has a line. A training that several experiments "
        "share is drawn once. A cross is the end of a training that diverged."
    )
    if undrawn := len(trainings) - data["key"].nunique():
        note = f"{note} {count_things(undrawn, 'training')} without a finite curve cannot be drawn."
    return PaperFigure("training_curves", sheet.fig, data, CLAIM, judge_curves(trainings), (note,))


def list_trainings(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each training, which several experiments can share, with its end.

    The columns added are base (16-bit, or the quantizer beside which adapters were trained), diverged, spikes and
    steps, those that were taken.
    """
    trained = find_trained(results)
    if trained.empty:
        return trained
    ends = trained[trained["task"] == TASK].drop_duplicates(["key", "metric"]).pivot(
        index="key", columns="metric", values="value"
    ).reindex(columns=["diverged", "loss_spikes", "steps"])  # fmt: skip
    trained = trained.drop_duplicates("key").reset_index(drop=True).join(ends, on="key")
    fields = [read_fields(cell) for cell in trained["train_fields"]]
    parts = zip(fields, trained.to_dict("records"), name_bases(trained), strict=True)
    trained = trained.assign(training=[name_training(own, row, base) for own, row, base in parts])
    first = ~trained.duplicated(["model", "training", "train_seed"])
    trained = trained.assign(diverged=trained["diverged"] > 0, spikes=trained["loss_spikes"].fillna(0))
    return trained[first]


def name_training(fields: Mapping[str, Any], row: Mapping[Any, Any], base: str) -> str:
    """Return what decides a training beside its seed: itself, the base of adapters, and the tensors that it rounds."""
    words = str(row["training"])
    if "lora" in fields:
        return f"{words} beside {base}"
    if "weights" in fields:
        chosen = [f"{name}={row[name]}" for name in CHOICE if not pd.isna(row.get(name))]
        return " ".join([words, *chosen])
    return words


def tabulate_curves(trainings: pd.DataFrame, store: str | None) -> pd.DataFrame:
    """Return COLUMNS, a row for each point of each training's curve."""
    if trainings.empty or store is None:
        return pd.DataFrame()
    curves = read_items(store, TASK, "curve", set(trainings["key"]))
    parts = []
    for row in trainings.sort_values(["parameters", "model", "training", "train_seed"]).to_dict("records"):
        curve = curves.get(row["key"])
        if curve is None or np.isnan(row["steps"]):
            continue
        width = row["steps"] / len(curve)
        points = pd.DataFrame({"step": width * (np.arange(len(curve)) + 0.5), "loss": curve})
        about = {name: row[name] for name in ("model", "training", "diverged", "key")}
        parts.append(points.assign(seed=row["train_seed"], **about))
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame()


def judge_curves(trainings: pd.DataFrame) -> str:
    """Say how many trainings there are, and how many of them diverged or had spikes."""
    diverged, spiked = int(trainings["diverged"].sum()), int((trainings["spikes"] > 0).sum())
    count = count_things(len(trainings), "training")
    return f"{diverged or 'None'} of {count} diverged. {spiked or 'None'} had a loss spike."
