"""What a unit loses: each objective against its definition, worked out the slow way."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kbit.data.windows import Windows
from kbit.methods.allocation import allocate as allocate_module
from kbit.methods.allocation.config import AllocationConfig
from kbit.methods.allocation.losses import measure_information
from kbit.methods.calibration import draw_windows
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import allocate_bits
from kbit.models.loading import LoadedModel, load_model
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec

CALIBRATION = CalibrationConfig(samples=3, length=32)


@pytest.fixture(autouse=True)
def _kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("nano-neox-98k")


def ask(objective: str, choices: Sequence[int] = (2, 4, 8), unit: str = "tensor") -> QuantConfig:
    allocation = AllocationConfig(bits=4.25, objective=objective, choices=tuple(choices), unit=unit)
    return QuantConfig(calibration=CALIBRATION, allocation=allocation)


def list_matrices(loaded: LoadedModel) -> list[torch.nn.Parameter]:
    return [p for name, p in loaded.model.named_parameters() if "layers" in name and p.ndim == 2]


def test_error_is_the_squared_error(loaded: LoadedModel) -> None:
    losses = allocate_bits(loaded.model, ask("error")).losses
    for row, weight in zip(losses, list_matrices(loaded), strict=True):
        values = weight.detach().double()
        for loss, bits in zip(row, (2, 4, 8), strict=True):
            rounded = fake_quantize(weight.detach(), QuantSpec(bits=bits)).double()
            assert loss == pytest.approx(float((rounded - values).square().sum()), rel=1e-6)


@torch.no_grad()
def test_kl_is_the_divergence_with_one_tensor_quantized(loaded: LoadedModel) -> None:
    quant = ask("kl")
    windows = draw_windows(loaded.model, quant, loaded.tokenizer)
    before = [weight.detach().clone() for weight in list_matrices(loaded)]
    losses = allocate_bits(loaded.model, quant, loaded.tokenizer).losses
    assert all(torch.equal(weight, was) for weight, was in zip(list_matrices(loaded), before, strict=True))

    def predict() -> torch.Tensor:
        logits: torch.Tensor = loaded.model(windows.tokens).logits
        return logits.double().log_softmax(-1)

    exact = predict()
    for unit in (0, 3, 7):
        for choice, bits in enumerate((2, 4, 8)):
            weight = list_matrices(loaded)[unit]
            weight.copy_(fake_quantize(weight, QuantSpec(bits=bits)))
            divergence = F.kl_div(predict(), exact, reduction="none", log_target=True).sum(-1).mean()
            weight.copy_(before[unit])
            # float32 logits of magnitude 10 have steps of 1e-6, which the mean over 96 tokens makes smaller
            assert losses[unit, choice] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)


def test_the_units_of_kl_may_be_layers(loaded: LoadedModel) -> None:
    found = allocate_bits(loaded.model, ask("kl", unit="layer"), loaded.tokenizer)
    assert found.losses.shape == (2, 3)
    names = [name for name, p in loaded.model.named_parameters() if "layers" in name and p.ndim == 2]
    for layer in ("layers.0.", "layers.1."):
        matrices = [name for name in names if layer in name]
        found_by = [[n for n, rule in enumerate(found.rules) if re.search(rule["match"], name)] for name in matrices]
        assert len(matrices) == 4
        assert all(len(numbers) == 1 and numbers == found_by[0] for numbers in found_by)


def test_fisher_is_half_the_error_in_the_metric_of_the_information(loaded: LoadedModel) -> None:
    quant = ask("fisher")
    windows = draw_windows(loaded.model, quant, loaded.tokenizer)
    names = [name for name, p in loaded.model.named_parameters() if "layers" in name and p.ndim == 2]
    information = measure_information(loaded.model, names, windows, seed=0)
    losses = allocate_bits(loaded.model, quant, loaded.tokenizer).losses
    for row, name in zip(losses, names, strict=True):
        values = loaded.model.get_parameter(name).detach()
        for loss, bits in zip(row, (2, 4, 8), strict=True):
            error = fake_quantize(values, QuantSpec(bits=bits)) - values
            assert loss == pytest.approx(float((information[name] * error.square()).sum() / 2), rel=1e-5)


def test_16_bits_lose_nothing_and_measure_nothing(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for objective in ("error", "fisher", "kl"):
        asked = {choices: ask(objective, choices=choices) for choices in ((2, 8), (2, 8, 16))}
        first = allocate_bits(loaded.model, asked[2, 8], loaded.tokenizer)
        with monkeypatch.context() as patch:
            for function in ("measure_errors", "weigh_errors", "measure_divergences"):
                patch.setattr(allocate_module, function, None)  # nothing is left to measure
            second = allocate_bits(loaded.model, asked[2, 8, 16], loaded.tokenizer)
        assert first.notes["kept"] == []
        assert second.notes["kept"] == ["2", "8"]
        assert (second.losses[:, :2] == first.losses).all()
        assert (second.losses[:, 2] == 0).all()


def test_a_parameter_that_no_window_reaches_has_no_information(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt2", vocab_size=11, n_layer=1, n_embd=8, n_head=2, n_positions=16)
    model.spare = torch.nn.Linear(3, 2)
    names = ["transformer.h.0.mlp.c_fc.weight", "spare.weight"]
    windows = Windows("text", "", torch.tensor([[3, 1, 4]]), 1.0)
    found = measure_information(model, names, windows, seed=0)
    assert float(found[names[0]].sum()) > 0
    assert torch.equal(found["spare.weight"], torch.zeros(2, 3))
    assert torch.equal(measure_information(model, names[1:], windows, seed=0)["spare.weight"], torch.zeros(2, 3))


def test_the_information_is_that_of_the_models_own_predictions(build_tiny: Callable[..., Any]) -> None:
    """The square of a window's summed gradient has the mean of the sum over its tokens and all successors."""
    model = build_tiny("gpt2", vocab_size=11, n_layer=1, n_embd=8, n_head=2, n_positions=16)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # predictions that are not all alike
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    names = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"]
    parameters = [model.get_parameter(name) for name in names]
    log_p = model(tokens).logits[0].log_softmax(-1)
    exact = [torch.zeros_like(parameter) for parameter in parameters]
    for row in log_p:
        for value in row:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            for total, gradient in zip(exact, gradients, strict=True):
                total += value.exp().detach() * gradient.square() / tokens.numel()
    draws = 400
    windows = Windows("text", "", tokens.repeat(draws, 1), 1.0)
    found = measure_information(model, names, windows, seed=0)
    for name, expected in zip(names, exact, strict=True):
        # the mean of 400 draws: one draw's sum varies by about as much as it is
        assert float(found[name].sum() / expected.sum()) == pytest.approx(1, abs=4 / np.sqrt(draws))
        correlation = np.corrcoef(found[name].flatten().numpy(), expected.flatten().numpy())[0, 1]
        assert correlation > 0.97
    assert all(parameter.requires_grad for parameter in model.parameters())
