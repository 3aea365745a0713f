"""Makes stores that hold nothing but the scores of items."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def write_items(folder: Path, scores: dict[str, dict[str, Any]], metric: str = "acc") -> None:
    """Write items to a store that holds nothing else: {key: {task: scores}}. Those of other metrics stay."""
    (folder / "experiments").mkdir(parents=True, exist_ok=True)
    for key, tasks in scores.items():
        path = folder / "experiments" / f"{key}.json"
        known = json.loads(path.read_text())["items"] if path.is_file() else []
        items = [item for item in known if item["metric"] != metric]
        items += [
            {"task": task, "metric": metric, "n": len(values), "encoding": "float32"}
            | {"data": base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()}
            for task, values in tasks.items()
        ]
        record = {"key": key, "schema_version": 1, "items": items}
        path.write_text(json.dumps(record))


def add_items(results: pd.DataFrame, folder: Path, count: int = 60) -> pd.DataFrame:
    """Return results whose values are the means of scores that a new store in the folder has.

    Variants of a model share nearly all of their items' chance.
    """
    rng = np.random.default_rng(0)
    shared = {model: rng.normal(0, 0.2, count) for model in results["model"].unique()}
    results = results.copy()
    for metric, of_metric in results[results["task"] != "mean_zero_shot"].groupby("metric"):
        scores: dict[str, dict[str, Any]] = {}
        for row in of_metric.itertuples():
            own = shared[row.model] + rng.normal(0, 0.005, count)
            items = (row.value + own - own.mean()).astype("<f4")  # type: ignore[operator]
            scores.setdefault(str(row.key), {})[str(row.task)] = items
        write_items(folder, scores, str(metric))
    results.attrs["store"] = str(folder)
    return results
