"""The paper's figures that are curves: what each shows, what the paper says of it, and how that is tested.

Dettmers & Zettlemoyer, "The case for 4-bit precision: k-bit inference scaling laws", ICML 2023 (arXiv 2212.09720v2).
The numbers of the figures are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import pandas as pd

from kbit.analysis.curves.curves import Measure
from kbit.analysis.curves.selections import (
    CONTROLS,
    prefer_family,
    select_block_sizes,
    select_data_types,
    select_exponents,
    select_gptq,
    select_methods,
    select_outliers,
    select_precisions,
)
from kbit.analysis.statistics.claims import Expectation, Split, judge_contrasts, judge_four_bit

Judge = Callable[[pd.DataFrame, Measure, pd.DataFrame], str]


STRONG_TYPES: Final = ("quantile", "float")  # "quantile and float are better than integer and dynamic exponent"


WEAK_TYPES: Final = ("int", "dynamic")


@dataclass(frozen=True)
class CurveFigure:
    """A figure of curves against total model bits.

    Attributes:
        name: for example "figure_2".
        claim: what the paper says, one sentence.
        select: points of all curves -> those drawn, with panel and series.
        judge: (points drawn, measure, results) -> what these results say of the claim.
        needs: what the results must hold, for the message where they do not.
        studies: ready studies that measure it.
        loss: whether it shows cross entropy; otherwise mean zero-shot accuracy.
    """

    name: str
    claim: str
    select: Callable[[pd.DataFrame], pd.DataFrame]
    judge: Judge
    needs: str
    studies: tuple[str, ...]
    loss: bool = False


def split_five_bit(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare 5 bits with 4 bits."""
    return ["5-bit"], ["4-bit"]


def split_quantile(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare quantile with the paper's other data types."""
    return ["quantile"], [name for name in series if name in ("float", *WEAK_TYPES)]


def split_block_sizes(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare the smallest with the largest block size up to 1024: the paper's range; series are in order of size."""
    sizes = [name for name in series if name.startswith("block ") and name.split()[1].isdigit()]
    within = [name for name in sizes if 64 <= int(name.split()[1]) <= 1024]
    ends = within if len(within) >= 2 else sizes
    return ends[:1], ends[-1:]


def split_data_types(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare the paper's strong data types with its weak ones."""
    return [name for name in series if name in STRONG_TYPES], [name for name in series if name in WEAK_TYPES]


def split_exponents(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare the heuristic's number of exponent bits, ceil(k / 2), with the others (Appendix C.4)."""
    bits = int(panel.split("-bit")[0].split()[-1])
    best = f"E{-(-bits // 2)}"
    return [best], [name for name in series if name != best]


def split_outliers(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare a precision with and without outliers in 16 bit."""
    kept = [name for name in series if "outliers" in name]
    return kept, [name.split(" with")[0] for name in kept]


def split_control(control: str, panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare outliers that the proxy selects with as many dimensions selected in another way (CONTROLS)."""
    shares = [name.removesuffix(control) for name in series if name.endswith(control)]
    kept = [f"{share} outliers" for share in shares]
    return [name for name in kept if name in series], [f"{share}{control}" for share in shares]


def split_rival(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare a precision with outliers in 16 bit with 4 bits without."""
    return [name for name in series if "outliers" in name], ["4-bit"]


def split_methods(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare GPTQ without blocks with zero-shot float in blocks of 64."""
    gptq = [name for name in series if "gptq" in name]
    return [name for name in gptq if "whole" in name] or gptq[-1:], [name for name in series if "gptq" not in name]


def split_gptq(panel: str, series: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Compare GPTQ with rounding to nearest."""
    return ["gptq"], ["rtn"]


def judge_block_sizes_and_types(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> str:
    """Test both parts of figure 3: the panels of block sizes and those of data types."""
    is_block = curves["series"].str.startswith("block ")
    parts = [
        ("Block size", curves[is_block], split_block_sizes),
        ("Data type", curves[~is_block], split_data_types),
    ]
    return " ".join(
        f"{what}: {judge_contrasts(points, split, 'better', measure, results)}"
        for what, points, split in parts
        if len(points)
    )


def judge_by(split: Split, expected: Expectation) -> Judge:
    """Return a judge that compares two groups of curves in each panel, see claims.judge_contrasts."""
    return lambda curves, measure, results: judge_contrasts(curves, split, expected, measure, results)


def judge_outliers(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> str:
    """Test all parts of figure 4: outliers help at 3 bits, not enough to reach 4 bits, and not at 4 bits.

    Where the same layers' or random dimensions were measured, also: those that the proxy selects are worth more.
    """
    is_three = curves["panel"].str.contains(", 3-bit")
    parts: list[tuple[str, pd.DataFrame, Split, Expectation]] = [
        ("3-bit gains by outliers", curves[is_three], split_outliers, "better"),
        ("3-bit with outliers stays behind 4-bit", curves[is_three], split_rival, "worse"),
        ("4-bit gains nothing by outliers", curves[~is_three], split_outliers, "no better"),
    ]
    for control in CONTROLS[1:]:
        has_control = curves[curves["series"].str.endswith(control)]["panel"].unique()
        among = curves[curves["panel"].isin(has_control)]
        what = f"outliers by proxy gain more than{control} dimensions"
        parts.append((what, among, partial(split_control, control), "better"))
    return " ".join(
        f"[{what}] {judge_contrasts(points, split, expected, measure, results)}"
        for what, points, split, expected in parts
        if len(points)
    )


def judge_gptq(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> str:
    """Test both parts of figure 5: at 3 bits GPTQ without blocks loses to blocked float, at 4 bits they are level."""
    parts = []
    for panel, group in curves.groupby("panel", sort=False):
        expected: Expectation = "worse" if ", 3-bit" in str(panel) else "level"
        parts.append(judge_contrasts(group, split_methods, expected, measure, results))
    return " ".join(parts)


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
        judge_four_bit,
        _PRECISIONS,
        ("nano/bit_level", "paper/figure_1"),
    ),
    CurveFigure(
        "figure_2",
        "At a fixed number of total model bits, 4-bit is best for almost all sizes and families.",
        select_precisions,
        judge_four_bit,
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
        judge_by(split_five_bit, "no better"),
        "4 and 5 bits, each at two or more sizes of one family",
        ("nano/bit_level", "paper/figure_7"),
    ),
    CurveFigure(
        "figure_8",
        "At 4 bits smaller blocks improve the scaling: most for Pythia and GPT-2, less for BLOOM and OPT.",
        partial(select_block_sizes, bits=4),
        judge_by(split_block_sizes, "better"),
        _BLOCKS.format(4),
        ("nano/block_size", "paper/figure_8"),
    ),
    CurveFigure(
        "figure_9",
        "At 4 bits the data types quantile and float scale better than int and dynamic exponent.",
        partial(select_data_types, bits=4),
        judge_by(split_data_types, "better"),
        _TYPES.format(4),
        ("nano/data_types", "paper/figure_9"),
    ),
    CurveFigure(
        "figure_10",
        "At 6 bits no data type improves the scaling.",
        partial(select_data_types, bits=6),
        judge_by(split_data_types, "no better"),
        _TYPES.format(6),
        ("nano/data_types", "paper/figure_10"),
    ),
    CurveFigure(
        "figure_11",
        "At 6 bits smaller blocks do not improve the scaling.",
        partial(select_block_sizes, bits=6),
        judge_by(split_block_sizes, "no better"),
        _BLOCKS.format(6),
        ("nano/block_size", "paper/figure_11"),
    ),
    CurveFigure(
        "figure_12",
        "A float does best with half of its bits, rounded up, as exponent bits (Appendix C.4; not at 5 bits).",
        of_family("opt", select_exponents),
        judge_by(split_exponents, "best"),
        "float with two numbers of exponent bits at one precision, each at two or more sizes of one family",
        ("nano/exponent_bits", "paper/figure_12"),
    ),
    CurveFigure(
        "figure_13",
        "By cross entropy, too, 4-bit is best at a fixed number of total model bits.",
        select_precisions,
        judge_four_bit,
        _PRECISIONS,
        ("nano/bit_level", "paper/figure_13"),
        loss=True,
    ),
    CurveFigure(
        "figure_14",
        "By cross entropy quantile is the best 4-bit data type, across models and scales.",
        partial(select_data_types, bits=4),
        judge_by(split_quantile, "best"),
        _TYPES.format(4),
        ("nano/data_types", "paper/figure_14"),
        loss=True,
    ),
    CurveFigure(
        "figure_15",
        "By cross entropy, too, smaller blocks improve the 4-bit scaling.",
        partial(select_block_sizes, bits=4),
        judge_by(split_block_sizes, "better"),
        _BLOCKS.format(4),
        ("nano/block_size", "paper/figure_15"),
        loss=True,
    ),
    CurveFigure(
        "methods",
        "Is GPTQ better than rounding to nearest, with the same quantizer and so at equal total bits?",
        join(*(partial(select_methods, bits=bits) for bits in (2, 3, 4))),
        judge_by(split_gptq, "better"),
        "2, 3 or 4 bits by two methods, each at two or more sizes of one family",
        ("nano/methods",),
        loss=True,
    ),
)
