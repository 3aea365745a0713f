"""What is lost where devices that train together send each other few bits.

Replicas of a model send gradients, and the stages of a pipeline send activations and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.trainings import find_trained
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack, take_sentence
from kbit.analysis.figures.training.formats import (
    PLAIN,
    describe_difference,
    draw_formats,
    find_differences,
    name_format,
    tabulate_formats,
)
from kbit.training.config import PRODUCTS, STAGES, STATES

CLAIM: Final = (
    "What is lost where replicas send gradients, and pipeline stages activations, in few bits? Dettmers 2016 found 8 "
    "bits as good as float32."
)


@dataclass(frozen=True)
class Sending:
    """One way in which devices send each other something, which is a panel of the figure.

    Attributes:
        name: the way, as the panel and its rows name it.
        metric: the metric of the training that counts the bytes.
        unit: what these bytes are counted for.
        name_format: the function that names a training's format, or returns None of a training without one.
        fields: the fields of trainings that differ between formats.
    """

    name: str
    metric: str
    unit: str
    name_format: Callable[[Mapping[str, Any]], str | None]
    fields: frozenset[str]


def draw_exchange(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw what few bits add to the loss, against the bytes that are sent: a panel for replicas and one for stages.

    Raises:
        MissingResults: nothing was sent.
    """
    parts = [
        (sending, table)
        for sending in SENDINGS
        if not (table := tabulate_formats(results, sending.metric, sending.name_format, sending.fields)).empty
    ]
    if not parts:
        needs = (
            "trainings in which replicas (train=exchange8bit) or pipeline stages (train=stages8bit) send few bits, and "
            "nothing else is quantized"
        )
        raise MissingResults(describe_lack("exchange", needs, ("nano/exchange",)))
    data = pd.concat([table.assign(panel=sending.name) for sending, table in parts], ignore_index=True)
    styles = style_series(data["format"])
    sheet = make_sheet(page, len(parts), (4.4, 3.4), 2, styles)
    for axes, (sending, table) in zip(sheet.add_axes(len(parts)), parts, strict=True):
        draw_formats(axes, table, styles)
        set_log_axis(axes, table["cost"].dropna(), "{:g}".format)
        axes.set_xlabel(f"bytes sent for each {sending.unit}")
        sheet.write_title(axes, sending.name)
    draw_legend(sheet.fig.body, styles, page, lines=False)
    note = (
        f"Marks are means over seeds of the difference to {PLAIN} with the same seed, dots are seeds, bars are "
        "Student's 95% intervals over seeds. Replicas are parts of a batch, and stages parts of a model, in one "
        "process, which computes what processes would."
    )
    counts = [describe_part(sending, table) for sending, table in parts] + [describe_unshown(results, data)]
    verdicts = [f"{sending.name.capitalize()}: {judge_exchange(table)}" for sending, table in parts]
    short = " ".join(map(take_sentence, verdicts))
    return PaperFigure("exchange", sheet.fig, data, CLAIM, " ".join(verdicts), (note, *filter(None, counts)), short)


def describe_part(sending: Sending, table: pd.DataFrame) -> str:
    """Say how many trainings a panel shows, and that it shows losses where there is none in float32."""
    trainings, seeds = count_things(len(table), "training"), count_things(table["seed"].nunique(), "seed")
    lone = f" It shows losses, as there is no {PLAIN}." if table["added"].isna().all() else ""
    return f"{sending.name.capitalize()}: {trainings} of {table['model'].iloc[0]}, {seeds}.{lone}"


def describe_unshown(results: pd.DataFrame, data: pd.DataFrame) -> str:
    """Say how many trainings send something and are not shown, or nothing."""
    trained = find_trained(results)
    senders = trained.loc[trained["metric"].isin([sending.metric for sending in SENDINGS]), "key"]
    left = len(set(senders) - set(data["key"]))
    why = "that diverged, quantize something else as well, or are of other models, recipes or quantizers"
    return f"Not shown: {count_things(left, 'training')} {why}." if left else ""


def name_exchange(fields: Mapping[str, Any]) -> str | None:
    """Return the name of how replicas exchange gradients, or None without replicas or where more is quantized."""
    if "replicas" not in fields or any(name in fields for name in (*PRODUCTS, *STATES, *STAGES, "lora", "fast")):
        return None
    shots = " in two shots" if fields.get("exchange_form") == "two_shot" else ""
    return f"{name_format(fields.get('exchange'))}{shots}{' with feedback' if fields.get('error_feedback') else ''}"


def name_stages(fields: Mapping[str, Any]) -> str | None:
    """Return the name of what pipeline stages send, or None where more is quantized or there are replicas."""
    if any(name in fields for name in (*PRODUCTS, *STATES, "exchange", "replicas", "lora", "fast")):
        return None
    count = "" if (stages := fields.get("stages", 2)) == 2 else f" ({stages} stages)"
    forward, back = (name_format(fields.get(role)) for role in STAGES)
    if forward == back:
        return f"{forward}{count}"
    if PLAIN in (forward, back):
        return f"{back} back alone{count}" if forward == PLAIN else f"{forward} forward alone{count}"
    return f"{forward} forward and {back} back{count}"


SENDINGS: Final = (
    Sending(
        "gradients between replicas",
        "exchanged_bytes_per_param",
        "parameter and step",
        name_exchange,
        frozenset({"exchange", "exchange_form", "error_feedback"}),
    ),
    Sending(
        "activations between stages",
        "stage_bytes_per_token",
        "token, forward and back",
        name_stages,
        frozenset({"stages", *STAGES}),
    ),
)


def judge_exchange(data: pd.DataFrame) -> str:
    """Say what each exchange loses to float32."""
    lost = find_differences(data)
    if lost.empty:
        return f"There is no training with {PLAIN} to compare with."
    words = [describe_difference(str(name), row, "bytes") for name, row in lost.iterrows()]
    if lost["low"].isna().all():
        return f"One seed of each shows no difference to {PLAIN}, nor likeness. Nats lost: {', '.join(words)}."
    worse = [str(name) for name, row in lost.iterrows() if row["low"] > 0]
    better = int((lost["high"] < 0).sum())
    unsure = int((~(lost["low"] > 0) & ~(lost["high"] < 0) & np.isfinite(lost["low"])).sum())
    verb = "loses" if len(worse) == 1 else "lose"
    named = " and ".join(part for part in (", ".join(worse[:-1]), *worse[-1:]) if part)
    head = f"{named} {verb} to {PLAIN}" if worse else f"nothing is shown to lose to {PLAIN}"
    below = f", {better} of {len(lost)} {'ends' if better == 1 else 'end'} below it" if better else ""
    return f"{head}{below}, {unsure} of {len(lost)} cannot be told from it. Nats lost: {', '.join(words)}."
