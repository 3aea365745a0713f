"""Calibration: every weight's inputs, through the quantized blocks before it, on text that is not evaluated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbit.data.texts import read_documents
from kbit.data.windows import Windows
from kbit.experiments.session import Session
from kbit.methods.calibration import calibrate, describe_calibration, draw_windows
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import find_weights, quantize_model
from kbit.methods.report import plan_quantization
from kbit.models.parameters import hash_weights
from kbit.numerics.quantizer import fake_quantize

SMALL = CalibrationConfig(samples=4, length=32)
GPTQ3 = QuantConfig(bits=3, data_type="nf", block_size=16, layout="row", method="gptq", calibration=SMALL)
ARCHITECTURES = ("gpt_neox", "gpt2", "opt", "bloom", "llama", "mixtral", "gpt_oss", "gemma2", "qwen3")


def make_windows_of(count: int, length: int) -> Windows:
    return Windows("random", "", torch.randint(259, (count, length), generator=torch.Generator().manual_seed(0)), 1.0)


def list_weights(model: Any, quant: QuantConfig = GPTQ3) -> Any:
    return find_weights(model, plan_quantization(model, quant), quant)


@torch.no_grad()
def record_inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The inputs of every linear layer and Conv1D in the blocks, by hooks: the plain way."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs).double() for name, inputs in seen.items()}


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "openai", "opt", "bloom", "llama", "gemma2"])
@pytest.mark.parametrize("count", [6, 67])  # one pass, 67 passes: a prime fills none evenly
def test_the_hessian_is_that_of_the_inputs(build_tiny: Callable[..., Any], architecture: str, count: int) -> None:
    model, windows = build_tiny(architecture), make_windows_of(count, 32)
    expected = record_inputs(model, windows.tokens)
    seen = []
    for weight, hessian in calibrate(model, list_weights(model), GPTQ3, windows):
        x = expected[weight.name]
        assert torch.allclose(hessian.double(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-5 * float(x.square().max()))
        seen.append(weight.name)
    assert seen == [weight.name for weight in list_weights(model)]


def test_later_blocks_see_what_the_quantized_ones_before_give(build_tiny: Callable[..., Any]) -> None:
    model, windows = build_tiny("gpt_neox"), make_windows_of(4, 32)
    for weight, hessian in calibrate(model, list_weights(model), GPTQ3, windows):
        if ".layers.1." in weight.name:
            x = record_inputs(model, windows.tokens)["gpt_neox.layers.1.attention.query_key_value.weight"]
            assert torch.allclose(hessian.double(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)
            break
        weight.replace(weight.values * 0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gptq_is_closer_to_the_model_than_rounding_to_nearest(
    build_tiny: Callable[..., Any], tokenizer: Any, architecture: str
) -> None:
    """On the text it was calibrated on, where random models have nothing else to be right about."""
    quant = dataclasses.replace(GPTQ3, calibration=dataclasses.replace(SMALL, samples=16))
    lost = {}
    for method in ("rtn", "gptq"):
        model = build_tiny(architecture, vocab_size=1024)
        tokens = draw_windows(model, quant, tokenizer).tokens
        with torch.no_grad():
            before = model(tokens).logits.log_softmax(-1)
            report = quantize_model(model, dataclasses.replace(quant, method=method), tokenizer)
            after = model(tokens).logits.log_softmax(-1)
        lost[method] = float(F.kl_div(after, before, log_target=True, reduction="batchmean"))
    assert report.coverage > (0.98 if architecture == "gpt_oss" else 0.99)  # its routers are larger
    assert lost["gptq"] < 0.9 * lost["rtn"]


def test_an_included_head_is_calibrated_too(build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = build_tiny("gpt_neox", vocab_size=1024)
    before = model.lm_head.weight.detach().clone()
    report = quantize_model(model, dataclasses.replace(GPTQ3, include="lm_head"), tokenizer)
    assert "lm_head.weight" in [tensor.name for tensor in report.tensors if tensor.quantized]
    assert not torch.equal(model.lm_head.weight, fake_quantize(before, GPTQ3.spec))


def test_the_same_seed_gives_the_same_model(build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    def run(seed: int) -> Tensor:
        model = build_tiny("gpt_neox", vocab_size=1024)
        calibration = dataclasses.replace(SMALL, seed=seed)
        report = quantize_model(model, dataclasses.replace(GPTQ3, calibration=calibration), tokenizer)
        assert report.notes["calibration"]["samples"] == 4
        assert len(report.notes["calibration"]["sha256"]) == 64
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_windows_are_drawn_without_overlap(build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    windows = draw_windows(
        build_tiny("gpt_neox"), dataclasses.replace(GPTQ3, calibration=CalibrationConfig()), tokenizer
    )
    assert windows.tokens.shape == (128, 256)
    assert len({tuple(window) for window in windows.tokens.tolist()}) == 128


def test_an_expert_that_sees_nothing_is_an_error_or_rounded_to_nearest(build_tiny: Callable[..., Any]) -> None:
    model, windows = build_tiny("mixtral"), make_windows_of(1, 1)  # one token reaches two of four experts
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj.* of 4\) saw no input.*unseen=rtn"):
        list(calibrate(model, list_weights(model), GPTQ3, windows))
    quant = dataclasses.replace(GPTQ3, calibration=dataclasses.replace(SMALL, unseen="rtn"))
    for weight, hessian in calibrate(model, weights := list_weights(model), quant, windows):
        assert weight.is_unseen == torch.equal(hessian, torch.eye(len(hessian)))
    unseen = describe_calibration(windows, weights)["unseen"]
    assert [len(experts) for experts in unseen.values()] == [2, 2, 2, 2]
    assert all("experts" in name for name in unseen)


@pytest.mark.parametrize("include", ["embed_in", r"dense\.bias"])
def test_what_is_in_no_product_is_said_to_be_that(build_tiny: Callable[..., Any], include: str) -> None:
    """More text would not help."""
    model, quant = build_tiny("gpt_neox"), dataclasses.replace(GPTQ3, include=include)
    with pytest.raises(ValueError, match=f"{include}.* is in no product .*quant.exclude.*unseen=rtn"):
        list(calibrate(model, list_weights(model, quant), quant, make_windows_of(1, 8)))


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"samples": 10_000}, ["nano_calibration", "windows of 32 tokens", "samples=10000"]),
        ({"length": 1000}, ["length=1000", "context of 256"]),
        ({"text": "nowhere.txt"}, ["'nowhere.txt'", "nano_calibration"]),
    ],
)
def test_bad_calibration_is_refused_before_work(
    build_tiny: Callable[..., Any], tokenizer: Any, calibration: dict[str, Any], words: list[str]
) -> None:
    quant = dataclasses.replace(GPTQ3, calibration=dataclasses.replace(SMALL, **calibration))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        quantize_model(build_tiny("gpt_neox"), quant, tokenizer)
    assert [word for word in words if word not in str(caught.value)] == []


def test_without_a_tokenizer_there_is_no_calibration(build_tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        quantize_model(build_tiny("gpt_neox"), GPTQ3)


def test_activations_that_are_not_finite_name_the_weight(build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = build_tiny("gpt_neox", vocab_size=1024)
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.bias.fill_(3e38)  # squares of it are beyond float32
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_4h_to_h\.weight: .*NaN or Inf"):
        quantize_model(model, GPTQ3, tokenizer)


def test_blocks_that_are_no_chain_are_refused(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt_neox")
    model.gpt_neox.layers[0].register_forward_hook(lambda _, args, output: None)
    layers = model.gpt_neox.layers
    original = layers[1].forward
    layers[1].forward = lambda hidden, **kwargs: original(hidden + 1, **kwargs)
    list(calibrate(model, list_weights(model), GPTQ3, make_windows_of(2, 8)))  # a change inside a block is its own
    model.gpt_neox.layers = nn.ModuleList([layers[1], layers[0], layers[0]])
    with pytest.raises(ValueError, match="blocks"):
        list(calibrate(model, list_weights(model), GPTQ3, make_windows_of(2, 8)))


def test_the_embedded_text_shares_nothing_with_the_held_out_one() -> None:
    """No ten words in a row, in any case or punctuation."""

    def find_runs(name: str) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for document in read_documents(name)[0]:
            words = re.findall(r"[a-z']+", document.lower())
            found.update(zip(*(words[i:] for i in range(10)), strict=False))
        return found

    assert not find_runs("nano_calibration") & find_runs("nano_held_out")


def test_an_experiment_may_not_calibrate_on_what_it_measures(kbit: Callable[..., Any], tmp_path: Path) -> None:
    done = kbit("run", "quant.method=gptq", "quant.calibration.text=nano_held_out")
    assert done.code == 1
    assert "quant.calibration.text" in done.err
    assert "nano_held_out" in done.err


def test_a_session_restores_the_weights() -> None:
    from kbit.evaluation.config import EvalConfig
    from kbit.experiments.config import Experiment
    from kbit.models.config import ModelConfig

    session = Session(ModelConfig())
    evaluation = EvalConfig(tasks=(), perplexity_windows=2)
    baseline, result, again = (
        session.run(Experiment(quant=quant, eval=evaluation))
        for quant in (QuantConfig(bits=16), GPTQ3, QuantConfig(bits=16))
    )
    assert baseline.weights_hash == again.weights_hash != result.weights_hash
    assert result.method_notes["dead_columns"] == {}
    assert result.method_notes["raised_damping"] == {}


def test_a_model_in_training_mode_is_calibrated_without_dropout(build_tiny: Callable[..., Any], tokenizer: Any) -> None:
    hashes = []
    for training, seed in ((False, 0), (True, 0), (True, 1)):
        model = build_tiny("gpt2", vocab_size=1024, n_layer=1, resid_pdrop=0.5, embd_pdrop=0.5)
        model.train(training)
        torch.manual_seed(seed)
        quantize_model(model, GPTQ3, tokenizer)
        hashes.append(hash_weights(model))
        assert all(module.training == training for module in model.modules())
    assert len(set(hashes)) == 1
