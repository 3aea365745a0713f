"""Which model fits where: the published tables, the formulas by hand, and the command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import transformers

from kbit.costs.fit import parse_precisions, tabulate_largest, tabulate_memory
from kbit.costs.hardware import GB, parse_hardware
from kbit.costs.memory import Use, count_cache_per_token, count_memory, find_longest_context
from kbit.costs.shapes import ModelShape, measure_shape, read_catalogue
from kbit.methods.config import QuantConfig

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
NOTHING = Use(context=0)
BASELINE, INT8 = QuantConfig(bits=16), QuantConfig.from_name("int8_rowwise")


# An encoder and a decoder of 24 layers, with attention within both and from the one to the other (Raffel et al. 2020).
T5_MATRICES = {(16384, 1024): 216, (1024, 16384): 72, (65536, 1024): 48, (1024, 65536): 48}
T5_11B = ModelShape("t5-11b", 11_307_321_344, 48, 1024, 128, 2 * 24 * 2 * 16384, 32128, 512, T5_MATRICES)


@pytest.fixture(scope="module")
def listed() -> list[ModelShape]:
    """The models that Dettmers et al. 2022 (LLM.int8()) list by hardware."""
    published = read_catalogue()
    shapes = [published[name] for name in ("bloom", "opt-175b", "opt-66b", "opt-30b", "opt-13b")]
    shapes.append(measure_shape("gpt-j-6b", transformers.GPTJConfig()))
    shapes.append(measure_shape("gpt-neo-1.3b", transformers.GPTNeoConfig()))
    return [*shapes, T5_11B]


# Dettmers et al. 2022, LLM.int8(), table 2: hardware, the largest model at 16 bits and at 8 bits.
INT8_TABLE = [
    ("8x80GB", "bloom", "bloom"),
    ("8x40GB", "opt-66b", "bloom"),
    ("8xrtx3090", "opt-66b", "bloom"),
    ("4xrtx3090", "opt-30b", "opt-66b"),
    ("15GB", "gpt-j-6b", "opt-13b"),
    ("12GB", "gpt-neo-1.3b", "t5-11b"),
]


@pytest.mark.parametrize(("hardware", "at_16_bits", "at_8_bits"), INT8_TABLE)
def test_the_largest_models_are_those_of_the_paper(
    listed: list[ModelShape], hardware: str, at_16_bits: str, at_8_bits: str
) -> None:
    precisions = {"16": BASELINE, "8": INT8}
    table = tabulate_largest(listed, precisions, [parse_hardware(hardware)], NOTHING, overhead=0)
    assert table.iloc[0].tolist() == [hardware, at_16_bits, at_8_bits]


@pytest.mark.parametrize(
    ("train", "parameters", "gigabytes"),
    [("none", 66, 132), ("adam", 66, 1056), ("adam8", 66, 396), ("none", 176, 352), ("adam", 176, 2816)],
)
def test_training_memory_is_16_or_6_bytes_a_parameter(train: str, parameters: int, gigabytes: int) -> None:
    """The round numbers of the papers, from round numbers of parameters."""
    shape = ModelShape("round", parameters * 10**9, 1, 1, 1, 1, 1, 1, {})
    assert count_memory(shape, BASELINE, Use(context=0, train=train)).total == gigabytes * GB


def test_blooms_cache_is_4_megabytes_a_token() -> None:
    assert count_cache_per_token(read_catalogue()["bloom"]) == 2 * 70 * 112 * 128 * 2 == 4_014_080


def test_the_cache_is_what_transformers_keeps(build_tiny: Callable[..., Any]) -> None:
    import torch

    model = build_tiny("llama", num_key_value_heads=2, num_attention_heads=4).to(torch.bfloat16)
    tokens = torch.zeros((3, 20), dtype=torch.long)
    layers = model(tokens, use_cache=True).past_key_values.layers
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    use = Use(context=20, batch=3)
    assert count_memory(measure_shape("tiny", model.config), BASELINE, use).cache == kept


def test_lora_counts_what_peft_trains(build_tiny: Callable[..., Any]) -> None:
    import peft

    model = build_tiny("gpt_neox")
    shape = measure_shape("tiny", model.config)
    config = peft.LoraConfig(r=4, target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])
    adapted = peft.inject_adapter_in_model(config, model)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape.count_adapter_parameters(4) == trained
    memory = count_memory(shape, QuantConfig(bits=4), Use(context=0, train="lora", rank=4))
    assert memory.training == 16 * trained
    plain, quantized = (
        count_memory(shape, QuantConfig(bits=bits), Use(context=8, train="lora")).activations for bits in (16, 4)
    )
    assert quantized - plain == 2 * 256 * 64  # the largest matrix, which is dequantized for its product


def test_the_longest_context_fits_and_the_next_does_not() -> None:
    shape, quant = read_catalogue()["opt-13b"], QuantConfig(bits=4)

    def count(context: int) -> int:
        return count_memory(shape, quant, Use(context=context)).total

    available = 8.5 * GB
    longest = find_longest_context(shape, count, available)
    assert 0 < longest < 2048
    assert count(longest) <= available < count(longest + 1)
    assert find_longest_context(shape, count, 10**15) == shape.context == 2048
    assert find_longest_context(shape, count, 0) == 0


def test_cards_and_totals_agree() -> None:
    shapes = [read_catalogue()["bloom"]]
    hardware = [parse_hardware("24GB"), parse_hardware("5xrtx3090")]
    table = tabulate_memory(shapes, parse_precisions("16,nf4_dq"), hardware, Use(batch=2), overhead=GB)
    assert table["precision"].tolist() == ["16-bit", "nf4_dq"]
    parts = table[["weights", "training", "cache", "activations"]].sum(axis=1)
    pd.testing.assert_series_equal(parts, table["total"], check_names=False)
    for row in table.to_dict("records"):
        cards = row["24GB: cards"]
        assert 23 * (cards - 1) < row["total"] <= 23 * cards
        assert (row["5xrtx3090: context"] >= 2048) == (cards <= 5)


@pytest.mark.parametrize(
    ("text", "cards", "gigabytes"),
    [
        ("24GB", 1, 24),
        ("4x24gb", 4, 24),
        ("rtx3090", 1, 24),
        ("8xrtx3090", 8, 24),
        ("RTX3090x2", 2, 24),
        ("1.5GB", 1, 1.5),
        ("800mb", 1, 0.8),
        ("2x6 GiB", 2, 6 * 1.073741824),
    ],
)
def test_hardware_is_read(text: str, cards: int, gigabytes: float) -> None:
    hardware = parse_hardware(text)
    assert hardware.cards == cards
    assert hardware.card_bytes == pytest.approx(gigabytes * GB)


def test_the_command_prints_and_writes(kbit: Kbit) -> None:
    done = kbit("fit", "--models", "opt-13b,pythia-70m", "--hardware", "12GB", "--bits", "16,4", "--csv", "fit.csv")
    assert done.code == 0
    assert done.out.splitlines()[2].split() == ["12GB", "pythia-70m", "opt-13b"]
    assert len(pd.read_csv("fit.csv")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "rtx3091"), "'rtx3091' is neither an amount of memory (24GB, 4x24GB) nor a card"),
        (("--hardware", "0x24GB"), "'0x24GB' is neither"),
        (("--bits", "4,9"), "--bits 9: bits=9 is not in 2..8"),
        (("--bits", "nf5x"), "did you mean nf5?"),
        (("--context", "-1"), "--context -1 is less than 0"),
        (("--overhead", "nan"), "--overhead nan is less than 0"),
        (("--train", "sgd"), "--train='sgd' is not one of: none, adam, adam8, lora"),
        (("--train", "adam", "--bits", "4"), "changes the weights, which nf4 has rounded"),
        (("--models", "opt-13x"), "did you mean opt-13b"),
    ],
)
def test_wrong_arguments_are_named(kbit: Kbit, arguments: tuple[str, ...], message: str) -> None:
    done = kbit("fit", *arguments)
    assert (done.code, message in done.err) == (1, True)
