"""What gradients lose that are quantized before replicas average them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_series
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.figures.training.formats import (
    PLAIN,
    describe_difference,
    describe_left_out,
    draw_formats,
    find_differences,
    name_format,
    tabulate_formats,
)

CLAIM: Final = (
    "What do gradients lose that are quantized before replicas average them? Dettmers 2016 found 8 bits as good as "
    "float32."
)
FORMAT_FIELDS: Final = frozenset({"exchange", "exchange_form", "error_feedback"})


def draw_exchange(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw what quantized gradients add to the loss, against the bytes that a replica hands over for each parameter.

    Raises:
        MissingResults: no replicas exchanged gradients.
    """
    data = tabulate_formats(results, "exchanged_bytes_per_param", name_exchange, FORMAT_FIELDS)
    if data.empty:
        needs = "trainings whose replicas exchange gradients (train=exchange8bit)"
        raise MissingResults(describe_lack("exchange", needs, ("nano/exchange",)))
    styles = style_series(data["format"])
    sheet = make_sheet(page, 1, (4.4, 3.4), 1, styles)
    (axes,) = sheet.add_axes(1)
    draw_formats(axes, data, styles)
    set_log_axis(axes, data["cost"], "{:g}".format)
    axes.set_xlabel("bytes handed over for each parameter and step")
    draw_legend(sheet.fig.body, styles, page, lines=False)
    note = (
        "Marks are means over seeds of the difference to float32 with the same seed, dots are seeds, bars are "
        "Student's 95% intervals over seeds. Replicas are parts of a batch in one process, which computes what "
        "processes would."
    )
    counts = f"Data: {count_things(len(data), 'training')} of {data['model'].iloc[0]}, {data['seed'].nunique()} seeds."
    notes = (note, counts, describe_left_out(results, data, name_exchange))
    return PaperFigure("exchange", sheet.fig, data, CLAIM, judge_exchange(data), tuple(filter(None, notes)))


def name_exchange(fields: Mapping[str, Any]) -> str | None:
    """Return the name of how replicas exchange gradients, or None where there is one replica or more is quantized."""
    others = ("weights", "activations", "gradients", "momentum", "variance", "lora", "fast")
    if "replicas" not in fields or any(name in fields for name in others):
        return None
    shots = " in two shots" if fields.get("exchange_form") == "two_shot" else ""
    return f"{name_format(fields.get('exchange'))}{shots}{' with feedback' if fields.get('error_feedback') else ''}"


def judge_exchange(data: pd.DataFrame) -> str:
    """Say what each exchange loses to float32."""
    lost = find_differences(data)
    if lost.empty:
        return f"There is no exchange in {PLAIN} to compare with."
    words = [describe_difference(str(name), row, "bytes") for name, row in lost.iterrows()]
    worse = [str(name) for name, row in lost.iterrows() if row["low"] > 0]
    unsure = int((~(lost["low"] > 0) & ~(lost["high"] < 0) & np.isfinite(lost["low"])).sum())
    verb = "loses" if len(worse) == 1 else "lose"
    named = " and ".join(part for part in (", ".join(worse[:-1]), *worse[-1:]) if part)
    head = f"{named} {verb} to {PLAIN}" if worse else f"No exchange is shown to lose to {PLAIN}"
    return f"{head}, {unsure} of {len(lost)} cannot be told from it. Nats lost: {', '.join(words)}."
