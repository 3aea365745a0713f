"""A model on several GPUs, as far as it can be tested without one: the arithmetic, and hooks on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kbit.models.device_map
from kbit.evaluation.scorer import Scorer
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.models.device_map import make_device_map, place_layers


def fullest(sizes: list[int], beside: int, devices: list[int]) -> int:
    """What the GPU with most of it has."""
    loads = [beside] + [0] * (max(devices, default=0) + 1)
    for size, device in zip(sizes, devices, strict=True):
        loads[device] += size
    return max(loads)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(0, 40), st.integers(1, 4))
def test_the_fullest_gpu_has_as_little_as_runs_of_blocks_allow(sizes: list[int], beside: int, gpus: int) -> None:
    devices = place_layers(sizes, beside, gpus)
    assert devices == sorted(devices)
    assert set(devices) <= set(range(gpus))
    every = (sorted(choice) for choice in itertools.product(range(gpus), repeat=len(sizes)))
    assert fullest(sizes, beside, devices) == min(fullest(sizes, beside, choice) for choice in every)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom", "llama", "mixtral"])
def test_every_tensor_has_a_gpu_and_blocks_are_whole(build_tiny: Callable[..., Any], architecture: str) -> None:
    model = build_tiny(architecture)
    device_map = make_device_map(model, 2)
    blocks = {name: device for name, device in device_map.items() if name.rpartition(".")[2].isdigit()}
    assert list(blocks.values()) == [0, 1]  # embeddings and head of 259 tokens are less than a block
    assert {device for name, device in device_map.items() if name not in blocks} == {0}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert [place for place in device_map if name.startswith(f"{place}.")] != []


def test_a_model_without_known_blocks_is_refused(
    build_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny("gpt2")
    monkeypatch.setattr(kbit.models.device_map, "list_whole_modules", lambda _: set())
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no known blocks to spread over 2 GPUs"):
        make_device_map(model, 2)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom", "llama"])
def test_hooks_change_no_score(build_tiny: Callable[..., Any], tokenizer: Any, architecture: str) -> None:
    """The same map with the CPU in place of each GPU: quantized, scored, restored and scored again."""
    from accelerate import dispatch_model

    plain, hooked = (build_tiny(architecture, vocab_size=1024) for _ in range(2))
    dispatch_model(hooked, dict.fromkeys(make_device_map(hooked, 2), "cpu"), main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in hooked.modules())
    scores = []
    for model in (plain, hooked):
        scorer = Scorer(model, tokenizer)
        requests = [(("", ""), [5, 6, 7], [n, 9]) for n in range(3)]
        before = scorer.score_tokens(requests)
        report = quantize_model(model, QuantConfig(bits=3))
        scores.append((before, scorer.score_tokens(requests), report.total_bits))
    assert scores[0] == scores[1]
    assert scores[0][0] != scores[0][1]


def test_weights_of_a_hooked_model_are_restored(build_tiny: Callable[..., Any]) -> None:
    from accelerate import dispatch_model

    from kbit.methods.report import plan_quantization

    model = build_tiny("gpt_neox")
    dispatch_model(model, dict.fromkeys(make_device_map(model, 2), "cpu"), main_device="cpu", force_hooks=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    original = copy_weights(model, plan_quantization(model, QuantConfig(bits=3)))
    quantize_model(model, QuantConfig(bits=3))
    restore_weights(model, original)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
