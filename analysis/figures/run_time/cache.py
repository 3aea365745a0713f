"""What a model loses by the bits of the keys and values that its attention keeps."""

from __future__ import annotations

from typing import Any, Final

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import LIMIT, MissingResults, PaperFigure, describe_lack, describe_sample
from kbit.analysis.figures.int8 import share_losses
from kbit.analysis.figures.run_time.lost import judge_level, tabulate_lost
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = "How many bits do keys and values need that attention keeps of each token?"
COLUMNS: Final = ["family", "series", "model", "parameters", "cache", "cache_bits", "lost", "low", "high", "key"]


def draw_cache_bits(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the cross entropy that a cache of few bits adds to a 16-bit model, a panel for each family.

    Raises:
        MissingResults: no 16-bit model has a rounded cache, and its baseline.
    """
    lost, measure = tabulate_lost(results)
    data = pick_points(lost) if len(lost) else lost
    if data.empty or measure is None:
        needs = "a model's cross entropy with keys and values of several bits, and at 16 bits"
        raise MissingResults(describe_lack("cache_bits", needs, ("nano/kv_cache",)))
    families = list(dict.fromkeys(data["family"]))
    styles = style_series(data["series"])
    sheet = make_sheet(page, len(families), (3.9, 3.9), 3, styles)
    panels = sheet.add_axes(len(families))
    for axes, family in zip(panels, families, strict=True):
        draw_series(axes, data[data["family"] == family], styles)
        sheet.write_title(axes, str(family))
    share_losses(panels, data.rename(columns={"lost": "added"}))
    sheet.label("bits of keys and values", "cross entropy added (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    note = "Bars: 95% intervals, windows paired with the 16-bit model's. Weights are at 16 bits. All panels have the "
    note += "same y axis."
    notes = (note, f"{describe_sample(results, data['key'], measure)} {LIMIT}")
    return PaperFigure("cache_bits", sheet.fig, data, CLAIM, judge(data), notes)


def pick_points(lost: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS of the models of which the cache alone is rounded."""
    alone = lost["kv_cache"].notna() & lost["activations"].isna() & (lost["weight_bits"] == BASELINE_BITS)
    rows = lost[alone].rename(columns={"kv_cache": "cache"})
    rows = rows.assign(series=rows["model"].astype(str) + ", " + rows["cache"].astype(str))
    return rows.sort_values(["family", "parameters", "cache", "cache_bits"], ignore_index=True)[COLUMNS]


def draw_series(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw a line for each model and kind of cache."""
    width = 0.5 * float(matplotlib.rcParams["lines.linewidth"])
    for name, line in rows.groupby("series", sort=False):
        style = styles[str(name)]
        looks: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.dashes}
        low, high, middle = (line[column].astype(float) for column in ("low", "high", "lost"))
        error = np.nan_to_num(np.maximum([middle - low, high - middle], 0))
        looks |= {"markersize": scale_marker(style), "capsize": 2, "elinewidth": width}
        axes.errorbar(line["cache_bits"].astype(int), middle, yerr=error, **looks)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(sorted(set(rows["cache_bits"].astype(int))))


def judge(data: pd.DataFrame) -> str:
    """Say what caches of the most and of the fewest bits add."""
    parts = []
    for cache, rows in data.groupby("cache", sort=False):
        for bits in sorted({int(rows["cache_bits"].max()), int(rows["cache_bits"].min())}, reverse=True):
            parts.append(judge_level(rows[rows["cache_bits"] == bits], f"A cache of {bits} bits ({cache})"))
    return "; ".join(parts) + "."
