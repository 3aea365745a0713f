"""Quantized products: against nn.Linear, against float64 through the same quantizers, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kbit.methods.quantize_model import quantize_model
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.training.products.fast import Fast, block_float, make_roles
from kbit.training.products.linear import QuantizedProducts, Roles, count_chunks, quantize_products

TOKENS, INPUTS, OUTPUTS = 48, 96, 80
MXFP4 = QuantSpec.from_name("mxfp4")
MXFP8 = QuantSpec(bits=8, data_type="float", exponent_bits=4, layout="row", block_size=32, scale_format="e8m0")
NVFP4 = QuantSpec.from_name("nvfp4")
INT8_ROWS = QuantSpec.from_name("int8_rowwise")
SPECS = {
    "m2": block_float(2),
    "m4": block_float(4),
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "nvfp4": NVFP4,
    "int8 rows": INT8_ROWS,
    "nf4 flat": QuantSpec(block_size=16, scale_format="fp32"),  # 16 divides all three dimensions
}

QAT_SPECS = [QuantSpec(bits=3), QuantSpec(bits=2, data_type="int", block_size=None)]


def make_layer(kind: str = "linear", *, bias: bool = True, seed: int = 0) -> nn.Module:
    """Return a model of one linear layer, which is called 0.layer.0."""
    torch.manual_seed(seed)
    layer: nn.Module = nn.Linear(INPUTS, OUTPUTS, bias=bias) if kind == "linear" else Conv1D(OUTPUTS, INPUTS)  # type: ignore[no-untyped-call]
    if bias:
        nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"dense": layer})])})


def dense(model: Any) -> Any:
    return model["layers"][0]["dense"]


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differentiate(layer: Any, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of x, of the weight and of the bias."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def quantized(model: nn.Module, *specs: QuantSpec | None, **options: Any) -> QuantizedProducts:
    return quantize_products(model, Roles(*specs), **options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(TOKENS,), (3, 16)], ids=str)
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("Conv1D", True)])
def test_without_quantizers_a_layer_computes_what_it_did(
    kind: str, bias: bool, shape: tuple[int, ...], autocast: bool
) -> None:
    model = make_layer(kind, bias=bias)
    x, gradient = draw(*shape, INPUTS), draw(*shape, OUTPUTS, seed=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = differentiate(dense(model), x, gradient)
        with quantized(model):
            found = differentiate(dense(model), x, gradient)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_a_strided_input_is_read_as_its_copy() -> None:
    model = make_layer(bias=False)  # torch adds a strided gradient of a bias in another order
    x, gradient = draw(INPUTS, TOKENS).t(), draw(OUTPUTS, TOKENS, seed=2).t()
    with quantized(model, *[block_float(2)] * 3):
        found = differentiate(dense(model), x, gradient)
        expected = differentiate(dense(model), x.contiguous(), gradient.contiguous())
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def assert_sum(found: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Compare with left right^T in float64: n float32 additions of the products' rounded terms are at most that off."""
    left, right = left.double(), right.double()
    expected, magnitude = left @ right.t(), left.abs() @ right.abs().t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    bound = (left.shape[1] + 1) * torch.finfo(torch.float32).eps * magnitude
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_products_are_those_of_quantized_operands_in_float64(spec: QuantSpec, kind: str) -> None:
    """Each operand is quantized along the dimension that its product sums."""
    model = make_layer(kind)
    x, gradient = draw(TOKENS, INPUTS), 1e-4 * draw(TOKENS, OUTPUTS, seed=2)
    layer = dense(model)
    weight = layer.weight.detach() if kind == "linear" else layer.weight.detach().t()
    with quantized(model, spec, spec, spec):
        y, of_x, of_weight, of_bias = differentiate(layer, x, gradient)
    of_weight = of_weight if kind == "linear" else of_weight.t()
    rows = [m.contiguous() for m in (x, weight, gradient, weight.t(), gradient.t(), x.t())]
    by_input, weight_by_input, by_output, weight_by_output, by_token, x_by_token = (
        fake_quantize(m, spec) for m in rows
    )
    assert_sum(y, by_input, weight_by_input, layer.bias.detach())
    assert_sum(of_x, by_output, weight_by_output)
    assert_sum(of_weight, by_token, x_by_token)
    assert_sum(of_bias[None], torch.ones(1, TOKENS), gradient.t())


def test_roles_are_quantized_alone() -> None:
    model, x, gradient = make_layer(), draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS, seed=2)
    weight, spec = dense(model).weight.detach(), block_float(2)
    with quantized(model, None, spec, None):  # straight through: the weights' gradient takes the forward's operand
        y, of_x, of_weight, _ = differentiate(dense(model), x, gradient)
    assert_sum(y, fake_quantize(x, spec), weight, dense(model).bias.detach())
    assert_sum(of_x, gradient, weight.t())
    assert_sum(of_weight, gradient.t(), fake_quantize(x, spec).t())
    with quantized(model, None, None, spec):
        y, of_x, of_weight, _ = differentiate(dense(model), x, gradient)
    assert_sum(y, x, weight, dense(model).bias.detach())
    assert_sum(of_x, fake_quantize(gradient, spec), weight.t())
    assert_sum(of_weight, fake_quantize(gradient.t().contiguous(), spec), x.t())


@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=3), QuantSpec(bits=2, data_type="int", block_size=None)], ids=["nf3", "int2"]
)
@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_weights_alone_train_through_the_model_that_quantize_model_makes(
    build_tiny: Callable[..., Any], architecture: str, spec: QuantSpec
) -> None:
    """Quantization-aware training: values and gradients are those at the quantized weights, bit for bit."""
    model, tokens = build_tiny(architecture), torch.arange(40).view(2, 20)
    rounded = copy.deepcopy(model)
    quantize_model(rounded, spec)
    gradients = []
    with quantized(model, spec) as products:
        assert len(products.layers) == 8
        for net in (model, rounded):
            net(tokens, labels=tokens).loss.backward()
            gradients.append({name: p.grad for name, p in net.named_parameters()})
        assert torch.equal(model(tokens).logits, rounded(tokens).logits)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert not torch.equal(model(tokens).logits, rounded(tokens).logits)


def test_layers_get_their_own_forward_back() -> None:
    model, x = make_layer(), draw(TOKENS, INPUTS)
    before = model.state_dict()
    expected = dense(model)(x)
    products = quantized(model, block_float(2), block_float(2))
    assert not torch.equal(dense(model)(x), expected)
    assert model.state_dict().keys() == before.keys()
    products.restore()
    products.restore()
    assert torch.equal(dense(model)(x), expected)
    assert "forward" not in vars(dense(model))


@pytest.mark.parametrize(("specs", "passes"), [((2, 2, 2), 1), ((4, 4, 4), 4), ((4, 2, 2), 5 / 3), ((2, 2, 4), 5 / 3)])
def test_passes_of_2_bit_chunks(specs: tuple[int, ...], passes: float) -> None:
    """W A, G W and G A: with m = 4 for one operand alone two of the three products take 2 passes."""
    model = make_layer()
    with quantized(model, *map(block_float, specs)) as products:
        differentiate(dense(model), draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS))
        with torch.no_grad():
            dense(model)(draw(TOKENS, INPUTS))  # what is only evaluated is no training
    assert products.counter.macs == 3 * TOKENS * INPUTS * OUTPUTS
    assert products.counter.passes_per_mac == pytest.approx(passes, rel=1e-12)


def test_chunks_of_an_operand() -> None:
    specs = [None, QuantSpec(bits=16), INT8_ROWS, MXFP4, block_float(4), block_float(3), block_float(2)]
    assert [count_chunks(spec) for spec in specs] == [8, 8, 4, 2, 2, 2, 1]


def test_stochastic_rounding_depends_on_use_and_step_alone() -> None:
    """Another use, layer, replica or step has other random numbers. The same step again, or more threads, have not."""
    model, x, gradient = make_layer(), draw(512, INPUTS), draw(512, OUTPUTS, seed=2)
    specs = [block_float(2, rounding="stochastic")] * 3
    with quantized(model, *specs) as products:

        def compute(step: int, replica: int = 0, threads: int = 1) -> list[list[torch.Tensor]]:
            products.begin_step(step, 10, replica)
            torch.set_num_threads(threads)
            try:
                return [differentiate(dense(model), x, gradient) for _ in range(2)]
            finally:
                torch.set_num_threads(1)

        first = compute(3)
        for again in (compute(3), compute(3, threads=2)):
            assert all(torch.equal(a, b) for use in range(2) for a, b in zip(first[use], again[use], strict=True))
        for other in (first[1], compute(4)[0], compute(3, replica=1)[0]):
            assert not any(torch.equal(a, b) for a, b in zip(first[0][:3], other[:3], strict=True))
    with quantized(nn.ModuleDict({"blocks": model["layers"]}), *specs) as products:  # type: ignore[index]
        products.begin_step(3, 10)
        assert not torch.equal(dense(model)(x), first[0][0])


def test_stochastic_rounding_of_an_operand_is_unbiased_below_the_top_and_clipped_there() -> None:
    """The table of m = 2 ends at 1.5 units of the group's power of two: 1.9 has no neighbour above."""
    model = make_layer(bias=False)
    dense(model).weight.data = torch.eye(INPUTS)  # the output is the quantized input
    x = torch.full((4000, INPUTS), 0.3)
    x[:, ::16] = 1.9
    with quantized(model, None, block_float(2, rounding="stochastic")):
        y = dense(model)(x)
    assert bool((y[:, ::16] == 1.5).all())
    inner = y.detach()[:, torch.arange(INPUTS) % 16 != 0]
    assert set(inner.unique().tolist()) == {0.0, 0.5}
    error = 0.5 * (0.6 * 0.4 / inner.numel()) ** 0.5  # of the mean of 0 and 0.5 with probabilities 0.4 and 0.6
    assert abs(float(inner.mean()) - 0.3) < 4 * error


def test_an_evaluation_within_a_step_leaves_the_training_its_random_numbers() -> None:
    model, x = make_layer(), draw(TOKENS, INPUTS)
    with quantized(model, block_float(2, rounding="stochastic")) as products:
        products.begin_step(0, 10)
        expected = dense(model)(x)
        products.begin_step(0, 10)
        with torch.no_grad():
            evaluated = [dense(model)(x) for _ in range(2)]
        assert torch.equal(dense(model)(x), expected)
    assert not torch.equal(*evaluated)


def test_gradient_checkpointing_is_refused(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt2")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model\.gradient_checkpointing_disable"):
        quantized(model, block_float(2))


@pytest.mark.parametrize("policy", [Roles(None, block_float(2)), Fast()], ids=["roles", "fast"])
def test_values_of_a_diverged_training_are_no_user_error(policy: Roles | Fast) -> None:
    model, x = make_layer(), draw(TOKENS, INPUTS)
    x[3, 5] = torch.inf
    where = r"layers\.0\.dense, step 7, activations: 1 of 4608 values are NaN"
    with quantize_products(model, policy) as products:
        products.begin_step(7, 10)
        with pytest.raises(FloatingPointError, match=where):
            dense(model)(x)


def test_values_beyond_the_scales_name_the_layer() -> None:
    spec = QuantSpec(block_size=16)
    with (
        quantized(model := make_layer(), None, spec),
        pytest.raises(ValueError, match=r"layers\.0\.dense, step 0, activations: .* beyond fp16"),
    ):
        dense(model)(1e5 * draw(TOKENS, INPUTS))


@pytest.mark.parametrize("role", ["activations", "gradients"])
@pytest.mark.parametrize("data_type", ["quantile", "learned"])
def test_a_data_type_that_needs_a_fit_is_for_weights(role: str, data_type: str) -> None:
    spec = QuantSpec(data_type=data_type, scale_format="fp32")
    assert Roles(weights=spec).weights == spec
    with pytest.raises(ValueError, match=f"{role}: data_type={data_type} is fitted to a tensor"):
        Roles(**{role: spec})


def test_gradients_need_scales_below_6e_8() -> None:
    """One float16 scale of a block of 1e-8 is six times too large: the block would be lost without a word."""
    with pytest.raises(ValueError, match="gradients: scale_format=fp16 ends at 6e-8"):
        Roles(gradients=QuantSpec())
    assert Roles(QuantSpec(bits=16), None, QuantSpec(bits=16)) == Roles()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((None, block_float(2, group=128), None), r"output of layers\.0\.dense is summed over 96 inputs, fewer than"),
        ((None, None, block_float(2, group=84)), r"summed over 80 outputs, fewer than the 84 of a block of gradients"),
        ((block_float(2, group=84), None, block_float(2)), "80 outputs, fewer than the 84 of a block of weights"),
        ((None, QuantSpec(block_size=64), None), "96 inputs, which blocks of 64 do not divide: layout=flat"),
    ],
)
def test_blocks_lie_within_the_summed_dimension(specs: tuple[QuantSpec | None, ...], message: str) -> None:
    model = make_layer()
    with pytest.raises(ValueError, match=message):
        quantized(model, *specs)
    assert "forward" not in vars(dense(model))


def test_weights_alone_may_have_any_blocks() -> None:
    """As quantize_model has them: no product needs blocks along its sum then."""
    with quantized(model := make_layer(), QuantSpec(block_size=128)):
        dense(model)(draw(TOKENS, INPUTS))


@pytest.mark.parametrize(("tokens", "ok"), [(15, False), (16, True), (17, True)])
def test_too_few_tokens_for_a_block_are_refused(tokens: int, ok: bool) -> None:
    model = make_layer()
    with quantized(model, *[block_float(2)] * 3):
        with torch.no_grad():
            dense(model)(draw(tokens, INPUTS))  # nothing is summed over tokens
        if ok:
            differentiate(dense(model), draw(tokens, INPUTS), draw(tokens, OUTPUTS))
        else:
            with pytest.raises(ValueError, match="summed over 15 tokens, fewer than the 16 of a block of activations"):
                dense(model)(draw(tokens, INPUTS))


def test_layers_are_chosen_by_pattern(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt2")
    with quantized(model, block_float(2), include=r"mlp", exclude=r"\.1\.") as products:
        assert [layer.name for layer in products.layers] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
        with pytest.raises(
            ValueError, match=r"transformer\.h\.0\.mlp\.c_fc has another forward in place of its class's"
        ):
            quantized(model, block_float(2))
    with pytest.raises(ValueError, match=r"include='nothing' and exclude=None leave no linear layer"):
        quantized(model, block_float(2), include="nothing")
    with pytest.raises(ValueError, match=r"experts computes its experts' products itself"):
        quantized(build_tiny("mixtral"), block_float(2))


def test_a_step_lies_within_the_training() -> None:
    with quantized(make_layer(), *make_roles(2).__dict__.values()) as products:
        products.begin_step(9, 10)
        with pytest.raises(ValueError, match=r"step=10 is not in 0\.\.9"):
            products.begin_step(10, 10)
