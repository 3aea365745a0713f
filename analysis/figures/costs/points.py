"""What the figures of cost show: time and memory of one machine, a row for each experiment and batch.

Times compare only where the machine, its threads and the tokens are the same, and only of weights that are in memory
in their bits. So quantized models whose weights are plain numbers (packed=false) are left out. Methods that multiply in
int8 have codes in memory that are never packed. Each is a series of its own beside the precisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import pandas as pd

from kbit.analysis.curves.settings import make_labels
from kbit.analysis.figures.canvas.styles import LineStyle, style_precisions, style_series
from kbit.analysis.figures.drawing import MissingResults, count_things, describe_lack
from kbit.evaluation.speed.record import TASK, find_batch
from kbit.layers.int8_schemes import SCHEMES
from kbit.numerics.spec import BASELINE_BITS

NEEDS: Final = "measured time and memory (eval.speed.measure=true packed=true) of two precisions of a model"
STUDIES: Final = ("nano/speed", "paper/int8_speed")
_STEADY: Final = 1.1  # the largest speed of the fixed product by the smallest at which times are taken to compare
_ABOUT: Final = [
    "key", "family", "model", "parameters", "bits", "data_type", "block_size", "method", "dtype", "total_bits",
]  # fmt: skip
_OF_MODEL: Final = {
    "weight_megabytes": "weight_megabytes", "step_megabytes": "step_megabytes", "packed_share": "packed_share",
    "matmul_gigaflops": "gigaflops", "read_gigabytes_per_second": "gigabytes_per_second",
}  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Measured costs that compare.

    Attributes:
        points: a row for each experiment and batch. Columns key, family, model, parameters, bits, data_type,
            block_size, method, dtype, total_bits, variant (the data type with its settings), series (the precision,
            such as 4-bit, or the method that multiplies in int8), batch, ms_per_token with its interval low and high,
            peak_megabytes, weight_megabytes, step_megabytes (the weights that a step reads, NaN of a model with
            experts), packed_share, gigaflops and gigabytes_per_second.
        conditions: the machine, and how many tokens were generated.
        notes: what the figure's caption says of them, what was left out included.
        warning: what a verdict must say if the machine's own speed varied too much, or "".
    """

    points: pd.DataFrame
    conditions: str
    notes: tuple[str, ...]
    warning: str


def gather_costs(results: pd.DataFrame, name: str) -> Costs:
    """Return the costs that a figure of this name shows: those of the conditions with the most experiments.

    Raises:
        MissingResults: fewer than two precisions of a model were measured.
    """
    rows = results[results["task"].astype(str).str.partition("/")[0] == TASK] if len(results) else results
    if rows.empty:
        raise MissingResults(describe_lack(name, NEEDS, STUDIES))
    conditions = str(rows.groupby("evaluation")["key"].nunique().sort_index().idxmax())
    here = rows[rows["evaluation"] == conditions]
    points = _tabulate(here)
    in_bits = points[(points["bits"] == BASELINE_BITS) | (points["packed_share"] > 0) | multiplies_int8(points)]
    if in_bits.empty or in_bits.groupby("model")["series"].nunique().max() < 2:
        raise MissingResults(describe_lack(name, NEEDS, STUDIES))
    notes = [
        f"Measured on {conditions}. {_describe_noise(in_bits)}",
        *describe_left(rows["key"].nunique() - here["key"].nunique(), "of other machines or numbers of tokens"),
        *describe_left(
            points["key"].nunique() - in_bits["key"].nunique(),
            "that are quantized and not packed: their weights are plain numbers in memory (run with packed=true)",
        ),
    ]
    return Costs(in_bits.reset_index(drop=True), conditions, tuple(notes), _warn(in_bits))


def _tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    about = rows.drop_duplicates("key").set_index("key", drop=False)
    table = about[_ABOUT].assign(variant=make_labels(about))
    precisions = table["bits"].astype(str) + "-bit"
    table["series"] = precisions.mask(multiplies_int8(table), table["variant"].astype(str).str.removeprefix("int "))
    for metric, column in _OF_MODEL.items():
        of_metric = rows[(rows["task"] == TASK) & (rows["metric"] == metric)].set_index("key")["value"]
        table[column] = of_metric.reindex(table.index)
    batches = rows["task"].map(find_batch)
    parts = []
    for batch in sorted(batches.dropna().unique()):
        mine = rows[batches == batch]
        times = mine[mine["metric"] == "ms_per_token"].set_index("key")
        peaks = mine[mine["metric"] == "peak_megabytes"].set_index("key")["value"]
        part = table.loc[table.index.isin(times.index)]
        times = times.loc[part.index]
        parts.append(
            part.assign(
                batch=int(batch), ms_per_token=times["value"], low=times["low"], high=times["high"],
                peak_megabytes=peaks.reindex(part.index),
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True) if parts else table.assign(batch=0).head(0)


def _describe_noise(points: pd.DataFrame) -> str:
    """Say how much the machine's own speed varied between the experiments."""
    flops = points.drop_duplicates("key")["gigaflops"]
    return (
        f"The same product of matrices ran at {flops.min():.3g} to {flops.max():.3g} GFLOP/s beside them: other work "
        "on the machine moves times as much."
    )


def _warn(points: pd.DataFrame) -> str:
    flops = points.drop_duplicates("key")["gigaflops"]
    ratio = float(flops.max() / flops.min())
    if ratio <= _STEADY:
        return ""
    return f" The machine's own speed varied {ratio:.1f}-fold meanwhile, so that differences below that say nothing."


def describe_left(count: int, which: str) -> list[str]:
    """Return the line of a caption that says how many experiments are left out, or none of 0."""
    return [f"Left out: {count_things(count, 'experiment')} {which}."] if count else []


def multiplies_int8(points: pd.DataFrame) -> pd.Series[bool]:
    """Return of which rows the method multiplies int8 by int8. What these have in memory is never packed."""
    return (points["bits"] < BASELINE_BITS) & points["method"].isin(SCHEMES)


def leave_int8(costs: Costs) -> Costs:
    """Return the costs without the methods that multiply in int8: of weights that are multiplied in 16 bits alone."""
    is_int8 = multiplies_int8(costs.points)
    count = costs.points.loc[is_int8, "key"].nunique()
    left = describe_left(count, "that multiply in int8, which is another product")
    return replace(costs, points=costs.points[~is_int8].reset_index(drop=True), notes=(*costs.notes, *left))


def style_points(points: pd.DataFrame) -> dict[str, LineStyle]:
    """Return the style of each series: the precisions' own, from few bits to many, and others for int8 methods."""
    is_int8 = multiplies_int8(points)
    precisions = style_precisions(sorted(points.loc[~is_int8, "bits"].unique()))
    return style_series([*precisions, *sorted(points.loc[is_int8, "series"].unique())], precisions)


def choose_variant(costs: Costs) -> Costs:
    """Return the costs of one quantizer: the variant, block size and dtype of most experiments, with the baselines.

    Methods that multiply in int8 and compute in the same dtype stay beside it.
    """
    points, is_int8 = costs.points, multiplies_int8(costs.points)
    settings = ["variant", "block_size", "dtype"]
    is_packed = (points["bits"] < BASELINE_BITS) & ~is_int8
    counts = points[is_packed if is_packed.any() else is_int8].groupby(settings, dropna=False)["key"].nunique()
    chosen = dict(zip(settings, counts.index[int(counts.to_numpy().argmax())], strict=True))
    mine = points["dtype"] == chosen["dtype"]
    for name in ("variant", "block_size"):
        same = points[name].isna() if pd.isna(chosen[name]) else points[name] == chosen[name]
        mine &= same | ~is_packed
    left = points["key"].nunique() - points.loc[mine, "key"].nunique()
    block = "whole tensors" if pd.isna(chosen["block_size"]) else f"blocks of {chosen['block_size']}"
    words = [f"{chosen['variant']}, {block}"] if is_packed.any() else []
    words += sorted(points.loc[mine & is_int8, "series"].unique())
    notes = (
        *costs.notes, f"Shown: {', '.join(words)}, computed in {chosen['dtype']}.",
        *describe_left(left, "with other settings (choose with --where)"),
    )  # fmt: skip
    return Costs(points[mine].reset_index(drop=True), costs.conditions, notes, _warn(points[mine]))
