"""Where in the space of settings quality is lost: data type by block size, and layer by layer."""

from __future__ import annotations

import re
from typing import Final

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kbit.analysis.claims import find_measures
from kbit.analysis.curves import ZERO_SHOT, Measure, is_missing, precision_curves, tabulate_curves
from kbit.analysis.drawing import MissingResults, PaperFigure, describe_lack, write_verdict
from kbit.analysis.frontier import draw_values
from kbit.analysis.panels import CAPTION_SIZE
from kbit.analysis.selections import WHOLE, has_settings, rank_setting
from kbit.analysis.styles import STYLE

MAP_PANELS: Final = 4  # the maps with the most cells
LAYERS: Final = re.compile(r"\(\?!(?:\.\*)?(?P<kept>.+?)\)")  # an exclude that spares one layer: layers\.(?!3\.)
MAP_CLAIM: Final = "Which data type and block size is best at equal total bits, counting the bits of the scales?"
SENSITIVITY_CLAIM: Final = "Which layer suffers most from being quantized, alone?"


def draw_data_types_map(results: pd.DataFrame) -> PaperFigure:
    """Draw, for each family and precision, what each data type and block size loses at equal total bits.

    A cell is the mean over the shared budgets of the distance to the best cell there: smaller blocks pay for their
    scales, as they are compared with a larger model. Below each number are the bits per parameter.

    Raises:
        MissingResults: nowhere are there two data types in two block sizes, each at two or more sizes of a model.
    """
    maps = {} if results.empty else find_maps(results)
    if not maps:
        needs = "two data types in two block sizes at one precision, each at two or more sizes of one family"
        raise MissingResults(describe_lack("data_types_map", needs, ("nano/data_types", "nano/block_size")))
    data = pd.concat(maps.values(), ignore_index=True)
    winners = [table.sort_values("loss").iloc[0] for table in maps.values()]
    verdict = "; ".join(
        f"{row['panel']}: best is {row['data_type']} {name_block(row['block_size'])} ({row['bits_per_param']:.2f} bits)"
        for row in winners
    )
    with matplotlib.style.context(["default", STYLE]):
        columns = min(len(maps), 2)
        rows = -(-len(maps) // columns)
        widest = max(table["block_size"].nunique(dropna=False) for table in maps.values())
        tallest = max(table["data_type"].nunique() for table in maps.values())
        size = (columns * (1.4 + 0.95 * widest), rows * (1.3 + 0.55 * tallest))
        fig = Figure(figsize=size, layout="constrained")
        for place, (title, table) in enumerate(maps.items()):
            draw_map(fig.add_subplot(rows, columns, place + 1), table, title)
        note = f"Numbers: {data['measure'].iloc[0]} lost against the best cell; in brackets: bits per parameter."
        write_verdict(fig, "data_types_map", MAP_CLAIM, verdict + ".", note)
    return PaperFigure("data_types_map", fig, data, MAP_CLAIM, verdict + ".")


def find_maps(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the largest maps by title, each with a row per cell; by cross entropy where that was measured."""
    maps = {}
    for family, rows in results.groupby("family"):
        for measure in find_measures(rows)[-1:]:
            points = precision_curves(rows, measure.metric, measure.task)
            points = points[(points["bits"] < 16) & ~has_settings(points["data_type"])]
            for bits, group in points.groupby("bits"):
                table = fill_map(group, measure)
                if not table.empty and min(table["data_type"].nunique(), table["block_size"].nunique(dropna=False)) > 1:
                    panel = f"{family}, {bits}-bit"
                    per_param = rows[(rows["bits"] == bits)].drop_duplicates("key").set_index("key")["bits_per_param"]
                    table["bits_per_param"] = table.pop("key").str.split().str[0].map(per_param)
                    maps[panel] = table.assign(panel=panel, measure=measure.name)
    return dict(sorted(maps.items(), key=lambda item: -len(item[1]))[:MAP_PANELS])


def fill_map(points: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return data_type, block_size, loss and key (of one experiment) for each cell that has a curve."""
    cells = points.groupby(["data_type", "block_size"], dropna=False).ngroup()
    table = tabulate_curves(points.assign(cell=cells), by="cell")
    if table.empty:
        return pd.DataFrame()
    sign = 1.0 if measure.higher_is_better else -1.0
    best = (sign * table).max(axis=1)
    loss = (best - (sign * table).T).T.mean()
    first = points.assign(cell=cells).drop_duplicates("cell").set_index("cell").loc[loss.index]
    return first[["data_type", "block_size", "key"]].assign(loss=loss).reset_index(drop=True)


def draw_map(axes: Axes, table: pd.DataFrame, title: str) -> None:
    """Draw one map: darker cells lose more; the best cell has a frame."""
    kinds = sorted(table["data_type"].unique(), key=rank_setting)
    blocks = sorted(table["block_size"].astype("Int64").fillna(WHOLE).unique())
    grid = np.full((len(kinds), len(blocks)), np.nan)
    words = {}
    for row in table.itertuples():
        block = WHOLE if is_missing(row.block_size) else int(row.block_size)  # type: ignore[arg-type]
        place = (kinds.index(row.data_type), blocks.index(block))
        grid[place] = row.loss
        words[place] = f"{row.loss:.3f}\n[{row.bits_per_param:.2f}]"
    top = float(np.nanquantile(grid, 0.8)) or 1.0  # one collapsed cell must not make all others white
    axes.imshow(grid, cmap="Greys", vmin=0, vmax=1.6 * top, aspect="auto")
    for (y, x), text in words.items():
        color = "white" if grid[y, x] > 0.95 * top else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=CAPTION_SIZE, color=color)
    best_y, best_x = (int(k) for k in np.unravel_index(np.nanargmin(grid), grid.shape))
    frame = np.array([[-0.48, -0.48], [0.48, -0.48], [0.48, 0.48], [-0.48, 0.48], [-0.48, -0.48]])
    axes.plot(*(frame + np.array([best_x, best_y])).T, color="#D55E00", linewidth=2)
    axes.set_xticks(range(len(blocks)), ["whole" if block == WHOLE else str(block) for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block size")
    axes.set_title(title, loc="left")


def name_block(block_size: object) -> str:
    """Return "block 64" or "whole tensor"."""
    return "whole tensor" if is_missing(block_size) else f"block {block_size}"


def draw_sensitivity(results: pd.DataFrame) -> PaperFigure:
    """Draw what the model loses when one layer, or one kind of matrix, is quantized and all others stay at 16 bits.

    Such an experiment excludes all but one: quant.exclude='layers\\.(?!3\\.)' (see sweeps/nano/sensitivity.yaml).

    Raises:
        MissingResults: no model has two such experiments and its 16-bit baseline.
    """
    measure = find_measures(results)[-1] if len(results) and find_measures(results) else ZERO_SHOT
    data = tabulate_sensitivity(results, measure) if "exclude" in results else pd.DataFrame()
    if data.empty:
        needs = "experiments that quantize one layer each, and the 16-bit model"
        raise MissingResults(describe_lack("sensitivity", needs, ("nano/sensitivity",)))
    parts = []
    for model, group in data.groupby("model", sort=False):
        worst = group.sort_values("loss").iloc[-1]
        parts.append(f"{model}: {worst['part']} ({worst['loss']:+.3f})")
    verdict = f"The most sensitive part is, of {'; '.join(parts)}."
    with matplotlib.style.context(["default", STYLE]):
        groups = list(data.groupby("model", sort=False))
        height = sum(0.28 * len(group) + 0.7 for _, group in groups)
        fig = Figure(figsize=(6.6, height + 0.6), layout="constrained")
        ratios = [len(group) + 2 for _, group in groups]
        grid = fig.add_gridspec(len(groups), 1, height_ratios=ratios)
        for place, (model, group) in enumerate(groups):
            axes = fig.add_subplot(grid[place])
            error = np.nan_to_num(np.maximum([group["loss"] - group["low"], group["high"] - group["loss"]], 0))
            axes.barh(group["part"], group["loss"], xerr=error, color="#56B4E9", edgecolor="0.2", height=0.7)
            axes.invert_yaxis()
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.set_title(f"{model}, {group['bits'].iloc[0]}-bit {group['data_type'].iloc[0]}", loc="left")
        axes.set_xlabel(f"{measure.name} lost")
        write_verdict(
            fig, "sensitivity", SENSITIVITY_CLAIM, verdict, f"Bars: 95% intervals ({data['source'].iloc[0]})."
        )
    return PaperFigure("sensitivity", fig, data, SENSITIVITY_CLAIM, verdict)


def tabulate_sensitivity(results: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return model, bits, data_type, part, loss, low, high, source: one row per model and part quantized alone."""
    rows = results[(results["metric"] == measure.metric) & (results["task"] == measure.task)].drop_duplicates("key")
    parts = rows["exclude"].map(name_part, na_action="ignore")
    rows = rows.assign(part=parts)
    tables = []
    for _, group in rows[rows["part"].notna() | (rows["bits"] == 16)].groupby("model", sort=True):
        alone, base = group[group["part"].notna()], group[group["bits"] == 16]
        if len(alone) < 2 or base.empty:
            continue
        ordered = pd.concat([base.head(1), alone])
        sign = -1.0 if measure.higher_is_better else 1.0
        draws = draw_values(ordered, measure, results)
        added = sign * (draws.values[:, 1:] - draws.values[:, :1])
        low, high = np.quantile(added, [0.025, 0.975], axis=0)
        loss = sign * (alone["value"] - base["value"].iloc[0])
        columns = ["model", "bits", "data_type", "part", "quantized_parameters"]
        tables.append(alone[columns].assign(loss=loss, low=low, high=high, source=draws.source))
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    order = table["part"].str.extract(r"(\d+)")[0].astype(float)
    return (
        table.assign(_order=order)
        .sort_values(["model", "_order"], kind="stable", ignore_index=True)
        .drop(columns="_order")
    )


def name_part(exclude: str) -> str | None:
    """Return the one part that an exclude pattern spares: "layer 3", "dense_h_to_4h"; None for other patterns."""
    found = LAYERS.search(exclude)
    if found is None:
        return None
    kept = found["kept"].replace("\\.", ".").strip(".^$*")
    return f"layer {kept}" if kept.isdigit() else kept
