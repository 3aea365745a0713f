"""A cache of keys and values in few bits: attention's numbers, and that scoring and generation see the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kbit.evaluation.scorer import Scorer
from kbit.layers.run_time.forwards import list_forwards
from kbit.layers.run_time.quantized_cache import QuantizedCache, count_cache_bits
from kbit.methods.config import CacheConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model, restore_weights
from kbit.models.inference import find_cache_name
from kbit.models.loading import load_model

TOKENS = torch.randint(0, 259, (2, 21), generator=torch.Generator().manual_seed(3))
PER_TOKEN = CacheConfig(bits=3)
PER_CHANNEL = CacheConfig(bits=3, keys="channel", block_tokens=8)


def quantize_cache(model: Any, cache: CacheConfig) -> Any:
    """The model in float64, whose rounding moves no value over a threshold, with its cache quantized."""
    quantize_model(model.double(), QuantConfig(bits=16, kv_cache=cache))
    return model


def round_rows(x: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """Integers of 3 bits, -3..3, that share a float16 scale along an axis."""
    largest = np.abs(x).max(axis=axis, keepdims=True).astype(np.float16).astype(np.float64)
    rounded: np.ndarray[Any, Any] = np.clip(np.sign(x) * np.floor(np.abs(x) / largest * 3 + 0.5), -3, 3) / 3 * largest
    return rounded


@pytest.mark.parametrize("cache", [PER_TOKEN, PER_CHANNEL, dataclasses.replace(PER_CHANNEL, values="channel")])
def test_attention_sees_what_the_cache_holds(cache: CacheConfig, build_tiny: Callable[..., Any]) -> None:
    """GPT-2's first attention in NumPy: a query sees blocks before its own rounded, and the others as they are."""
    model = quantize_cache(build_tiny("gpt2"), cache)
    attention = model.transformer.h[0].attn
    seen: list[torch.Tensor] = []
    attention.c_attn.register_forward_hook(lambda *call: seen.append(call[2]))
    mixed: list[torch.Tensor] = []
    attention.c_proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    with torch.no_grad():
        model(TOKENS[:1])
    states = torch.cat(seen, dim=1)[0].numpy().reshape(21, 3, 4, 16)  # token, query or key or value, head, channel
    q, k, v = states.transpose(1, 2, 0, 3)  # [head, token, channel] each
    size = cache.block_tokens
    expected = np.zeros((21, 4, 16))
    for t in range(21):
        held = []
        for x, axis in ((k, cache.keys), (v, cache.values)):
            if axis == "token":
                held.append(round_rows(x[:, : t + 1], -1))
                continue
            full = t // size * size
            blocks = [round_rows(x[:, start : start + size], 1) for start in range(0, full, size)]
            held.append(np.concatenate([*blocks, x[:, full : t + 1]], axis=1))
        keys, values = held
        scores = np.einsum("hc,htc->ht", q[:, t], keys) / 4  # the root of 16 channels
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected[t] = np.einsum("ht,htc->hc", weights / weights.sum(axis=1, keepdims=True), values)
    found = torch.cat(mixed, dim=1)[0].numpy().reshape(21, 4, 16)
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("cache", [PER_TOKEN, PER_CHANNEL], ids=["token", "channel"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "bloom", "gpt2"])
def test_a_text_at_once_is_the_text_token_by_token(
    architecture: str, cache: CacheConfig, build_tiny: Callable[..., Any]
) -> None:
    model = build_tiny(architecture)
    name = find_cache_name(model.forward)
    with torch.no_grad():
        plain = model.double()(TOKENS).logits
        quantize_cache(model, cache)
        at_once = model(TOKENS, use_cache=False).logits
        kept: dict[str, Any] = {}
        steps = []
        for token in TOKENS.T:
            output = model(token[:, None], use_cache=True, **kept)
            kept = {name: getattr(output, name)}
            steps.append(output.logits)
        assert isinstance(kept[name], QuantizedCache)
        assert (torch.cat(steps, dim=1) - at_once).abs().max() < 1e-6
        assert (at_once - plain).abs().max() > 1e-3
        written = model.generate(TOKENS[:1, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(model(written).logits[0, 8:-1].argmax(-1), written[0, 9:])
        restore_weights(model, {})
        assert torch.equal(model(TOKENS).logits, plain)


@pytest.mark.parametrize(("cache", "rows"), [(PER_TOKEN, False), (PER_CHANNEL, True)], ids=["token", "channel"])
def test_scores_do_not_depend_on_the_batch(cache: CacheConfig, *, rows: bool) -> None:
    """Per token the beginning of several texts is shared as ever. With blocks of tokens a text has its own row."""
    loaded = load_model("nano-neox-98k")
    quantize_cache(loaded.model, cache)
    scorer = Scorer(loaded.model, loaded.tokenizer)
    assert scorer.path == ("one sequence per row" if rows else "prefix sharing")
    assert (scorer.batch_tokens == 1) == rows
    requests = [(None, [5, 6, 7, 8] * 5, [9, 10]), (None, [5, 6, 7, 8] * 5, [11]), (None, [300] * 20, [301])]
    together = [score for score, _ in scorer.score_tokens(requests)]
    with torch.no_grad():
        for score, (_, context, rest) in zip(together, requests, strict=True):
            logits = loaded.model(torch.tensor([context + rest[:-1]])).logits[0].log_softmax(-1)
            assert score == pytest.approx(float(sum(logits[-len(rest) + i, t] for i, t in enumerate(rest))), abs=1e-5)


def test_a_cache_of_tokens_that_are_not_rounded_is_refused(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("llama")
    name = find_cache_name(model.forward)
    cache = model(TOKENS, use_cache=True)[name]
    quantize_cache(model, PER_TOKEN)
    with pytest.raises(ValueError, match="a DynamicCache of 21 tokens is no quantized cache"):
        model(TOKENS, **{name: cache})
    assert isinstance(model(TOKENS, **{name: DynamicCache()})[name], QuantizedCache)


def test_bits_of_a_stored_number_are_recorded(build_tiny: Callable[..., Any]) -> None:
    per_token = quantize_model(build_tiny("llama"), QuantConfig(bits=16, kv_cache=PER_TOKEN))
    assert per_token.notes == {"cache_bits_per_value": 3 + 16 / 16}  # heads have 16 channels
    mixed = quantize_model(build_tiny("llama"), QuantConfig(bits=16, kv_cache=PER_CHANNEL))
    assert mixed.notes == {"cache_bits_per_value": 3 + (16 / 16 + 16 / 8) / 2}


def test_bits_are_those_of_all_layers_and_each_must_have_room_for_blocks() -> None:
    """One layer keeps 2 heads of 16 numbers, the other keys of 8 and values of 32: 48, 24 and 56 of them."""
    first = torch.zeros(1, 2, 3, 16)
    layers = [(first, first), (torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 32))]
    bits = (64 * (3 + 1) + 8 * (3 + 2) + 32 * (3 + 0.5)) / 104
    assert count_cache_bits(layers, PER_TOKEN) == pytest.approx(bits)
    with pytest.raises(ValueError, match="a token has 8 numbers in one head, fewer than the 16"):
        count_cache_bits(layers, CacheConfig(bits=4, block_size=16))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 18, [1] * 21])}, "a row may hold no padding"),
        ({"attention_mask": torch.tensor([[1] * 21, [1] * 18 + [0] * 3])}, "a row may hold no padding"),
        ({"attention_mask": torch.ones(2, 1, 21, 21)}, "a row may hold no padding"),
        ({"attention_mask": {"full_attention": None}}, "a row may hold no padding"),
        ({"position_ids": torch.arange(21).expand(3, 2, 21)}, r"not of shape \[3, 2, 21\]"),
        ({"position_ids": torch.tensor([[*range(10), *range(11)]] * 2)}, "a row must be one text"),
        ({"return_dict": False}, "give return_dict=True"),
    ],
    ids=["left", "right", "four axes", "dict", "three axes", "two texts", "tuple"],
)
def test_rows_that_are_no_whole_texts_have_no_blocks_of_tokens(
    given: dict[str, Any], message: str, build_tiny: Callable[..., Any]
) -> None:
    model = build_tiny("llama", num_hidden_layers=1)
    quantize_cache(model, PER_CHANNEL)
    with pytest.raises(ValueError, match=message):
        model.model(TOKENS, **given)
    ones = {"attention_mask": torch.ones(2, 21, dtype=torch.long), "position_ids": torch.arange(21).expand(2, 21)}
    with torch.no_grad():
        assert torch.equal(model(TOKENS, **ones).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("architecture", "cache", "message"),
    [
        ("openai", PER_TOKEN, "OpenAIGPTLMHeadModel keeps no cache of keys and values"),
        ("llama", CacheConfig(bits=4, block_size=32), "a token has 16 numbers in one head, fewer than the 32"),
        ("gemma2", PER_CHANNEL, "per channel need full attention, and there is DynamicSlidingWindowLayer"),
    ],
)
def test_what_a_model_cannot_have_is_refused(
    architecture: str, cache: CacheConfig, message: str, build_tiny: Callable[..., Any]
) -> None:
    model = build_tiny(architecture)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, QuantConfig(bits=16, kv_cache=cache))
    assert list_forwards(model) == []


@pytest.mark.parametrize(
    "fields",
    [{"layout": "flat"}, {"rounding": "stochastic"}, {"centering": True}, {"scale_format": "fp8"}],
    ids=["flat", "stochastic", "centering", "fp8"],
)
def test_what_lets_a_token_see_later_ones_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="let a token's key depend on later tokens"):
        CacheConfig(bits=4, **fields)


def test_wrong_axes_and_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quant\.kv_cache\.keys='head' is not one of: token, channel"):
        CacheConfig(keys="head")
    with pytest.raises(ValueError, match=r"quant\.kv_cache\.block_tokens=0 is not >= 1"):
        CacheConfig(block_tokens=0)
