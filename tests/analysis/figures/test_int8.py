"""The figure of int8 methods, on planted losses, and the paper's own table beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import pytest

from kbit.analysis.curves.curves import AmbiguousResults
from kbit.analysis.curves.settings import make_label
from kbit.analysis.figures.drawing import PaperFigure
from kbit.analysis.figures.int8 import read_paper
from kbit.analysis.figures.registry import FIGURES
from kbit.layers.int8_schemes import SCHEMES


def plant(planted: pd.DataFrame, added: dict[str, float]) -> pd.DataFrame:
    """The 16-bit rows of one family, and int8 methods that add so much to their cross entropy."""
    base = planted[(planted["bits"] == 16) & (planted["family"] == "opt") & (planted["metric"] == "cross_entropy")]
    rows = [base]
    for method, loss in added.items():
        moved = {name: base[name] + loss for name in ("value", "low", "high")}
        rows.append(base.assign(bits=8, data_type="int", method=method, key=base["key"] + method, **moved))
    return pd.concat(rows, ignore_index=True)


def test_the_figure_has_what_each_method_adds(planted: pd.DataFrame) -> None:
    added = {"absmax": 0.3, "vectorwise": 0.1, "llm_int8": 0.001}
    figure = FIGURES["int8_methods"](plant(planted, added))
    ours = figure.data[figure.data["source"] == "this store"]
    assert set(ours["panel"]) == {"opt"}
    assert len(ours) == 9
    for method, loss in added.items():
        assert ours.loc[ours["method"] == method, "added"].tolist() == [pytest.approx(loss)] * 3
    assert (ours["low"] < ours["added"]).all()
    assert (ours["added"] < ours["high"]).all()
    assert figure.verdict.startswith("Of 3 models: holds in 3. llm_int8 adds less than 0.01 nats: holds in 3 (+0.0010")


@pytest.mark.parametrize(
    ("absmax", "llm_int8", "verdict"),
    [
        (0.3, 0.2, "does not hold in 3. llm_int8 adds less than 0.01 nats: does not hold in 3"),
        (0.002, 0.001, "does not hold in 3. llm_int8 adds less than 0.01 nats: holds in 3"),  # absmax keeps it too
        (0.011, 0.001, "undecided in 3. llm_int8 adds less than 0.01 nats: holds in 3"),
        (0.3, 0.009, "undecided in 3. llm_int8 adds less than 0.01 nats: undecided in 3"),
    ],
)
def test_both_halves_of_the_claim_need_their_intervals(
    absmax: float, llm_int8: float, verdict: str, planted: pd.DataFrame
) -> None:
    figure = FIGURES["int8_methods"](plant(planted, {"absmax": absmax, "llm_int8": llm_int8}))
    assert figure.verdict.startswith(f"Of 3 models: {verdict}")


def test_a_baseline_of_another_evaluation_is_refused(planted: pd.DataFrame) -> None:
    rows = plant(planted, {"absmax": 0.3})
    base = rows[rows["bits"] == 16]
    other = base.assign(key="0" + base["key"], evaluation="float32, 8 windows", value=base["value"] - 1)
    with pytest.raises(AmbiguousResults, match="8 windows"):
        FIGURES["int8_methods"](pd.concat([other, rows], ignore_index=True))


def test_a_threshold_of_ones_own_is_named(planted: pd.DataFrame) -> None:
    rows = plant(planted, {"llm_int8": 0.1}).assign(activation_threshold=3.0)
    ours = FIGURES["int8_methods"](rows).data
    assert "llm_int8 threshold 3" in set(ours["method"])


def test_the_papers_table_is_the_transcribed_one() -> None:
    table = read_paper().set_index(["method", "model"])
    assert set(table.index.get_level_values("method")) == set(SCHEMES)
    assert table.loc[("absmax", "fairseq-125m"), "perplexity"] == 87.76
    assert table.loc[("absmax", "fairseq-125m"), "added"] == pytest.approx(math.log(87.76 / 25.65))
    assert table.loc[("zeropoint_llm_int8", "fairseq-13b"), "added"] == 0
    assert len(table) == 8 * 5


def test_an_int8_method_and_ways_to_select_outliers_name_their_curve() -> None:
    row = {"bits": 8, "data_type": "int", "exponent_bits": None, "layout": "row", "scale_format": "fp32"}
    assert make_label(row | {"method": "llm_int8", "activation_threshold": 6.0}) == "int llm_int8"
    assert make_label(row | {"method": "llm_int8", "activation_threshold": 3.0}) == "int llm_int8 threshold 3"
    nf = {"bits": 3, "data_type": "nf", "exponent_bits": None, "method": "rtn"}
    assert make_label(nf | {"outlier_fraction": 0.02, "outlier_selection": "proxy"}) == "nf outliers 0.02"
    assert make_label(nf | {"outlier_fraction": 0.02, "outlier_selection": "random"}) == "nf random outliers 0.02"
    assert make_label(nf | {"outlier_fraction": 0.0, "outlier_zscore": 4.0}) == "nf outliers z > 4"


def test_figure_4_shows_the_controls_beside_the_proxy(
    planted: pd.DataFrame, draw_planted: Callable[[str], PaperFigure]
) -> None:
    planted = planted[(planted["family"] == "opt") & (planted["bits"].isin([3, 4]) & planted["data_type"].eq("nf"))]
    kept = planted[planted["outlier_fraction"] == 0.02]
    control = kept.assign(outlier_selection="random", key=kept["key"] + "random")
    figure = FIGURES["figure_4"](pd.concat([planted.assign(outlier_selection="proxy"), control], ignore_index=True))
    three = figure.data[figure.data["panel"] == "opt, nf3 block 64"]
    assert list(dict.fromkeys(three["series"])) == ["3-bit", "3-bit with 2% outliers", "3-bit with 2% random", "4-bit"]
    # the claims are about the proxy; one more part compares it with the control, whose loss is planted as the same
    head, _, part = figure.verdict.partition(" [outliers by proxy gain more than random dimensions] ")
    assert head == draw_planted("figure_4").verdict
    assert part.startswith("Of 2 panels: undecided in 2. Mean lead: opt, nf3 block 64, 3-bit with 2% outliers over")
