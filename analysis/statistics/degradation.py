"""What quantization costs a model: its value against its own at 16 bits, on the same items."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Floats, Measure
from kbit.analysis.statistics.frontier import draw_values
from kbit.numerics.spec import BASELINE_BITS


def widen_degenerate(low: Floats, high: Floats, n: Floats) -> tuple[Floats, Floats]:
    """Return 95% intervals of paired differences of accuracies, none of width zero.

    Where no item is right for one model and wrong for the other, resampling items gives the same difference every
    time, whatever n is. If a share p of all items went over to one of the models, n items would show none with
    probability (1 - p)^n. The exact (Clopper-Pearson) bound is the p where that is 2.5%:

        p = 1 - 0.025^(1/n)              0.116 for n = 30, 0.0037 for n = 1000

    Args:
        low, high: intervals by bootstrap.
        n: the number of items behind each difference. A mean over tasks has the items of all tasks together.
    """
    half = np.where(high > low, 0.0, 1 - 0.025 ** (1 / n))
    return low - half, high + half


def measure_lost(
    points: pd.DataFrame, measure: Measure, results: pd.DataFrame, *, intervals: bool = True
) -> pd.DataFrame:
    """Return the quantized points with what each loses against the same model at 16 bits.

    Points of a model without a 16-bit value are left out. See widen_degenerate for accuracies that differ in no item.

    Args:
        points: values measured in one way (curves.pick_rows, curves.precision_curves), with the columns model, bits,
            value, low, high and key.
        measure: the measure that they show.
        results: the table behind the points, see frontier.draw_values.
        intervals: False skips the draws.

    Returns:
        The quantized points in their order, with a column lost (> 0: worse, in the measure's unit). With intervals also
        error (the standard error of lost), low and high (its 95% interval), and source (how they were found).
    """
    is_base = points["bits"] == BASELINE_BITS
    base = points[is_base].drop_duplicates("model").set_index("model", drop=False)
    quantized = points[~is_base & points["model"].isin(base.index)]
    sign = -1.0 if measure.higher_is_better else 1.0
    own = quantized["model"].map(base["value"]).astype(np.float64)  # of none, pandas would make it text
    quantized = quantized.assign(lost=sign * (quantized["value"].astype(np.float64) - own))
    if not intervals or quantized.empty:
        return quantized
    error, low, high = np.empty((3, len(quantized)))
    source = np.empty(len(quantized), dtype=object)
    needed = pd.concat([part[["key", "value", "low", "high"]] for part in (base, quantized)])
    places = {model: place for place, model in enumerate(base.index)}
    for model, of_model in quantized.groupby("model").indices.items():  # a table of each takes longer than its draws
        rows = np.asarray(of_model)
        draws = draw_values(needed.iloc[[places[model], *(len(base) + rows).tolist()]], measure, results)
        drawn = sign * (draws.values[:, 1:] - draws.values[:, :1])
        error[rows], source[rows] = drawn.std(axis=0), draws.source
        low[rows], high[rows] = np.quantile(drawn, [0.025, 0.975], axis=0)
    if measure.higher_is_better and "n" in quantized:
        low, high = widen_degenerate(low, high, quantized["n"].to_numpy(dtype=np.float64))
    return quantized.assign(error=error, low=low, high=high, source=source)
