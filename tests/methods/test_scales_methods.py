"""Methods that choose scales (mse, hqq, awq): each is no worse than the usual scales by the error it minimises."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kbit.methods.awq import ALPHAS, find_channel_scales, quantize_scaled
from kbit.methods.block_scales import BlockScales, find_best_scales
from kbit.methods.config import CalibrationConfig, GptqConfig, QuantConfig
from kbit.methods.gptq import quantize_weight
from kbit.methods.hqq import P, find_half_quadratic_scales, fit_line, shrink
from kbit.methods.quantize_model import quantize_model
from kbit.methods.weight import Weight
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.scale_formats import FACTORS, SCALE_FORMATS
from kbit.numerics.spec import LAYOUTS, NORMALIZATIONS, QuantSpec

SPECS = [
    QuantSpec(2 * i % 3 + 2, kind, block_size=24, layout=LAYOUTS[i % 2], normalization=normal, scale_format=scales)
    for i, (kind, normal, scales) in enumerate(
        itertools.product(("int", "nf", "dynamic"), NORMALIZATIONS, SCALE_FORMATS)
    )
    if scales != "e8m0" or normal == "absmax"
]


def make_matrix(rows: int = 12, inputs: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def quantize_best(matrix: Tensor, spec: QuantSpec) -> Tensor:
    blocks = BlockScales(matrix, spec)
    return blocks.round(matrix, find_best_scales(matrix, blocks))


def quantize_half_quadratic(matrix: Tensor, spec: QuantSpec) -> Tensor:
    blocks = BlockScales(matrix, spec)
    return blocks.round(matrix, find_half_quadratic_scales(matrix, blocks))


def distance(a: Tensor, b: Tensor, power: float = 2.0) -> float:
    return float((a - b).double().abs().pow(power).sum())


def test_searched_scales_have_the_least_squared_error_and_are_stored_ones() -> None:
    matrix = make_matrix()
    for spec in SPECS:
        assert distance(quantize_best(matrix, spec), matrix) <= distance(fake_quantize(matrix, spec), matrix) * (
            1 + 1e-6
        )


def test_searched_scales_are_the_best_of_all_factors_for_each_block() -> None:
    matrix, spec = make_matrix(4, 32), QuantSpec(bits=2, data_type="nf", block_size=16, layout="row")
    best = quantize_best(matrix, spec)
    codebook = spec.make_codebook()
    for block, found in zip(matrix.view(-1, 16), best.view(-1, 16), strict=True):
        largest = np.float16(float(block.abs().max())).astype(np.float32)
        scales = [np.float32(np.float16(largest * factor)) for factor in (*FACTORS, np.float32(1))]
        errors = [np.square(block.numpy()[:, None] - codebook * scale).min(axis=1).sum() for scale in scales]
        assert distance(found, block) == pytest.approx(min(errors), rel=1e-5)


def test_half_quadratic_scales_lose_less_of_the_error_they_minimise() -> None:
    matrix = make_matrix()
    better = 0
    for spec in SPECS:
        fitted = distance(quantize_half_quadratic(matrix, spec), matrix, P)
        usual = distance(fake_quantize(matrix, spec), matrix, P)
        assert fitted <= usual * (1 + 1e-6)
        better += fitted < 0.99 * usual
    assert better > 0.5 * len(SPECS)  # not just the usual scales returned


MX = [
    QuantSpec(4, "float", 2, layout="row", block_size=20, scale_format="e8m0"),
    QuantSpec(4, "int", layout="row", block_size=20, scale_format="e8m0"),
    QuantSpec(4, "nf", layout="flat", block_size=20, scale_format="e8m0"),
]


@pytest.mark.parametrize("spec", MX)
def test_of_powers_of_two_each_block_takes_the_best(spec: QuantSpec) -> None:
    """Half-quadratic scales are nearest powers, which are the usual ones or better."""
    matrix = make_matrix()
    blocks = BlockScales(matrix, spec)
    usual = blocks.usual
    powers = [blocks.store(usual.scales * factor, usual.offsets) for factor in np.exp2(np.arange(-3, 3, dtype="f4"))]
    best = np.min([blocks.measure_errors(matrix, grid) for grid in powers], axis=0)
    assert distance(quantize_best(matrix, spec), matrix) == pytest.approx(best.sum(), rel=1e-6)
    for factor, power in ((0.76, 1), (0.9, 1), (1.4, 1), (1.6, 2), (0.7, 0.5)):
        stored = blocks.store(usual.scales * np.float32(factor), usual.offsets).scales
        np.testing.assert_array_equal(stored, usual.scales * np.float32(power))
    least = blocks.measure_errors(matrix, usual, power=P)
    fitted = blocks.split((quantize_half_quadratic(matrix, spec) - matrix).abs().pow(P)).sum(1).numpy()
    assert (fitted <= least * (1 + 1e-5)).all()


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_scale_leaves_its_format(scale_format: str, normalization: str) -> None:
    """Where rounding to nearest works, so do methods that try larger scales."""
    if scale_format == "e8m0" and normalization != "absmax":
        return
    spec = QuantSpec(3, "dynamic", block_size=16, layout="row", normalization=normalization, scale_format=scale_format)
    most = {"bf16": 3e38, "fp32": 3e38, "e8m0": 2.0**127}.get(scale_format, 65504.0)  # minmax has offsets in fp16
    values = make_matrix(8, 32)
    values *= 0.999 * most / values.abs().max() / (2 if normalization == "minmax" else 1)
    hessian = torch.diag(torch.logspace(-3, 3, 32))
    usual = distance(fake_quantize(values, spec) / most, values / most)
    assert distance(quantize_best(values, spec) / most, values / most) <= usual * (1 + 1e-5)
    assert bool(quantize_half_quadratic(values, spec).isfinite().all())
    if most == 65504:  # products of larger weights leave float32
        weight = Weight("w", values, spec)
        for codes, _ in (
            quantize_scaled(weight, hessian),
            quantize_weight(weight, hessian, GptqConfig(search_scales=True)),
        ):
            assert bool(codes.dequantize().isfinite().all())


def test_shrink_lets_large_errors_be_and_takes_small_ones() -> None:
    shrunk = shrink(torch.tensor([0.0, 0.01, -0.01, 1000.0, -1000.0]), beta=10)
    assert shrunk[:3].tolist() == [0, 0, 0]
    assert shrunk[3:].tolist() == pytest.approx([1000, -1000], rel=1e-4)


@pytest.mark.parametrize("has_offset", [False, True])
def test_the_line_is_that_of_least_squares(has_offset: bool) -> None:
    z, target = make_matrix(3, 20), make_matrix(3, 20, seed=1) + 3 * make_matrix(3, 20)
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[:, 17:] = False
    start = torch.ones(3, 1)
    scales, offsets = fit_line(z, target, valid, start, torch.zeros(3, 1), has_offset=has_offset)
    for i in range(3):
        columns = [z[i, :17], torch.ones(17)] if has_offset else [z[i, :17]]
        expected = torch.linalg.lstsq(torch.stack(columns, dim=1), target[i, :17, None]).solution[:, 0]
        assert torch.allclose(torch.cat([scales[i], offsets[i]])[: len(expected)], expected, atol=1e-5)


def test_activation_aware_scales_never_lose_more_of_the_layers_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) * torch.logspace(-1, 1, 64)  # some inputs a hundred times others
    hessian = 2 / 300 * x.T @ x
    for spec in (QuantSpec(bits=3, data_type="nf"), QuantSpec(bits=2, normalization="minmax", layout="row")):
        values = make_matrix(16, 64)
        codes, alpha = quantize_scaled(Weight("w", values, spec), hessian)
        lost, usual = ((q - values) @ x.T for q in (codes.dequantize(), fake_quantize(values, spec)))
        assert lost.norm() < 0.9 * usual.norm()
        assert alpha in [round(a, 2) for a in ALPHAS[1:]]


def test_with_equal_activations_it_rounds_to_nearest() -> None:
    values, spec = make_matrix(8, 32), QuantSpec(bits=3)
    codes, _ = quantize_scaled(Weight("w", values, spec), torch.eye(32))
    assert torch.equal(codes.dequantize(), fake_quantize(values, spec))


def test_channel_scales_follow_the_activations_and_dead_inputs_are_finite() -> None:
    hessian = torch.diag(torch.tensor([2.0, 8.0, 0.0]))  # root mean squares 1, 2, 0
    scales = find_channel_scales(hessian, 0.5)
    assert float(scales[1] / scales[0]) == pytest.approx(2**0.5, rel=1e-3)
    assert bool(torch.isfinite(scales).all() and (scales > 0).all())


@pytest.mark.parametrize("method", ["mse", "hqq", "awq"])
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_methods_run_on_models_and_count_their_bits(
    build_tiny: Callable[..., Any], tokenizer: Any, method: str, architecture: str
) -> None:
    quant = QuantConfig(bits=3, data_type="nf", block_size=16, calibration=CalibrationConfig(samples=8, length=32))
    usual, chosen = (
        quantize_model(build_tiny(architecture, vocab_size=1024), dataclasses.replace(quant, method=name), tokenizer)
        for name in ("rtn", method)
    )
    more = sum(16 * _inputs(t.shape, architecture) for t in chosen.tensors if t.quantized) if method == "awq" else 0
    assert chosen.total_bits == usual.total_bits + more
    assert chosen.weight_rmse is not None
    assert usual.weight_rmse is not None
    assert chosen.weight_rmse < (1.2 if method == "awq" else 1.0) * usual.weight_rmse


def _inputs(shape: tuple[int, ...], architecture: str) -> int:
    """Inputs of a matrix, of all experts: Conv1D is [in, out]."""
    inputs = shape[0] if architecture == "gpt2" else shape[-1]
    return inputs * (shape[0] if len(shape) == 3 else 1)


def test_kept_columns_stay_and_no_scale_sees_them() -> None:
    values, spec = make_matrix(8, 32), QuantSpec(bits=3, block_size=16, layout="row")
    values[:, 3] = 100.0
    weight = Weight("w", values, spec, outlier_columns=torch.tensor([3]))
    matrix = weight.copy_matrix()
    blocks = BlockScales(matrix, spec)
    codes = blocks.encode(matrix, find_best_scales(matrix, blocks), values.shape, values.dtype)
    quantized = codes.keep_columns(weight.outlier_columns, weight.copy_outliers()).dequantize()
    assert torch.equal(quantized[:, 3], values[:, 3])
    assert float((quantized - values).abs().max()) < 1.0


def test_half_quadratic_is_at_least_as_good_as_hqq() -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    values, table = make_matrix(64, 256), tuple(np.linspace(-1, 1, 16))
    packed, meta = quantize.Quantizer.quantize(
        values, nbits=4, group_size=64, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32
    )
    theirs = quantize.Quantizer.dequantize(packed, meta).view_as(values)
    spec = QuantSpec(4, "table", table=table, normalization="minmax", layout="row", scale_format="fp32")
    ours = quantize_half_quadratic(values, spec)
    assert distance(ours, values, P) <= distance(theirs, values, P)
