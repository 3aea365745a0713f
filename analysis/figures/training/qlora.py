"""Adapters beside a quantized base: what each data type of the base costs (QLoRA, Table 4)."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import find_cross_entropy, pick_rows
from kbit.analysis.curves.published import read_published
from kbit.analysis.curves.settings import complete_settings, name_quantizers
from kbit.analysis.curves.trainings import describe_seeds, read_fields
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.figures.tables import finish_table
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "Adapters trained beside a 4-bit base reach what they reach beside a 16-bit one with NF4 and double quantization, "
    "and not with FP4 (QLoRA, Table 4: mean MMLU 53.1, 52.2 and 53.0)."
)
UNSEEN: Final = "training/unseen"  # the rest of the text that adapters were trained on
COLUMNS: Final = ["model", "base", "bits_per_param", "seed", "before", "after", "unseen", "key"]


def draw_qlora(results: pd.DataFrame) -> PaperFigure:
    """Show the loss before and after training adapters for each base, beside the published accuracies.

    Raises:
        MissingResults: no model has adapters beside a quantized base and beside the 16-bit one.
    """
    data = tabulate_qlora(results)
    if data.empty:
        needs = "adapters trained beside a quantized base and beside the 16-bit one (train=qlora)"
        raise MissingResults(describe_lack("qlora", needs, ("nano/qlora", "paper/qlora_table_4")))
    summary = summarize(data)
    shown = pd.DataFrame(
        {
            "model": summary["model"],
            "base": summary["base"],
            "bits per parameter": summary["bits_per_param"].map("{:.3f}".format),
            "before": summary["before"].map("{:.4f}".format).replace("nan", "-"),
            "after": summary["after"].map("{:.4f}".format),
            "after - 16 bits (95%)": [show(*row) for row in summary[["mean", "low", "high"]].itertuples(index=False)],
            "its own text": summary["unseen"].map("{:.4f}".format).replace("nan", "-"),
            "MMLU (paper)": summary["mmlu"].map("{:.1f}".format).replace("nan", "-"),
        }
    )
    seeds = data.groupby(["model", "base"])["seed"].nunique().min()
    experiments = count_things(data["key"].nunique(), "experiment")
    models = count_things(data["model"].nunique(), "model")
    sample = (
        f"Data: {experiments} on {models}. Differences are paired by seed ({int(seeds)} at least), with "
        "Student's 95% intervals over seeds. Before: the quantized base without adapters. Its own text: what was "
        "held back of the adapters' text."
    )
    return finish_table("qlora", data, shown, "Adapters beside a quantized base", CLAIM, judge_qlora(summary), sample)


def tabulate_qlora(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each model, base and seed of one kind of training, the most frequent one.

    Models without adapters beside the 16-bit base are left out.
    """
    measure = find_cross_entropy(results)
    if measure is None or "train_fields" not in results:
        return pd.DataFrame()
    rows = pick_rows(results, measure.metric, measure.task)
    fields = [read_fields(cell) for cell in rows["train_fields"]]
    rows = rows.assign(seed=[own.get("seed", 0) for own in fields], has_adapters=["lora" in own for own in fields])
    rows = rows.assign(base=name_bases(rows))
    tuned = rows[rows["has_adapters"]]
    if tuned.empty:
        return pd.DataFrame()
    tuned = tuned[tuned["training"] == tuned["training"].value_counts().sort_index().idxmax()]
    tuned = tuned[tuned["model"].isin(tuned.loc[tuned["bits"] == BASELINE_BITS, "model"])]
    if (tuned["bits"] == BASELINE_BITS).all():
        return pd.DataFrame()
    plain = rows[rows["training"].isna()].drop_duplicates(["model", "base"]).set_index(["model", "base"])["value"]
    own = results[(results["task"] == UNSEEN) & (results["metric"] == "cross_entropy")].set_index("key")["value"]
    pairs = zip(tuned["model"], tuned["base"], strict=True)
    table = tuned.assign(after=tuned["value"], before=[plain.get(pair, np.nan) for pair in pairs])
    table = table.assign(unseen=table["key"].map(own.to_dict()))
    return table.sort_values(["parameters", "model", "bits_per_param", "base", "seed"], ignore_index=True)[COLUMNS]


def name_bases(rows: pd.DataFrame) -> pd.Series[str]:
    """Return the name of each row's quantizer at its bits, with the settings that are not usual."""
    quantized = complete_settings(rows[rows["bits"] != BASELINE_BITS].assign(training=None))
    names = pd.Series(name_quantizers(quantized), quantized.index, dtype=object)
    return names.reindex(rows.index, fill_value="16-bit")


def summarize(data: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model and base: means over seeds, and the difference to the 16-bit base, paired by seed."""
    published = read_published("qlora").set_index("base")["mmlu"]
    rows = []
    for (model, base), own in data.groupby(["model", "base"], sort=False):
        whole = data[(data["model"] == model) & (data["base"] == "16-bit")].set_index("seed")["after"]
        gaps = (own.set_index("seed")["after"] - whole).dropna()
        mean, low, high = (0.0, np.nan, np.nan) if base == "16-bit" else describe_seeds(gaps)
        about = own[["bits_per_param", "before", "after", "unseen"]].mean().to_dict()
        about |= {"mean": mean, "low": low, "high": high, "mmlu": published.get(str(base), np.nan)}
        rows.append({"model": model, "base": base} | about)
    return pd.DataFrame(rows).sort_values(["model", "after"], ignore_index=True)


def show(mean: float, low: float, high: float) -> str:
    """Return a difference with its interval."""
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})" if np.isfinite(low) else f"{mean:+.4f}"


def judge_qlora(summary: pd.DataFrame) -> str:
    """Say which bases cost adapters a measurable loss, and which share of the base's loss they win back."""
    quantized = summary[summary["base"] != "16-bit"]
    worse, level = quantized[quantized["low"] > 0], quantized[~(quantized["low"] > 0)]
    parts = []
    if len(worse):
        parts.append(f"Beside {', '.join(dict.fromkeys(worse['base']))} adapters end above those beside 16 bits")
    if len(level):
        parts.append(f"Beside {', '.join(dict.fromkeys(level['base']))} no difference is shown")
    whole = summary[summary["base"] == "16-bit"].set_index("model")
    lost = quantized["before"].to_numpy() - whole["before"].reindex(quantized["model"]).to_numpy()
    left = quantized["mean"].to_numpy()
    known = np.isfinite(lost) & (lost > 0)
    if known.any():
        parts.append(f"On average they win back {np.mean(1 - left[known] / lost[known]):.0%} of what rounding loses")
    return ". ".join(parts) + "."
