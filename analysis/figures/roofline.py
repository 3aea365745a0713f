"""Figure 16: how much faster a matrix product with k-bit weights can be, by the roofline model.

A layer of n x m weights times a batch of b inputs takes at least as long as its slower side,

    t(k, b) = max(memory, compute),   memory = (k n m / 8 + 2 b (n + m)) / bandwidth,   compute = 2 n m b / peak,

as k-bit weights are read from memory, expanded in cache and multiplied in 16 bit (Williams et al. 2009, Dettmers &
Zettlemoyer 2023, sections 2.1 and 5.1). While memory is the slower side, k bits are 16 / k times as fast. A larger
batch makes compute the slower side, and fewer bits gain nothing.

Where the results have measured times, this machine is one of the devices, with the speeds of a read and of a float32
product that were measured beside them, and the measured speedups are points on its panel. The two are no data sheet's:
the machine may do better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import matplotlib
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.figures.canvas.axes import label_plainly, set_value_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, style_precisions
from kbit.analysis.figures.costs.points import choose_variant, gather_costs, leave_int8
from kbit.analysis.figures.drawing import MissingResults, PaperFigure
from kbit.numerics.spec import BASELINE_BITS


@dataclass(frozen=True)
class Device:
    """What the roofline needs to know of a device.

    Attributes:
        name: the words that figures print.
        bandwidth: the memory's bandwidth, bytes per second.
        peak: the speed of dense 16-bit multiply-accumulate arithmetic with float32 sums, operations per second.
    """

    name: str
    bandwidth: float
    peak: float


# The makers' data sheets: memory bandwidth, dense FP16 tensor throughput with FP32 accumulation.
DEVICES: Final = (
    Device("RTX 3090", 936e9, 71e12),
    Device("RTX 4090", 1008e9, 165.2e12),
    Device("A100 80GB SXM", 2039e9, 312e12),
    Device("H100 SXM", 3352e9, 989.4e12),
)

PRECISIONS: Final = (3, 4, 8, 16)
ROWS, COLUMNS = 4 * 12288, 12288  # OPT-175B's first feed-forward layer, outputs x inputs
PAPER_BATCH: Final = 16

PAPER_LIMITS: Final = {
    "RTX 3090": 60,
    "RTX 4090": 200,
}  # "inference batch size below 60 / 200" (the paper, section 5.1)

CLAIM: Final = "At batch 16 a speedup of nearly 4 is possible for 4-bit weights; it lasts for small batches only."


def estimate_seconds(device: Device, bits: float, batch: float, rows: int = ROWS, columns: int = COLUMNS) -> float:
    """Return the roofline time of one layer, seconds.

    Args:
        device: the device that it runs on.
        bits: bits per weight, scales included.
        batch: the number of inputs multiplied at once.
        rows, columns: the number of the layer's outputs and of its inputs.
    """
    memory = (bits * rows * columns / 8 + 2 * batch * (rows + columns)) / device.bandwidth
    return float(max(memory, 2 * rows * columns * batch / device.peak))


def find_largest_batch(device: Device, bits: float) -> float:
    """Return the batch up to which memory is the slower side, (bits / 8) peak / (2 bandwidth)."""
    return bits / 8 * device.peak / (2 * device.bandwidth)


def tabulate_roofline(devices: tuple[Device, ...] = DEVICES) -> pd.DataFrame:
    """Return device, bits, batch, seconds and speedup over 16 bit for batches of 1 to 1024."""
    rows = [
        {"device": device.name, "bits": bits, "batch": batch, "seconds": estimate_seconds(device, bits, batch)}
        for device in devices
        for bits in PRECISIONS
        for batch in (2**power for power in range(11))
    ]
    table = pd.DataFrame(rows)
    whole = table[table["bits"] == 16].set_index(["device", "batch"])["seconds"]
    base = whole.loc[pd.MultiIndex.from_frame(table[["device", "batch"]])].to_numpy()
    return table.assign(speedup=base / table["seconds"])


def draw_roofline(results: pd.DataFrame, page: Page, devices: tuple[Device, ...] = DEVICES) -> PaperFigure:
    """Draw the roofline speedup of k-bit weights against the batch, a panel per device.

    Args:
        results: measured times, if there are any. The rest of the figure follows from the devices.
        page: the page to draw on.
        devices: the devices to draw, beside the one that was measured.
    """
    own, measured, notes = read_measured(results)
    verdict = judge_roofline(tabulate_roofline(devices), devices) + (judge_measured(own[0], measured) if own else "")
    drawn = (*devices, *own)
    table = pd.concat([tabulate_roofline(drawn).assign(source="roofline"), measured], ignore_index=True)
    styles = style_precisions(sorted({*PRECISIONS, *measured.get("bits", [])}))
    sheet = make_sheet(page, len(drawn), (3.9, 2.8), 2, styles)
    for axes, device in zip(sheet.add_axes(len(drawn)), drawn, strict=True):
        _draw_device(axes, table[table["device"] == device.name], styles)
        set_value_axis(axes, 0, 1.05 * table["speedup"].max())
        sheet.write_title(axes, device.name)
    sheet.label("batch", "speedup over 16 bit")
    draw_legend(sheet.fig.body, styles, page)
    note = (
        f"Lines are computed, not measured: {ROWS} x {COLUMNS} weights, data sheets' bandwidth and peak. Grey line: "
        "batch 16. All panels have the same axes."
    )
    return PaperFigure("figure_16", sheet.fig, table, CLAIM, verdict, (note, *notes))


def _draw_device(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw the roofline of a device as lines, and what was measured on it as markers."""
    for (source, bits), curve in rows.groupby(["source", "bits"]):
        style = styles[f"{bits}-bit"]
        is_computed = source == "roofline"
        has_markers = not is_computed or "measured" not in set(rows["source"])
        marker, dashes = style.marker if has_markers else "none", style.dashes if is_computed else "none"
        axes.plot(curve["batch"], curve["speedup"], color=style.color, marker=marker, linestyle=dashes)
    axes.set_xscale("log", base=2)
    label_plainly(axes.xaxis)
    axes.axvline(PAPER_BATCH, color="0.6", linewidth=0.5 * float(matplotlib.rcParams["lines.linewidth"]))


def read_measured(results: pd.DataFrame) -> tuple[tuple[Device, ...], pd.DataFrame, tuple[str, ...]]:
    """Return the machine whose times the results have, its speedups, and notes. All are empty without any.

    The speedups are of the largest model that was timed at 16 bits and others: columns device, bits, batch, seconds (of
    a step), speedup and source.
    """
    try:
        costs = leave_int8(choose_variant(gather_costs(results, "figure_16")))
    except MissingResults:
        return (), pd.DataFrame(), ()
    points = costs.points
    has_both = points[points["bits"] == BASELINE_BITS]["model"]
    points = points[points["model"].isin(has_both)]
    if points["bits"].nunique() < 2:
        return (), pd.DataFrame(), ()
    rows = points[points["model"] == points.sort_values("parameters")["model"].iloc[-1]]
    seconds = rows["ms_per_token"] * rows["batch"] / 1e3
    table = rows.assign(device=costs.conditions, seconds=seconds, source="measured").reset_index(drop=True)
    base = table[table["bits"] == BASELINE_BITS].drop_duplicates("batch").set_index("batch")["seconds"]
    table = table.assign(speedup=table["batch"].map(base) / table["seconds"])
    bandwidth, peak = (1e9 * float(points[name].mean()) for name in ("gigabytes_per_second", "gigaflops"))
    note = (
        f"{costs.conditions}: lines are the roofline of {bandwidth / 1e9:.1f} GB/s and {peak / 1e9:.0f} GFLOP/s, which "
        "a read of 128 MB and a product in float32 reached. Larger caches and other dtypes may exceed both. "
        f"Markers are measured steps of {rows['model'].iloc[0]}."
    )
    columns = ["device", "bits", "batch", "seconds", "speedup", "source"]
    return (Device(costs.conditions, bandwidth, peak),), table[columns], (note, *costs.notes)


def judge_measured(device: Device, measured: pd.DataFrame) -> str:
    """Say how large the measured speedups are at the smallest batch, beside those of the machine's roofline."""
    at = measured[(measured["batch"] == measured["batch"].min()) & (measured["bits"] != BASELINE_BITS)]
    batch = int(measured["batch"].min())
    words = []
    for bits, gain in at.groupby("bits")["speedup"].mean().items():
        width = int(str(bits))
        limit = estimate_seconds(device, BASELINE_BITS, batch) / estimate_seconds(device, width, batch)
        words.append(f"{width}-bit {gain:.2f} of {limit:.2f}")
    return f" Measured on {device.name} at batch {batch}, beside its roofline: {', '.join(words)}."


def judge_roofline(table: pd.DataFrame, devices: tuple[Device, ...]) -> str:
    """Say how large the speedup is at the paper's batch, and up to which batch memory is the limit."""
    at = table[(table["bits"] == 4) & (table["batch"] == PAPER_BATCH)].set_index("device")["speedup"]
    holds = "Holds" if at.min() > 3.5 else "Does not hold everywhere"
    gains = ", ".join(f"{name} {gain:.2f}" for name, gain in at.items())
    limits = []
    for device in devices:
        paper = f", the paper's limit {PAPER_LIMITS[device.name]}" if device.name in PAPER_LIMITS else ""
        wide, narrow = (find_largest_batch(device, bits) for bits in (16, 4))
        limits.append(f"{device.name} {wide:.0f} at 16 bit and {narrow:.0f} at 4{paper}")
    return f"{holds} by the roofline: at batch 16, 4-bit gains {gains}. Memory-bound up to batch: {'; '.join(limits)}."
