"""What a run prints when it ends: the numbers of one experiment, or how many of many there are."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kbit.cli.errors import fail
from kbit.experiments.config import RunConfig

if TYPE_CHECKING:
    import pandas as pd

    from kbit.engine.plan import Plan
    from kbit.store.store import Store


def report_results(plan: Plan, settings: RunConfig, store: Store) -> None:
    """Say what the store now has of what was asked; exit with 1 if not all of it."""
    from kbit.store.readers import read_failures

    distinct = {key: experiment for experiment, key in plan.keys.items()}
    missing = distinct.keys() - store.finished_keys()
    if not missing:
        if len(distinct) == 1:
            print(describe_results(store.root, next(iter(distinct))))
        print(f"{len(distinct)} of {len(distinct)} asked results are in {store.root}")
        if len(distinct) > 1:
            print(f"see them: kbit figures --results {settings.results}, kbit results --results {settings.results}")
        return
    reasons = read_failures(store.root).set_index("key")["reason"]
    for key in sorted(missing):
        log = store.log_path(key)
        where = f"; its log: {log}" if log is not None and log.exists() else ""
        print(f"no result: {distinct[key].label()} ({key}): {reasons.get(key, 'not run')}{where}", file=sys.stderr)
    fail(f"{len(missing)} of {len(distinct)} asked results are missing; tracebacks are in {store.root}/failures")


def describe_results(store_path: str, key: str) -> str:
    """Return the measurements of one experiment as a table."""
    from kbit.store.readers import read_results

    rows = read_results(store_path).query("key == @key")
    first = rows.iloc[0]
    head = f"{first['model']}: {first['total_bits'] / 1e6:.2f} Mbit in all, {first['bits_per_param']:.2f} bits/param"
    table = rows[["task", "metric", "value", "low", "high", "n"]].to_string(index=False)
    return "\n".join([head, table, *_explain_control(rows), *_describe_features(store_path, key)])


def _explain_control(rows: pd.DataFrame) -> list[str]:
    """Say why features were found and zeroed, but no random dimensions (see measure_ablation)."""
    return [
        f"no random control: {count:.0f} of {width} dimensions are features, so that there are not as many others"
        for count, width in rows.loc[rows["metric"] == "features", ["value", "n"]].itertuples(index=False)
        if count > width / 2
    ]


def _describe_features(store_path: str, key: str) -> list[str]:
    """Return the hidden dimensions that are large most often, a line each; none if they were not looked for."""
    from kbit.store.readers import read_features

    rows = read_features(store_path, [key])
    lines = []
    for (dimension, is_feature), places in rows.groupby(["dimension", "is_feature"], sort=False):
        first, top = places.iloc[0], places.sort_values("largest", key=abs).iloc[-1]
        lines.append(
            f"dimension {dimension}{' (feature)' if is_feature else ''}: large in {first['layers']:.0%} of layers, at "
            f"{first['positions']:.2%} of positions; up to {top['largest']:.1f}, layer {top['layer']} {top['input']}"
        )
    return lines
