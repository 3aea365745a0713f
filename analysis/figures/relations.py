"""Does one number predict another? Perplexity and accuracy, weight error and loss, KL divergence and accuracy.

One point is one experiment. Points of one model are not independent, so an interval of a correlation resamples models
where there are enough of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from kbit.analysis.curves.curves import ZERO_SHOT, Floats, Measure, find_cross_entropy, pick_rows
from kbit.analysis.curves.settings import make_labels
from kbit.analysis.figures.canvas.axes import set_log_axis
from kbit.analysis.figures.canvas.page import Page, StyledFigure
from kbit.analysis.figures.canvas.sheets import draw_legend, make_sheet
from kbit.analysis.figures.canvas.styles import scale_marker, style_precisions
from kbit.analysis.figures.drawing import (
    LIMIT,
    LIMIT_OF_MODELS,
    MissingResults,
    PaperFigure,
    describe_lack,
    describe_sample,
)
from kbit.analysis.statistics.degradation import measure_lost
from kbit.layers.int8_schemes import SCHEMES
from kbit.numerics.spec import BASELINE_BITS

PAPER_R: Final = -0.94  # Pile-CC perplexity and mean zero-shot accuracy over more than 35,000 experiments (section 4)
PERPLEXITY_CAP: Final = 100.0  # the paper cuts curves there as unstable (Appendix C.5)
MIN_POINTS: Final = 4
MOST_BARS: Final = 200  # points, as more bars would hide them
MIN_MODELS: Final = 8  # below, resampling models says little
DRAWS: Final = 1000
ROUNDING: Final = 1e-12  # a sum of squares that shrinks to this share of itself is that of one value
# what tells experiments of one data type and block size apart, in the CSV
QUANTIZER: Final = ("method", "method_options", "outlier_fraction", "outlier_selection", "seed")
Values = Callable[[pd.DataFrame], "pd.Series[float]"]


@dataclass(frozen=True)
class Relation:
    """A scatter plot of experiments.

    Attributes:
        name: the figure's name.
        claim: the question, or what the paper says.
        x, y: results -> one value per experiment, index key.
        x_label, y_label: the labels of the axes.
        needs: what the results must hold.
        studies: ready studies that measure it.
        rank: whether ranks are correlated (Spearman) in place of values (Pearson).
        log_x: whether x has a log axis.
        of_accuracy: whether y comes from the mean zero-shot accuracy instead of the cross entropy.
        lost: whether y is what a model loses against itself at 16 bits.
    """

    name: str
    claim: str
    x: Values
    y: Values
    x_label: str
    y_label: str
    needs: str
    studies: tuple[str, ...]
    rank: bool = True
    log_x: bool = False
    of_accuracy: bool = True
    lost: bool = False


def read_accuracy(results: pd.DataFrame) -> pd.Series[float]:
    """Return the mean zero-shot accuracy of each experiment."""
    return read_metric(results, ZERO_SHOT.metric, ZERO_SHOT.task)


def read_loss(results: pd.DataFrame) -> pd.Series[float]:
    """Return the cross entropy of each experiment, of the text with the most results."""
    measure = find_cross_entropy(results)
    return read_metric(results, "cross_entropy", measure.task if measure else "")


def read_perplexity(results: pd.DataFrame) -> pd.Series[float]:
    """Return exp(cross entropy) of each experiment, capped as in the paper."""
    loss = read_loss(results)
    capped = np.minimum(loss.to_numpy(dtype=np.float64), np.log(PERPLEXITY_CAP))  # before exp, which may overflow
    return pd.Series(np.exp(capped), loss.index)


def read_divergence(results: pd.DataFrame) -> pd.Series[float]:
    """Return the KL divergence from the same model at 16 bit of each quantized experiment, on read_loss's text."""
    measure = find_cross_entropy(results)
    return read_metric(results[results["bits"] < BASELINE_BITS], "kl_divergence", measure.task if measure else "")


def read_weight_error(results: pd.DataFrame) -> pd.Series[float]:
    """Return the relative error of the quantized weights, sqrt(sum (w - w')^2 / sum w^2), of each experiment.

    Left out are experiments whose loss has other causes than the error of all weights: those that quantize a part of
    the layers or have several quantizers (include, exclude, rules, allocation), and int8 methods, which round
    activations too.
    """
    if "weight_rmse" not in results:
        return pd.Series(dtype=np.float64)
    is_whole = (results["bits"] < BASELINE_BITS) & ~results["method"].isin(SCHEMES)
    for part in ("include", "exclude", "rules", "allocation"):
        is_whole &= results[part].isna() if part in results else True
    rows = results[is_whole].drop_duplicates("key")
    return rows.set_index("key")["weight_rmse"].dropna().astype(np.float64)


def read_metric(results: pd.DataFrame, metric: str, task: str) -> pd.Series[float]:
    """Return one measurement of each experiment, index key.

    Raises:
        AmbiguousResults: a family was measured in several ways.
    """
    return pick_rows(results, metric, task).set_index("key")["value"]


def read_lost(results: pd.DataFrame, measure: Measure | None) -> pd.Series[float]:
    """Return what each quantized experiment loses against its model at 16 bits. It is left out without a baseline."""
    if measure is None:
        return pd.Series(dtype=np.float64)
    rows = pick_rows(results, measure.metric, measure.task)
    return measure_lost(rows, measure, results, intervals=False).set_index("key")["lost"]


RELATIONS: Final = (
    Relation(
        "perplexity_accuracy",
        f"Is perplexity as good a measure as zero-shot accuracy? The paper: r = {PAPER_R} over its experiments.",
        read_perplexity,
        read_accuracy,
        f"perplexity (per token, capped at {PERPLEXITY_CAP:.0f})",
        "mean zero-shot accuracy",
        "mean zero-shot accuracy and cross entropy of the same experiments",
        ("nano/bit_level", "paper/figure_2"),
        rank=False,
    ),
    Relation(
        "kl_accuracy",
        "Does the KL divergence from the 16-bit model tell how much accuracy is lost?",
        read_divergence,
        lambda results: read_lost(results, ZERO_SHOT),
        "KL divergence from the 16-bit model (nats per token)",
        "mean zero-shot accuracy lost",
        "KL divergence and mean zero-shot accuracy of the same experiments, with the 16-bit models",
        ("nano/bit_level",),
        log_x=True,
        lost=True,
    ),
    Relation(
        "error_accuracy",
        "Does the error of the weights tell how much accuracy is lost?",
        read_weight_error,
        lambda results: read_lost(results, ZERO_SHOT),
        "relative error of the quantized weights",
        "mean zero-shot accuracy lost",
        "weight_rmse (stored with every experiment since it is measured) and mean zero-shot accuracy, with the 16-bit "
        "models",
        ("nano/bit_level",),
        log_x=True,
        lost=True,
    ),
    Relation(
        "error_loss",
        "Does the error of the weights tell how much the model loses?",
        read_weight_error,
        lambda results: read_lost(results, find_cross_entropy(results)),
        "relative error of the quantized weights",
        "cross entropy added (nats per token)",
        "weight_rmse (stored with every experiment since it is measured) and cross entropy, with the 16-bit models",
        ("nano/bit_level", "nano/data_types"),
        log_x=True,
        of_accuracy=False,
        lost=True,
    ),
)


def gather_points(relation: Relation, results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each experiment that has both values.

    Returns:
        Columns key, family, model, bits, data_type, block_size, variant (the data type's name with every setting that
        is not the default, as in the figures), those of QUANTIZER that the results have, x, y.
    """
    both = pd.concat({"x": relation.x(results), "y": relation.y(results)}, axis=1).dropna()
    about = results.drop_duplicates("key").set_index("key")
    about = about.loc[both.index]
    columns = ["family", "model", "bits", "data_type", "block_size", "variant"]
    settings = [name for name in QUANTIZER if name in about]
    about = about.assign(variant=make_labels(about))[[*columns, *settings]]
    return about.join(both).reset_index(names="key")


def correlate(points: pd.DataFrame, rank: bool, seed: int = 0) -> tuple[float, float, float, str]:
    """Return the correlation of x and y with its 95% interval, and how the interval was found.

    Models are resampled where there are MIN_MODELS or more, because the points of a model hang together. Otherwise the
    interval is Fisher's, as if points were independent, and too narrow.

    Args:
        points: a table with the columns x, y, model.
        rank: whether to return Spearman's rho in place of Pearson's r.
        seed: the seed of the resampling.
    """
    if rank:
        points = points.assign(x=points["x"].rank(), y=points["y"].rank())
    test = stats.pearsonr(points["x"], points["y"])
    r = float(test.statistic)
    names, codes = np.unique(points["model"].to_numpy(), return_inverse=True)
    if len(names) < MIN_MODELS:
        interval = test.confidence_interval(0.95)
        return r, float(interval.low), float(interval.high), "Fisher's, points taken as independent: too narrow"
    low, high = np.nanquantile(resample_groups(points, codes, np.random.default_rng(seed)), [0.025, 0.975])
    return r, float(low), float(high), f"bootstrap over {len(names)} models"


def resample_groups(points: pd.DataFrame, codes: npt.NDArray[np.intp], rng: np.random.Generator) -> Floats:
    """Return Pearson's r of x and y in DRAWS resamples of whole groups, from the sums of each group.

    Args:
        points: columns x, y.
        codes: the group of each point, 0, 1, ...
        rng: source of the draws.
    """
    x, y = ((points[name] - points[name].mean()).to_numpy(dtype=np.float64) for name in ("x", "y"))
    sums = np.stack([np.bincount(codes, terms) for terms in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=1)
    groups = len(sums)
    chosen = np.stack([np.bincount(rng.integers(0, groups, groups), minlength=groups) for _ in range(DRAWS)])
    n, sx, sy, xx, yy, xy = (chosen @ sums).T
    spread_x, spread_y = xx - sx**2 / n, yy - sy**2 / n
    varied = (spread_x > ROUNDING * xx) & (spread_y > ROUNDING * yy)  # others have no r
    product = np.where(varied, spread_x * spread_y, 1.0)
    return np.where(varied, np.clip((xy - sx * sy / n) / np.sqrt(product), -1, 1), np.nan)  # rounding can exceed 1


def draw_relation(relation: Relation, results: pd.DataFrame, page: Page) -> PaperFigure:
    """Draw one relation: a marker per experiment by precision, the correlation below.

    Raises:
        MissingResults: fewer than MIN_POINTS experiments have both values.
    """
    points = pd.DataFrame() if results.empty else gather_points(relation, results)
    points = points[points["x"] > 0] if relation.log_x and len(points) else points
    if len(points) < MIN_POINTS or points["x"].nunique() < 2 or points["y"].nunique() < 2:
        raise MissingResults(describe_lack(relation.name, relation.needs, relation.studies))
    r, low, high, source = correlate(points, relation.rank)
    letter = "rho" if relation.rank else "r"
    verdict = f"{letter} = {r:.2f} (95% interval {low:.2f} to {high:.2f}, {source}) over {len(points)} experiments"
    if relation.name == "perplexity_accuracy":
        inside = "within" if low <= PAPER_R <= high else "outside"
        verdict += f"; the paper's {PAPER_R} is {inside} the interval"
    per_model = [correlate(group, relation.rank)[0] for _, group in points.groupby("model") if is_varied(group)]
    if per_model:
        verdict += f". Within one model: {describe_range(per_model)}"
    measure = ZERO_SHOT if relation.of_accuracy else find_cross_entropy(results)
    assert measure is not None  # the points have it
    notes = [describe_sample(results, points["key"], measure), LIMIT_OF_MODELS]
    if relation.lost and len(points) <= MOST_BARS:
        points, source = add_intervals(points, measure, results)
        notes.append(f"Bars: 95% intervals ({source}). {LIMIT}")
    fig = scatter(points, relation, page)
    short = f"{letter} = {r:.2f} (95% interval {low:.2f} to {high:.2f}) over {len(points)} experiments."
    return PaperFigure(relation.name, fig, points, relation.claim, verdict + ".", tuple(notes), short)


def describe_range(values: Sequence[float]) -> str:
    """Return for example "-0.20 to 0.30 over 3 models", "0.87 (1 model)"."""
    if len(values) == 1:
        return f"{values[0]:.2f} (1 model)"
    return f"{min(values):.2f} to {max(values):.2f} over {len(values)} models"


def add_intervals(points: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the points with the 95% intervals low and high of what each loses, and how they were found."""
    rows = pick_rows(results, measure.metric, measure.task)
    rows = rows[rows["key"].isin(points["key"]) | (rows["bits"] == BASELINE_BITS)]
    lost = measure_lost(rows, measure, results).set_index("key").loc[points["key"]]
    points = points.assign(low=lost["low"].to_numpy(), high=lost["high"].to_numpy())
    return points, "; ".join(sorted(lost["source"].unique()))


def is_varied(points: pd.DataFrame) -> bool:
    """Whether a correlation of these points is defined."""
    return len(points) >= MIN_POINTS and points["x"].nunique() > 1 and points["y"].nunique() > 1


def scatter(points: pd.DataFrame, relation: Relation, page: Page) -> StyledFigure:
    """Draw the points, a style per precision."""
    styles = style_precisions(sorted(points["bits"].unique()))
    sheet = make_sheet(page, 1, (6.0, 4.3), 1, styles)
    [axes] = sheet.add_axes(1)
    alpha = float(np.clip(60 / len(points), 0.25, 0.9))  # dense clouds show their density
    width = 0.5 * float(matplotlib.rcParams["lines.linewidth"])
    for bits, group in points.groupby("bits"):
        style = styles[f"{bits}-bit"]
        if "low" in group:
            axes.vlines(group["x"], group["low"], group["high"], color=style.color, linewidth=width, alpha=0.45)
        axes.plot(
            group["x"],
            group["y"],
            linestyle="none",
            marker=style.marker,
            color=style.color,
            markersize=scale_marker(style),
            markeredgecolor="white",
            markeredgewidth=0.4,
            alpha=alpha,
            rasterized=len(points) > 2000,
        )
    if relation.log_x:
        set_log_axis(axes, points["x"], "{:g}".format)
    sheet.label(relation.x_label, relation.y_label)
    draw_legend(sheet.fig.body, styles, page, lines=False)
    return sheet.fig
