"""Adapters beside a quantized base: what each data type of the base costs (QLoRA, Table 4)."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import find_cross_entropy, refuse_mixed_evaluations, take_rows
from kbit.analysis.curves.published import read_published
from kbit.analysis.curves.trainings import add_diverged, describe_seeds, name_bases, read_fields
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.figures.tables import finish_table
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "Adapters trained beside a 4-bit base reach what they reach beside a 16-bit one with NF4 and double quantization, "
    "and not with FP4 (QLoRA, Table 4: mean MMLU 53.1, 52.2 and 53.0)."
)
UNSEEN: Final = "training/unseen"  # the rest of the text that adapters were trained on
COLUMNS: Final = ["model", "base", "bits_per_param", "seed", "before", "after", "unseen", "diverged", "key"]


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
    seeds = data[~data["diverged"]].groupby(["model", "base"])["seed"].nunique().min()
    experiments = count_things(data.loc[~data["diverged"], "key"].nunique(), "experiment")
    models = count_things(data["model"].nunique(), "model")
    sample = (
        f"Data: {experiments} on {models}. Differences are paired by seed ({int(seeds)} at least), with "
        "Student's 95% intervals over seeds. Before: the quantized base without adapters. Its own text: what was "
        f"held back of the adapters' text.{describe_diverged(data)}"
    )
    return finish_table("qlora", data, shown, "Adapters beside a quantized base", CLAIM, judge_qlora(summary), sample)


def tabulate_qlora(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each model, base and seed of one kind of training, the most frequent one.

    Experiments that differ in what they measure share a training. Models without adapters beside the 16-bit base are
    left out.
    """
    measure = find_cross_entropy(results)
    if measure is None or "train_fields" not in results:
        return pd.DataFrame()
    rows = add_diverged(take_rows(results, measure.metric, measure.task), results)
    fields = [read_fields(cell) for cell in rows["train_fields"]]
    rows = rows.assign(seed=[own.get("seed", 0) for own in fields], has_adapters=["lora" in own for own in fields])
    rows = rows.assign(base=name_bases(rows))
    tuned = rows[rows["has_adapters"]]
    if tuned.empty:
        return pd.DataFrame()
    tuned = tuned[tuned["training"] == tuned["training"].value_counts().sort_index().idxmax()]
    tuned = tuned[tuned["model"].isin(tuned.loc[(tuned["bits"] == BASELINE_BITS) & ~tuned["diverged"], "model"])]
    plain = rows[rows["training"].isna() & rows["model"].isin(tuned["model"]) & rows["base"].isin(tuned["base"])]
    refuse_mixed_evaluations(pd.concat([tuned[tuned["value"].notna()], plain]))
    tuned = tuned.drop_duplicates(["model", "base", "seed"])
    if (tuned["bits"] == BASELINE_BITS).all():
        return pd.DataFrame()
    before = plain.drop_duplicates(["model", "base"]).set_index(["model", "base"])["value"]
    own = results[(results["task"] == UNSEEN) & (results["metric"] == "cross_entropy")].set_index("key")["value"]
    pairs = zip(tuned["model"], tuned["base"], strict=True)
    table = tuned.assign(after=tuned["value"], before=[before.get(pair, np.nan) for pair in pairs])
    table = table.assign(unseen=table["key"].map(own.to_dict()))
    return table.sort_values(["parameters", "model", "bits_per_param", "base", "seed"], ignore_index=True)[COLUMNS]


def summarize(data: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model and base: means over seeds, and the difference to the 16-bit base, paired by seed.

    Trainings that diverged are left out.
    """
    data = data[~data["diverged"]]
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
    """Say how the loss beside each base differs from that beside 16 bits, and which share of the base's is won back."""
    quantized = summary[summary["base"] != "16-bit"]
    low, high = quantized["low"], quantized["high"]
    kinds = (
        (low > 0, "adapters end above those beside 16 bits"),
        (high < 0, "adapters end below those beside 16 bits"),
        ((low <= 0) & (high >= 0), "no difference is shown"),
        (low.isna(), "there is one seed, which shows no difference or likeness"),
    )
    parts = []
    for holds, words in kinds:
        if holds.any():
            parts.append(f"Beside {', '.join(_name_each(quantized[holds], summary['model'].nunique()))} {words}")
    whole = summary[summary["base"] == "16-bit"].set_index("model")
    lost = quantized["before"].to_numpy() - whole["before"].reindex(quantized["model"]).to_numpy()
    left = quantized["mean"].to_numpy()
    known = np.isfinite(lost) & (lost > 0) & np.isfinite(left)
    if known.any():
        parts.append(f"On average they win back {np.mean(1 - left[known] / lost[known]):.0%} of what rounding loses")
    return ". ".join(parts) + "."


def _name_each(rows: pd.DataFrame, models: int) -> list[str]:
    """Return the bases of rows, with their models if there are several."""
    return list(rows["base"]) if models == 1 else [f"{row.base} ({row.model})" for row in rows.itertuples()]


def describe_diverged(data: pd.DataFrame) -> str:
    """Say how many trainings of each base diverged, or nothing if none did."""
    parts = [
        f"{base} {int(own['diverged'].sum())} of {len(own)}"
        for base, own in data.groupby("base", sort=False)
        if own["diverged"].any()
    ]
    return f" Trainings that diverged, and are left out: {', '.join(parts)}." if parts else ""
