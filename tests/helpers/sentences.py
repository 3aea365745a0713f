"""Computes what a figure's sentences claim again, from the data drawn and the store, and compares.

Nothing here uses the analysis: curves are interpolated by numpy, intervals follow from the errors of independent
points, and correlations are scipy's. Of intervals by resampling a third of a standard error is chance.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import pandas as pd
from sentence_contrasts import check_contrasts, check_figure_3, check_figure_4, check_figure_5
from sentence_races import check_four_bit
from sentence_tables import (
    check_anchors,
    check_features,
    check_frontier,
    check_int8,
    check_laws,
    check_map,
    check_relation,
    check_roofline,
    check_sensitivity,
    check_table_1,
    check_table_2,
    check_verdicts,
)

Check = Callable[[str, pd.DataFrame, pd.DataFrame], None]  # verdict, data drawn, the store

EXPECTED: Final = {
    "figure_7": "no better", "figure_8": "better", "figure_9": "better", "figure_10": "no better",
    "figure_11": "no better", "figure_12": "best", "figure_14": "best", "figure_15": "better", "methods": "better",
}  # fmt: skip


TABLES: Final[dict[str, Check]] = {
    "table_1": check_table_1,
    "table_2": check_table_2,
    "verdicts": check_verdicts,
    "frontier": check_frontier,
    "laws": check_laws,
    "data_types_map": check_map,
    **dict.fromkeys(("perplexity_accuracy", "kl_accuracy", "error_accuracy", "error_loss"), check_relation),
    "sensitivity": check_sensitivity,
    "int8_methods": check_int8,
    "features": check_features,
    "anchors": check_anchors,
    "figure_16": check_roofline,
}


CURVES: Final[dict[str, Callable[[str, pd.DataFrame], None]]] = {
    **dict.fromkeys(("figure_1", "figure_2", "figure_13"), check_four_bit),
    "figure_3": check_figure_3,
    "figure_4": check_figure_4,
    "outliers": check_figure_4,
    "figure_5": check_figure_5,
}


def check_sentences(name: str, verdict: str, caption: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    """Check the verdict of one figure, and how much data its caption says it rests on."""
    assert not re.search(r"(?<!\w)[+-]?nan\b|<NA>|None", verdict), verdict
    if name in TABLES:
        TABLES[name](verdict, data, store)
    elif name in CURVES:
        CURVES[name](verdict, data)
    else:
        check_contrasts(verdict, data, EXPECTED[name])
    if name in TABLES:
        return
    keys = {key for group in data["key"] for key in group.split()}
    assert f"Data: {len(keys)} experiment" in caption
    assert f" on {data['model'].nunique()} model" in caption
    metric, task = data["metric"].iloc[0], data["task"].iloc[0]
    measured = store[(store["metric"] == metric) & (store["task"] == task) & store["family"].isin(data["family"])]
    left = measured["key"].nunique() - len(keys)
    assert (f"Left out: {left} experiment" in caption) == (left > 0)
