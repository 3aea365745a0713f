"""Which parts of an 8-bit optimizer are needed: dynamic codes, blocks, stable embedding (8-bit Optimizers, Table 3)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.optimizers import EXACT, keep_usual, name_states, tabulate_trainings
from kbit.analysis.curves.published import read_published
from kbit.analysis.curves.trainings import describe_seeds
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, count_things, describe_lack
from kbit.analysis.figures.tables import finish_table

CLAIM: Final = (
    "8-bit Adam needs dynamic codes, blocks and the stable embedding together: with evenly spaced codes 90% of the "
    "trainings are unstable (8-bit Optimizers, Table 3)."
)
COLUMNS: Final = ["model", "states", "block", "stable", "seed", "diverged", "value", "key"]
GROUP: Final = ["model", "states", "block", "stable"]
WHOLE: Final = "whole"


def draw_optimizer_ablation(results: pd.DataFrame) -> PaperFigure:
    """Show the share of unstable trainings and the loss for each kind of states, beside the published ones.

    Raises:
        MissingResults: no model was trained with 8-bit and with 32-bit states.
    """
    data = tabulate_ablation(results)
    if data.empty:
        needs = "models trained with 8-bit and with 32-bit states"
        raise MissingResults(describe_lack("optimizer_ablation", needs, ("nano/optimizer_ablation",)))
    summary = summarize(data)
    shown = pd.DataFrame(
        {
            "model": summary["model"],
            "states": summary["states"],
            "block": summary["block"],
            "stable embedding": summary["stable"].map({True: "yes", False: "no"}),
            "unstable": [f"{share:.0%} of {n}" for share, n in summary[["unstable", "seeds"]].itertuples(index=False)],
            "loss": summary["loss"].map("{:.4f}".format).replace("nan", "-"),
            "loss - 32-bit (95%)": [_show(*row) for row in summary[["mean", "low", "high"]].itertuples(index=False)],
            "paper: unstable": summary["paper_unstable"].map("{:.0f}%".format).replace("nan%", "-"),
            "paper: loss - 32-bit": summary["paper_loss"].map("{:+.3f}".format).replace("+nan", "-"),
        }
    )
    trainings = count_things(data["key"].nunique(), "training")
    sample = (
        f"Data: {trainings}, {int(summary['seeds'].min())} seeds at least. Losses are of the trainings that ended. "
        "Differences to 32-bit states, without stable embedding, are paired by seed, with Student's 95% intervals over "
        "seeds. The paper's are of a model of 209M parameters, as logarithms of its perplexities."
    )
    title = "8-bit optimizer states, part by part"
    return finish_table("optimizer_ablation", data, shown, title, CLAIM, judge_ablation(summary), sample)


def tabulate_ablation(results: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS, a row for each training with 32-bit states, or with 8-bit ones of one data type and block."""
    trainings = tabulate_trainings(results)
    if trainings.empty:
        return trainings
    states = zip(trainings["momentum"], trainings["variance"], strict=True)
    is_shown = [(m is None) == (v is None) and (m is None or m.bits == 8) for m, v in states]
    trainings = keep_usual(trainings[is_shown])
    pairs = list(zip(trainings["momentum"], trainings["variance"], strict=True))
    table = trainings.assign(
        states=pd.Series([name_states(m, v) for m, v in pairs], trainings.index, dtype=object),
        block=["" if m is None else m.block_size or WHOLE for m, _ in pairs],
    )
    table = table[table["states"].notna()]
    both = table.groupby("model")["states"].agg(lambda own: EXACT in set(own) and own.nunique() > 1)
    table = table[table["model"].map(both).astype(bool)]
    order = table["block"].astype(str).map({"": 0, WHOLE: 1}).fillna(2)
    return table.assign(order=order).sort_values(
        ["parameters", "model", "stable", "states", "order", "seed"], ignore_index=True
    )[COLUMNS]  # fmt: skip


def summarize(data: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model, states, block and embedding: shares, means, and differences to 32-bit states."""
    published, rows = read_published("optimizer_ablation"), []
    plain = published.loc[published["states"] == EXACT, "perplexity"].iloc[0]
    for group, own in data.groupby(GROUP, sort=False):
        about: dict[str, Any] = dict(zip(GROUP, group, strict=True))
        base = data[(data["model"] == about["model"]) & (data["states"] == EXACT) & ~data["stable"]]
        gaps = (own.set_index("seed")["value"] - base.set_index("seed")["value"]).dropna()
        is_base = about["states"] == EXACT and not about["stable"]
        mean, low, high = (np.nan, np.nan, np.nan) if is_base or gaps.empty else describe_seeds(gaps)
        about |= {"seeds": len(own), "unstable": own["diverged"].mean(), "loss": own["value"].mean()}
        about |= {"mean": mean, "low": low, "high": high}
        about |= _find_published(published, about, float(plain))
        rows.append(about)
    return pd.DataFrame(rows)


def _find_published(published: pd.DataFrame, about: dict[str, Any], plain: float) -> dict[str, float]:
    """Return the paper's numbers for these states, whose tables all have a 0. Any block is a block there."""
    is_blockwise = about["block"] not in ("", WHOLE)
    same = (published["states"] == about["states"]) & (published["stable"] == about["stable"])
    found = published[same & (published["blocks"] == is_blockwise)]
    if found.empty:
        return {"paper_unstable": np.nan, "paper_loss": np.nan}
    row = found.iloc[0]
    return {"paper_unstable": float(row["unstable"]), "paper_loss": float(np.log(row["perplexity"] / plain))}


def _show(mean: float, low: float, high: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})" if np.isfinite(low) else f"{mean:+.4f} (one seed)"


def judge_ablation(summary: pd.DataFrame) -> str:
    """Say which states are unstable, and what the best 8-bit ones and the stable embedding are worth."""
    sentences = []
    quantized = summary[summary["states"] != EXACT].assign(lost=summary["unstable"] * summary["seeds"])
    counts = quantized.groupby("states")[["lost", "seeds"]].sum()
    for states, (lost, seeds) in counts.sort_values("lost", ascending=False, kind="stable").iterrows():
        sentences.append(f"{states}: {lost:.0f} of {seeds:.0f} trainings are unstable")
    blocks = summary[(summary["block"] != WHOLE) & summary["mean"].notna() & ~summary["stable"]]
    for row in blocks[blocks["unstable"] == 0].to_dict("records"):
        sentences.append(f"{row['states']} in blocks ends {_show(row['mean'], row['low'], row['high'])} from 32 bits")
    stable = summary[summary["stable"] & (summary["states"] == EXACT) & summary["mean"].notna()]
    for row in stable.to_dict("records"):
        sentences.append(f"The stable embedding changes 32 bits by {_show(row['mean'], row['low'], row['high'])}")
    return ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."
