"""Which model is recommended for an amount of memory: on planted values, with memory added up by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from toy_items import add_items

from kbit.analysis.statistics import recommendation
from kbit.analysis.statistics.recommendation import describe_recommendation, recommend
from kbit.checks import KbitError
from kbit.costs.shapes import ModelShape

# Two layers of 16 values each for keys and values, of a token: 64 values, of 2 bytes.
CACHED = 64


@pytest.fixture(autouse=True)
def _shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModelShape:
        if name == "stranger":
            raise ValueError("unknown")
        context = 256 if name == "short" else None
        return ModelShape(name, 10**6, 2, 16, 2, CACHED, 100, context, {(16, 16): 2})

    monkeypatch.setattr(recommendation, "find_shape", find)


def make_point(model: str, bits: int, value: float, *, error: float = 0.01, **fields: Any) -> dict[str, Any]:
    """One experiment of a model whose weights take bits / 16 of 2 MB (small) or 8 MB (large)."""
    parameters = {"small": 10**6, "large": 4 * 10**6}.get(model, 10**6)
    return {
        "key": f"{model}-{bits}", "model": model, "family": "toy", "parameters": parameters,
        "bits": bits, "data_type": None if bits == 16 else "nf", "block_size": pd.NA if bits == 16 else 64,
        "exponent_bits": pd.NA, "method": None if bits == 16 else "rtn", "seed": 0, "bits_per_param": float(bits),
        "total_bits": parameters * bits, "task": "mean_zero_shot", "metric": "acc", "value": value,
        "low": value - 1.959964 * error, "high": value + 1.959964 * error, "n": 100, "evaluation": "float32, all items",
    } | fields  # fmt: skip


def make_results(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"exponent_bits": "Int64", "block_size": "Int64"})


@pytest.fixture
def results() -> pd.DataFrame:
    """Small at 4, 8 and 16 bits takes 0.5, 1 and 2 MB, and large at 4 and 16 bits 2 and 8 MB."""
    return make_results(
        make_point("small", 4, 0.50), make_point("small", 8, 0.52), make_point("small", 16, 0.53),
        make_point("large", 4, 0.60), make_point("large", 16, 0.62),
    )  # fmt: skip


def test_the_best_that_fits_is_recommended(results: pd.DataFrame) -> None:
    table = recommend(results, "2.1MB", context=0)
    assert table[["model", "variant", "fits"]].to_numpy().tolist() == [
        ["large", "nf4 block 64", True],
        ["small", "16-bit", True],
        ["small", "nf8 block 64", True],
        ["small", "nf4 block 64", True],
        ["large", "16-bit", False],
    ]
    assert table["gigabytes"].tolist() == pytest.approx([2e-3, 2e-3, 1e-3, 0.5e-3, 8e-3])
    assert table["difference"].tolist() == pytest.approx([0, -0.07, -0.08, -0.1, 0.02])
    text = describe_recommendation(table)
    assert text[0].startswith("4 of 5 measured models and quantizers fit into 2.1MB")
    assert text[1].startswith("Take large nf4 block 64: mean zero-shot accuracy 0.6 (95% interval 0.5804 to 0.6196)")
    assert text[-3].startswith("From 8 MB on: large 16-bit, +0.02")
    assert text[-2].startswith("Below 2 MB: small nf8 block 64, -0.08")
    assert text[-1].startswith("Measured: float32, all items. Differences: unpaired")


def test_models_that_round_while_they_run_are_left_out(results: pd.DataFrame) -> None:
    """A cache of 4 bits is none of 16 bits in memory, and a 16-bit model with one is not the plain model."""
    rounded = [
        make_point("large", 16, 0.9, kv_cache="int", cache_bits=4, key="cache"),
        make_point("small", 16, 0.9, activations="int", activation_bits=4, key="inputs"),
        make_point("small", 4, 0.9, activations="int", activation_bits=8, key="both"),
    ]
    table = recommend(pd.concat([results, make_results(*rounded)], ignore_index=True), "2.1MB", context=0)
    plain = recommend(results, "2.1MB", context=0)
    assert table["key"].tolist() == plain["key"].tolist()
    text = describe_recommendation(table)
    told = "Left out, as they simulate rounded inputs or caches, which take no less memory: 3 experiments."
    assert text == [*describe_recommendation(plain), told]


def test_the_context_takes_memory_too(results: pd.DataFrame) -> None:
    """At 1,000 tokens and batch 3 the cache of both models has 64 x 2 x 3,000 bytes."""
    table = recommend(results, "1GB", context=1000, batch=3).set_index(["model", "variant"])
    assert table["cache"].tolist() == pytest.approx([CACHED * 2 * 3000 / 1e9] * 5)
    states, logits = 2 * 12 * 16 * 3 * 1000, 4 * 3 * 100
    plain, packed = (table.loc[("small", name), "activations"] for name in ("16-bit", "nf4 block 64"))
    assert plain == pytest.approx((states + logits) / 1e9)
    assert packed == pytest.approx((states + logits + 2 * 16 * 16) / 1e9)  # a dequantized matrix
    parts = table["weights"] + table["cache"] + table["activations"]
    assert table["gigabytes"].tolist() == pytest.approx(parts.tolist())


def test_chances_are_those_of_independent_intervals() -> None:
    """A lead of .01 with errors of .01 each: P(best) = Phi(.01 / (.01 sqrt 2)) = .76, and 100 (1.96 sqrt 2)^2 items."""
    rows = make_results(make_point("small", 8, 0.50), make_point("small", 4, 0.49))
    table = recommend(rows, "2MB", context=0)
    assert table["chance"].tolist() == pytest.approx([0.76, 0.24], abs=0.04)
    assert table["items_to_settle"].iloc[1] == pytest.approx(768, rel=0.1)
    (line,) = [line for line in describe_recommendation(table) if line.startswith("Undecided")]
    found = re.search(r"About (\d+) items or windows .* all 100 were measured: other tasks or texts must decide", line)
    assert found is not None
    assert int(found[1]) == table["items_to_settle"].iloc[1]


def test_differences_are_paired_by_items(results: pd.DataFrame, tmp_path: Path) -> None:
    tasks = [results.assign(task=task) for task in ("a", "b")]
    stored = add_items(pd.concat([results, *tasks], ignore_index=True), tmp_path)
    alone, paired = (recommend(rows, "2.1MB", context=0) for rows in (results, stored))
    widths = [(table["difference_high"] - table["difference_low"]).iloc[4] for table in (alone, paired)]
    assert widths[1] < widths[0] / 4  # variants of a model share nearly all of their items' chance
    assert paired["chance"].iloc[0] > 0.95


def test_losses_are_lower_and_compare_within_a_family(results: pd.DataFrame) -> None:
    losses = results.assign(task="text", metric="cross_entropy", value=-results["value"], low=np.nan, high=np.nan)
    both = pd.concat([results, losses], ignore_index=True)
    table = recommend(both, "2.1MB", context=0, measure="cross_entropy")
    assert (table["model"].iloc[0], table["value"].iloc[0]) == ("large", -0.6)
    assert table["chance"].isna().all()
    assert "How sure that is cannot be said: a value has no interval." in describe_recommendation(table)
    two = losses.assign(family=losses["model"])
    with pytest.raises(KbitError, match="losses per token of large, small do not compare"):
        recommend(two, "2.1MB", context=0)


def test_what_cannot_be_recommended_is_said(results: pd.DataFrame) -> None:
    with pytest.raises(KbitError, match=r"nothing .* fits into 0.1MB .* small nf4 block 64, takes 0.5 MB"):
        recommend(results, "0.1MB", context=0)
    with pytest.raises(KbitError, match="no experiment has a mean zero-shot accuracy or a cross entropy"):
        recommend(results.assign(metric="other"), "1MB")
    with pytest.raises(ValueError, match="--memory '6' is neither an amount of memory"):
        recommend(results, "6")
    with pytest.raises(ValueError, match="--measure='accuracy' is not one of: mean_zero_shot, cross_entropy"):
        recommend(results, "1MB", measure="accuracy")
    more = pd.concat([results, make_results(make_point("stranger", 4, 0.9))], ignore_index=True)
    table = recommend(more, "2.1MB", context=0)
    assert "stranger" not in set(table["model"])
    assert describe_recommendation(table)[-1] == "Left out: stranger (its shape is not known here)."


def test_a_model_is_not_used_beyond_its_context(results: pd.DataFrame) -> None:
    more = pd.concat([results, make_results(make_point("short", 4, 0.9))], ignore_index=True)
    assert recommend(more, "1GB", context=256)["model"].iloc[0] == "short"
    table = recommend(more, "1GB", context=257)
    assert table["model"].iloc[0] == "large"
    assert describe_recommendation(table)[-1] == "Left out: short (it takes 256 tokens)."
    with pytest.raises(KbitError, match=r"257 tokens: short \(it takes 256 tokens\)\. --context asks"):
        recommend(more[more["model"] == "short"], "1GB", context=257)


def test_a_card_loses_some_memory_and_an_amount_does_not(results: pd.DataFrame) -> None:
    assert recommend(results, "24GB").attrs["available"] == 24e9
    assert recommend(results, "2xrtx3090").attrs["available"] == 2 * 23e9


def test_only_one_way_of_measuring_is_compared(results: pd.DataFrame) -> None:
    other = make_results(make_point("small", 4, 0.99, key="other", evaluation="float32, 8 items"))
    table = recommend(pd.concat([results, other], ignore_index=True), "2.1MB", context=0)
    assert 0.99 not in table["value"].tolist()
    assert "Left out, as they were measured in another way: 1 experiments." in describe_recommendation(table)
