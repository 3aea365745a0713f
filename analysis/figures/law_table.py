"""The laws compared on a store: a row per law and family, with what each gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Measure, find_cross_entropy
from kbit.analysis.curves.families import take_family
from kbit.analysis.curves.selections import select_block_sizes, select_precisions
from kbit.analysis.curves.settings import rank_data_type
from kbit.analysis.figures.drawing import (
    LIMIT_OF_MODELS,
    MissingResults,
    PaperFigure,
    choose_panels,
    describe_lack,
    describe_sample,
    describe_undrawn,
    draw_table,
)
from kbit.analysis.statistics.degradation import measure_lost
from kbit.analysis.statistics.frontier import draw_values
from kbit.analysis.statistics.grades import NAMED, join_parts
from kbit.analysis.statistics.laws import Fit, TooFewPoints, check_held_out, fit_law
from kbit.numerics.spec import BASELINE_BITS

CLAIM: Final = (
    "Do power laws in parameters and bits fit poorly, and precisions run nearly parallel, as the paper has it?"
)

BLOCK_LAW_BITS: Final = 4
TABLE_LAWS: Final = ("power", "offset", "kumar", "block")  # those of laws.LAWS that are compared
# what laws need of a point
LAW_COLUMNS: Final = ["model", "parameters", "bits", "block_size", "value", "low", "high", "key"]
# what selections need beside it
SELECTED: Final = [
    *("family", "data_type", "label", "allocation", "exponent_bits", "total_bits"),
    *(name for name in LAW_COLUMNS if name != "parameters"),
]
TABLE_DRAWS: Final = 200  # the ends of 95% intervals rest on 5 draws each: enough for the two digits shown

# Published exponents to compare with: Kumar et al. 2024, Table 2 (its 1/g is 1/0.5907), and arXiv 2505.14302, W4A16.
# Their exponents of the training tokens D (0.5068 and 0.161) have no counterpart here, see laws.
PUBLISHED: Final = {
    "kumar": {"N exponent": 0.3439, "1 / g": 1 / 0.5907},
    "block": {"N exponent": 0.3589, "G exponent": 0.3533},
}


def collect_points(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return by law (TABLE_LAWS) the points that it describes: LAW_COLUMNS, y and error.

    The points are those of the family's variant that was measured most, whose panel's name they have, and none without
    a variant. Of variants measured as often it is the first. y is the cross entropy, or what quantization adds to it.
    Its standard error comes from the draws of frontier.draw_values, so the error of a difference on the same text is
    small.

    Args:
        curves: the curves of one family, from precision_curves.
        measure: the cross entropy on some text.
        results: the table that the curves come from, which tells the models' sizes and where their items are.
    """
    sized = add_sizes(curves, results)
    precisions, blocks = select_precisions(sized, tied=False), select_block_sizes(sized, BLOCK_LAW_BITS, tied=False)
    return split_by_law(sized, precisions, blocks, measure, results)


def collect_tied(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each law with its points, see collect_points, for every data type that was measured as often as the first.

    The arguments are those of collect_points.
    """
    sized = add_sizes(curves, results)
    precisions, blocks = select_precisions(sized), select_block_sizes(sized, BLOCK_LAW_BITS)
    precisions = precisions[precisions["bits"] < BASELINE_BITS]
    types = {law: list(dict.fromkeys((blocks if law == "block" else precisions)["data_type"])) for law in TABLE_LAWS}
    yield from ((law, pd.DataFrame()) for law, own in types.items() if not own)  # it has a row with the reason
    for data_type in sorted({*types["power"], *types["block"]}, key=rank_data_type):
        chosen, in_blocks = (shown[shown["data_type"] == data_type] for shown in (precisions, blocks))
        points = split_by_law(sized, chosen, in_blocks, measure, results)
        yield from ((law, points[law]) for law, own_types in types.items() if data_type in own_types)


def add_sizes(curves: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Return the points with their model's number of parameters, and of the settings what selections need."""
    parameters = results.drop_duplicates("model").set_index("model")["parameters"]
    slim = curves[SELECTED].astype(dict.fromkeys(("model", "key", "label"), object))  # rows of these are taken faster
    return slim.assign(parameters=slim["model"].map(parameters).astype(float))


def split_by_law(
    sized: pd.DataFrame, precisions: pd.DataFrame, blocks: pd.DataFrame, measure: Measure, results: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Return what collect_points does, of points that were selected for the laws of precisions and of block sizes."""
    base = sized.loc[sized["bits"] == BASELINE_BITS, LAW_COLUMNS].drop_duplicates("model")
    own = [*LAW_COLUMNS, "data_type", "panel"]
    precisions = precisions.loc[precisions["bits"] < BASELINE_BITS, own]
    blocks = blocks.loc[blocks["block_size"].notna(), own]
    losses = add_losses(base, precisions, measure, results)
    return {
        "power": losses,
        "offset": losses,
        "kumar": subtract_base(base, precisions, measure, results),
        "block": subtract_base(base, blocks, measure, results),
    }


def add_losses(base: pd.DataFrame, chosen: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> pd.DataFrame:
    """Return the 16-bit points and the chosen ones with y = L, or none where either kind is missing."""
    if base.empty or chosen.empty:
        return pd.DataFrame()
    everything = pd.concat([base, chosen], ignore_index=True)
    draws = draw_values(everything, measure, results).values
    return everything.assign(y=everything["value"], error=draws.std(axis=0))


def subtract_base(base: pd.DataFrame, chosen: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen points with y = L - L_16, or none without 16-bit points."""
    if base.empty or chosen.empty:
        return pd.DataFrame()
    added = measure_lost(pd.concat([base, chosen], ignore_index=True), measure, results)
    return added.assign(y=added["lost"]).reset_index(drop=True)


def compare_laws(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row per family and law: how well it fits, what it predicts of the largest model, its parameters.

    Each data type that was measured as often as the first has rows of its own.

    Returns:
        Columns family, law, panel (the family's variant that is fitted), data_type, points, r2, rmse, worst (the
        largest residual, nats), held_out (the model), held_out_rmse, inside, naive_rmse, parameters (text with 95%
        intervals), keys (of the experiments behind the points, separated by blanks), and reason where a law could not
        be fitted.

    Raises:
        AmbiguousResults: see precision_curves.
    """
    rows: list[dict[str, Any]] = []
    known: dict[Measure, pd.DataFrame | None] = {}
    for family, of_family in results[results["metric"] == "cross_entropy"].groupby("family"):
        measure = find_cross_entropy(of_family)
        assert measure is not None  # the rows have it
        losses = of_family[of_family["task"] == measure.task]
        curves = take_family(results, family, measure, known)
        for law, points in collect_tied(curves, measure, losses):
            row: dict[str, Any] = {"family": family, "law": law}
            try:
                if points.empty:
                    raise TooFewPoints("no quantized models beside their 16-bit baseline")
                is_base = (curves["bits"] == BASELINE_BITS) & curves["model"].isin(points["model"])
                keys = " ".join(dict.fromkeys([*curves.loc[is_base, "key"], *points["key"]]))
                row |= {name: points[name].dropna().iloc[0] for name in ("panel", "data_type")}
                rows.append(row | describe_fit(law, points) | {"keys": keys})
            except TooFewPoints as error:
                rows.append(row | {"reason": str(error)})
    columns = [
        "panel",
        "data_type",
        "points",
        "r2",
        "rmse",
        "worst",
        "held_out",
        "held_out_rmse",
        "inside",
        "naive_rmse",
    ]
    columns += ["parameters", "keys"]
    return pd.DataFrame(rows, columns=["family", "law", *columns, "reason"])


def describe_fit(law: str, points: pd.DataFrame) -> dict[str, Any]:
    """Return the columns of compare_laws for one fit.

    Raises:
        TooFewPoints: see fit_law.
    """
    points = points[["model", "parameters", "bits", "block_size", "y", "error"]]  # to copy these alone
    fit = fit_law(law, points, draws=TABLE_DRAWS)
    row: dict[str, Any] = {
        "points": len(points),
        "r2": fit.r2,
        "rmse": fit.rmse,
        "parameters": describe_parameters(fit),
    }
    row["worst"] = float(np.abs(fit.residuals).max())
    try:
        check = check_held_out(law, points, draws=TABLE_DRAWS, near=fit)
    except TooFewPoints:
        return row
    return row | {
        "held_out": check.model,
        "held_out_rmse": check.rmse,
        "inside": check.inside,
        "naive_rmse": check.naive,
    }


def describe_parameters(fit: Fit) -> str:
    """Return the exponents with their 95% intervals, beside published ones."""
    words = []
    for name, value, (low, high) in zip(fit.design.names, fit.parameters, fit.intervals, strict=True):
        known = PUBLISHED.get(fit.law, {}).get(name)
        paper = "" if known is None else f", published {known:.3g}"
        words.append(f"{name} {value:.3g} ({low:.3g} to {high:.3g}{paper})")
    return "; ".join(words)


def draw_laws(results: pd.DataFrame) -> PaperFigure:
    """Compare the laws: residuals of each, and its prediction of the largest model from the smaller ones.

    Raises:
        MissingResults: no family has enough points for any law.
        AmbiguousResults: see precision_curves.
    """
    data = pd.DataFrame() if results.empty else compare_laws(results)
    if data.empty or data["rmse"].isna().all():
        needs = "cross entropy at two or more precisions and several sizes of one family, with the 16-bit models"
        raise MissingResults(describe_lack("laws", needs, ("nano/bit_level", "paper/figure_13")))
    fitted = data[data["rmse"].notna()]
    shown = describe_fits(fitted)
    fitted = fitted.assign(panel=fitted["family"].astype(str) + ", " + fitted["data_type"].astype(str))
    drawn = choose_panels(fitted)
    fig = draw_table(shown.loc[drawn.index], "Laws of quantized models' cross entropy")
    note = (
        "power, offset: of the loss; kumar, block: of what quantization adds to it, with the tokens of training taken "
        "as the same for all sizes of a family. naive: as the next smaller model."
    )
    measures = [
        find_cross_entropy(rows) for _, rows in results[results["family"].isin(fitted["family"])].groupby("family")
    ]
    sample = describe_sample(results, fitted["keys"], *dict.fromkeys(m for m in measures if m))
    notes = (
        note,
        describe_undrawn(fitted, drawn, "data types of families", "fits"),
        describe_unfitted(data),
        sample,
        LIMIT_OF_MODELS,
    )
    return PaperFigure("laws", fig, data, CLAIM, judge_laws(fitted), tuple(filter(None, notes)), table=shown)


def describe_fits(fitted: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of compare_laws that were fitted as they are read."""
    return pd.DataFrame(
        {
            "variant": fitted["panel"],
            "law": fitted["law"],
            "points": fitted["points"].astype(int).astype(str),
            "R2": fitted["r2"].map("{:.3f}".format),
            "RMSE (nats)": fitted["rmse"].map("{:.4f}".format),
            "largest model": fitted["held_out"].astype(object).fillna("-"),
            "RMSE there": fitted["held_out_rmse"].map("{:.4f}".format).replace("nan", "-"),
            "naive": fitted["naive_rmse"].map("{:.4f}".format).replace("nan", "-"),
            "parameters (95% intervals)": fitted["parameters"],
        }
    )


def describe_unfitted(data: pd.DataFrame) -> str:
    """Return the line of the caption that names each law that was not fitted, with the reason. It may be empty."""
    unfitted = data[data["rmse"].isna()]
    short = [
        reason.replace(f"the law {law!r} has ", "")
        for law, reason in zip(unfitted["law"], unfitted["reason"], strict=True)
    ]
    unfitted = unfitted.assign(reason=short)
    parts = [
        f"{' and '.join(dict.fromkeys(rows['law']))} of {family} ({reason})"
        for (family, reason), rows in unfitted.groupby(["family", "reason"], sort=False)
    ]
    return f"Not fitted: {join_parts(parts[:NAMED], len(parts))}." if parts else ""


def judge_laws(fitted: pd.DataFrame) -> str:
    """Say how much worse the power law fits than a base curve with offsets, without a verdict for want of intervals."""
    wide = fitted.pivot(index=["family", "panel"], columns="law", values="rmse")
    wide = wide.reindex(columns=["power", "offset"]).dropna()
    if wide.empty:
        return "Not tested: power law and offsets were not both fitted."
    ratio = wide["power"] / wide["offset"]
    worse = int((ratio > 1).sum())
    return (
        f"In {worse} of {len(ratio)} variants the bivariate power law leaves larger residuals than a base "
        f"curve with offsets (RMSE {wide['power'].mean():.4f} against {wide['offset'].mean():.4f} nats)."
    )
