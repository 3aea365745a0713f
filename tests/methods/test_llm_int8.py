"""Int8 products: exact where they can be, the worked numbers, what outliers do to them, and whole models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from planted import plant_features
from torch import nn

from kbit.data.tasks import load_tasks
from kbit.data.windows import make_windows
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.perplexity import Reference, compute_reference, measure_cross_entropy
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.token_budget import TokenBudget
from kbit.evaluation.zero_shot import evaluate, prepare_task
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.session import Session
from kbit.layers import int8_linear
from kbit.layers.int8_linear import Int8Linear, multiply_int8, quantize_int8
from kbit.layers.int8_schemes import SCHEMES
from kbit.methods.config import QuantConfig
from kbit.methods.llm_int8 import describe_products, make_product
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.methods.report import plan_quantization
from kbit.methods.weight import Weight
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model
from kbit.models.parameters import hash_weights
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec

Build = Callable[..., Any]

INT8 = QuantConfig(bits=8, method="llm_int8")
TOKENS = torch.arange(1, 129).view(2, 64)
# The row that explains int8 in talks; its copies print slightly other codes, these are computed exactly.
PLAIN = torch.tensor([3.5, 0.1, 0.02, 1, 0.3, 0.01, 0.05, 0.1])
WITH_OUTLIER = torch.tensor([15.0, 0.1, 0.02, 1, 0.3, 0.01, 0.05, 0.1])


def make_layer(method: str, weight: torch.Tensor, bias: torch.Tensor | None = None, **fields: Any) -> Int8Linear:
    config = QuantConfig(bits=8, method=method, **fields)
    return make_product(Weight("w", weight.clone(), config.spec), bias, config)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Integers in -127..127, both ends in each row: int8 with scale 1, with and without a zero point."""
    x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[:, 0], x[:, 1] = 127, -127
    return x


# ---- numbers


def test_the_worked_numbers() -> None:
    """With 15 in the place of 3.5 three of eight values become 0, not one, and the rest take 4 levels, not 6.

    Then three ways out: blocks, vector-wise scales, decomposition.
    """
    assert quantize_int8(PLAIN[None], by_row=True).codes[0].tolist() == [127, 4, 1, 36, 11, 0, 2, 4]
    assert quantize_int8(WITH_OUTLIER[None], by_row=True).codes[0].tolist() == [127, 1, 0, 8, 3, 0, 0, 1]
    # blocks: only those that share the outlier's block of 4 suffer; the others are 127 times their largest, 0.3
    blocked = fake_quantize(WITH_OUTLIER, QuantSpec(bits=8, data_type="int", block_size=4, scale_format="fp32"))
    assert (blocked[4:] * 127 / 0.3).round().tolist() == [127, 4, 21, 42]
    assert (blocked[:4] * 127 / 15).round().tolist() == [127, 1, 0, 8]
    # vector-wise: the token without outlier keeps its levels; with one scale for both it would not
    both = torch.stack([PLAIN, WITH_OUTLIER])
    assert quantize_int8(both, by_row=True).codes[0].tolist() == [127, 4, 1, 36, 11, 0, 2, 4]
    assert quantize_int8(both, by_row=False).codes[0].tolist() == [30, 1, 0, 8, 3, 0, 0, 1]
    # decomposition: the outlier's dimension is multiplied at 16 bits, the rest has all levels
    layer = make_layer("llm_int8", torch.eye(8))
    assert layer(WITH_OUTLIER[None])[0, 0] == 15
    rest = WITH_OUTLIER.index_fill(0, torch.tensor([0]), 0.0)
    assert quantize_int8(rest[None], by_row=True).codes[0].tolist() == [0, 13, 3, 127, 38, 1, 6, 13]
    assert (layer(WITH_OUTLIER[None])[0, 1:] * 127).round().tolist() == [13, 3, 127, 38, 1, 6, 13]


@pytest.mark.parametrize("zero_point", [False, True])
@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from([1e-30, 1, 1e30]))
def test_error_is_at_most_half_a_step(
    zero_point: bool, rows: int, columns: int, seed: int, shift: float, unit: float
) -> None:
    x = (draw(rows, columns, seed=seed) + shift) * unit
    q = quantize_int8(x, by_row=True, zero_point=zero_point)
    span = (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)) / 254 if zero_point else x.abs().amax(1) / 127
    worst = 1.0 if zero_point else 0.5  # the zero point is rounded too, so that the range's upper end may be cut
    assert ((q.dequantize() - x).abs() <= (worst + 1e-3) * span[:, None]).all()
    assert q.codes.min() >= -127


@pytest.mark.parametrize("zero_point", [False, True])
def test_zero_is_exact_and_a_matrix_of_zeros_is_zeros(zero_point: bool) -> None:
    x = draw(3, 50) + 2
    x[:, 7] = 0
    assert (quantize_int8(x, by_row=False, zero_point=zero_point).dequantize()[:, 7] == 0).all()
    assert (quantize_int8(torch.zeros(2, 3), by_row=True, zero_point=zero_point).dequantize() == 0).all()


@pytest.mark.parametrize("zero_point", [False, True])
def test_the_smallest_numbers_have_codes_of_their_sign(zero_point: bool) -> None:
    """Below 2^-142 the scale itself is a rounded subnormal, down to 2/3 of what it should be."""
    x = torch.tensor([[190.0, -190, 100, 0], [300, 128, -200, 0]]) * 2.0**-149
    assert torch.equal(quantize_int8(x, by_row=True, zero_point=zero_point).dequantize().sign(), x.sign())


def test_a_zero_point_uses_the_levels_of_one_sided_values() -> None:
    x = draw(4, 200).abs()
    errors = [(quantize_int8(x, by_row=True, zero_point=z).dequantize() - x).square().mean() for z in (False, True)]
    assert errors[1] < errors[0] / 3.5  # half the step, a quarter of the squared error


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = draw(2, 16)
    x[1, 3] = bad
    for method in ("vectorwise", "zeropoint"):
        assert not torch.isfinite(make_layer(method, draw(4, 16))(x)[1]).any()


# ---- products


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 20), st.booleans(), st.integers(0, 1000))
def test_products_are_exact_with_and_without_padding(m: int, k: int, n: int, padded: bool, seed: int) -> None:
    a, b = (draw_codes(rows, max(k, 2), seed=seed + i).to(torch.int8) for i, rows in enumerate((m, n)))
    with pytest.MonkeyPatch.context() as patch:
        if padded:  # as a GPU needs it
            patch.setitem(int8_linear.GEMM_SHAPES, "cpu", int8_linear.GEMM_SHAPES["cuda"])
        assert torch.equal(multiply_int8(a, b).long(), a.long() @ b.long().t())


def test_a_device_without_int8_products_is_named() -> None:
    a = torch.empty(2, 2, dtype=torch.int8, device="meta")
    with pytest.raises(ValueError, match="no int8 matrix product on meta; there is on: cpu, cuda"):
        multiply_int8(a, a)


@pytest.mark.parametrize("method", SCHEMES)
def test_what_int8_represents_exactly_is_multiplied_exactly(method: str) -> None:
    x, w = draw_codes(5, 96, seed=1), draw_codes(7, 96, seed=2)
    if SCHEMES[method].decomposes:
        x[:, 50] = 10_000.0  # int8 cannot, beside the others: the threshold cuts it out
    scaled_x, scaled_w = x / 64, w / 1024  # powers of two: scales are exact
    bias = torch.arange(7.0) / 8
    layer = make_layer(method, scaled_w, bias, activation_threshold=2.0)
    assert torch.equal(layer(scaled_x), (x.double() @ w.t().double() / 65536 + bias).float())
    assert layer.met.nonzero().flatten().tolist() == ([50] if SCHEMES[method].decomposes else [])


@pytest.mark.parametrize("method", SCHEMES)
def test_a_layer_is_the_product_of_what_its_codes_stand_for(method: str) -> None:
    """Including batches of any shape, dimensions kept by the configuration and those above the threshold."""
    x, w, scheme = draw(2, 3, 48, seed=3) * 2, draw(10, 48, seed=4), SCHEMES[method]
    config = QuantConfig(bits=8, method=method, activation_threshold=4.0)
    kept = torch.tensor([1, 30])
    layer = make_product(Weight("w", w.clone(), config.spec, outlier_columns=kept), None, config)
    rows = x.view(6, 48)
    wide = (rows.abs().amax(0) > 4.0) if scheme.decomposes else torch.zeros(48, dtype=torch.bool)
    wide[kept] = True
    rest_w = w.index_fill(1, kept, 0.0)
    a = quantize_int8(rows * ~wide, by_row=scheme.input_rows, zero_point=scheme.zero_point).dequantize()
    b = quantize_int8(rest_w, by_row=scheme.weight_rows, zero_point=scheme.zero_point).dequantize()
    expected = a.double() @ b.double().t() + (rows[:, wide].double() @ w[:, wide].double().t())
    assert torch.allclose(layer(x).view(6, 10).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.met, wide) or not scheme.decomposes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_of_16_bits_computes_the_same_and_rounds_its_result(dtype: torch.dtype) -> None:
    x, w, bias = (draw(*shape).to(dtype) for shape in ((5, 32), (6, 32), (6,)))
    x[:, 3] = 8
    low, high = (make_layer("llm_int8", w.to(d), bias.to(d))(x.to(d)) for d in (dtype, torch.float32))
    assert low.dtype == dtype
    # the outlier's product is rounded to 16 bits, and so is their sum: a rounding each
    assert ((low.float() - high).abs() <= 2 * torch.finfo(dtype).eps * high.abs().max()).all()


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_bitsandbytes_computes_the_same(threshold: float) -> None:
    """On float16 inputs; its result is rounded to float16 (2^-11 relative), with outliers in two roundings more.

    It dequantizes its int8 weights for the outliers, where the paper and kbit take the 16-bit ones: so here weights
    that int8 represents exactly. It cuts values out, not dimensions, before a row's scale: so here whole columns.
    """
    bnb = pytest.importorskip("bitsandbytes")
    x, w = draw(24, 64, seed=5).clamp(-2.5, 2.5).half(), (draw_codes(16, 64, seed=6) / 1024).half()
    if threshold:
        x[:, [3, 40]] = (x[:, [3, 40]].abs() + 4) * x[:, [3, 40]].sign()
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.is_training = threshold, False, False  # else not in int8 on a CPU
    theirs = bnb.matmul(x, w, state=state).float()
    method = {"method": "llm_int8", "activation_threshold": threshold} if threshold else {"method": "vectorwise"}
    ours = make_layer(weight=w.float(), **method)(x.float())
    assert (ours - theirs).abs().max() <= 4 * 2**-11 * theirs.abs().max()
    exact = x.double() @ w.double().t()
    assert (ours - theirs).abs().max() < (ours - exact).abs().max() / 2  # closer to it than int8 is to the product


# ---- models


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom", "llama"])
def test_a_model_computes_in_int8_and_is_restored(build_tiny: Build, architecture: str) -> None:
    model = build_tiny(architecture)
    before, weights_hash = logits(model), hash_weights(model)
    copies = copy_weights(model, plan_quantization(model, INT8))
    report = quantize_model(model, INT8)
    assert hash_weights(model) != weights_hash
    assert report.weight_rmse is not None
    assert 0 < report.weight_rmse < 0.01
    error = (logits(model) - before).abs().max() / before.abs().max()
    assert 0 < error < 0.05
    layers = sum(isinstance(vars(m).get("forward"), Int8Linear) for m in model.modules())
    assert layers == sum(t.quantized for t in report.tensors)
    restore_weights(model, copies)
    assert torch.equal(logits(model), before)
    assert hash_weights(model) == weights_hash
    assert not any("forward" in vars(m) for m in model.modules())


def test_planted_features_ruin_one_scale_and_not_decomposition(build_tiny: Build) -> None:
    errors = {}
    for planted in (False, True):
        for method in ("absmax", "zeropoint", "vectorwise", "llm_int8"):
            model = build_tiny("opt")
            before = logits(model)
            if planted:
                plant_features(model, [7, 41])
                assert torch.allclose(logits(model), before, rtol=0, atol=1e-6)
            quantize_model(model, dataclasses.replace(INT8, method=method))
            errors[planted, method] = float((logits(model) - before).square().mean().sqrt())
            if method == "llm_int8" and planted:
                notes = describe_products(model)
                assert notes["decomposed_most"]["dimensions"] == 2  # the planted ones and no other
    assert errors[True, "absmax"] > 8 * errors[False, "absmax"]
    assert errors[True, "vectorwise"] > 8 * errors[False, "vectorwise"]  # every token has the outliers
    assert errors[True, "llm_int8"] < 1.5 * errors[False, "llm_int8"]


@pytest.mark.parametrize("method", ["absmax", "llm_int8", "zeropoint_vectorwise"])
def test_results_do_not_depend_on_the_batch(method: str) -> None:
    """Not even where a batch shares its scale or its outliers; restored, the model is the 16-bit one again."""
    evaluation = EvalConfig(tasks=("nano_endings",), limit=6, perplexity_windows=3)
    session = Session(ModelConfig("nano-neox-98k"))
    quant = QuantConfig(bits=8, method=method, activation_threshold=3.0)
    measured = [
        session.run(Experiment(quant=quant, eval=dataclasses.replace(evaluation, batch_size=size))).measurements
        for size in (1, 32)
    ]
    if method == "zeropoint_vectorwise":  # a float32 product of another shape may sum in another order
        assert [m.value for m in measured[0]] == pytest.approx([m.value for m in measured[1]], rel=1e-5)
    else:
        assert measured[0] == measured[1]
    baseline = session.run(Experiment(quant=QuantConfig(bits=16), eval=evaluation))
    [divergence] = [m for m in baseline.measurements if m.metric == "kl_divergence"]
    assert divergence.value == 0
    assert baseline.batch_tokens == 1024


@pytest.mark.parametrize(("method", "fields"), [
    ("absmax", {}), ("zeropoint", {}), ("llm_int8", {"activation_threshold": 2.0}), ("vectorwise", {}),
])  # fmt: skip
def test_choices_of_an_item_score_as_alone_under_lm_eval(method: str, fields: dict[str, Any]) -> None:
    """Also the user's own model, quantized before any scorer sees it."""
    loaded = load_model("nano-neox-98k")
    scorer = Scorer(loaded.model, loaded.tokenizer)
    [task] = load_tasks(["nano_choice"])
    requests = prepare_task(task, 3).instances
    unquantized = scorer.loglikelihood(requests)
    config = QuantConfig(bits=8, method=method, **fields)
    original = copy_weights(loaded.model, plan_quantization(loaded.model, config))
    quantize_model(loaded.model, config)
    theirs = HFLM(
        loaded.model, tokenizer=loaded.tokenizer, batch_size=1, softmax_dtype=torch.float32, logits_cache=False
    ).loglikelihood(requests, disable_tqdm=True)
    for one in (scorer, Scorer(loaded.model, loaded.tokenizer)):
        mine = one.loglikelihood(requests)
        assert max(abs(a - b) for (a, _), (b, _) in zip(mine, theirs, strict=True)) < 1e-4  # 0.6 where they share a row
        assert one.path == ("prefix sharing" if method == "vectorwise" else "one sequence per row")
        assert (one.batch_size, one.batch_tokens) == ((32, 1024) if method == "vectorwise" else (1, 1))
    restore_weights(loaded.model, original)
    assert scorer.loglikelihood(requests) == unquantized


@pytest.mark.parametrize("method", ["absmax", "llm_int8"])
def test_whoever_evaluates_the_model_its_results_do_not_depend_on_the_batch(method: str) -> None:
    """The functions that are given a model, not an experiment: tasks, windows, the reference of a KL divergence."""
    loaded = load_model("nano-neox-98k")
    windows = make_windows("nano_held_out", loaded.tokenizer, context=64, max_windows=3)
    quantize_model(loaded.model, QuantConfig(bits=8, method=method, activation_threshold=2.0))
    by_1, by_32 = (evaluate(loaded.model, loaded.tokenizer, "nano_cloze", batch_size=size, limit=3) for size in (1, 32))
    assert by_1 == by_32
    states = [compute_reference(loaded.model, windows, TokenBudget(tokens)) for tokens in (1, 1024)]
    assert torch.equal(*states)
    model: Any = loaded.model
    reference = Reference(states[0], model.get_output_embeddings())
    alone, together = (
        measure_cross_entropy(loaded.model, windows, TokenBudget(tokens), reference) for tokens in (1, 1024)
    )
    assert alone == together
    [divergence] = [m.value for m in together.measurements if m.metric == "kl_divergence"]
    assert divergence == 0


def test_the_record_says_what_was_decomposed() -> None:
    quant = dataclasses.replace(INT8, activation_threshold=2.0)
    result = Session(ModelConfig("nano-gpt2-98k")).run(
        Experiment(ModelConfig("nano-gpt2-98k"), quant, EvalConfig(tasks=(), perplexity_windows=2))
    )
    assert 0 < result.method_notes["decomposed_share"] < 1
    assert 0 < result.method_notes["decomposed_most"]["dimensions"] <= result.method_notes["decomposed_most"]["of"]


@pytest.mark.parametrize(("architecture", "fields", "words"), [
    ("llama", {"include": "lm_head"}, r"lm_head\.weight is the output embedding"),
    ("mixtral", {}, r"experts\.gate_up_proj is a weight of MixtralExperts"),
])  # fmt: skip
def test_what_has_no_int8_product_is_named(
    build_tiny: Build, architecture: str, fields: dict[str, Any], words: str
) -> None:
    model = build_tiny(architecture)
    before = hash_weights(model)
    with pytest.raises(ValueError, match=words):
        quantize_model(model, dataclasses.replace(INT8, **fields))
    assert hash_weights(model) == before
    assert not any("forward" in vars(m) for m in model.modules())


# ---- bits and configuration


@pytest.mark.parametrize(("method", "constants"), [("absmax", 1), ("rowwise", 1), ("vectorwise", 10), ("llm_int8", 10)])
def test_bits_are_codes_and_constants(method: str, constants: int) -> None:
    config = QuantConfig(bits=8, method=method)
    assert config.count_bits((10, 48)) == 8 * 480 + 32 * constants
    if f"zeropoint_{method}" in SCHEMES:
        shifted = dataclasses.replace(config, method=f"zeropoint_{method}")
        assert shifted.count_bits((10, 48)) == 8 * 480 + (32 + 8) * constants
    layer = make_layer(method, draw(10, 48))
    assert 32 * layer.weight.scale.numel() + 8 * layer.weight.codes.numel() == config.count_bits((10, 48))


def test_the_configuration_does_what_the_methods_are_called() -> None:
    """The names are the paper's: what each says of a method is what the method does, and what is counted."""
    for name in SCHEMES:
        config = QuantConfig(bits=8, method=name)
        decomposes = name.endswith(("llm_int8", "decomposition"))
        assert config.decomposes == decomposes
        assert config.spec.layout == ("row" if name.endswith(("vectorwise", "llm_int8")) else "flat")
        assert SCHEMES[name].sees_whole_input == (decomposes or name in ("absmax", "zeropoint"))
        assert (config.count_bits((4, 4)) > config.spec.count_bits((4, 4))) == name.startswith("zeropoint")


def test_other_fields_of_the_quantizer_mean_nothing_and_the_threshold_something() -> None:
    def key(**fields: Any) -> str:
        return find_key(Experiment(quant=dataclasses.replace(INT8, **fields)))

    assert key(data_type="nf", block_size=128, scale_format="fp16") == key()
    assert key(activation_threshold=3.0) != key() != key(method="vectorwise")
    assert key(bits=16) == find_key(Experiment(quant=QuantConfig(bits=16)))
    assert Experiment(quant=INT8).label() == "nano-neox-98k llm_int8"
    with pytest.raises(ValueError, match=r"method=llm_int8 computes in 8 bits: quant\.bits=4 is not 8"):
        QuantConfig(bits=4, method="llm_int8")


def test_a_linear_layers_own_forward_is_untouched_elsewhere() -> None:
    layer = nn.Linear(4, 4)
    assert "forward" not in vars(layer)
