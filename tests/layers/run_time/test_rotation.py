"""Rotations: orthogonal matrices of known orders, and that a quantized model is that of a rotated one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.layers.run_time.rotation import Basis, find_block, find_paley_order, make_paley, make_rotation
from kbit.methods.config import ActivationConfig, CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.loading import load_model
from kbit.models.parameters import as_matrix
from kbit.numerics.quantizer import fake_quantize


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 60, 76, 108])
def test_paley_matrices_are_hadamard_matrices(order: int) -> None:
    matrix = make_paley(order)
    assert set(matrix.flatten()) == {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


def test_the_largest_known_block_is_taken() -> None:
    """Sizes of models: Llama-2-7B's 11,008 = 2^8 43 has no factor of order 43, 28 is of Paley's second kind."""
    sizes = {64: 64, 768: 768, 2048: 2048, 14336: 14336, 5120: 5120, 11008: 256, 172: 4, 7: 1, 13824: 13824}
    assert {size: find_block(size) for size in sizes} == sizes
    assert [find_paley_order(order) for order in (1, 2, 96, 768, 6, 92)] == [1, 1, 12, 12, 0, 0]


@pytest.mark.parametrize("size", [16, 24, 172, 56])
def test_a_rotation_is_its_matrix_and_comes_back(size: int) -> None:
    rotation = make_rotation(size, 0)
    matrix = rotation.rotate(torch.eye(size, dtype=torch.float64)).numpy()  # x R for each unit vector is a row of R
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-12
    assert set(np.round(np.abs(matrix[matrix != 0]) * np.sqrt(rotation.block), 9)) == {1.0}
    if size == 16:
        assert np.abs(matrix - np.diag(rotation.signs) @ hadamard(16) / 4).max() < 1e-12
    x = torch.randn(3, 5, size, dtype=torch.float64)
    assert (rotation.rotate(x) - x @ torch.from_numpy(matrix)).abs().max() < 1e-12
    assert (rotation.rotate_back(rotation.rotate(x)) - x).abs().max() < 1e-12
    assert not torch.equal(make_rotation(size, 1).signs, rotation.signs)


def test_a_basis_turns_weights_inputs_and_their_squares() -> None:
    """y S = x' W'^T with x' = x diag(g)^-1 R and W' = S^T W diag(g) R, by their matrices."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 24, generator=generator, dtype=torch.float64) for rows in (9, 16))
    gain = torch.rand(24, generator=generator, dtype=torch.float64) + 0.5
    inputs, outputs = make_rotation(24, 0), make_rotation(16, 0)
    basis = Basis(inputs, gain, outputs)
    r, s = (rotation.rotate(torch.eye(len(rotation.signs), dtype=torch.float64)) for rotation in (inputs, outputs))
    turned, weight = basis.turn_inputs(x), basis.turn_weight(w)
    assert torch.allclose(turned, x / gain @ r)
    assert torch.allclose(weight, s.T @ w * gain @ r)
    assert torch.allclose(turned @ weight.T, x @ w.T @ s)
    assert torch.allclose(basis.turn_inputs_back(turned), x)
    assert torch.allclose(basis.turn_weight_back(weight), w)
    assert torch.allclose(basis.turn_square(x.T @ x), turned.T @ turned)


@pytest.mark.parametrize(
    "name", ["nano-neox-98k", "nano-opt-98k", "nano-bloom-98k", "nano-gpt2-98k", "nano-stories-260k"]
)
def test_a_quantized_model_is_that_of_the_rotated_one(name: str) -> None:
    """Each layer computes (x R) Q(W R)^T, as a model does whose weights and inputs are rotated in fact.

    Without rounding that changes no token's log-likelihood by 1e-4 nats.
    """
    quant = QuantConfig(bits=4, block_size=16, layout="row", rotation="hadamard", rotation_seed=3, min_coverage=0.0)
    loaded, plain = load_model(name), load_model(name)
    report = quantize_model(loaded.model, quant)
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        before = plain.model(tokens).logits.log_softmax(-1)
        _rotate(plain.model, report.products, quant, rounds=False)
        assert (plain.model(tokens).logits.log_softmax(-1) - before).abs().max() < 1e-4
        _rotate(plain.model, report.products, quant, rounds=True)
        expected = plain.model(tokens).logits.log_softmax(-1)
        assert (expected - before).abs().max() > 1e-2
        assert (loaded.model(tokens).logits.log_softmax(-1) - expected).abs().max() < 1e-4


def _rotate(model: Any, names: list[str], quant: QuantConfig, *, rounds: bool) -> None:
    """Rotate weights and the inputs of their layers once, and then quantize the rotated weights."""
    for name in names:
        layer, weight = model.get_submodule(name.removesuffix(".weight")), model.get_parameter(name)
        matrix = as_matrix(weight.detach(), layer)
        if rounds:
            matrix.copy_(fake_quantize(matrix.contiguous(), quant.spec))
            continue
        rotation = make_rotation(matrix.shape[-1], 3)
        matrix.copy_(rotation.rotate(matrix))
        layer.register_forward_pre_hook(lambda _, inputs, rotate=rotation.rotate: (rotate(inputs[0]),))


def test_inputs_are_rounded_in_the_rotation(build_tiny: Callable[..., Any]) -> None:
    """An outlier then is no block's largest value alone."""
    model = build_tiny("llama")
    activations = ActivationConfig(bits=4)
    quantize_model(model, QuantConfig(bits=16, activations=activations, rotation="hadamard"))
    layer, rotation = model.model.layers[0].mlp.up_proj, make_rotation(64, 0)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 64
    rounded = fake_quantize(rotation.rotate(x), activations)
    expected = rounded @ rotation.rotate(layer.weight.detach()).T
    assert torch.allclose(layer(x), expected, atol=1e-3)
    plain = (fake_quantize(x, activations) @ layer.weight.T - x @ layer.weight.T).norm()
    assert (layer(x) - x @ layer.weight.T).norm() < plain / 2


def test_what_a_rotation_leaves_of_outliers_falls_with_the_number_of_inputs() -> None:
    """Two inputs are 64 times as large, and their weights 1/64: squared errors of products of inputs in 4 bits.

    A rotation keeps the length of x, so that the largest of n rotated numbers is at least |x| / sqrt(n).
    """
    left = {}
    for n in (64, 1024):
        generator = torch.Generator().manual_seed(n)
        x, w = torch.randn(300, n, generator=generator), torch.randn(50, n, generator=generator)
        x[:, [3, 17]] *= 64
        w[:, [3, 17]] /= 64
        basis, spec = Basis(make_rotation(n, 0)), ActivationConfig(bits=4)
        rotated = basis.turn_inputs_back(fake_quantize(basis.turn_inputs(x), spec))
        errors = [((rounded - x) @ w.T).square().sum() for rounded in (rotated, fake_quantize(x, spec))]
        left[n] = float(errors[0] / errors[1])
    assert left[1024] < 0.1 < 0.3 < left[64] < 0.7  # .076 and .50 by NumPy


@pytest.mark.parametrize("method", ["mse", "hqq", "gptq", "awq"])
def test_every_method_sees_the_rotated_weights_and_inputs(method: str) -> None:
    """It gives what it gives for a model that is rotated in fact. Rounding may move a few values over a threshold."""
    calibration = CalibrationConfig(samples=2, length=32)
    quant = QuantConfig(bits=3, layout="row", block_size=16, method=method, rotation="hadamard", rotation_seed=3)
    quant = dataclasses.replace(quant, calibration=calibration, exclude=r"layers\.1\.", min_coverage=0.0)
    loaded, rotated = load_model("nano-neox-98k"), load_model("nano-neox-98k")
    names = quantize_model(loaded.model, quant, loaded.tokenizer).products
    _rotate(rotated.model, names, quant, rounds=False)
    quantize_model(rotated.model, dataclasses.replace(quant, rotation=None), rotated.tokenizer)
    for name in names:
        ours, theirs = loaded.model.get_parameter(name).detach(), rotated.model.get_parameter(name).detach()
        rotation = make_rotation(ours.shape[-1], 3)
        difference = (rotation.rotate(ours) - theirs).abs()
        assert (difference > 1e-4 * theirs.abs().max()).float().mean() < 0.02, name


def test_what_does_not_go_with_a_rotation_is_refused_and_keys_know_it() -> None:
    with pytest.raises(ValueError, match=r"quant\.rotation='givens' is not one of: hadamard, residual"):
        QuantConfig(rotation="givens")
    with pytest.raises(ValueError, match=r"no quant\.outlier_\* can stay at 16 bits"):
        QuantConfig(rotation="hadamard", outlier_fraction=0.1)
    with pytest.raises(ValueError, match=r"quant\.method=llm_int8 quantizes inputs as they are"):
        QuantConfig(bits=8, method="llm_int8", rotation="hadamard")

    def key(**fields: Any) -> str:
        return find_key(Experiment(quant=QuantConfig(**fields)))

    assert key(bits=16, rotation="hadamard") == key(bits=16)
    assert key(rotation_seed=1) == key()
    assert len({key(), key(rotation="hadamard"), key(rotation="hadamard", rotation_seed=1)}) == 3
    eight = ActivationConfig(bits=8)
    assert key(bits=16, activations=eight, rotation="hadamard") != key(bits=16, activations=eight)
