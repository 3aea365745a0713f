"""Which points the figure of methods shows."""

from __future__ import annotations

import pandas as pd

from kbit.analysis.selections import select_methods


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
