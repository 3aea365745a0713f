"""kbit.compare: the numbers of `kbit run`, their differences item by item, and models that are left as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import kbit
from kbit.notebook import comparison
from kbit.store.items import read_items

QUANTIZERS = ("nf4", "int4", kbit.QuantSpec(bits=3, data_type="nf", block_size=32))
SMALL: dict[str, Any] = {"tasks": ["nano_choice", "nano_swap"], "limit": 20, "windows": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def table(store: Path) -> pd.DataFrame:
    return kbit.compare("nano-neox-98k", QUANTIZERS, results=store, reference="int4", **SMALL)


def test_there_is_a_row_for_each_quantizer_after_the_16_bit_model(table: pd.DataFrame) -> None:
    assert table["quantizer"].tolist() == ["16-bit", "nf4", "int4", "nf3 block 32"]
    assert table["bits_per_param"].tolist() == [16, 4.25, 4.25, 3.5]
    assert table["weight_error"].tolist() == sorted(table["weight_error"])
    assert table.attrs["reference"] == "int4"


def test_its_numbers_are_those_of_the_store(table: pd.DataFrame, store: Path) -> None:
    rows = kbit.read_results(store)
    stored = rows[rows["metric"] == "cross_entropy"].set_index(["bits", "data_type"])
    nf4 = table.set_index("quantizer").loc["nf4"]
    for column, name in [("cross_entropy", "value"), ("cross_entropy_low", "low"), ("cross_entropy_high", "high")]:
        assert nf4[column] == stored.loc[(4, "nf"), name]
    mean = rows[(rows["task"] == "mean_zero_shot") & (rows["data_type"] == "int")].iloc[0]
    int4 = table.set_index("quantizer").loc["int4"]
    assert [int4[name] for name in ("acc", "acc_low", "acc_high")] == pytest.approx(
        [mean[name] for name in ("value", "low", "high")]
    )


def test_differences_are_those_of_the_items(table: pd.DataFrame, store: Path) -> None:
    """Student's paired interval by SciPy, from the items that the store keeps."""
    keys = kbit.read_results(store).drop_duplicates("key").set_index(["bits", "data_type"])["key"]
    items = read_items(store, "nano_held_out", "cross_entropy")
    paired = stats.ttest_rel(items[keys[4, "nf"]], items[keys[4, "int"]])
    low, high = paired.confidence_interval(0.95)
    row = table.set_index("quantizer").loc["nf4"]
    assert row["cross_entropy_difference"] == pytest.approx(np.mean(items[keys[4, "nf"]] - items[keys[4, "int"]]))
    assert row["cross_entropy_difference_low"] == pytest.approx(low)
    assert row["cross_entropy_difference_high"] == pytest.approx(high)
    reference = table.set_index("quantizer").loc["int4"]
    assert [reference[name] for name in reference.index if "_difference" in name] == [0.0] * 3 * 6


def test_no_other_quantizer_is_said_to_be_exactly_as_accurate(table: pd.DataFrame) -> None:
    others = table[table["quantizer"] != "int4"]
    for name in ("acc", "acc nano_choice", "acc nano_swap"):
        assert (others[f"{name}_difference_low"] < others[f"{name}_difference_high"]).all()


def test_what_the_store_has_is_not_measured_again(
    table: pd.DataFrame, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(comparison, "Session")
    again = kbit.compare("nano-neox-98k", QUANTIZERS, results=store, reference="int4", **SMALL)
    pd.testing.assert_frame_equal(again, table)


def test_a_model_of_ones_own_gives_the_same_numbers_and_stays_as_it_was(table: pd.DataFrame) -> None:
    loaded = kbit.load_model("nano-neox-98k")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    own = kbit.compare(loaded.model, ["int4"], tokenizer=loaded.tokenizer, **SMALL)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    columns = ["quantizer", "total_bits", "weight_error", "cross_entropy", "kl_divergence", "acc"]
    pd.testing.assert_frame_equal(own[columns], table.iloc[[0, 2]][columns].reset_index(drop=True))


def test_a_plain_module_is_compared_by_its_outputs() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 8)).train()
    x = torch.randn(40, 64)
    rows: Any = kbit.compare(module, ["int4", "nf4"], inputs=x).set_index("quantizer").T
    assert module.training
    module.eval()
    with torch.no_grad():
        exact = module(x)
        for name in ("0.weight", "2.weight"):
            weight = module.get_parameter(name)
            weight.copy_(kbit.fake_quantize(weight.detach(), kbit.QuantSpec.from_name("int4")))
        errors = (module(x) - exact).norm(dim=1) / exact.norm(dim=1)
    assert rows["int4"]["output_error"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert rows["16-bit"]["output_error"] == 0
    assert 4 < rows["nf4"]["bits_per_param"] < 4.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kbit.compare("nano-neox-98k", ["nf44"]), r"quant='nf44': did you mean nf4\? It is not one of: "),
        (lambda: kbit.compare("nano-neox-98k", []), "no quantizer"),
        (lambda: kbit.compare("nano-neox-98k", ["nf4", "nf4"]), "nf4 is given twice"),
        (
            lambda: kbit.compare("nano-neox-98k", ["nf4"], reference="int4"),
            "reference='int4' is not one of: 16-bit, nf4",
        ),
        (lambda: kbit.compare(nn.Linear(4, 4), ["nf4"]), "a Linear is no language model.*inputs"),
        (
            lambda: kbit.compare(nn.Linear(64, 4), [kbit.QuantConfig(exclude="weight")], inputs=torch.ones(2, 64)),
            "nf4 block 64 exclude=weight: it leaves nothing of the Linear",
        ),
    ],
    ids=["unknown", "none", "twice", "reference", "no inputs", "no matrix"],
)
def test_what_cannot_be_compared_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_without_its_tokenizer_is_refused(build_tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="needs tokenizer="):
        kbit.compare(build_tiny("llama"), ["nf4"])


def test_a_model_that_is_no_16_bit_model_is_refused_each_time(tokenizer: Any) -> None:
    loaded = kbit.load_model("nano-neox-98k")
    kbit.quantize_model(loaded.model, kbit.QuantSpec(bits=3))
    for _ in range(2):
        with pytest.raises(ValueError, match="already quantized"):
            kbit.compare(loaded.model, ["nf4"], tokenizer=loaded.tokenizer, windows=1)
    other = kbit.load_model("nano-neox-98k")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1 / 3)
    with pytest.raises(ValueError, match="no 16-bit values"):
        kbit.compare(other.model, ["nf4"], tokenizer=other.tokenizer, windows=1)
    layer = nn.Linear(64, 8)
    kbit.quantize_model(layer, kbit.QuantConfig(include="weight", min_coverage=0.0))
    with pytest.raises(ValueError, match="already quantized"):
        kbit.compare(layer, ["nf4"], inputs=torch.ones(2, 64))


def test_a_model_in_training_is_measured_without_dropout(build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = build_tiny("gpt2", vocab_size=1024, resid_pdrop=0.5).half().float().train()
    table = kbit.compare(model, ["nf4"], tokenizer=tokenizer, windows=2)
    assert table["kl_divergence"].iloc[0] == 0
    assert model.training
    again = kbit.compare(model, ["nf4"], tokenizer=tokenizer, windows=2)
    pd.testing.assert_frame_equal(again, table)


def test_the_comparison_is_drawn_with_its_reference(table: pd.DataFrame) -> None:
    fig = kbit.plot(table)
    labels = [axis.get_xlabel() for axis in fig.axes]
    assert labels == ["cross entropy (nats per token)", "difference to int4"]
    ticks = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert ticks == ["nf3 block 32 (3.50)", "int4 (4.25)", "nf4 (4.25)", "16-bit (16.00)"]
    assert kbit.plot(table, "acc nano_swap").axes[0].get_xlabel() == "acc nano_swap"
    with pytest.raises(ValueError, match=r"measure='accc' is not one of: cross_entropy, .*did you mean acc"):
        kbit.plot(table, "accc")
