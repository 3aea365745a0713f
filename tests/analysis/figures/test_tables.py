"""Tables, relations and maps with known answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from toy_curves import make_results

from kbit.analysis.curves.curves import ZERO_SHOT, AmbiguousResults, Measure, find_cross_entropy
from kbit.analysis.curves.published import compare_anchors, match_published, read_published
from kbit.analysis.figures.drawing import MissingResults, PaperFigure, draw_table
from kbit.analysis.figures.law_table import compare_laws
from kbit.analysis.figures.maps import choose_ink, name_part
from kbit.analysis.figures.registry import FIGURES
from kbit.analysis.figures.relations import correlate, read_loss, read_lost, read_weight_error, resample_groups
from kbit.analysis.figures.roofline import DEVICES, Device, estimate_seconds, find_largest_batch
from kbit.analysis.figures.tables import table_2


def test_table_1_holds_ours_and_the_papers(planted: pd.DataFrame, draw_planted: Callable[[str], PaperFigure]) -> None:
    figure = draw_planted("table_1")
    paper = figure.data[figure.data["model"] == "opt-175b (paper)"]
    assert paper["gptq_2bit"].tolist() == [11.84, 10.0, 9.18]
    assert paper["float_3bit"].tolist() == [13.26, 10.38, 9.99]
    row = planted.query("model == 'opt-1m' and bits == 3 and data_type == 'float' and block_size == 64")
    loss = row.loc[(row["metric"] == "cross_entropy") & (row["exponent_bits"] == 2), "value"].iloc[0]
    ours = figure.data.query("model == 'opt-1m' and block_size == 64")
    assert ours["float_3bit"].iloc[0] == pytest.approx(np.exp(loss))


def test_table_2_compares_measured_correlations(planted: pd.DataFrame) -> None:
    relations = ["feed_forward", "attention", "control"]
    rows = pd.DataFrame(
        [(model, f"proxy/{r}") for model in ("a", "opt-350m", "c") for r in relations], columns=["model", "task"]
    )
    rows = rows.assign(metric="spearman_weight_std", bits=16, family="toy", key=rows["model"])
    rows["parameters"] = rows["model"].map({"a": 10, "opt-350m": 350, "c": 5})
    values = [0.7, 0.3, 0.0, 0.8, 0.35, 0.05, 0.75, 0.4, 0.0]
    figure = table_2(rows.assign(value=values))
    assert figure.verdict.startswith("Holds: feed-forward minus attention +0.40 (")
    assert set(figure.data["model"]) >= {"a", "opt-66b (paper)"}
    assert figure.table is not None
    shown = figure.table.set_index("model")["control"]  # ours is its own row beside the paper's of the same model
    assert (shown["opt-350m"], shown["opt-350m (paper)"]) == ("0.05", "-0.05")
    assert shown.index[:3].tolist() == ["c", "a", "opt-350m"]  # by size
    # 0.333 +- 4.303 * 0.0577 / sqrt(3): Student's quantile of two degrees of freedom
    assert "attention minus control +0.33 (+0.19 to +0.48)" in figure.verdict
    assert table_2(rows.assign(value=[-v for v in values])).verdict.startswith("Does not hold")
    assert table_2(rows.assign(value=[*values[:6], 0.3, 0.4, 0.0])).verdict.startswith("Undecided")
    assert table_2(rows.head(3).assign(value=values[:3])).verdict.startswith("Undecided")
    assert table_2(rows.head(2).assign(value=values[:2])).verdict == "Not tested: no model has all three correlations."
    quantized = rows.assign(value=0.0, bits=3, key=rows["model"] + "-3")
    both = table_2(pd.concat([quantized, rows.assign(value=values)], ignore_index=True))
    assert both.verdict == figure.verdict  # the 16-bit experiment stands for its model
    assert "Data: 3 experiments on 3 models of toy." in " ".join(both.notes)


def test_published_values_are_the_transcribed_ones() -> None:
    table = read_published().set_index(["model", "bits", "method", "task", "metric"])["value"]
    assert table.index.is_unique
    assert table["opt-125m", 16, "none", "wikitext2", "perplexity"] == 27.65
    # the mean over four tasks is that of the four rows
    tasks = [table["opt-175b", 16, "none", t, "acc"] for t in ("lambada_openai", "piqa", "winogrande", "hellaswag")]
    assert table["opt-175b", 16, "none", "mean_zero_shot", "acc"] == pytest.approx(np.mean(tasks))


def test_published_points_lie_where_ours_do() -> None:
    curves = pd.DataFrame(
        {"panel": "opt", "model": ["opt-125m", "opt-125m", "mine"], "bits": [16, 3, 16], "total_bits": [2e9, 4e8, 1e9]}
    )
    measure = Measure("cross entropy", "cross_entropy", "wikitext2", higher_is_better=False)
    points = match_published(curves, measure)
    assert set(zip(points["bits"], points["total_bits"], strict=True)) == {(16, 2e9), (3, 4e8)}
    assert points.loc[points["bits"] == 16, "value"].tolist() == [pytest.approx(np.log(27.65))]
    assert match_published(curves, ZERO_SHOT).empty


def test_published_circles_are_drawn_and_their_source_named(planted: pd.DataFrame) -> None:
    names = {"opt-1m": "opt-125m", "opt-4m": "opt-350m", "opt-16m": "opt-1.3b"}
    rows = planted[planted["metric"] == "cross_entropy"].replace({"model": names}).assign(task="wikitext2")
    figure = FIGURES["figure_13"](rows)
    assert "Circles: published values; GPTQ" in " ".join(figure.write_paragraphs("full"))
    assert figure.fig.subfigs[0].legends[0].get_texts()[-1].get_text() == "published"


def test_anchors_say_whether_published_values_are_met(planted: pd.DataFrame) -> None:
    base = planted[(planted["bits"] == 16) & (planted["model"] == "opt-1m")].head(2)
    rows = base.assign(
        model="opt-125m",
        task=["piqa", "winogrande"],
        metric="acc",
        value=[0.63, 0.51],
        low=[0.5, 0.4],
        high=[0.7, 0.6],
    )
    table = compare_anchors(rows).set_index("task")
    assert table["agrees"].to_dict() == {"piqa": True, "winogrande": False}  # however wide our intervals are
    assert FIGURES["anchors"](rows).verdict.startswith("1 of 2 values agree with the published ones to 0.005")
    few = rows.assign(evaluation="float32, 10 items")
    assert compare_anchors(few).empty
    assert compare_anchors(pd.concat([few, rows])).equals(compare_anchors(rows))
    with pytest.raises(AmbiguousResults, match="bfloat16"):
        compare_anchors(pd.concat([rows, rows.assign(evaluation="bfloat16, all items", key="other")]))


def test_a_perplexity_agrees_relative_to_the_published(planted: pd.DataFrame) -> None:
    base = planted[(planted["bits"] == 16) & (planted["model"] == "opt-1m")].head(1)
    rows = base.assign(model="opt-125m", task="wikitext2", metric="perplexity", evaluation="float32, all windows")
    assert compare_anchors(rows.assign(value=27.65 * 1.004))["agrees"].tolist() == [True]
    assert compare_anchors(rows.assign(value=27.65 * 1.006))["agrees"].tolist() == [False]


@pytest.mark.parametrize("name", ["perplexity_accuracy", "kl_accuracy", "error_accuracy", "error_loss"])
def test_a_baseline_measured_in_another_way_is_refused(name: str, planted: pd.DataFrame) -> None:
    base = planted[planted["bits"] == 16]
    other = base.assign(evaluation="bfloat16, 100 items", key="0" + base["key"], value=base["value"] - 0.1)
    with pytest.raises(AmbiguousResults, match="bfloat16, 100 items"):
        FIGURES[name](pd.concat([other, planted], ignore_index=True))


def test_the_error_of_some_layers_or_of_activations_is_not_the_weights(planted: pd.DataFrame) -> None:
    own = read_weight_error(planted)
    assert len(own) == planted.loc[planted["bits"] < 16, "key"].nunique()
    rows = planted[planted["bits"] == 4]
    for change in ({"exclude": r"layers\.(?!3\.)"}, {"include": "mlp"}, {"method": "llm_int8"}):
        more = rows.assign(key="more" + rows["key"], **change)
        assert read_weight_error(pd.concat([planted, more], ignore_index=True)).equals(own)


def test_what_is_lost_is_against_the_same_model_at_16_bits(planted: pd.DataFrame) -> None:
    added = read_lost(planted, find_cross_entropy(planted))
    about = planted.drop_duplicates("key").set_index("key").loc[added.index]
    assert (about["bits"] < 16).all()
    loss = read_loss(planted)
    for key in added.index[::50]:
        base = planted.query("bits == 16 and model == @about.model[@key] and metric == 'cross_entropy'")["value"].iloc[
            0
        ]
        assert added[key] == pytest.approx(loss[key] - base)


def test_bars_of_a_relation_are_intervals_of_what_is_lost(planted: pd.DataFrame) -> None:
    few = planted[(planted["data_type"].isna() | (planted["data_type"] == "nf")) & (planted["method"] != "gptq")]
    for name in ("kl_accuracy", "error_accuracy", "error_loss"):
        data = FIGURES[name](few).data
        assert (data["low"] < data["y"]).all()
        assert (data["y"] < data["high"]).all()
    # unpaired here: two independent values of half-widths 0.002 and 0.003
    assert (data["high"] - data["low"]).to_numpy() == pytest.approx(2 * 0.0025 * 2**0.5, rel=0.2)
    assert "low" not in FIGURES["kl_accuracy"](planted).data  # too many points for bars
    assert "low" not in FIGURES["perplexity_accuracy"](few).data


def test_correlations_and_their_intervals() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(400)
    points = pd.DataFrame({"x": x, "y": 0.8 * x + 0.6 * rng.standard_normal(400), "model": np.arange(400) % 20})
    for rank in (False, True):
        r, low, high, source = correlate(points, rank)
        assert low < r < high
        assert low < 0.8 < high + 0.03
        assert source == "bootstrap over 20 models"
    assert "Fisher" in correlate(points.assign(model=0), rank=False)[3]


def test_resampling_by_sums_is_resampling_of_points() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, 50)
    points = pd.DataFrame({"x": np.where(codes < 7, 3.0, 4.0), "y": rng.standard_normal(50)})
    found = resample_groups(points, codes, np.random.default_rng(1))
    again = np.random.default_rng(1)
    varied = 0
    for r in found:
        chosen = [np.flatnonzero(codes == group) for group in again.integers(0, 8, 8)]
        drawn = points.iloc[np.concatenate(chosen)]
        if drawn["x"].nunique() < 2:
            assert np.isnan(r)
        else:
            varied += 1
            assert r == pytest.approx(np.corrcoef(drawn.T)[0, 1])
    assert 0 < varied < len(found)


def test_a_rank_correlation_sees_order_alone() -> None:
    points = pd.DataFrame({"x": np.arange(10.0), "model": 0})
    assert correlate(points.assign(y=np.exp(points["x"])), rank=True)[0] == pytest.approx(1)


def test_the_map_finds_the_best_cell_and_counts_scales(draw_planted: Callable[[str], PaperFigure]) -> None:
    figure = draw_planted("data_types_map")
    four = figure.data[figure.data["panel"] == "opt, 4-bit"]
    assert len(four) == 18  # five data types by three block sizes, float by a fourth, and two more exponents at 64
    assert four["loss"].min() == 0
    assert four.sort_values("loss")["data_type"].iloc[0] == "quantile4"
    assert four.set_index("block_size")["bits_per_param"].to_dict() == {
        64: 4.25,
        128: 4.125,
        256: 4.0625,
        1024: 4 + 1 / 64,
    }


def test_shades_mean_the_same_in_every_panel_and_blanks_are_hatched(planted: pd.DataFrame) -> None:
    hole = (planted["data_type"] == "int") & (planted["block_size"] == 128)
    figure = FIGURES["data_types_map"](planted[~hole])
    assert set(figure.data.groupby("panel").size()) == {17, 18}  # 4 and 6 bits
    *panels, bar = figure.fig.axes
    assert len(panels) == 4
    assert "lost" in bar.get_ylabel()
    shades: dict[float, set[Any]] = {}
    for axes in panels:
        assert axes.patch.get_hatch() == "////"
        cells = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_fill()]
        assert len(cells) == len(axes.texts)  # a cell that was not measured is not covered
        losses = {text.get_position(): float(text.get_text().split()[0]) for text in axes.texts}
        frames = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
        framed = {(round(frame.get_x() + 0.46), round(frame.get_y() + 0.46)) for frame in frames}
        assert {losses[place] for place in framed} == {min(losses.values())}
        for cell, text in zip(cells, axes.texts, strict=True):
            shades.setdefault(float(text.get_text().split()[0]), set()).add(cell.get_facecolor())
            assert contrast_ratio(cell.get_facecolor(), text.get_color()) >= 4.5
    assert all(np.ptp(np.array(list(same)), axis=0).max() < 0.05 for same in shades.values())
    luminances = [find_luminance(next(iter(shades[loss]))) for loss in sorted(shades)]
    assert luminances == sorted(luminances, reverse=True)  # darker is worse, also across panels


def find_luminance(color: Any) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    rgb = np.array(to_rgb(color))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def contrast_ratio(one: Any, other: Any) -> float:
    """(L + 0.05) / (L' + 0.05), the lighter above (WCAG 2.1)."""
    dark, light = sorted([find_luminance(one), find_luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_ink_is_legible_on_any_shade(shade: tuple[float, float, float]) -> None:
    assert contrast_ratio(shade, choose_ink(shade)) >= 4.5


def test_the_map_says_how_sure_its_best_cell_is(draw_planted: Callable[[str], PaperFigure]) -> None:
    figure = draw_planted("data_types_map")
    four = figure.data[figure.data["panel"] == "opt, 4-bit"].sort_values("loss")
    found = re.search(
        r"opt, 4-bit: best is quantile4 block 64 \[4\.25\], its lead over (.+?) (\S+) nats \(95%", figure.verdict
    )
    assert found is not None
    assert float(found[2]) == pytest.approx(four["loss"].iloc[1], abs=6e-5)


def test_sensitivity_is_the_loss_of_one_part(planted: pd.DataFrame) -> None:
    base = planted[(planted["bits"] == 16) & (planted["model"] == "opt-1m")]
    rows = [base]
    for part, loss in (("0", 0.1), ("1", 0.3), ("10", 0.2)):
        rows.append(
            base.assign(key=part, bits=3, data_type="nf", exclude=rf"layers\.(?!{part}\.)", value=base["value"] + loss)
        )
    figure = FIGURES["sensitivity"](pd.concat(rows, ignore_index=True))
    assert figure.data["part"].tolist() == ["layer 0", "layer 1", "layer 10"]
    assert figure.data["loss"].to_numpy() == pytest.approx([0.1, 0.3, 0.2])
    assert "opt-1m: layer 1 (+0.300, nf3 none whole tensor)" in figure.verdict
    with pytest.raises(MissingResults, match=r"kbit run \+sweeps=nano/sensitivity"):
        FIGURES["sensitivity"](pd.concat(rows[:2], ignore_index=True))
    other = base.assign(key="0other", value=base["value"] - 1, evaluation="float32, 8 windows")
    with pytest.raises(AmbiguousResults, match="8 windows"):
        FIGURES["sensitivity"](pd.concat([other, *rows], ignore_index=True))


def test_sensitivity_is_by_one_quantizer(planted: pd.DataFrame) -> None:
    """Layers quantized to 3 and to 4 bits, and by int: the setting with the most layers is shown, and named."""
    base = planted[(planted["bits"] == 16) & (planted["model"] == "opt-1m")]
    rows = [base]
    for bits, kind, parts in ((3, "nf", 2), (4, "nf", 3), (4, "int", 2)):
        for part in range(parts):
            about: dict[str, Any] = {
                "key": f"{bits}{kind}{part}",
                "bits": bits,
                "data_type": kind,
                "block_size": 64,
                "method": "rtn",
            }
            loss = base["value"] + 1 / bits + 0.1 * part
            rows.append(base.assign(exclude=rf"layers\.(?!{part}\.)", value=loss, **about))
    figure = FIGURES["sensitivity"](pd.concat(rows, ignore_index=True).astype({"block_size": "Int64"}))
    assert figure.data["loss"].to_numpy() == pytest.approx([0.25, 0.35, 0.45])
    assert [axes.get_title(loc="left") for axes in figure.fig.axes] == ["opt-1m, nf4 block 64"]
    assert "Left out: 4 experiments" in " ".join(figure.write_paragraphs("full"))


def test_sensitivity_shows_all_data_types_that_tie_side_by_side(planted: pd.DataFrame) -> None:
    base = planted[(planted["bits"] == 16) & (planted["model"] == "opt-1m")]
    rows = [base]
    for kind, loss in (("nf", 0.1), ("int", 0.2)):
        for part in range(2):
            about: dict[str, Any] = {"key": f"{kind}{part}", "bits": 4, "data_type": kind, "block_size": 64}
            value = base["value"] + loss + 0.1 * part
            rows.append(base.assign(exclude=rf"layers\.(?!{part}\.)", value=value, method="rtn", **about))
    figure = FIGURES["sensitivity"](pd.concat(rows, ignore_index=True).astype({"block_size": "Int64"}))
    assert figure.verdict.endswith(
        "of opt-1m: layer 1 (+0.300, int4 block 64); opt-1m: layer 1 (+0.200, nf4 block 64)."
    )
    (axes,), [body] = figure.fig.axes, figure.fig.subfigs
    bars = {(round(bar.get_y(), 6), round(bar.get_width(), 6)): bar.get_facecolor() for bar in axes.patches}  # type: ignore[attr-defined]
    assert sorted(width for _, width in bars) == pytest.approx([0.1, 0.2, 0.2, 0.3])
    assert len({y for y, _ in bars}) == 4
    named = {text.get_text(): patch.get_facecolor() for text, patch in zip(*read_legend(body), strict=True)}
    assert set(named) == {"int4 block 64", "nf4 block 64"}
    assert set(named.values()) == set(bars.values())


def read_legend(body: Any) -> tuple[list[Any], list[Any]]:
    [legend] = body.legends
    return legend.get_texts(), legend.get_patches()


def test_laws_are_fitted_to_all_data_types_that_tie() -> None:
    table = compare_laws(make_results(("int", "nf")))
    fitted = table[table["rmse"].notna()].groupby("law")["panel"].agg(list).to_dict()
    assert "power" in fitted
    assert all(panels == ["toy, int block 64", "toy, nf block 64"] for panels in fitted.values())
    alone = compare_laws(make_results(("nf",)))
    same = ["law", "points", "rmse", "parameters"]
    pd.testing.assert_frame_equal(
        table[table["panel"] == "toy, nf block 64"][same].reset_index(drop=True),
        alone[alone["panel"] == "toy, nf block 64"][same].reset_index(drop=True),
    )


@pytest.mark.parametrize(
    ("pattern", "part"),
    [(r"layers\.(?!3\.)", "layer 3"), (r"layers\.\d+\.(?!mlp\.dense)", "mlp.dense"), ("lm_head", None)],
)
def test_a_lookahead_names_the_part(pattern: str, part: str | None) -> None:
    assert name_part(pattern) == part


def test_the_roofline_by_hand() -> None:
    device = Device("toy", bandwidth=100.0, peak=100.0)
    # 10 x 10 weights at 16 bits: 200 bytes, and 2 (10 + 10) bytes of inputs and outputs, at 100 bytes a second
    assert estimate_seconds(device, bits=16, batch=1, rows=10, columns=10) == pytest.approx(2.4)
    assert estimate_seconds(device, bits=16, batch=100, rows=10, columns=10) == pytest.approx(200)  # 20,000 operations
    assert find_largest_batch(device, bits=16) == pytest.approx(1)
    assert find_largest_batch(DEVICES[0], 16) == pytest.approx(75.9, abs=0.1)


def test_a_table_holds_every_cell() -> None:
    fig = draw_table(pd.DataFrame({"name": ["a", "b " * 40], "number": [1, 2]}), "title")
    words = [text.get_text() for text in fig.axes[0].texts]
    assert {"title", "name", "number", "a", "1", "2"} <= set(words)
    assert sum(word.count("b") for word in words) == 40 + 1


def test_methods_compete_for_a_budget(planted: pd.DataFrame) -> None:
    """GPTQ on int is planted 0.1 nats a bit better than int: of these alone it is the best choice of 4 bits."""
    rows = planted[(planted["data_type"] == "int") & (planted["block_size"] == 64) | (planted["bits"] == 16)]
    rows = rows[rows["bits"].isin([3, 4]) & (rows["family"] == "opt")]
    figure = FIGURES["frontier"](rows)
    assert set(figure.data["choice"]) == {"int4 gptq block 64"}
    assert f"Data: {rows['key'].nunique()} experiments on 3 models of opt." in " ".join(figure.write_paragraphs("full"))


def test_a_frontier_of_one_small_model_is_still_shown(planted: pd.DataFrame) -> None:
    rows = planted[(planted["data_type"] == "nf") & (planted["block_size"] == 64) & (planted["metric"] == "acc")]
    rows = rows[rows["method"].eq("rtn") & rows["outlier_fraction"].eq(0) & rows["family"].eq("opt")]
    best = rows["model"].eq("opt-1m") & rows["bits"].eq(2)
    figure = FIGURES["frontier"](rows.assign(value=rows["value"].mask(best, 0.9)))
    assert len(figure.data) == 5
    assert figure.data["total_bits"].between(rows["total_bits"].min(), rows["total_bits"].max()).all()


def test_a_precision_against_16_bits_alone_is_no_contest(planted: pd.DataFrame) -> None:
    one = planted[~planted["data_type"].eq("int") | planted["bits"].eq(8)]
    one = one[one["data_type"].isin(["int", "nf"]) | (one["bits"] == 16)]
    figure = FIGURES["verdicts"](one[one["family"] == "opt"])
    alone = figure.data["grade"].str.startswith("no contest")
    assert set(figure.data.loc[alone, "data_type"]) == {"int"}
    assert figure.data.loc[alone, "bits"].isna().all()
    counted = int((~alone).sum())
    assert f"of {counted} variants" in figure.verdict
    caption = " ".join(figure.write_paragraphs("full"))
    assert f"Not counted: {int(alone.sum())} with one quantized precision" in caption
    assert (figure.data["lowest"] < figure.data["highest"]).all()
