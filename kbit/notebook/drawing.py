"""Figures of what a notebook compares: the table of kbit.compare, and codebooks beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kbit.analysis.figures.canvas.notebooks import show_figures
from kbit.analysis.figures.canvas.page import Page, apply_style
from kbit.analysis.figures.canvas.styles import style_data_type, style_series
from kbit.checks import check_choice
from kbit.notebook.quantizers import Quantizer, name_quantizers
from kbit.numerics.codebooks import ADAPTIVE, Codebook
from kbit.numerics.quantizer import quantize
from kbit.numerics.spec import QuantSpec

ROW_HEIGHT: Final = 0.32  # inches
PRETTY: Final = {
    "cross_entropy": "cross entropy (nats per token)",
    "kl_divergence": "KL divergence to 16 bits (nats per token)",
    "top1_agreement": "share of tokens with the 16-bit model's first choice",
    "acc": "mean accuracy",
    "output_error": "relative error of the output",
}


def plot(comparison: pd.DataFrame, measure: str | None = None) -> Figure:
    """Draw the table of kbit.compare: a measure of each quantizer, and its paired difference to the reference.

    Args:
        comparison: the table.
        measure: the column to draw. None draws the first measure.

    Raises:
        ValueError: there is no such measure.
    """
    measures = [name.removesuffix("_low") for name in comparison.columns if name.endswith("_low")]
    measures = [name for name in measures if not name.endswith("_difference")]
    measure = measures[0] if measure is None else measure
    check_choice("measure", measure, tuple(measures))
    show_figures()
    table = comparison.iloc[::-1]  # matplotlib counts from below
    columns = [(measure, PRETTY.get(measure, measure))]
    if f"{measure}_difference" in comparison:
        columns.append((f"{measure}_difference", f"difference to {comparison.attrs.get('reference', 'the reference')}"))
    with apply_style(Page()):
        fig = Figure(figsize=(4 * len(columns) + 2, 1 + ROW_HEIGHT * len(table)), layout="constrained")
        axes = fig.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axis, (column, title) in zip(axes, columns, strict=True):
            value, low, high = (table[name].to_numpy(float) for name in (column, f"{column}_low", f"{column}_high"))
            axis.errorbar(value, np.arange(len(table)), xerr=[value - low, high - value], fmt="o", color="#0072B2")
            axis.set_xlabel(title)
            axis.grid(axis="x", alpha=0.3)
            if column.endswith("_difference"):
                axis.axvline(0, color="black", linewidth=0.8)
        rows = zip(table["quantizer"], table["bits_per_param"], strict=True)
        axes[0].set_yticks(np.arange(len(table)), [f"{name} ({bits:.2f})" for name, bits in rows])
        axes[0].set_ylabel("quantizer (bits per parameter)")
        return fig


def plot_codebooks(quantizers: Iterable[Quantizer], tensor: Any = None) -> Figure:
    """Draw the values of codebooks, one row a quantizer, in units of a block's scale.

    Args:
        quantizers: names of presets, or QuantSpecs.
        tensor: an array or torch tensor, which codebooks of quantile and learned are fitted to.

    Raises:
        ValueError: an unknown quantizer, or one whose codebook is fitted to a tensor, without one.
    """
    specs = {name: config.spec for name, config in name_quantizers(quantizers).items()}
    tables = {name: _find_codebook(spec, tensor) for name, spec in specs.items()}
    known = {name: style_data_type(spec.data_type, spec.bits, spec.exponent_bits) for name, spec in specs.items()}
    styles = style_series(tables, known)
    show_figures()
    with apply_style(Page()):
        fig = Figure(figsize=(7, 1 + ROW_HEIGHT * len(tables)), layout="constrained")
        axis = fig.subplots()
        for place, (name, values) in enumerate(reversed(tables.items())):
            axis.plot(values, np.full(len(values), place), "|", color=styles[name].color, markersize=12)
        axis.set_yticks(np.arange(len(tables)), list(reversed(tables)))
        axis.set_xlabel("value in units of the block's scale")
        return fig


def _find_codebook(spec: QuantSpec, tensor: Any) -> Codebook:
    if spec.data_type in ADAPTIVE and tensor is not None:
        return np.asarray(quantize(tensor, spec).codebook.cpu().numpy())
    return spec.make_codebook()
