"""One data type, one look: in every figure, whatever else the figure shows."""

from __future__ import annotations

import itertools

import matplotlib
import pandas as pd
import pytest
from cycler import cycler
from matplotlib.colors import to_rgb
from toy_curves import make_results

from kbit.analysis.figures.canvas.styles import (
    TYPE_STYLES,
    TooManyCurves,
    style_data_type,
    style_precision,
    style_precisions,
    style_series,
)
from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.figures.registry import FIGURES
from kbit.numerics.data_types import DATA_TYPES


def find_colors(figure: PaperFigure) -> dict[str, str]:
    return {str(c.get_label()): c[0].get_color() for axes in figure.fig.axes for c in axes.containers}


def test_every_data_type_has_a_color_of_its_own() -> None:
    assert {name.split()[0] for name in TYPE_STYLES} >= set(DATA_TYPES) - {"mine"}
    assert len({(style.color, style.marker) for style in TYPE_STYLES.values()}) == len(TYPE_STYLES)
    for one, other in itertools.combinations(TYPE_STYLES.values(), 2):
        assert max(abs(a - b) for a, b in zip(to_rgb(one.color), to_rgb(other.color), strict=True)) > 0.1


def test_a_data_type_looks_the_same_beside_any_others() -> None:
    few, many = make_results(("nf", "quantile")), make_results(("af", "dynamic", "int", "mine", "nf", "quantile"))
    for name in ("figure_9", "figure_14"):
        colors = find_colors(FIGURES[name](few))
        assert colors == {label: style_data_type(label[:-1], 4).color for label in ("nf4", "quantile4")}
        others = find_colors(FIGURES[name](many))
        assert others["nf4"] == colors["nf4"]
        assert others["mine4"] == style_data_type("mine", 4).color not in {s.color for s in TYPE_STYLES.values()}


def test_a_float_has_its_exponent_bits_in_its_name_and_its_look() -> None:
    results = make_results(("float", "nf"))
    other = results[results["data_type"] == "float"].assign(exponent_bits=2)
    other = other.assign(key=other["key"] + "-e2")[other["bits"] == 4]
    both = pd.concat([results, other], ignore_index=True).astype({"exponent_bits": "Int64"})
    colors = find_colors(FIGURES["figure_9"](both))
    assert list(colors) == ["float4-e2m1", "float4-e3m0", "nf4"]
    assert colors["float4-e3m0"] == style_data_type("float", 4).color == style_data_type("float", 8).color
    assert colors["float4-e2m1"] == style_data_type("float", 3).color == style_data_type("float", 5, 2).color


def test_a_block_size_looks_the_same_beside_any_others() -> None:
    few, many = make_results(block_sizes=(64, 1024)), make_results(block_sizes=(16, 32, 64, 256, 1024))
    colors, others = (find_colors(FIGURES["figure_8"](results)) for results in (few, many))
    assert len(set(others.values())) == 5
    assert {name: others[name] for name in colors} == colors


def test_colors_of_a_style_are_written_as_a_browser_reads_them() -> None:
    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=["tab:orange", "0.5", (0.0, 1.0, 0.0)])}):
        colors = {style_precision(bits).color for bits in (3, 4, 5, 6)}
    assert colors == {"#ff7f0e", "#808080", "#00ff00"}


def test_looks_that_are_taken_get_another_marker() -> None:
    same = style_data_type("nf", 4)
    styles = style_series(["a", "b"], {"a": same, "b": same})
    assert styles["a"] == same
    assert styles["b"].color == same.color
    assert styles["b"].marker != same.marker
    with pytest.raises(TooManyCurves, match="--where"):
        style_series(map(str, range(20)), {str(k): same for k in range(20)})
    assert style_series(["x", "4-bit"], style_precisions([4]))["4-bit"] == style_precisions([4])["4-bit"]
