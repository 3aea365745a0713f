"""What a rotation before rounding gains, by the bits of weights and of the inputs of products."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import Measure
from kbit.analysis.curves.run_time import name_weights
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_series
from kbit.analysis.figures.drawing import LIMIT, MissingResults, PaperFigure, describe_lack, describe_sample
from kbit.analysis.figures.int8 import share_losses
from kbit.analysis.figures.run_time.lost import tabulate_lost
from kbit.analysis.statistics.frontier import draw_values
from kbit.analysis.statistics.grades import count_grades, grade_interval
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = "Does a rotation before rounding help, of weights alone and with the inputs of products?"
NONE: Final = "no rotation"
COLUMNS: Final = [
    *("family", "model", "parameters", "weights", "inputs", "weight_bits", "activation_bits", "rotation"),
    *("lost", "low", "high", "gain", "gain_low", "gain_high", "key"),
]
MOST_PANELS: Final = 9
_OTHERS: Final = ["include", "exclude", "kv_cache", "cache_bits"]
SETTING: Final = ["model", "weights", "inputs", "weight_bits", "activation_bits", *_OTHERS]


def draw_rotation(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw the cross entropy that rounding adds, with and without a rotation, a panel for each model.

    Raises:
        MissingResults: no model was quantized in the same way with and without a rotation, beside its 16-bit baseline.
    """
    lost, measure = tabulate_lost(results)
    data = pd.DataFrame() if lost.empty or measure is None else pair_rotations(lost, measure, results)
    if data.empty or measure is None:
        needs = "a model's cross entropy with and without a rotation, and at 16 bits"
        raise MissingResults(describe_lack("rotation", needs, ("nano/rotation",)))
    models = list(dict.fromkeys(data["model"]))
    models, left = models[:MOST_PANELS], models[MOST_PANELS:]
    styles = style_series(sorted(data["rotation"].unique(), key=lambda name: (name != NONE, name)))
    sheet = make_sheet(page, len(models), (3.9, 3.6), 3, styles)
    panels = sheet.add_axes(len(models))
    for axes, model in zip(panels, models, strict=True):
        draw_settings(axes, data[data["model"] == model], styles)
        sheet.write_title(axes, str(model))
    drawn = data[data["model"].isin(models)]
    share_losses(panels, drawn.rename(columns={"lost": "added"}))
    sheet.label("bits of the weights / of the inputs", "cross entropy added (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    names = "; ".join(
        dict.fromkeys(f"weights {w}, inputs {i}" for w, i in zip(data["weights"], data["inputs"], strict=True))
    )
    note = (
        "Bars: 95% intervals, windows paired with the 16-bit model's. A gain is the difference to the same quantizer "
    )
    note += f"without a rotation, windows paired. All panels have the same y axis. Quantizers: {names}."
    if left:
        note += f" Not drawn, but in the data and the verdict: {', '.join(left)}."
    notes = (note, f"{describe_sample(results, data['key'], measure)} {LIMIT}")
    return PaperFigure("rotation", sheet.fig, data, CLAIM, judge(data), notes)


def pair_rotations(lost: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS of the settings that were measured with and without a rotation, the smallest models first.

    Args:
        lost: what each quantized model adds, see tabulate_lost.
        measure, results: the measure, and the table behind the points.
    """
    words = {name: lost[name].fillna("").astype(str) if name in lost else "" for name in _OTHERS}
    rotation = lost["rotation"].fillna(NONE) if "rotation" in lost else NONE
    rows = lost.assign(
        weights=name_weights(lost), inputs=lost["activations"].fillna("16-bit"), rotation=rotation, **words
    )
    rows = rows.drop_duplicates([*SETTING, "rotation"])
    known = rows.groupby(SETTING)["rotation"].transform(lambda found: NONE in set(found) and len(set(found)) > 1)
    rows = rows[known.astype(bool)].sort_values(
        ["parameters", "model", "weight_bits", "activation_bits", "rotation"], ignore_index=True
    )
    parts = [
        _add_gains(group.reset_index(drop=True), measure, results) for _, group in rows.groupby("model", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)


def _add_gains(rows: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> pd.DataFrame:
    """Return one model's rows with what each rotation gains: nats, and the 95% interval of the paired difference."""
    draws = draw_values(rows, measure, results).values
    bare = rows[rows["rotation"] == NONE].reset_index().set_index(SETTING)["index"]
    place = bare.reindex(pd.MultiIndex.from_frame(rows[SETTING])).to_numpy(dtype=int)
    gain = rows["lost"].to_numpy(dtype=float)[place] - rows["lost"].to_numpy(dtype=float)
    low, high = np.quantile(draws[:, place] - draws, [0.025, 0.975], axis=0)
    is_bare = (rows["rotation"] == NONE).to_numpy()
    values = {"gain": gain, "gain_low": low, "gain_high": high}
    return rows.assign(**{name: np.where(is_bare, np.nan, value) for name, value in values.items()})


def draw_settings(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw one model's losses: a place for each pair of bits, and in it a marker for each rotation."""
    pairs = sorted({(int(w), int(a)) for w, a in zip(rows["weight_bits"], rows["activation_bits"], strict=True)})
    step = 0.6 / len(styles)
    for number, (name, style) in enumerate(styles.items()):
        own = rows[rows["rotation"] == name]
        keys = zip(own["weight_bits"], own["activation_bits"], strict=True)
        x = np.array([pairs.index((int(w), int(a))) for w, a in keys]) + step * (number - (len(styles) - 1) / 2)
        low, high, middle = (own[column].to_numpy(dtype=float) for column in ("low", "high", "lost"))
        error = np.nan_to_num(np.maximum([middle - low, high - middle], 0))
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": scale_marker(style)}
        axes.errorbar(x, middle, yerr=error, linestyle="none", capsize=2, **look)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(pairs)), [f"{w}/{a}" for w, a in pairs])


def share_left(rows: pd.DataFrame, data: pd.DataFrame) -> str:
    """Say which share of the loss a rotation leaves, of the settings that lose anything beyond their interval."""
    about = ["model", "weights", "inputs"]
    lows = data[data["rotation"] == NONE].groupby(about)["low"].min()
    is_lost = lows.reindex(pd.MultiIndex.from_frame(rows[about])).to_numpy(dtype=float) > 0
    lost, gain = (rows.loc[is_lost, name].astype(float) for name in ("lost", "gain"))
    left = lost / (lost + gain)
    return f", {left.min():.0%} to {left.max():.0%} of the loss is left" if len(left) else ""


def judge(data: pd.DataFrame) -> str:
    """Say where each rotation gains: for weights alone, for inputs alone, and for both."""
    parts = []
    is_wide, is_whole = data["weight_bits"] == BASELINE_BITS, data["activation_bits"] == BASELINE_BITS
    kinds = {"weights alone": ~is_wide & is_whole, "inputs alone": is_wide & ~is_whole, "both": ~is_wide & ~is_whole}
    for rotation in dict.fromkeys(data.loc[data["rotation"] != NONE, "rotation"]):
        for words, chosen in kinds.items():
            rows = data[chosen & (data["rotation"] == rotation)]
            if len(rows):
                ends = zip(rows["gain_low"].astype(float), rows["gain_high"].astype(float), strict=True)
                grades = count_grades(grade_interval(low, high) for low, high in ends)
                gains = f"{rows['gain'].min():+.4f} to {rows['gain'].max():+.4f} nats per token"
                share = share_left(rows, data)
                parts.append(f"A {rotation} rotation gains where {words} are rounded: {grades} ({gains}{share})")
    return "; ".join(parts) + "."
