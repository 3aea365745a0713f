"""Numbers that papers printed, to draw beside ours: the same model, precision, task and metric."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Measure, pick_rows
from kbit.numerics.spec import BASELINE_BITS

TOLERANCE: Final = 0.005  # other dtypes, kernels and versions of the evaluation flip an item in 200 at most
ALL_ITEMS: Final = r"\ball (?:items|windows)\b"  # in the column evaluation
FOLDER: Final = Path(str(files("kbit"))) / "analysis" / "published"


@cache
def read_published(name: str = "results") -> pd.DataFrame:
    """Return published numbers: results (model, bits, method, task, metric, value, source) or those of a figure."""
    return pd.read_csv(FOLDER / f"{name}.csv")


def match_published(curves: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return published values of the models and precisions drawn, each where our own point lies on the x axis.

    Perplexities p of a text are drawn as cross entropies, ln p.

    Returns:
        Columns panel, model, bits, total_bits, value, method, source.
    """
    table = read_published()
    metric = "perplexity" if measure.metric == "cross_entropy" else measure.metric
    table = table[(table["metric"] == metric) & (table["task"] == measure.task)]
    if metric == "perplexity":
        table = table.assign(value=np.log(table["value"]))
    ours = curves[["panel", "model", "bits", "total_bits"]].drop_duplicates(["panel", "model", "bits"])
    columns = ["panel", "model", "bits", "total_bits", "value", "method", "source"]
    return ours.merge(table, on=["model", "bits"])[columns]


def compare_anchors(results: pd.DataFrame) -> pd.DataFrame:
    """Return our values beside published ones, one row for each model, precision, task and metric that both have.

    Only unquantized models are compared, as quantizers of other papers differ from each of ours. Only values of all
    items are compared: model and items are then the same, so a difference does not come from chance, and it is held
    against a fixed tolerance.

    Returns:
        Columns model, bits, task, metric, value, low, high, published, difference, agrees (within TOLERANCE, which for
        a perplexity is relative to the published one), source.

    Raises:
        AmbiguousResults: a family was measured in several ways.
    """
    table = read_published().rename(columns={"value": "published"}).drop(columns="method")
    table = table[table["bits"] == BASELINE_BITS]
    on = ["model", "bits", "task", "metric"]
    ours = results[(results["bits"] == BASELINE_BITS) & results["model"].isin(table["model"])]
    ours = ours[ours["evaluation"].str.contains(ALL_ITEMS)] if "evaluation" in ours else ours.iloc[:0]
    for (metric, task), _ in table.groupby(["metric", "task"]):
        pick_rows(ours, str(metric), str(task))  # refuses several ways
    both = ours.drop_duplicates(on)[[*on, "value", "low", "high"]].merge(table, on=on)
    difference = both["value"] - both["published"]
    unit = both["published"].where(both["metric"] == "perplexity", 1.0)
    both = both.assign(difference=difference, agrees=difference.abs() <= TOLERANCE * unit)
    return both[[*on, "value", "low", "high", "published", "difference", "agrees", "source"]]
