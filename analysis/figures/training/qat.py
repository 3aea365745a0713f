"""Quantization-aware training against rounding alone, at equal total bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kbit.analysis.curves.curves import find_cross_entropy, refuse_mixed_evaluations, take_rows
from kbit.analysis.curves.settings import WHOLE, complete_settings, make_labels
from kbit.analysis.curves.trainings import (
    CONTROL,
    GPTQ,
    PTQ,
    QAT,
    QLORA,
    add_diverged,
    describe_seeds,
    name_way,
    read_fields,
)
from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import LineStyle, scale_marker, style_precisions
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.statistics.frontier import weigh_curve
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "Does training for few bits move the optimal precision? At the bits where rounding prefers more bits of fewer "
    "parameters, quantization-aware training may not."
)
WAYS: Final = (PTQ, GPTQ, QLORA, QAT, CONTROL)
USUAL: Final = {"training": None, "method": "rtn", "method_options": ""}  # what ways differ in
COLUMNS: Final = ["family", "model", "way", "label", "bits", "seed", "total_bits", "value", "diverged", "key"]


class Lead(NamedTuple):
    """How much better one precision is than the next lower one, at a budget.

    Attributes:
        family: the models' family.
        lower, upper: the two precisions.
        budget: total bits of the family's largest model at the lower one.
        rounded: nats by which the upper precision is better after rounding alone.
        trained: the same after training for it, for each seed.
        control: the same after as long a training without rounding, for each seed. Empty without such trainings.
    """

    family: str
    lower: int
    upper: int
    budget: float
    rounded: float
    trained: pd.Series[float]
    control: pd.Series[float]

    @property
    def has_control(self) -> bool:
        """Whether a training without rounding shares a seed with those for the precision."""
        return bool((self.control - self.trained).notna().any())

    @property
    def is_moved(self) -> bool:
        """Whether the lead is smaller after training for the precision than after rounding, and than the control's."""
        less = [self.rounded - self.trained, (self.control - self.trained).dropna()]
        return all(describe_seeds(by_seed)[1] > 0 for by_seed in less if len(by_seed))


def draw_qat(results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw cross entropy against total bits, a panel for each way to the rounded weights, a line for each precision.

    Raises:
        MissingResults: no model was both rounded and trained for it, with one quantizer.
    """
    data = tabulate_qat(results)
    if data.empty:
        needs = "models that were rounded, and trained for the same quantizer (train=qat)"
        raise MissingResults(describe_lack("qat", needs, ("nano/qat",)))
    done = data[~data["diverged"]]
    panels = [(family, way) for family in done["family"].unique() for way in WAYS if _has(done, family, way)]
    styles = style_precisions(sorted(done["bits"].unique()))
    sheet = make_sheet(page, len(panels), (3.2, 3.4), 3, styles)
    for axes, (family, way) in zip(sheet.add_axes(len(panels)), panels, strict=True):
        rows = done[(done["family"] == family) & (done["way"] == way)]
        draw_way(axes, rows, styles)
        set_log_axis(axes, done["total_bits"], format_bits)
        low, high = done["value"].min(), done["value"].max()
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        sheet.write_title(axes, f"{family}: {way}")
    sheet.label("total model bits", "cross entropy (nats per token)")
    draw_legend(sheet.fig.body, styles, page)
    return PaperFigure("qat", sheet.fig, data, CLAIM, judge_qat(done), describe_qat(data))


def _has(data: pd.DataFrame, family: str, way: str) -> bool:
    return bool(((data["family"] == family) & (data["way"] == way)).any())


def draw_way(axes: Axes, rows: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Draw a line through the means of each precision's models, bars over seeds, and a dot for each seed."""
    for bits, line in rows.groupby("bits"):
        style = styles[f"{bits}-bit"]
        axes.plot(line["total_bits"], line["value"], ".", color=style.color, markersize=3, alpha=0.6)
        models = line.groupby("total_bits")["value"]
        means = pd.DataFrame([describe_seeds(values) for _, values in models], columns=["mean", "low", "high"])
        error = np.nan_to_num([means["mean"] - means["low"], means["high"] - means["mean"]])
        axes.errorbar(
            sorted(models.groups), means["mean"], yerr=error, color=style.color, marker=style.marker, capsize=2,
            linestyle=style.dashes, markersize=scale_marker(style),
        )  # fmt: skip


def tabulate_qat(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each experiment of a model and a quantizer that were both rounded and trained for.

    The 16-bit rows are the checkpoint in PTQ and GPTQ, and the trained control in QAT. Adapters add their bits.
    A training that diverged has no value.
    """
    measure = find_cross_entropy(results)
    if measure is None or "train_fields" not in results:
        return pd.DataFrame()
    rows = add_diverged(take_rows(results, measure.metric, measure.task), results)
    fields = [read_fields(cell) for cell in rows["train_fields"]]
    ways = pd.Series(list(map(name_way, fields, rows["method"])), rows.index, dtype=object)
    rows = rows.assign(way=ways, seed=[own.get("seed", 0) for own in fields])
    rows = choose_kinds(add_adapters(rows[rows["way"].notna()], results))
    quantized = rows[rows["bits"] != BASELINE_BITS]
    quantized = quantized.assign(label=make_labels(complete_settings(quantized.assign(**USUAL))))
    quantized = quantized.assign(block=quantized["block_size"].fillna(WHOLE).astype("int64"))
    aware = quantized[(quantized["way"] == QAT) & ~quantized["diverged"]]
    if aware.empty:
        return pd.DataFrame()
    label = aware["label"].value_counts().sort_index().idxmax()
    block = aware.loc[aware["label"] == label, "block"].value_counts().sort_index().idxmax()
    quantized = choose_options(quantized[(quantized["label"] == label) & (quantized["block"] == block)])
    quantized = quantized[quantized["model"].isin(aware["model"])]
    base = rows[(rows["bits"] == BASELINE_BITS) & rows["model"].isin(aware["model"])].assign(label=None)
    copies = [base[base["way"] == way].assign(way=other) for way, other in ((CONTROL, QAT), (PTQ, GPTQ))]
    table = pd.concat([quantized, base, *copies], ignore_index=True)
    table = table[table["way"].isin(quantized["way"])]
    refuse_mixed_evaluations(table[table["value"].notna()])
    table = table[~table.duplicated(["model", "way", "bits", "seed"])]
    return table.sort_values(["family", "way", "bits", "total_bits", "seed"], ignore_index=True)[COLUMNS]


def choose_kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one kind of training for each way, the most frequent one. The control's is that of QAT."""
    own = ({name: value for name, value in read_fields(cell).items() if name not in ("seed", "weights")}
           for cell in rows["train_fields"])  # fmt: skip
    kinds = pd.Series([json.dumps(fields, sort_keys=True) for fields in own], rows.index, dtype=object)
    chosen = pd.Series(True, rows.index)
    for way, others in ((QAT, (QAT, CONTROL)), (QLORA, (QLORA,))):
        if (found := kinds[rows["way"] == way]).size:
            usual = found.value_counts().sort_index().idxmax()
            chosen &= ~rows["way"].isin(others) | (kinds == usual)
    return rows[chosen]


def choose_options(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with GPTQ's most frequent options only."""
    if "method_options" not in rows or not (rows["way"] == GPTQ).any():
        return rows
    options = rows["method_options"].fillna("")
    usual = options[rows["way"] == GPTQ].value_counts().sort_index().idxmax()
    return rows[(rows["way"] != GPTQ) | (options == usual)]


def add_adapters(rows: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Return rows with the bits of adapters in their total bits."""
    found = results[(results["task"] == "training") & (results["metric"] == "adapter_bits")]
    bits = rows["key"].map(found.drop_duplicates("key").set_index("key")["value"]).fillna(0)
    return rows.assign(total_bits=rows["total_bits"] + bits.astype("int64"))


def list_leads(data: pd.DataFrame) -> Iterator[Lead]:
    """Yield the lead of each precision over the next lower one, at the bits of each family's largest model."""
    for family, rows in data[data["bits"] != BASELINE_BITS].groupby("family"):
        rounded, trained, control = (rows[rows["way"] == way] for way in (PTQ, QAT, CONTROL))
        for lower, upper in pairwise(sorted(set(trained["bits"]) & set(rounded["bits"]))):
            budget = float(trained.loc[trained["bits"] == lower, "total_bits"].max())
            before = subtract(rounded, lower, upper, budget)
            after, plain = (subtract_seeds(own, lower, upper, budget) for own in (trained, control))
            if np.isfinite(before) and len(after):
                yield Lead(str(family), int(lower), int(upper), budget, before, after, plain)


def subtract_seeds(rows: pd.DataFrame, lower: int, upper: int, budget: float) -> pd.Series[float]:
    """Return subtract of each seed for which it is known."""
    found = {seed: subtract(own, lower, upper, budget) for seed, own in rows.groupby("seed")}
    return pd.Series(found, dtype=np.float64).dropna()


def subtract(rows: pd.DataFrame, lower: int, upper: int, budget: float) -> float:
    """Return the loss at the lower precision minus that at the upper one, both at a budget. NaN beyond the models."""
    losses = []
    for bits in (lower, upper):
        curve = rows[rows["bits"] == bits].sort_values("total_bits")
        if curve.empty:
            return float("nan")
        weights = weigh_curve(curve["total_bits"].to_numpy(dtype=np.float64), np.array([budget]))
        losses.append(float((weights @ curve["value"].to_numpy(dtype=np.float64))[0]))
    return losses[0] - losses[1]


def judge_qat(data: pd.DataFrame) -> str:
    """Say how the lead of each precision over the next lower one changes, with intervals over seeds."""
    leads = list(list_leads(data))
    if not leads:
        return f"There are too few models to compare precisions at equal bits. {describe_recovery(data)}"
    moved = [lead for lead in leads if lead.is_moved]
    flipped = [lead for lead in moved if lead.rounded > 0 and describe_seeds(lead.trained)[2] < 0]
    if flipped:
        head = "Training moves the optimal precision: fewer bits become better at equal bits"
    elif moved:
        ahead = [lead for lead in leads if lead.rounded > 0]
        stays = bool(ahead) and all(describe_seeds(lead.trained)[1] > 0 for lead in ahead)
        optimum = "the optimal one stays" if stays else "seeds do not tell which is best now"
        head = f"Training moves precisions together, and {optimum}: more bits lead by less at equal bits"
    else:
        head = "These trainings do not show that the optimal precision moves"
    if moved and not any(lead.has_control for lead in moved):
        head = f"Beside rounding alone, without a control that trained as long: {head[0].lower()}{head[1:]}"
    return ". ".join([head, *map(describe_lead, leads), describe_recovery(data)])


def describe_lead(lead: Lead) -> str:
    """Say one lead in words: after rounding, after training, by how much it shrank, and the control's."""
    trained, shrunk = describe_seeds(lead.trained), describe_seeds(lead.rounded - lead.trained)
    control = f". Trained, then rounded, they lead by {show(describe_seeds(lead.control))}" if len(lead.control) else ""
    return (
        f"{lead.family} at {format_bits(lead.budget)}: {lead.upper} bits lead {lead.lower} by {lead.rounded:+.3f} nats "
        f"when rounded, and by {show(trained)} when trained for it, which is {show(shrunk)} less{control}"
    )


def show(described: tuple[float, float, float]) -> str:
    """Return a mean with its interval, as +0.012 (-0.003 to +0.027)."""
    mean, low, high = described
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if np.isfinite(low) else f"{mean:+.3f} (one seed)"


def describe_recovery(data: pd.DataFrame) -> str:
    """Say which share of what rounding loses each way wins back, as a mean over models.

        1 - (loss - own loss at 16 bits) / (rounded - checkpoint)

    A training changes the 16-bit model, too. Its own loss at 16 bits is that of the trained control.
    """
    values = data.groupby(["model", "way", "bits"])["value"].mean().to_dict()
    parts = []
    for bits in sorted(set(data["bits"]) - {BASELINE_BITS}):
        shares: dict[str, list[float]] = {way: [] for way in WAYS if way != PTQ}
        for model in data["model"].unique():
            whole, rounded = (values.get((model, PTQ, k), np.nan) for k in (BASELINE_BITS, bits))
            for way, own in shares.items():
                base, reached = (values.get((model, way, k), np.nan) for k in (BASELINE_BITS, bits))
                if rounded > whole and np.isfinite(reached - base):  # NaN is larger than nothing
                    own.append(1 - (reached - base) / (rounded - whole))
        named = ", ".join(f"{way} {np.mean(own):.0%}" for way, own in shares.items() if own)
        parts += [f"at {bits} bits {named}"] if named else []
    if not parts:
        return "No model shows what rounding loses and what is won back: this needs 16 bits, rounded and trained."
    return f"Won back of what rounding loses: {'; '.join(parts)}."


def describe_qat(data: pd.DataFrame) -> tuple[str, ...]:
    """Return the notes: what is drawn, and how much it rests on."""
    aware = data[(data["way"] == QAT) & (data["bits"] != BASELINE_BITS)]
    seeds = int(aware[~aware["diverged"]].groupby(["model", "bits"])["seed"].nunique().min())
    lost = int(data.drop_duplicates("key")["diverged"].sum())
    diverged = f" {count_things(lost, 'experiment')} more diverged in training." if lost else ""
    experiments = count_things(data.loc[~data["diverged"], "key"].nunique(), "experiment")
    models = count_things(data["model"].nunique(), "model")
    return (
        "Lines are means over seeds, dots are seeds, bars are Student's 95% intervals over seeds. The 16-bit line "
        "beside trained models is the control, which was trained as long at the same learning rate.",
        "Of trainings that differ in more than seed and precision the most frequent kind is drawn, and of "
        "GPTQ the most frequent options.",
        f"Data: {experiments} on {models}, {count_things(seeds, 'seed')} of each training at least.{diverged} Between "
        "models a line is linear in log bits.",
    )
