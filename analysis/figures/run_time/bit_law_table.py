"""Laws of what is rounded: the bits of weights, inputs and cache, and the share of the weights, compared on a store."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.run_time import BITS, is_rounded, name_weights
from kbit.analysis.curves.settings import make_labels
from kbit.analysis.figures.drawing import (
    LIMIT_OF_MODELS,
    MissingResults,
    PaperFigure,
    describe_lack,
    describe_sample,
    draw_table,
)
from kbit.analysis.figures.run_time.lost import tabulate_lost
from kbit.analysis.statistics.bit_laws import check_largest, fit_bits, list_parameters
from kbit.analysis.statistics.laws import Fit, HeldOut, TooFewPoints, check_held_out, fit_law
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "Do the bits of weights, inputs and cache act as effective parameters do, each one's more where others are few, or "
    "do their losses add up?"
)
LAWS: Final = ("effective added", "separate")
MIXED: Final = "mixed"  # laws.LAWS
THINGS: Final = ("weight_bits", *BITS)
DRAWS: Final = 200
FLOOR: Final = 0.1  # of a point's value, see collect_points
COLUMNS: Final = [
    *(
        "family",
        "law",
        "things",
        "points",
        "r2",
        "rmse",
        "relative",
        "held_out",
        "held_out_rmse",
        "inside",
        "naive_rmse",
    ),
    *("parameters", "keys", "reason"),
]
_SHOWN: Final = {"weight_bits": "weights", "activation_bits": "inputs", "cache_bits": "cache"}


def draw_bit_laws(results: pd.DataFrame) -> PaperFigure:
    """Compare the two laws, a row for each family and law.

    Raises:
        MissingResults: no family has enough points for either law.
    """
    lost, measure = tabulate_lost(results)
    data = compare_laws(lost) if len(lost) else pd.DataFrame(columns=COLUMNS)
    if measure is None or data["rmse"].isna().all():
        needs = (
            "cross entropy with inputs or a cache of several bits, or with several shares of the weights quantized, "
        )
        needs += "for several sizes of one family, and at 16 bits"
        raise MissingResults(describe_lack("bit_laws", needs, ("nano/activations", "nano/kv_cache", "nano/shares")))
    fitted = data[data["rmse"].notna()]
    shown = write_table(fitted)
    fig = draw_table(shown, "Laws of what rounding adds to the cross entropy")
    note = (
        "effective added: A N^-a (prod f^-a - prod f(16)^-a) with f = 1 - exp(-k / g) for the bits k of each thing "
        "(Kumar et al. 2024). separate: the sum of C N^-b exp(-k / g) over what is rounded. mixed: C N^-b Q^q "
        "(log2 G)^c of the share Q of all parameters that is quantized, in blocks of G (after arXiv 2410.06722). A "
        f"point counts with its standard error, but with {FLOOR:.0%} of its value at least. typical error: the median "
        "of |residual| / value. naive: as the next smaller model. Rotated models are left out."
    )
    reasons = dict.fromkeys(data.loc[data["rmse"].isna(), "reason"])
    left = f"Not fitted: {'; '.join(map(str, reasons))}." if reasons else ""
    sample = describe_sample(results, fitted["keys"], measure)
    notes = tuple(line for line in (note, left, f"{sample} {LIMIT_OF_MODELS}") if line)
    return PaperFigure("bit_laws", fig, data, CLAIM, judge(fitted), notes, table=shown)


def write_table(fitted: pd.DataFrame) -> pd.DataFrame:
    """Return the table that is drawn, in words."""
    return pd.DataFrame(
        {
            "family": fitted["family"],
            "law": fitted["law"],
            "of": fitted["things"],
            "points": fitted["points"].astype(int).astype(str),
            "R2": fitted["r2"].astype(float).map("{:.3f}".format),
            "RMSE (nats)": fitted["rmse"].astype(float).map("{:.4f}".format),
            "typical error": fitted["relative"].astype(float).map("{:.0%}".format),
            "largest model": fitted["held_out"].astype(object).fillna("-"),
            "RMSE there": fitted["held_out_rmse"].astype(float).map("{:.4f}".format).replace("nan", "-"),
            "naive": fitted["naive_rmse"].astype(float).map("{:.4f}".format).replace("nan", "-"),
            "parameters (95% intervals)": fitted["parameters"],
        }
    )


def collect_points(lost: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return one family's points for both laws, and the columns of bits that vary in them.

    The points have the quantizers of weights, of inputs and of the cache that were measured most, and no rotation. y is
    what rounding adds, and error its standard error, with FLOOR of the value at least: laws are not exact, and else the
    points that add nearly nothing would decide alone.

    Args:
        lost: the family's rows of tabulate_lost.
    """
    plain = lost[lost["rotation"].isna()] if "rotation" in lost else lost
    plain = plain.assign(weights=name_weights(plain))
    for name in ("include", "exclude", "rules", "allocation"):
        plain = plain[plain[name].isna()] if name in plain else plain
    for thing, column in (("weight_bits", "weights"), ("activation_bits", "activations"), ("cache_bits", "kv_cache")):
        rounded = plain[thing] < BASELINE_BITS
        if rounded.any():
            most = plain.loc[rounded, column].value_counts(sort=False).sort_index().idxmax()
            plain = plain[~rounded | (plain[column] == most)]
    points = plain.drop_duplicates(["model", *THINGS]).reset_index(drop=True)
    things = [name for name in THINGS if points.loc[points[name] < BASELINE_BITS, name].nunique() > 1]
    alone = [name for name in THINGS if name not in things]
    return add_errors(points[(points[alone] == BASELINE_BITS).all(axis=1)]), things


def collect_shares(lost: pd.DataFrame) -> pd.DataFrame:
    """Return one family's points for the law of the share of the weights, with columns share and block_size.

    They have the data type, its settings and the bits that were measured with the most excludes. There are none where a
    family has fewer than two shares in a model, or fewer than two block sizes.

    Args:
        lost: the family's rows of tabulate_lost.
    """
    weights = lost[(lost["weight_bits"] < BASELINE_BITS) & ~is_rounded(lost) & lost["block_size"].notna()]
    chosen = [name for name in ("include", "exclude") if name in weights]
    labels = make_labels(weights.assign(bits=weights["weight_bits"]).drop(columns=chosen))
    names = labels + " " + weights["weight_bits"].astype(str)
    partial = weights[chosen].notna().any(axis=1)
    if not partial.any():
        return pd.DataFrame()
    most = names[partial].value_counts(sort=False).sort_index().idxmax()
    points = weights.assign(share=weights["quantized_parameters"] / weights["parameters"])[names == most]
    points = points.drop_duplicates(["model", "share", "block_size", *chosen])
    if points.groupby("model")["share"].nunique().max() < 2 or points["block_size"].nunique() < 2:
        return pd.DataFrame()
    return add_errors(points.assign(bits=points["weight_bits"]))


def add_errors(points: pd.DataFrame) -> pd.DataFrame:
    """Return points with y, what rounding adds, and its error, see collect_points."""
    value = points["lost"].astype(float)
    error = np.maximum(points["error"].astype(float), FLOOR * value.abs())
    return points.assign(y=value, error=error).reset_index(drop=True)


def compare_laws(lost: pd.DataFrame) -> pd.DataFrame:
    """Return COLUMNS: a row for each family and law, with the reason where a law could not be fitted."""
    rows: list[dict[str, Any]] = []
    for family, of_family in lost.groupby("family", sort=True):
        points, things = collect_points(of_family)
        shares = collect_shares(of_family)
        fits: list[tuple[str, str, pd.DataFrame]] = []
        if set(things) & set(BITS):
            fits += [(law, ", ".join(_SHOWN[name] for name in things), points) for law in LAWS]
        fits += [(MIXED, "share, block size", shares)] if len(shares) else []
        for law, words, chosen in fits:
            row: dict[str, Any] = {"family": family, "law": law, "things": words}
            try:
                rows.append(row | describe_fit(law, chosen, things) | {"keys": " ".join(chosen["key"])})
            except TooFewPoints as error:
                rows.append(row | {"reason": f"{family}: {error}"})
    return pd.DataFrame(rows, columns=COLUMNS)


def describe_fit(law: str, points: pd.DataFrame, things: list[str]) -> dict[str, Any]:
    """Return the columns of compare_laws for one fit.

    Raises:
        TooFewPoints: see kbit.analysis.statistics.laws.fit_terms.
    """
    fit = fit_law(law, points, draws=DRAWS) if law == MIXED else fit_bits(law, points, things, draws=DRAWS)
    relative = float(np.median(np.abs(fit.residuals) / points["y"].abs().clip(lower=1e-12)))
    row: dict[str, Any] = {"points": len(points), "r2": fit.r2, "rmse": fit.rmse, "relative": relative}
    row["parameters"] = describe_parameters(fit)
    try:
        check = check_law(law, points, things)
    except TooFewPoints:
        return row
    held = {"held_out": check.model, "held_out_rmse": check.rmse, "inside": check.inside, "naive_rmse": check.naive}
    return row | held


def check_law(law: str, points: pd.DataFrame, things: list[str]) -> HeldOut:
    """Return how well a law predicts the largest model. For "mixed" no smaller one has quite the same share.

    Raises:
        TooFewPoints: see kbit.analysis.statistics.laws.fit_terms.
    """
    if law == MIXED:
        return check_held_out(law, points, draws=DRAWS)
    return check_largest(law, points, things, draws=DRAWS)


def describe_parameters(fit: Fit) -> str:
    """Return the parameters with their 95% intervals."""
    words = []
    for row in list_parameters(fit).itertuples():
        name = str(row.name)
        for column, shown in _SHOWN.items():
            name = name.replace(column, shown)
        words.append(f"{name} {row.value:.3g} ({row.low:.3g} to {row.high:.3g})")
    return "; ".join(words)


def judge(fitted: pd.DataFrame) -> str:
    """Say which law leaves the smaller errors, without a verdict for want of intervals."""
    wide = fitted.pivot(index="family", columns="law", values="relative").reindex(columns=[*LAWS, MIXED])
    mixed, wide = wide[MIXED].dropna(), wide[list(LAWS)].dropna()
    shares = f" The law of shares misses by {mixed.mean():.0%} typically." if len(mixed) else ""
    if wide.empty:
        return f"Not tested: no family has both laws of bits.{shares}"
    closer = int((wide[LAWS[0]] < wide[LAWS[1]]).sum())
    means = (f"{wide[law].mean():.0%}" for law in LAWS)
    richer = ", separate losses with more parameters" if fitted["things"].str.contains(",").any() else ""
    return (
        f"Effective parameters leave smaller typical errors than separate losses in {closer} of {len(wide)} families "
        f"({' against '.join(means)} on average), of points that both were fitted to{richer}."
        f"{judge_unseen(fitted)}{shares}"
    )


def judge_unseen(fitted: pd.DataFrame) -> str:
    """Say how far both laws of bits are off on the largest models, which they were not fitted to. Nothing: unknown."""
    unseen = fitted.pivot(index="family", columns="law", values="held_out_rmse").reindex(columns=list(LAWS)).dropna()
    if unseen.empty:
        return ""
    ours, theirs = (unseen[law].astype(float).mean() for law in LAWS)
    return f" On the largest model, which they did not see, they miss by {ours:.4f} and {theirs:.4f} nats on average."
