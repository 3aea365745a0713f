"""The paper's figures that are curves: what each shows, what the paper says of it, and how that is tested.

Dettmers & Zettlemoyer, "The case for 4-bit precision: k-bit inference scaling laws", ICML 2023 (arXiv 2212.09720v2).
The numbers of the figures are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import pandas as pd

from kbit.analysis.curves.curves import Measure, sort_curves
from kbit.analysis.curves.selections import (
    CONTROLS,
    PROXY,
    RIVAL_BITS,
    prefer_family,
    select_block_sizes,
    select_data_types,
    select_exponents,
    select_gptq,
    select_methods,
    select_outliers,
    select_precisions,
)
from kbit.analysis.curves.settings import WHOLE
from kbit.analysis.statistics.claims import Comparison, Expectation, Groups, judge_contrasts
from kbit.analysis.statistics.verdicts import judge_four_bit


class Part(NamedTuple):
    """A part of a verdict: what it is about, perhaps nothing, and what the results say, in short at first."""

    about: str
    said: str


Judge = Callable[[pd.DataFrame, Measure, pd.DataFrame], list[Part]]
STRONG_TYPES: Final = ("quantile", "float")  # "quantile and float are better than integer and dynamic exponent"
WEAK_TYPES: Final = ("int", "dynamic")


@dataclass(frozen=True)
class CurveFigure:
    """A figure of curves against total model bits.

    Attributes:
        name: its name, for example "figure_2".
        claim: what the paper says, one sentence.
        select: points of all curves -> the points drawn, with the columns that selections.mark adds.
        judge: (points drawn, measure, results) -> what these results say of each part of the claim.
        needs: what the results must hold, for the message where they do not.
        studies: ready studies that measure it.
        loss: whether it shows cross entropy instead of mean zero-shot accuracy.
    """

    name: str
    claim: str
    select: Callable[[pd.DataFrame], pd.DataFrame]
    judge: Judge
    needs: str
    studies: tuple[str, ...]
    loss: bool = False


def list_series(points: pd.DataFrame, chosen: pd.Series[bool]) -> list[str]:
    """Return the names of the curves that have a chosen point, in order."""
    return list(dict.fromkeys(points.loc[chosen, "series"]))


def split_five_bit(points: pd.DataFrame) -> Groups:
    """Compare 5 bits with 4 bits."""
    return list_series(points, points["bits"] == 5), list_series(points, points["bits"] == 4)


def split_quantile(points: pd.DataFrame) -> Groups:
    """Compare quantile with every other data type, those that came after the paper among them."""
    is_quantile = points["data_type"] == "quantile"
    return list_series(points, is_quantile), list_series(points, ~is_quantile)


def split_block_sizes(points: pd.DataFrame) -> Groups:
    """Compare the smallest with the largest block size within the paper's range, 64 to 1024.

    Series are in order of size, and those of one model size are no curves. With fewer than two sizes in the range the
    whole range of sizes counts.
    """
    points = points[points["series"].isin(list(sort_curves(points, "series")))]
    sizes = list_series(points, points["block_size"].notna())
    within = list_series(points, points["block_size"].between(64, 1024).fillna(False))
    ends = within if len(within) >= 2 else sizes
    return ends[:1], ends[1:][-1:]


def split_data_types(points: pd.DataFrame) -> Groups:
    """Compare the paper's strong data types, of floats those with the paper's exponent bits, with its weak ones."""
    strong, weak = (points["label"].isin(types) for types in (STRONG_TYPES, WEAK_TYPES))
    return list_series(points, strong), list_series(points, weak)


def split_exponents(points: pd.DataFrame) -> Groups:
    """Compare the heuristic's number of exponent bits, ceil(k / 2), with the others (Appendix C.4)."""
    is_best = points["exponent_bits"] == -(-points["bits"] // 2)
    return list_series(points, is_best), list_series(points, ~is_best)


def find_kept(points: pd.DataFrame, selection: str) -> pd.Series[bool]:
    """Whether a point has outliers in 16 bit that were selected in this way."""
    return (points["outlier_fraction"] > 0) & (points["outlier_selection"] == selection)


def split_outliers(points: pd.DataFrame) -> Groups:
    """Compare a precision with and without outliers in 16 bit: each share of outliers with the one curve without."""
    is_kept = find_kept(points, PROXY)
    kept = list_series(points, is_kept)
    is_without = (points["outlier_fraction"] == 0) & points["bits"].isin(points.loc[is_kept, "bits"])
    return kept, list_series(points, is_without) * len(kept)


def split_control(selection: str, points: pd.DataFrame) -> Groups:
    """Compare outliers that the proxy selects with as many dimensions selected in another way."""
    proxies = points[find_kept(points, PROXY)]
    by_share = dict(zip(proxies["outlier_fraction"], proxies["series"], strict=True))
    is_control = find_kept(points, selection)
    shares = dict.fromkeys(points.loc[is_control, "outlier_fraction"])
    return [by_share[share] for share in shares if share in by_share], list_series(points, is_control)


def split_rival(points: pd.DataFrame) -> Groups:
    """Compare a precision with outliers in 16 bit with 4 bits without."""
    is_rival = (points["bits"] == RIVAL_BITS) & (points["outlier_fraction"] == 0)
    return list_series(points, find_kept(points, PROXY)), list_series(points, is_rival)


def split_gptq_and_float(points: pd.DataFrame) -> Groups:
    """Compare GPTQ without blocks, or else in the largest blocks with a curve, with zero-shot float in blocks of 64."""
    is_gptq = points["method"] == "gptq"
    drawn = is_gptq & points["series"].isin(list(sort_curves(points, "series")))
    block = points["block_size"].fillna(WHOLE)
    return list_series(points, is_gptq & (block == block[drawn].max())), list_series(points, ~is_gptq)


def split_gptq(points: pd.DataFrame) -> Groups:
    """Compare GPTQ with rounding to nearest: GPTQ with its default options, or with those that all of it has."""
    is_gptq = points["method"] == "gptq"
    options = points.loc[is_gptq, "method_options"].unique()
    chosen = options[0] if len(options) == 1 else ""
    return list_series(points, is_gptq & (points["method_options"] == chosen)), list_series(
        points, points["method"] == "rtn"
    )


FIVE_BIT: Final = Comparison(split_five_bit, "5-bit", "4-bit")
QUANTILE: Final = Comparison(split_quantile, "quantile", "another data type")
BLOCK_SIZES: Final = Comparison(split_block_sizes, "small blocks", "larger blocks")
DATA_TYPES: Final = Comparison(split_data_types, " or ".join(STRONG_TYPES), " or ".join(WEAK_TYPES))
EXPONENTS: Final = Comparison(split_exponents, "half of the bits as exponent bits", "another number of exponent bits")
OUTLIERS: Final = Comparison(split_outliers, "outliers in 16 bit", "the same precision without")
RIVAL: Final = Comparison(split_rival, "outliers in 16 bit", f"{RIVAL_BITS}-bit without")
GPTQ_AND_FLOAT: Final = Comparison(split_gptq_and_float, "GPTQ", "float in blocks of 64")
GPTQ: Final = Comparison(split_gptq, "GPTQ with its default or its only options", "rounding to nearest")


def judge_block_sizes_and_types(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Part]:
    """Test both parts of figure 3: the panels of block sizes and those of data types."""
    is_block = curves["varied"] == "block_size"
    parts = [
        ("Block size: ", curves[is_block], BLOCK_SIZES),
        ("Data type: ", curves[~is_block], DATA_TYPES),
    ]
    return [
        Part(about, judge_contrasts(points, comparison, "better", measure, results))
        for about, points, comparison in parts
        if len(points)
    ]


def judge_by(comparison: Comparison, expected: Expectation) -> Judge:
    """Return a judge that compares two groups of curves in each panel, see claims.judge_contrasts."""
    return lambda curves, measure, results: [Part("", judge_contrasts(curves, comparison, expected, measure, results))]


def judge_precisions(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Part]:
    """Test that 4-bit is best at equal total bits."""
    return [Part("", judge_four_bit(curves, measure, results))]


def judge_outliers(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Part]:
    """Test all parts of figure 4: outliers help at 3 bits, not enough to reach 4 bits, and not at 4 bits.

    Where as many dimensions were selected in another way, one more part says whether the proxy's are worth more.
    """
    is_three = curves.groupby("panel")["bits"].transform("min") == 3  # the rival with 4 bits stands in such a panel too
    parts: list[tuple[str, pd.DataFrame, Comparison, Expectation]] = [
        ("3-bit gains by outliers", curves[is_three], OUTLIERS, "better"),
        ("3-bit with outliers stays behind 4-bit", curves[is_three], RIVAL, "worse"),
        ("4-bit gains nothing by outliers", curves[~is_three], OUTLIERS, "no better"),
    ]
    for selection in list_controls(curves):
        has_control = curves.loc[find_kept(curves, selection), "panel"]
        among = curves[curves["panel"].isin(has_control)]
        what = f"outliers by proxy gain more than {selection} dimensions"
        control = Comparison(partial(split_control, selection), "outliers by proxy", f"{selection} dimensions")
        parts.append((what, among, control, "better"))
    return [
        Part(f"[{what}] ", judge_contrasts(points, comparison, expected, measure, results))
        for what, points, comparison, expected in parts
        if len(points)
    ]


def list_controls(curves: pd.DataFrame) -> list[str]:
    """Return how outliers were selected other than by proxy, the known ways first."""
    found = set(curves.loc[curves["outlier_fraction"] > 0, "outlier_selection"]) - {PROXY}
    return [*(name for name in CONTROLS if name in found), *sorted(found - set(CONTROLS))]


def judge_gptq(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> list[Part]:
    """Test both parts of figure 5: at 3 bits GPTQ without blocks loses to blocked float, at 4 bits they are level."""
    parts = []
    for _, group in curves.groupby("panel", sort=False):
        bits = int(group["bits"].iloc[0])
        expected: Expectation = "worse" if bits == 3 else "level"
        said = judge_contrasts(group, GPTQ_AND_FLOAT, expected, measure, results)
        parts.append(Part(f"[{bits}-bit: GPTQ {expected}] ", said))
    return parts


def join(*selects: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return a selection that shows the panels of several."""
    return lambda points: pd.concat([select(points) for select in selects], ignore_index=True)


def of_family(family: str, *selects: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return a selection that shows the panels of several of one family, see selections.prefer_family."""
    return lambda points: prefer_family(join(*selects)(points), family)


_PRECISIONS = "two precisions, each at two or more sizes of one family"
_BLOCKS = "{} bits with two block sizes of one data type, each at two or more sizes of one family"
_TYPES = "{} bits with two data types of one block size, each at two or more sizes of one family"

CURVE_FIGURES: Final = (
    CurveFigure(
        "figure_1",
        "For OPT, accuracy at equal total bits rises from 16 to 8 to 4 bits and falls again at 3 bits.",
        of_family("opt", partial(select_precisions, bits=(3, 4, 8, 16))),
        judge_precisions,
        _PRECISIONS,
        ("nano/bit_level", "paper/figure_1"),
    ),
    CurveFigure(
        "figure_2",
        "At a fixed number of total model bits, 4-bit is best for almost all sizes and families.",
        select_precisions,
        judge_precisions,
        _PRECISIONS,
        ("nano/bit_level", "paper/figure_2"),
    ),
    CurveFigure(
        "figure_3",
        "At 4 bits, small blocks and the data types quantile and float improve the scaling; for Pythia, block 64 "
        "instead of 1024 gains nearly as much as a fifth bit.",
        of_family("pythia", partial(select_block_sizes, bits=4), partial(select_data_types, bits=4)),
        judge_block_sizes_and_types,
        "4 bits with two block sizes or two data types, each at two or more sizes of one family",
        ("nano/block_size", "nano/data_types", "paper/figure_3"),
    ),
    CurveFigure(
        "figure_4",
        "16-bit outliers (proxy quantization) stabilize 3-bit, which still does not reach 4-bit; 4-bit gains nothing.",
        of_family("opt", *(partial(select_outliers, bits=bits) for bits in (3, 4))),
        judge_outliers,
        "3 or 4 bits with and without outliers in 16 bit, at two or more sizes of one family",
        ("nano/outliers", "paper/figure_4"),
    ),
    CurveFigure(
        "outliers",
        "By cross entropy, do 16-bit outliers pay for their bits, more than the same layer's or random dimensions?",
        of_family("opt", *(partial(select_outliers, bits=bits) for bits in (3, 4))),
        judge_outliers,
        "3 or 4 bits with and without outliers in 16 bit, at two or more sizes of one family",
        ("nano/outliers",),
        loss=True,
    ),
    CurveFigure(
        "figure_5",
        "Without blocks, GPTQ at 3 bits scales worse than zero-shot float with blocks of 64; at 4 bits they are level.",
        of_family("opt", *(partial(select_gptq, bits=bits) for bits in (3, 4))),
        judge_gptq,
        "GPTQ beside float with blocks of 64, each at two or more sizes of one family",
        ("nano/gptq", "paper/figure_5"),
    ),
    CurveFigure(
        "figure_7",
        "In no family does 5-bit scale better than 4-bit.",
        select_precisions,
        judge_by(FIVE_BIT, "no better"),
        "4 and 5 bits, each at two or more sizes of one family",
        ("nano/bit_level", "paper/figure_7"),
    ),
    CurveFigure(
        "figure_8",
        "At 4 bits smaller blocks improve the scaling: most for Pythia and GPT-2, less for BLOOM and OPT.",
        partial(select_block_sizes, bits=4),
        judge_by(BLOCK_SIZES, "better"),
        _BLOCKS.format(4),
        ("nano/block_size", "paper/figure_8"),
    ),
    CurveFigure(
        "figure_9",
        "At 4 bits the data types quantile and float scale better than int and dynamic exponent.",
        partial(select_data_types, bits=4),
        judge_by(DATA_TYPES, "better"),
        _TYPES.format(4),
        ("nano/data_types", "paper/figure_9"),
    ),
    CurveFigure(
        "figure_10",
        "At 6 bits no data type improves the scaling.",
        partial(select_data_types, bits=6),
        judge_by(DATA_TYPES, "no better"),
        _TYPES.format(6),
        ("nano/data_types", "paper/figure_10"),
    ),
    CurveFigure(
        "figure_11",
        "At 6 bits smaller blocks do not improve the scaling.",
        partial(select_block_sizes, bits=6),
        judge_by(BLOCK_SIZES, "no better"),
        _BLOCKS.format(6),
        ("nano/block_size", "paper/figure_11"),
    ),
    CurveFigure(
        "figure_12",
        "A float does best with half of its bits, rounded up, as exponent bits (Appendix C.4; not at 5 bits).",
        of_family("opt", select_exponents),
        judge_by(EXPONENTS, "best"),
        "float with two numbers of exponent bits at one precision, each at two or more sizes of one family",
        ("nano/exponent_bits", "paper/figure_12"),
    ),
    CurveFigure(
        "figure_13",
        "By cross entropy, too, 4-bit is best at a fixed number of total model bits.",
        select_precisions,
        judge_precisions,
        _PRECISIONS,
        ("nano/bit_level", "paper/figure_13"),
        loss=True,
    ),
    CurveFigure(
        "figure_14",
        "By cross entropy quantile is the best 4-bit data type, across models and scales.",
        partial(select_data_types, bits=4),
        judge_by(QUANTILE, "best"),
        _TYPES.format(4),
        ("nano/data_types", "paper/figure_14"),
        loss=True,
    ),
    CurveFigure(
        "figure_15",
        "By cross entropy, too, smaller blocks improve the 4-bit scaling.",
        partial(select_block_sizes, bits=4),
        judge_by(BLOCK_SIZES, "better"),
        _BLOCKS.format(4),
        ("nano/block_size", "paper/figure_15"),
        loss=True,
    ),
    CurveFigure(
        "methods",
        "Is GPTQ better than rounding to nearest, with the same quantizer and so at equal total bits?",
        join(*(partial(select_methods, bits=bits) for bits in (2, 3, 4))),
        judge_by(GPTQ, "better"),
        "2, 3 or 4 bits by two methods, each at two or more sizes of one family",
        ("nano/methods",),
        loss=True,
    ),
)
