"""What a model loses by the bits of its weights and of the inputs of its products."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle

from kbit.analysis.curves.run_time import name_weights
from kbit.analysis.figures.canvas.page import Page, get_line_height, get_small_size, measure_text
from kbit.analysis.figures.canvas.sheets import is_beside, make_sheet
from kbit.analysis.figures.drawing import LIMIT, MissingResults, PaperFigure, describe_lack, describe_sample
from kbit.analysis.figures.maps import SHADES, check_room, choose_ink, draw_scale, scale_top
from kbit.analysis.figures.run_time.lost import judge_level, tabulate_lost
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = "How many bits do the inputs of products need beside those of the weights?"
COLUMNS: Final = ["panel", "model", "weights", "inputs", "weight_bits", "activation_bits", "lost", "low", "high", "key"]
MOST_PANELS: Final = 6  # the models with the most cells
_CHOSEN: Final = ["include", "exclude"]  # which products: the name of 16-bit weights does not tell
_VARIANT: Final = ["weights", "inputs", "rotation", *_CHOSEN]


def draw_activations_map(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw, for each model, the cross entropy added by each pair of bits of weights and of inputs.

    Raises:
        MissingResults: no model has rounded weights and inputs, and its 16-bit baseline.
    """
    lost, measure = tabulate_lost(results)
    data = pick_cells(lost) if len(lost) else lost
    if data.empty or measure is None:
        needs = "a model's cross entropy with weights and inputs of several bits, and at 16 bits"
        raise MissingResults(describe_lack("activations_map", needs, ("nano/activations",)))
    panels = list(dict.fromkeys(data["panel"]))
    widest, tallest = data["activation_bits"].nunique(), data["weight_bits"].nunique()
    size = get_small_size()
    room = (widest + 1.5) * measure_text("+0.000", size), (tallest + 2.5) * 2 * get_line_height(size)
    sheet = make_sheet(page, len(panels), (1.2 + 0.7 * widest, 1.2 + 0.5 * tallest), 3, least_width=room[0])
    check_room(sheet, room, len(panels))
    shades = ScalarMappable(PowerNorm(0.5, 0, max(scale_top(data["lost"].astype(float)), 1e-3)), SHADES)
    for axes, panel in zip(sheet.add_axes(len(panels)), panels, strict=True):
        draw_cells(axes, data[data["panel"] == panel], shades)
        sheet.write_title(axes, panel)
    sheet.label("bits of the inputs", "bits of the weights")
    draw_scale(sheet, shades, "cross entropy added (nats per token)", "right" if is_beside(page) else "bottom")
    variants = "; ".join(dict.fromkeys(f"weights {row.weights}, inputs {row.inputs}" for row in data.itertuples()))
    note = "Numbers: nats per token added to the 16-bit model, below them half the width of the 95% interval, windows "
    note += f"paired with the 16-bit model's. Quantizers: {variants}."
    notes = (note, f"{describe_sample(results, data['key'], measure)} {LIMIT}")
    return PaperFigure("activations_map", sheet.fig, data, CLAIM, judge(data), notes)


def pick_cells(lost: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS of each model's most measured pair of quantizers of weights and inputs."""
    lost = lost[lost["kv_cache"].isna()]
    words = {name: lost[name].fillna("") if name in lost else "" for name in ("rotation", *_CHOSEN)}
    lost = lost.assign(weights=name_weights(lost), inputs=lost["activations"], **words)
    parts = []
    for model, group in lost.sort_values(["family", "parameters"], kind="stable").groupby("model", sort=False):
        is_wide, is_whole = group["weight_bits"] == BASELINE_BITS, group["inputs"].isna()
        both = group[~is_wide & ~is_whole]
        if both.empty:
            continue
        # of equally frequent ones the first by name
        most: Any = both[_VARIANT].value_counts(sort=False).sort_index().idxmax()
        weights, inputs, rotation, *products = most
        chosen = group[
            (is_wide | (group["weights"] == weights))
            & (is_whole | (group["inputs"] == inputs))
            & (group["rotation"] == rotation)
            & (group[_CHOSEN] == products).all(axis=1)
        ]
        words = {"weights": weights, "inputs": f"{inputs} {rotation}".strip(), "panel": str(model)}
        parts.append(chosen.drop_duplicates(["weight_bits", "activation_bits"]).assign(**words))
    parts = sorted(parts, key=lambda part: -len(part))[:MOST_PANELS]
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame()


def draw_cells(axes: Axes, cells: pd.DataFrame, shades: ScalarMappable) -> None:
    """Draw one model's cells: darker ones lose more, those not measured are hatched."""
    heights = sorted({BASELINE_BITS, *cells["weight_bits"].astype(int)}, reverse=True)
    widths = sorted({BASELINE_BITS, *cells["activation_bits"].astype(int)})
    axes.set_facecolor("0.97")
    axes.patch.set(hatch="////", edgecolor="0.6")  # what no cell covers shows it
    axes.imshow(np.full((len(heights), len(widths)), np.nan), aspect="auto")  # sets the limits
    base = {"weight_bits": BASELINE_BITS, "activation_bits": BASELINE_BITS, "lost": 0.0, "low": 0.0, "high": 0.0}
    for row in pd.concat([cells, pd.DataFrame([base])]).itertuples():
        y, x = heights.index(int(row.weight_bits)), widths.index(int(row.activation_bits))  # type: ignore[arg-type]
        lost, half = float(row.lost), (float(row.high) - float(row.low)) / 2  # type: ignore[arg-type]
        shade = shades.to_rgba(np.array([max(lost, 0.0)]))[0]
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=0.8))
        words = f"{lost:+.3f}\n±{half:.3f}" if half else "0"
        axes.text(x, y, words, ha="center", va="center", fontsize=get_small_size(), color=choose_ink(shade))
    axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axes.set_yticks(range(len(heights)), [str(bits) for bits in heights])
    axes.grid(visible=False)


def judge(data: pd.DataFrame) -> str:
    """Say what inputs of the most and of the fewest bits add to 16-bit weights, or to the widest that were measured."""
    widest = data[data["weight_bits"] == data["weight_bits"].max()]
    rounded = widest[widest["activation_bits"] < BASELINE_BITS]
    if rounded.empty:
        return "Inputs were not rounded beside the widest weights."
    ends = sorted({int(rounded["activation_bits"].max()), int(rounded["activation_bits"].min())}, reverse=True)
    beside = f"beside weights of {int(widest['weight_bits'].iloc[0])} bits"
    parts = [judge_level(rounded[rounded["activation_bits"] == k], f"Rounding to {k} bits {beside}") for k in ends]
    return "; ".join(parts) + "."
