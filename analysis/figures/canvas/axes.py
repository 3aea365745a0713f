"""Axes with ticks that fit: round numbers whose labels do not touch, however small the axis is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, NullFormatter, NullLocator

from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.canvas.page import get_size, measure_text

TICK_STEPS: Final = (
    (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
    (1.0, 2.0, 3.0, 5.0),
    (1.0, 2.0, 5.0),
    (1.0, 3.0),
    (1.0,),
)


class RoundLocator(Locator):
    """Ticks of a log x axis, as dense as their labels allow when the axis is drawn."""

    def __init__(self, format_value: Callable[[float], str]) -> None:
        super().__init__()
        self._format = format_value
        self._size = get_size("xtick.labelsize")

    def __call__(self) -> Sequence[float]:
        axis: Any = self.axis
        left, right = sorted(map(float, axis.get_view_interval()))
        width = axis.axes.get_window_extent().width / axis.axes.figure.dpi
        powers = range(int(np.floor(np.log10(left))), int(np.floor(np.log10(right))) + 1)
        label = max(measure_text(self._format(5 * 10.0**power), self._size) for power in powers) + self._size / 72
        return choose_ticks(left, right, min(0.95, label / width))


def choose_ticks(left: float, right: float, gap: float) -> list[float]:
    """Return the densest round numbers whose labels do not touch.

    Args:
        left, right: ends of the log axis.
        gap: least distance of two ticks, as a fraction of the axis.
    """
    powers = range(int(np.floor(np.log10(left))), int(np.ceil(np.log10(right))) + 1)
    for steps in TICK_STEPS:
        candidates = np.array([step * 10.0**power for power in powers for step in steps])
        ticks = candidates[(candidates >= left) & (candidates <= right)]
        if ticks.size < 2:
            return [left, right]  # too short an axis for round numbers this far apart
        if np.diff(np.log(ticks)).min() >= gap * np.log(right / left):
            return [float(tick) for tick in ticks]
    # Only decades are left, and there are too many of them: every second, third, ...
    return [float(tick) for tick in ticks[:: int(np.ceil(gap * np.log10(right / left)))]]


def set_value_axis(axes: Axes, bottom: float, top: float) -> None:
    """Make the y axis a linear one between two ends. A very low axis has one tick."""
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))


def set_bits_axis(axes: Axes, left: float, right: float) -> None:
    """Make the x axis a log axis of bits with round budgets as ticks."""
    set_round_axis(axes, left, right, format_bits)


def set_log_axis(axes: Axes, values: pd.Series[float], format_value: Callable[[float], str]) -> None:
    """Make the x axis a log axis around positive values, with round ticks."""
    left, right = float(values.min()), float(values.max())
    pad = max((right / left) ** 0.05, 1.05)
    set_round_axis(axes, left / pad, right * pad, format_value)


def set_round_axis(axes: Axes, left: float, right: float, format_value: Callable[[float], str]) -> None:
    """Make the x axis a log axis between two ends, with round ticks."""
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(RoundLocator(format_value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))


def label_plainly(axis: Axis) -> None:
    """Label a log axis with plain numbers, as "0.01", which need no mathematical typesetting."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
