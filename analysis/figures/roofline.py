"""Figure 16: how much faster a matrix product with k-bit weights can be, by the roofline model.

A layer of n x m weights times a batch of b inputs takes at least as long as its slower side,

    t(k, b) = max(memory, compute),   memory = (k n m / 8 + 2 b (n + m)) / bandwidth,   compute = 2 n m b / peak,

as k-bit weights are read from memory, expanded in cache and multiplied in 16 bit (Williams et al. 2009, Dettmers &
Zettlemoyer 2023, sections 2.1 and 5.1). While memory is the slower side, k bits are 16 / k times as fast. A larger
batch makes compute the slower side, and fewer bits gain nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import matplotlib
import pandas as pd

from kbit.analysis.figures.canvas.axes import label_plainly, set_value_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import style_precisions
from kbit.analysis.figures.drawing import PaperFigure


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
        results: not used, as the figure follows from the devices.
        page: the page to draw on.
        devices: the devices to draw.
    """
    table = tabulate_roofline(devices)
    verdict = judge_roofline(table, devices)
    styles = style_precisions(PRECISIONS)
    sheet = make_sheet(page, len(devices), (3.9, 2.8), 2, styles)
    for axes, device in zip(sheet.add_axes(len(devices)), devices, strict=True):
        for bits, curve in table[table["device"] == device.name].groupby("bits"):
            style = styles[f"{bits}-bit"]
            axes.plot(curve["batch"], curve["speedup"], color=style.color, marker=style.marker, linestyle=style.dashes)
        axes.set_xscale("log", base=2)
        label_plainly(axes.xaxis)
        set_value_axis(axes, 0, 1.05 * table["speedup"].max())
        axes.axvline(PAPER_BATCH, color="0.6", linewidth=0.5 * float(matplotlib.rcParams["lines.linewidth"]))
        sheet.write_title(axes, device.name)
    sheet.label("batch", "speedup over 16 bit")
    draw_legend(sheet.fig.body, styles, page)
    note = (
        f"Computed, not measured: {ROWS} x {COLUMNS} weights, data sheets' bandwidth and peak. Grey line: batch 16. "
        "All panels have the same axes."
    )
    return PaperFigure("figure_16", sheet.fig, table, CLAIM, verdict, (note,))


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
