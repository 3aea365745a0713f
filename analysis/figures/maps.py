"""Where in the space of settings quality is lost: data type by block size, and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from kbit.analysis.curves.curves import (
    TIE,
    ZERO_SHOT,
    Floats,
    Measure,
    find_measures,
    pick_rows,
    tabulate_curves,
)
from kbit.analysis.curves.families import find_curves
from kbit.analysis.curves.selections import has_settings, most_points
from kbit.analysis.curves.settings import (
    WHOLE,
    is_missing,
    make_labels,
    name_block,
    name_quantizers,
    name_variant,
    rank_data_type,
    rank_label,
)
from kbit.analysis.figures.canvas.captions import CaptionedFigure, TooSmallPage
from kbit.analysis.figures.canvas.page import Page, StyledFigure, get_line_height, get_small_size, measure_text
from kbit.analysis.figures.canvas.sheets import Sheet, is_beside, make_sheet
from kbit.analysis.figures.canvas.styles import style_data_type, style_series
from kbit.analysis.figures.drawing import (
    LIMIT,
    MissingResults,
    PaperFigure,
    describe_choice,
    describe_lack,
    describe_sample,
)
from kbit.analysis.statistics.degradation import measure_lost
from kbit.analysis.statistics.frontier import draw_values, mean_interval, weigh_points
from kbit.analysis.statistics.grades import describe_lead
from kbit.numerics.spec import BASELINE_BITS

MAP_PANELS: Final = 4  # the maps with the most cells
SHADES: Final = "Blues"  # its luminance falls steadily: it reads in grey too
BAR_WIDTH: Final = 1.0  # inches, for the scale of shades
LAYERS: Final = re.compile(r"\(\?!(?:\.\*)?(?P<kept>.+?)\)")  # an exclude that spares one layer: layers\.(?!3\.)
MAP_CLAIM: Final = "Which data type and block size is best at equal total bits, counting the bits of the scales?"
QUANTIZER: Final = ["bits", "data_type", "label", "block_size"]
SENSITIVITY_CLAIM: Final = "Which layer suffers most from being quantized, alone?"


def draw_data_types_map(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw, for each family and precision, what each data type and block size loses at equal total bits.

    A cell is the mean over the shared budgets of the distance to the best cell there. Smaller blocks pay for their
    scales, as they are compared with a larger model. Below each number are the bits per parameter. One scale of shades
    serves all panels. A cell that was not measured is hatched.

    Raises:
        MissingResults: nowhere are there two data types in two block sizes, each at two or more sizes of a model.
    """
    measures = [] if results.empty else find_measures(results)
    maps = find_maps(results, measures[-1]) if measures else {}
    if not maps:
        needs = "two data types in two block sizes at one precision, each at two or more sizes of one family"
        raise MissingResults(describe_lack("data_types_map", needs, ("nano/data_types", "nano/block_size")))
    measure = measures[-1]
    data = pd.concat([cells.table for cells in maps.values()], ignore_index=True)
    verdict = "; ".join(describe_winner(panel, cells, measure, results) for panel, cells in maps.items()) + "."
    widest = max(cells.table["block_size"].nunique(dropna=False) for cells in maps.values())
    tallest = max(cells.table["data_type"].nunique() for cells in maps.values())  # with a float's exponent bits
    size = get_small_size()
    room = (widest + 2.5) * measure_text("[0.000]", size), (tallest + 2.5) * 2 * get_line_height(size)
    panel = (1.4 + 0.95 * widest + BAR_WIDTH / 2, 1.3 + 0.55 * tallest)
    sheet = make_sheet(page, len(maps), panel, 2, least_width=room[0])
    check_room(sheet, room, len(maps))
    shades = ScalarMappable(PowerNorm(0.5, 0, scale_top(data["loss"])), SHADES)
    for axes, (title, cells) in zip(sheet.add_axes(len(maps)), maps.items(), strict=True):
        draw_map(axes, cells.table, shades)
        sheet.write_title(axes, title)
    unit = "" if measure.higher_is_better else " (nats per token)"
    draw_scale(sheet, shades, f"{measure.name} lost{unit}", "right" if is_beside(page) else "bottom")
    note = f"Numbers: {measure.name} lost against the best cell of each budget, a mean over the budgets; in "
    note += "brackets: bits per parameter. Framed: the cell that loses least. One scale of shades for all panels. "
    note += "Hatched: not measured, or not at two sizes."
    points = find_curves(results, measure.metric, measure.task)
    left = describe_choice(points[points["bits"] < BASELINE_BITS], data.rename(columns={"keys": "key"}))
    notes = (note, f"{describe_sample(results, data['keys'], measure)} {LIMIT}", *left)
    short = "; ".join(f"{panel}: {name_best(cells)}" for panel, cells in maps.items()) + "."
    data = data.drop(columns="kind")
    return PaperFigure("data_types_map", sheet.fig, data, MAP_CLAIM, verdict, notes, short)


def draw_scale(sheet: Sheet, shades: ScalarMappable, label: str, place: Literal["right", "bottom"]) -> None:
    """Draw the scale of shades beside or below all panels."""
    share = 0.15 if place == "right" else 0.35 / float(sheet.fig.get_size_inches()[1])
    panels = sheet.fig.axes
    bar = sheet.fig.body.colorbar(
        shades, ax=panels, extend="max", shrink=0.8, location=place, aspect=30, fraction=share, label=label
    )
    if place == "bottom":
        bar.locator = MaxNLocator(3)  # small losses take most of the scale: more labels would touch
        bar.update_ticks()


def check_room(sheet: Sheet, room: tuple[float, float], count: int) -> None:
    """Raise TooSmallPage if a panel is too small for the words of its cells, which need so many inches."""
    if sheet.panel_width < room[0] or sheet.panel_height < room[1]:
        raise TooSmallPage(
            f"each of {count} maps needs {room[0]:.1f} x {room[1]:.1f} inches for its words: give a larger --width or "
            "--height, or draw fewer with --where"
        )


def name_best(cells: Cells) -> str:
    """Return "best is nf4 block 64 [4.25]", or the cells that tie."""
    best = [name_cell(row) for _, row in cells.table[find_least(cells.table["loss"])].iterrows()]
    return f"best is {best[0]}" if len(best) == 1 else f"best are {' and '.join(best)}, which are level"


@dataclass(frozen=True)
class Cells:
    """The cells of one map.

    Attributes:
        table: a row per cell, with data_type (the label, with a float's exponent bits), kind (the data type alone),
            block_size, loss, keys (of experiments), bits_per_param, panel, measure.
        points: the curves' points, whose column cell has the index of their row in `table`.
        budgets: the budgets at which all cells are compared.
    """

    table: pd.DataFrame
    points: pd.DataFrame
    budgets: Floats


def scale_top(losses: pd.Series[float]) -> float:
    """Return the loss of the darkest shade: nine cells in ten lose less, and collapsed cells do not set the scale."""
    return float(np.quantile(losses, 0.9)) or 1.0


def find_maps(results: pd.DataFrame, measure: Measure) -> dict[str, Cells]:
    """Return the largest maps by title."""
    curves = find_curves(results, measure.metric, measure.task)
    curves = curves[(curves["bits"] < BASELINE_BITS) & ~has_settings(curves, but_exponents=True)]
    per_param = results.drop_duplicates("key").set_index("key")["bits_per_param"]
    maps = {}
    for (family, bits), group in curves.groupby(["family", "bits"]):
        group = group.assign(kind=group["data_type"], data_type=name_quantizers(group))
        cells = compare_cells(group, measure)
        if cells is None:
            continue
        first = cells.table["keys"].str.split().str[0]
        panel = f"{family}, {bits}-bit"
        table = cells.table.assign(bits_per_param=first.map(per_param), panel=panel, measure=measure.name)
        maps[panel] = replace(cells, table=table)
    return dict(sorted(maps.items(), key=lambda item: -count_cells(item[1].table))[:MAP_PANELS])


def count_cells(table: pd.DataFrame) -> int:
    """Return how many data types by block sizes a map has, where a float's exponent bits make no other data type."""
    return len(table[["kind", "block_size"]].drop_duplicates())


def compare_cells(curves: pd.DataFrame, measure: Measure) -> Cells | None:
    """Return the cells of one precision that have a curve, or None without two data types in two block sizes."""
    points = curves.assign(cell=curves.groupby(["data_type", "block_size"], dropna=False).ngroup())
    values = tabulate_curves(points, by="cell")
    if values.empty:
        return None
    sign = 1.0 if measure.higher_is_better else -1.0
    best = (sign * values).max(axis=1)
    loss = (best - (sign * values).T).T.mean()
    by_cell = points.groupby("cell")
    table = by_cell[["family", "kind", "data_type", "block_size"]].first().loc[loss.index]
    table = table.assign(loss=loss, keys=by_cell["key"].agg(" ".join).loc[loss.index])
    if min(table["data_type"].nunique(), table["block_size"].nunique(dropna=False)) < 2:
        return None
    return Cells(table, points.reset_index(drop=True), values.index.to_numpy(dtype=np.float64))


def describe_winner(panel: str, cells: Cells, measure: Measure, results: pd.DataFrame) -> str:
    """Return the best cell of a map with its lead over the next and the lead's interval, or the cells that tie."""
    if find_least(cells.table["loss"]).sum() > 1:
        return f"{panel}: {name_best(cells)}"
    best, second, *_ = cells.table.sort_values("loss", kind="stable").index
    points = cells.points[cells.points["cell"].isin([best, second])].reset_index(drop=True)
    weights = weigh_points(points, cells.budgets, "cell")
    sign = 1.0 if measure.higher_is_better else -1.0
    row = sign * np.mean(weights[best] - weights[second], axis=0)
    low, high = mean_interval(draw_values(points, measure, results), row)
    lead = describe_lead(float(points["value"].to_numpy(dtype=np.float64) @ row), low, high, measure)
    return f"{panel}: {name_best(cells)}, its lead over {name_cell(cells.table.loc[second])} {lead}"


def find_least(losses: pd.Series[float]) -> pd.Series[bool]:
    """Whether each loss is the least, or equal to it."""
    return losses <= losses.min() + TIE


def name_cell(cell: pd.Series[Any]) -> str:
    """Return for example "nf block 64 [4.25]": with its bits per parameter."""
    return f"{name_variant(cell['data_type'], cell['block_size'])} [{cell['bits_per_param']:.2f}]"


def draw_map(axes: Axes, table: pd.DataFrame, shades: ScalarMappable) -> None:
    """Draw one map: darker cells lose more, the best (all that tie) has a frame, those not measured are hatched."""
    names = zip(table["data_type"].astype(str), table["kind"], strict=True)
    ranks = {label: (rank_data_type(kind), rank_label(label)) for label, kind in names}
    kinds = sorted(ranks, key=ranks.__getitem__)
    blocks = sorted(table["block_size"].astype("Int64").fillna(WHOLE).unique())
    grid = np.full((len(kinds), len(blocks)), np.nan)
    axes.set_facecolor("0.97")
    axes.patch.set(hatch="////", edgecolor="0.6")  # what no cell covers shows it
    axes.imshow(grid, aspect="auto")  # sets the limits
    for row, is_best in zip(table.itertuples(), find_least(table["loss"]), strict=True):
        block = WHOLE if is_missing(row.block_size) else int(row.block_size)  # type: ignore[arg-type]
        y, x = kinds.index(str(row.data_type)), blocks.index(block)
        shade = shades.to_rgba(np.array([row.loss]))[0]
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=0.8))
        words = f"{row.loss:.3f}\n[{row.bits_per_param:.2f}]"
        axes.text(x, y, words, ha="center", va="center", fontsize=get_small_size(), color=choose_ink(shade))
        if is_best:
            corner = (x - 0.46, y - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=2.5, zorder=2))
    axes.set_xticks(range(len(blocks)), ["whole" if block == WHOLE else str(block) for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block size")
    axes.grid(visible=False)


def choose_ink(shade: Sequence[float] | Floats) -> str:
    """Return "black" or "white", whichever contrasts more with a colour: at least 4.5 to 1 on any.

    WCAG 2.1 has contrast = (L + 0.05) / (L' + 0.05) for the relative luminances. Black and white are level where
    (L + 0.05)^2 = 1.05 * 0.05.
    """
    rgb = np.asarray(shade, dtype=np.float64)[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def draw_sensitivity(results: pd.DataFrame, page: Page) -> PaperFigure:
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
    for (model, quantizer), group in data.groupby(["model", "quantizer"], sort=False):
        worst = group[group["loss"] >= group["loss"].max() - TIE]
        parts.append(f"{model}: {' and '.join(worst['part'])} ({worst['loss'].iloc[0]:+.3f}, {quantizer})")
    verdict = f"The part that loses most when it alone is quantized is, of {'; '.join(parts)}."
    fig = draw_bars(data, f"{measure.name} lost", page)
    bars = f"Bars: 95% intervals ({'; '.join(sorted(data['source'].unique()))}). All panels have the same axis."
    left = data["left_out"].iloc[0]
    bars += f" Left out: {left} experiments with other quantizers (choose with --where)." if left else ""
    notes = (bars, f"{describe_sample(results, data['key'], measure)} {LIMIT}")
    return PaperFigure("sensitivity", fig, data, SENSITIVITY_CLAIM, verdict, notes, verdict)


def draw_bars(data: pd.DataFrame, label: str, page: Page) -> StyledFigure:
    """Draw a panel for each model: a bar for each part, and those of several quantizers side by side."""
    first = data.drop_duplicates("quantizer")
    known = {
        str(name): style_data_type(str(kind), int(bits), exponent_bits)
        for name, kind, bits, exponent_bits in zip(
            first["quantizer"], first["kind"], first["bits"], first["exponent_bits"], strict=True
        )
    }
    styles = style_series(known, known)
    groups = list(data.groupby("model", sort=False))
    size = get_small_size()
    line = max(1.0, 0.8 * len(styles)) * 1.6 * get_line_height(size)
    needed = sum(line * group["part"].nunique() + 5 * get_line_height(size) for _, group in groups) + 0.5
    if page.height is not None and page.height < 0.75 * needed:
        raise TooSmallPage(f"{len(groups)} panels with {len(data)} bars need a --height of {0.75 * needed:.1f}in")
    width, height = page.width or 6.6, page.height or needed
    sheet = Sheet(CaptionedFigure(width, height), len(groups), 1, width, height / len(groups))
    grid = sheet.fig.body.add_gridspec(
        len(groups), 1, height_ratios=[group["part"].nunique() + 2 for _, group in groups]
    )
    for place, (model, group) in enumerate(groups):
        axes = sheet.fig.body.add_subplot(grid[place], sharex=sheet.fig.axes[0] if place else None)
        draw_parts(axes, group, {name: style.color for name, style in styles.items()})
        sheet.write_title(axes, f"{model}, {first['quantizer'].iloc[0]}" if len(styles) == 1 else str(model))
    sheet.label(label, "")
    if len(styles) > 1:
        handles = [Patch(facecolor=style.color, edgecolor="0.2", label=name) for name, style in styles.items()]
        sheet.fig.body.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 3))
    return sheet.fig


def draw_parts(axes: Axes, rows: pd.DataFrame, colors: dict[str, str]) -> None:
    """Draw the bars of one model, downwards: those of one part side by side."""
    parts = {part: place for place, part in enumerate(dict.fromkeys(rows["part"]))}
    height = 0.8 / len(colors)
    for number, (quantizer, color) in enumerate(colors.items()):
        own = rows[rows["quantizer"] == quantizer]
        error = np.nan_to_num(np.maximum([own["loss"] - own["low"], own["high"] - own["loss"]], 0))
        y = own["part"].map(parts).to_numpy(dtype=np.float64) + (number - (len(colors) - 1) / 2) * height
        looks: dict[str, Any] = {"color": color, "edgecolor": "0.2", "height": height, "error_kw": {"elinewidth": 0.8}}
        axes.barh(y, own["loss"], xerr=error, **looks)
    axes.set_yticks(list(parts.values()), list(parts))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.axvline(0, color="0.3", linewidth=0.8)


def tabulate_sensitivity(results: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return a row per model and part quantized alone, with the one quantizer by which each family has the most.

    Quantizers of other data types that have as many are kept, too. Columns: key, family, model, bits, data_type (the
    label, with settings), block_size, quantizer (its name), kind (the data type alone), exponent_bits, part,
    quantized_parameters, loss, low, high, source, left_out (how many such experiments have other quantizers).
    """
    part = results["exclude"].map(name_part, na_action="ignore")
    rows = results.assign(part=part)[part.notna() | (results["bits"] == BASELINE_BITS)]
    rows = pick_rows(rows, measure.metric, measure.task)
    alone = rows[rows["part"].notna()]
    if alone.empty:
        return pd.DataFrame()
    labels = make_labels(alone.assign(include=None, exclude=None))
    alone = alone.assign(label=labels, block_size=alone["block_size"].astype("Int64"))
    chosen = most_points(alone, QUANTIZER, tied=True).drop_duplicates(["model", "part", "data_type"])
    table = measure_lost(pd.concat([rows[rows["part"].isna()], chosen], ignore_index=True), measure, results)
    if table.empty:
        return pd.DataFrame()
    names = [
        f"{name} {name_block(block)}"
        for name, block in zip(
            name_quantizers(table.assign(include=None, exclude=None)), table["block_size"], strict=True
        )
    ]
    table = table.assign(quantizer=names, kind=table["data_type"])
    table = table[table.groupby(["model", "quantizer"])["part"].transform("size") >= 2]
    columns = ["key", "family", "model", "bits", "label", "block_size", "quantizer", "kind", "exponent_bits", "part"]
    order = table["part"].str.extract(r"(\d+)")[0].astype(float)
    ordered = table.assign(_order=order, loss=table["lost"], left_out=len(alone) - len(chosen))
    ordered = ordered.sort_values(["model", "quantizer", "_order"], kind="stable", ignore_index=True)
    ordered = ordered[[*columns, "quantized_parameters", "loss", "low", "high", "source", "left_out"]]
    return ordered.drop(columns="data_type", errors="ignore").rename(columns={"label": "data_type"})


def name_part(exclude: str) -> str | None:
    """Return the one part that an exclude pattern spares ("layer 3", "dense_h_to_4h"), or None for other patterns."""
    found = LAYERS.search(exclude)
    if found is None:
        return None
    kept = found["kept"].replace("\\.", ".").strip(".^$*")
    return f"layer {kept}" if kept.isdigit() else kept
