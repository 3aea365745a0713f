"""Results of models whose inputs of products, or keys and values, are rounded while they run."""

from __future__ import annotations

from typing import Final

import pandas as pd

from kbit.analysis.curves.settings import is_missing, make_labels, name_variant
from kbit.methods.options import RUN_TIME
from kbit.numerics.spec import BASELINE_BITS

BITS: Final = ("activation_bits", "cache_bits")


def leave_out_rounded(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results without models whose weights alone are at 16 bits, which would pass for 16-bit baselines."""
    if results.empty:  # it may have no columns
        return results
    return _leave_out(results, (results["bits"] == BASELINE_BITS) & is_rounded(results))


def leave_out_run_time(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results without models that round anything while they run, whatever their weights are."""
    return _leave_out(results, is_rounded(results))


def is_rounded(results: pd.DataFrame) -> pd.Series[bool]:
    """Return, for each row, whether its model rounds inputs of products, or keys and values, while it runs."""
    known = [name for name in RUN_TIME if name in results]
    return results[known].notna().any(axis=1).astype(bool)


def _leave_out(results: pd.DataFrame, rows: pd.Series[bool]) -> pd.DataFrame:
    if not rows.any():
        return results
    kept = results[~rows]
    kept.attrs = results.attrs
    return kept


def split_bits(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with the weights' bits in a column weight_bits, and in bits the fewest of anything in the model.

    Only a model of which nothing is rounded then has 16 in column bits.
    """
    filled = {name: rows[name].astype("Int64").fillna(BASELINE_BITS) for name in BITS}
    rows = rows.assign(weight_bits=rows["bits"], **filled)
    return rows.assign(bits=rows[["weight_bits", *BITS]].min(axis=1).astype(int))


def name_weights(rows: pd.DataFrame) -> pd.Series[str]:
    """Return the name of each row's quantizer of weights. It tells neither their bits nor a rotation."""
    others = ["activations", "kv_cache", *BITS, "rotation"]
    labels = make_labels(rows.assign(bits=rows["weight_bits"]).drop(columns=others))
    names = [
        "16-bit" if is_missing(label) else name_variant(label, block)
        for label, block in zip(labels, rows["block_size"], strict=True)
    ]
    return pd.Series(names, rows.index, dtype=object)
