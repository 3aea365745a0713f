"""Which points a figure shows."""

from __future__ import annotations

from functools import partial

import pandas as pd

from kbit.analysis.curves.selections import select_block_sizes, select_methods, select_outliers
from kbit.analysis.figures.paper import of_family


def make_points(*names: str) -> pd.DataFrame:
    rows = [
        {"family": "toy", "data_type": name, "block_size": 64, "bits": bits, "model": model, "total_bits": size}
        for name in names
        for bits in (2, 3)
        for model, size in (("small", 10), ("large", 20))
    ]
    return pd.DataFrame(rows)


def test_methods_of_the_quantizer_with_the_most_are_curves_with_their_options() -> None:
    names = ["nf", "nf gptq", "nf gptq search_scales=True", "nf mse", "int row gptq", "int row", "nf e8m0 scales"]
    shown = select_methods(make_points(*names), bits=2)
    assert set(shown["panel"]) == {"toy, 2-bit nf block 64"}
    assert set(shown["series"]) == {"rtn", "gptq", "gptq search_scales=True", "mse"}
    assert len(shown) == 8


def test_without_a_method_there_is_nothing_to_show() -> None:
    assert select_methods(make_points("nf", "int"), bits=2).empty


def plant_outliers(family: str, models: int, base: str = "nf") -> pd.DataFrame:
    """3 and 4 bits with and without outliers, at some sizes of a family."""
    rows = [
        {"family": family, "data_type": name, "block_size": 64, "bits": bits, "model": f"{family}-{place}"}
        | {"total_bits": 10**place}
        for name in (base, f"{base} outliers 0.02")
        for bits in (3, 4)
        for place in range(models)
    ]
    return pd.DataFrame(rows)


def test_a_family_that_cannot_be_drawn_is_not_preferred() -> None:
    points = pd.concat([plant_outliers("nano-opt", 1), plant_outliers("other", 2)], ignore_index=True)
    shown = of_family("opt", *(partial(select_outliers, bits=bits) for bits in (3, 4)))(points)
    assert set(shown["panel"]) == {"other, 3-bit nf block 64", "other, 4-bit nf block 64"}
    points = pd.concat([points, plant_outliers("opt", 2)], ignore_index=True)
    assert set(of_family("opt", partial(select_outliers, bits=3))(points)["family"]) == {"opt"}


def test_a_setting_that_cannot_be_drawn_is_not_chosen_however_many_points_it_has() -> None:
    small = pd.concat(
        [plant_outliers("toy", 1), plant_outliers("toy", 1).replace("nf outliers 0.02", "nf outliers 0.1")]
    )
    small = pd.concat([small, small.replace("nf outliers 0.1", "nf outliers 0.3")])
    points = pd.concat([small, plant_outliers("toy", 2, "int")], ignore_index=True).drop_duplicates()
    assert set(select_outliers(points, 4)["panel"]) == {"toy, 4-bit int block 64"}
    blocks = [("nf", size, 1) for size in (32, 64, 128, 256, 512)] + [("int", size, 2) for size in (64, 128)]
    rows = [
        {"family": "toy", "data_type": name, "block_size": size, "bits": 4, "model": str(k), "total_bits": 10**k}
        for name, size, models in blocks
        for k in range(models)
    ]
    assert set(select_block_sizes(pd.DataFrame(rows), 4)["data_type"]) == {"int"}
