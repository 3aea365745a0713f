"""Numbers that papers printed, to draw beside ours: the same model, precision, task and metric."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves import Measure

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

    Only unquantized models: quantizers of other papers differ from each of ours.

    Returns:
        Columns model, bits, task, metric, value, low, high, published, difference, inside (published is in our 95%
        interval), source.
    """
    table = read_published().rename(columns={"value": "published"}).drop(columns="method")
    table = table[table["bits"] == 16]
    on = ["model", "bits", "task", "metric"]
    ours = results[results["bits"] == 16].drop_duplicates(on)
    both = ours[[*on, "value", "low", "high"]].merge(table, on=on)
    inside = both["published"].between(both["low"], both["high"])
    both = both.assign(difference=both["value"] - both["published"], inside=inside)
    return both[[*on, "value", "low", "high", "published", "difference", "inside", "source"]]
