"""GPTQ on one matrix: equal to the published algorithm written out plainly, and not worse than rounding to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kbit.methods.block_scales import BlockScales, find_best_scales
from kbit.methods.config import GptqConfig
from kbit.methods.gptq import factor_inverse, order_columns, quantize_weight, round_columns
from kbit.methods.weight import Weight
from kbit.numerics.data_types import DATA_TYPES
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.scale_formats import SCALE_FORMATS
from kbit.numerics.spec import LAYOUTS, NORMALIZATIONS, QuantSpec

TABLE = (-1.0, -0.4, 0.0, 0.3, 1.0)


def make_layer(rows: int, inputs: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Random weights, and the Hessian of inputs that are correlated and of unequal size, both float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix / inputs**0.5
    hessian = 2 / tokens * x.T @ x
    return torch.randn(rows, inputs, generator=generator), (hessian + hessian.T) / 2


def layer_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """|| W X - Q X ||^2 per token."""
    lost = (weight - quantized).double()
    return float((lost @ hessian.double() * lost).sum()) / 2


def run_gptq(
    values: Tensor, hessian: Tensor, spec: QuantSpec, options: GptqConfig | None = None, kept: tuple[int, ...] = ()
) -> Tensor:
    weight = Weight("w", values, spec, outlier_columns=torch.tensor(kept, dtype=torch.int64))
    codes, _ = quantize_weight(weight, hessian, options or GptqConfig())
    return codes.keep_columns(weight.outlier_columns, weight.copy_outliers()).dequantize()


def published_gptq(
    matrix: NDArray[np.float64], hessian: NDArray[np.float64], spec: QuantSpec, order: list[int], *, refit: bool
) -> NDArray[np.float64]:
    """The published algorithm for absmax blocks along the row, one column after the other, without lazy updates."""
    w, n, size = matrix.copy(), len(order), spec.block_size or matrix.shape[1]
    codebook = spec.make_codebook().astype(np.float64)
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(n)
    u = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T

    def scales_of(block: int) -> NDArray[np.float64]:
        part = w[:, block * size : (block + 1) * size].astype(np.float32)
        largest: NDArray[np.float64] = np.abs(part).max(axis=1).astype(np.float16).astype(np.float64)
        return largest

    scales = [scales_of(block) for block in range(-(-n // size))]
    for i, j in enumerate(order):
        if refit and j % size == 0:
            scales[j // size] = scales_of(j // size)
        scale = scales[j // size]
        q = codebook[(w[:, j, None] / scale[:, None] >= midpoints).sum(axis=1)] * scale
        error = (w[:, j] - q) / u[i, i]
        w[:, order[i + 1 :]] -= error[:, None] * u[i, i + 1 :]
        w[:, j] = q
    return w


@pytest.mark.parametrize("leaf", [1, 7, 128])
@pytest.mark.parametrize(
    ("block_size", "refit", "act_order"),
    [
        (64, True, False),
        (40, True, False),
        (None, True, False),
        (64, False, False),
        (64, False, True),
        (None, False, True),
    ],
)
@pytest.mark.parametrize(("data_type", "bits"), [("nf", 3), ("float", 4), ("dynamic", 2)])
def test_it_is_the_published_algorithm_bit_for_bit_in_float64(
    data_type: str, bits: int, block_size: int | None, refit: bool, act_order: bool, leaf: int
) -> None:
    spec = QuantSpec(bits=bits, data_type=data_type, block_size=block_size, layout="row")
    values, hessian = (tensor.double() for tensor in make_layer(12, 150))
    order = order_columns(hessian, torch.empty(0, dtype=torch.int64), act_order=act_order)
    factor, _ = factor_inverse(hessian[order][:, order], 0.01)
    blocks = BlockScales(values, spec)
    codes = round_columns(values[:, order], factor, blocks, order, refit=refit, leaf=leaf)
    scales, _ = blocks.at(order)
    columns = blocks.look_up(codes.long()) * scales.T
    expected = published_gptq(values.numpy(), hessian.numpy(), spec, order.tolist(), refit=refit)
    assert np.array_equal(columns.numpy(), expected[:, order])


@pytest.mark.parametrize("seed", range(3))
def test_in_float32_few_values_differ_and_the_error_is_the_same(seed: int) -> None:
    """A value at a threshold may go the other way, and then the rest of its row does; the error does not change."""
    spec = QuantSpec(bits=3, data_type="nf", layout="row")
    values, hessian = make_layer(64, 192, seed)
    expected = published_gptq(values.double().numpy(), hessian.double().numpy(), spec, list(range(192)), refit=True)
    quantized = run_gptq(values, hessian, spec)
    same = np.isclose(quantized.double().numpy(), expected, rtol=1e-6, atol=0)  # float32 products
    assert same.mean() > 0.98
    errors = [layer_error(values, q, hessian) for q in (quantized, torch.from_numpy(expected))]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


@pytest.mark.parametrize("n", [1, 3, 128, 129, 300])
def test_the_factor_is_that_of_the_inverse(n: int) -> None:
    _, hessian = make_layer(1, n)
    factor, damping = factor_inverse(hessian.double(), 0.01)
    identity = torch.eye(n, dtype=torch.float64)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * identity
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, identity, atol=1e-10)


def specs(**fixed: Any) -> st.SearchStrategy[QuantSpec]:
    """All quantizers that GPTQ takes, but af, whose tables take a second each."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "bits": st.integers(2, 8),
        "data_type": st.sampled_from([name for name in DATA_TYPES if name != "af"]),
        "block_size": st.sampled_from([1, 7, 16, 24, 64, 1000]),
        "layout": st.sampled_from(LAYOUTS),
        "normalization": st.sampled_from(NORMALIZATIONS),
        "centering": st.booleans(),
        "scale_format": st.sampled_from(list(SCALE_FORMATS)),
        "rounding": st.sampled_from(["nearest", "truncate"]),
    }
    for name, value in fixed.items():
        drawn[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)

    def make(fields: dict[str, Any]) -> QuantSpec:
        if fields["scale_format"] == "e8m0":
            fields["normalization"] = "absmax"
        if fields["data_type"] == "table":
            fields |= {"table": TABLE, "bits": max(3, fields["bits"])}
        return QuantSpec(**fields)

    return st.fixed_dictionaries(drawn).map(make)


@settings(max_examples=100)
@given(spec=specs(), act_order=st.booleans(), static=st.booleans(), rows=st.integers(1, 5), inputs=st.integers(1, 70))
def test_with_an_identity_as_hessian_it_rounds_to_nearest(
    spec: QuantSpec, act_order: bool, static: bool, rows: int, inputs: int
) -> None:
    values, _ = make_layer(rows, inputs)
    options = GptqConfig(act_order=act_order, static_groups=static or act_order)
    assert torch.equal(run_gptq(values, torch.eye(inputs), spec, options), fake_quantize(values, spec))


LAYERS: dict[str, st.SearchStrategy[Any]] = {
    "spec": specs(rounding="nearest", centering=False, block_size=st.sampled_from([7, 16, 24, 64, 1000])),
    "seed": st.integers(0, 10**6),
    "rows": st.integers(8, 24),
    "inputs": st.integers(32, 96),
}


def compare_with_nearest(spec: QuantSpec, seed: int, rows: int, inputs: int, options: GptqConfig) -> float:
    """Return the layer's error as a share of that of rounding to nearest."""
    values, hessian = make_layer(rows, inputs, seed)
    errors = [
        layer_error(values, quantized, hessian)
        for quantized in (run_gptq(values, hessian, spec, options), fake_quantize(values, spec))
    ]
    return errors[0] / errors[1]


@settings(max_examples=60)
@given(**LAYERS)
def test_with_act_order_the_layers_error_is_not_above_that_of_rounding_to_nearest(
    spec: QuantSpec, seed: int, rows: int, inputs: int
) -> None:
    """Nothing guarantees it: GPTQ is greedy. In 1,958 random layers of these kinds the worst was 0.75."""
    assert compare_with_nearest(spec, seed, rows, inputs, GptqConfig(act_order=True, static_groups=True)) <= 1


@settings(max_examples=60, derandomize=True)  # no bound holds for all layers: these are a fixed sample
@given(**LAYERS)
def test_in_the_columns_own_order_the_layers_error_is_seldom_above_that_of_rounding_to_nearest(
    spec: QuantSpec, seed: int, rows: int, inputs: int
) -> None:
    """Scales follow weights that have grown: in 2,042 random layers up to 29% above, 69% at 2 bits."""
    assert compare_with_nearest(spec, seed, rows, inputs, GptqConfig()) <= (1.3 if spec.bits > 2 else 1.7)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("data_type", ["nf", "quantile"])
def test_searched_scales_are_those_of_mse_and_lose_less(data_type: str, static: bool) -> None:
    spec = QuantSpec(bits=2, data_type=data_type, block_size=16, layout="row")
    values, hessian = make_layer(16, 64)
    options = GptqConfig(static_groups=static, search_scales=True)
    plain = run_gptq(values, hessian, spec, GptqConfig(static_groups=static))
    searched = run_gptq(values, hessian, spec, options)
    assert layer_error(values, searched, hessian) < 0.9 * layer_error(values, plain, hessian)
    blocks = BlockScales(values, spec)
    best = blocks.round(values, find_best_scales(values, blocks))
    assert torch.equal(run_gptq(values, torch.eye(64), spec, options), best)


def test_kept_columns_stay_and_the_others_do_not_see_them() -> None:
    spec, kept = QuantSpec(bits=3, data_type="nf", block_size=16, layout="row"), (3, 4, 40)
    values, hessian = make_layer(8, 48)
    values[:, 40] = 100.0  # would take the whole block's scale
    quantized = run_gptq(values, hessian, spec, kept=kept)
    others = [i for i in range(48) if i not in kept]
    assert torch.equal(quantized[:, kept], values[:, kept])
    assert layer_error(values, quantized, hessian) < layer_error(values, fake_quantize(values, spec), hessian)
    alone = values.clone()
    alone[:, kept] = 0
    rounded = run_gptq(values, torch.eye(48), spec, kept=kept)
    assert torch.equal(rounded[:, others], fake_quantize(alone, spec)[:, others])


@pytest.mark.parametrize("static", [False, True])
def test_a_matrix_whose_columns_are_all_kept_stays(static: bool) -> None:
    values, hessian = make_layer(8, 48)
    options = GptqConfig(static_groups=static)
    assert torch.equal(run_gptq(values, hessian, QuantSpec(bits=3), options, kept=tuple(range(48))), values)


def test_a_dead_column_becomes_zero_and_harms_no_other() -> None:
    spec = QuantSpec(bits=4, block_size=16, layout="row")
    values, hessian = make_layer(8, 32)
    hessian[5, :] = hessian[:, 5] = 0
    quantized = run_gptq(values, hessian, spec)
    assert torch.equal(quantized[:, 5], torch.zeros(8))
    values[:, 5] = 0
    assert torch.equal(run_gptq(values, hessian, spec), quantized)


def test_damping_that_is_too_little_is_raised_and_reported() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.05]))  # rounding can make it so
    _, used = factor_inverse(hessian, 0.01)
    assert used == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("hessian", "words"),
    [
        (torch.ones(4, 4), ["w: ", "4 inputs is singular", "damping=0 ", "quant.gptq.damping"]),
        (torch.full((4, 4), torch.nan), ["w: ", "NaN or Inf"]),
    ],
)
def test_a_hessian_of_no_use_is_an_error_that_names_the_weight(hessian: Tensor, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        run_gptq(torch.ones(2, 4), hessian, QuantSpec(), GptqConfig(damping=0))
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_layers_error_is_that_of_gptqmodel() -> None:
    """Both round to an even grid between each group's extremes; its zero point is an integer: that costs it 2 to 3%."""
    gptqmodel = pytest.importorskip("gptqmodel.quantization")

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator) * torch.rand(256, generator=generator)
    x = torch.randn(2048, 256, generator=generator) @ mix / 16
    values, hessian = 0.02 * torch.randn(256, 256, generator=generator), 2 / 2048 * x.T @ x
    linear = torch.nn.Linear(256, 256, bias=False)
    linear.weight.data = values.clone()
    config = gptqmodel.QuantizeConfig(
        bits=4, group_size=64, sym=False, desc_act=False, static_groups=True, act_group_aware=False, damp_percent=0.01
    )
    theirs = gptqmodel.gptq.GPTQ(linear, config)
    theirs.quantizer.configure(perchannel=True)
    theirs.add_batch(x[None], None, batch_index=0)
    table = tuple(np.linspace(-1, 1, 16).tolist())
    spec = QuantSpec(4, "table", table=table, normalization="minmax", layout="row", scale_format="fp32")
    ours = run_gptq(values, hessian, spec, GptqConfig(static_groups=True))
    ratio = layer_error(values, ours, hessian) / layer_error(values, theirs.quantize()[0], hessian)
    assert 0.95 < ratio < 1.02
