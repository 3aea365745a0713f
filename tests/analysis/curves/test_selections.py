"""Which points a figure shows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import pytest

from kbit.analysis.curves.selections import (
    select_block_sizes,
    select_data_types,
    select_exponents,
    select_gptq,
    select_methods,
    select_outliers,
)
from kbit.analysis.curves.settings import complete_settings, make_labels
from kbit.analysis.figures.paper import of_family


def make_points(*settings: dict[str, Any], bits: tuple[int, ...] = (2, 3), models: int = 2) -> pd.DataFrame:
    """Points of settings at some precisions and sizes, with the columns of precision_curves that selections need."""
    usual = {"family": "toy", "data_type": "nf", "block_size": 64, "exponent_bits": pd.NA}
    rows = [
        usual | {"bits": k, "model": f"m{place}", "total_bits": 10**place} | setting
        for setting in settings
        for k in bits
        for place in range(models)
    ]
    points = complete_settings(pd.DataFrame(rows).astype({"block_size": "Int64"}))
    return points.assign(label=make_labels(points))


def test_methods_of_the_quantizer_with_the_most_are_curves_with_their_options() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"method": "gptq"},
        {"method": "gptq", "method_options": "search_scales=True"},
    ]
    settings += [{"method": "mse"}, {"method": "mine"}, {"data_type": "int", "layout": "row", "method": "gptq"}]
    settings += [{"data_type": "int", "layout": "row"}, {"scale_format": "e8m0"}]
    shown = select_methods(make_points(*settings), bits=2)
    assert set(shown["panel"]) == {"toy, nf2 block 64"}
    assert set(shown["series"]) == {"rtn", "gptq", "gptq search_scales=True", "mse", "mine"}
    assert len(shown) == 10


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["calibration.samples=16"] * 2, {"float2-e1m0 block 64", "int2 gptq block 64", "int2 gptq whole tensor"}),
        (
            ["calibration.samples=16", ""],
            {"float2-e1m0 block 64", "int2 gptq calibration.samples=16 block 64", "int2 gptq whole tensor"},
        ),
    ],
)
def test_a_name_has_the_options_in_which_points_of_its_method_differ(options: list[str], names: set[str]) -> None:
    gptq = [
        {"data_type": "int", "method": "gptq", "method_options": words, "block_size": block}
        for words, block in zip(options, (64, None), strict=True)
    ]
    points = make_points({"data_type": "float", "exponent_bits": 1}, *gptq, bits=(2,))
    shown = select_gptq(points, bits=2)
    assert set(shown["series"]) == names
    assert set(shown.loc[shown["method"] == "gptq", "method_options"]) == set(options)  # the CSV tells them


def test_without_a_method_there_is_nothing_to_show() -> None:
    assert select_methods(make_points({}, {"data_type": "int"}), bits=2).empty


def test_options_and_settings_with_blanks_are_no_words_of_a_label() -> None:
    """A path with blanks, a pattern that says "gptq" or "outliers": columns are compared, not words."""
    settings: list[dict[str, Any]] = [{}, {"method": "awq", "method_options": "calibration.text=my gptq text.txt"}]
    settings += [{"exclude": "gptq outliers 0.5"}, {"data_type": "float", "exponent_bits": 2}]
    points = make_points(*settings, bits=(2,))
    assert set(select_methods(points, bits=2)["series"]) == {"rtn", "awq"}
    more = {"method": "awq", "method_options": "grid_points=5"}
    more_points = make_points(*settings, more, bits=(2,))
    options = {"awq calibration.text=my gptq text.txt", "awq grid_points=5"}
    assert set(select_methods(more_points, bits=2)["series"]) == {"rtn", *options}
    assert select_gptq(points, bits=2).empty
    assert select_outliers(points, bits=2).empty


def test_data_types_of_any_name_are_curves() -> None:
    points = make_points({}, {"data_type": "mine"}, {"data_type": "mine", "layout": "row"}, bits=(4,))
    assert list(dict.fromkeys(select_data_types(points, bits=4)["series"])) == ["mine4", "nf4"]


def test_exponents_are_those_of_floats_without_other_settings() -> None:
    floats: list[dict[str, Any]] = [{"exponent_bits": 1}, {}, {"exponent_bits": 2, "layout": "row"}]
    points = make_points(*({"data_type": "float"} | setting for setting in floats), {"exponent_bits": 1}, bits=(4,))
    shown = select_exponents(points)
    assert set(shown["series"]) == {"E1", "E3"}  # not stored: the paper's three bits
    assert len(shown) == 4


def plant_outliers(family: str, models: int, data_type: str = "nf", share: float = 0.02) -> pd.DataFrame:
    """3 and 4 bits with and without outliers, at some sizes of a family."""
    about = {"family": family, "data_type": data_type}
    points = make_points(about, about | {"outlier_fraction": share}, bits=(3, 4), models=models)
    return points.assign(model=family + points["model"])


def test_a_family_that_cannot_be_drawn_is_not_preferred() -> None:
    points = pd.concat([plant_outliers("nano-opt", 1), plant_outliers("other", 2)], ignore_index=True)
    shown = of_family("opt", *(partial(select_outliers, bits=bits) for bits in (3, 4)))(points)
    assert set(shown["panel"]) == {"other, nf3 block 64", "other, nf4 block 64"}
    points = pd.concat([points, plant_outliers("opt", 2)], ignore_index=True)
    assert set(of_family("opt", partial(select_outliers, bits=3))(points)["family"]) == {"opt"}


def test_a_setting_that_cannot_be_drawn_is_not_chosen_however_many_points_it_has() -> None:
    small = [plant_outliers("toy", 1, share=share) for share in (0.02, 0.1, 0.3)]
    points = pd.concat([*small, plant_outliers("toy", 2, "int")], ignore_index=True).drop_duplicates()
    assert set(select_outliers(points, 4)["panel"]) == {"toy, int4 block 64"}
    parts = [make_points({"block_size": size}, bits=(4,), models=1) for size in (32, 64, 128, 256, 512)]
    parts += [make_points({"data_type": "int", "block_size": size}, bits=(4,)) for size in (64, 128)]
    assert set(select_block_sizes(pd.concat(parts, ignore_index=True), 4)["data_type"]) == {"int"}
