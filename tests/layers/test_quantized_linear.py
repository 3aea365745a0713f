"""Packed layers: the bits of fake quantization by tiles, its values by the fused kernels, and their state."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from kbit.checkpoints.packing import put_codes
from kbit.kernels.simd import AVX2, AVX512, GENERIC
from kbit.layers import quantized_linear
from kbit.layers.packed_weight import PackedLayout
from kbit.layers.quantized_experts import QuantizedExperts
from kbit.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.methods.weight import ExpertCodes
from kbit.numerics.quantizer import quantize
from kbit.numerics.spec import QuantSpec

# Every scale format, offsets, a mean, tables of the tensor's own, blocks across rows, short blocks, one block.
SPECS: list[dict[str, Any]] = [
    {"bits": 4, "data_type": "nf", "block_size": 64},
    {"bits": 3, "data_type": "nf", "block_size": 32, "scale_format": "fp32", "layout": "row"},
    {"bits": 4, "data_type": "quantile", "block_size": 128, "scale_format": "bf16", "normalization": "minmax"},
    {"bits": 4, "data_type": "float", "block_size": 32, "scale_format": "e8m0"},
    {"bits": 4, "data_type": "float", "block_size": 16, "scale_format": "fp8", "centering": True},
    {"bits": 4, "data_type": "nf", "block_size": 64, "scale_format": "dq8", "normalization": "signed_absmax"},
    {"bits": 3, "data_type": "int", "block_size": None, "scale_format": "dq8", "normalization": "minmax"},
    {"bits": 3, "data_type": "int", "block_size": 64, "layout": "row"},
    {"bits": 8, "data_type": "int", "block_size": 32, "normalization": "minmax"},  # computed, not looked up
    {"bits": 4, "data_type": "int", "block_size": 24},  # tiles alone
]


def make_layer(
    spec: dict[str, Any], out: int = 37, inputs: int = 96, **options: Any
) -> tuple[nn.Linear, QuantizedLinear]:
    """Return a layer with quantized values, and the packed one."""
    layer = nn.Linear(inputs, out)
    q = quantize(layer.weight, QuantSpec(**spec))
    if options.get("outliers"):
        columns = torch.tensor([1, 17, inputs - 1])
        q = q.keep_columns(columns, layer.weight.detach()[:, columns].clone())
    if options.get("input_scales"):
        q = dataclasses.replace(q, input_scales=(torch.rand(inputs) + 0.5).half())
    with torch.no_grad():
        layer.weight.copy_(q.dequantize())
    return layer, QuantizedLinear.from_codes(q, layer)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(str(v) for v in spec.values()))
@pytest.mark.parametrize("options", [{}, {"outliers": True, "input_scales": True}], ids=["plain", "columns"])
def test_both_paths_compute_what_fake_quantization_does(spec: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, packed = make_layer(spec, **options)
    fused = spec["block_size"] != 24
    for batch in (1, 3) if spec is SPECS[0] else (1,):  # each kernel takes a second or more to compile
        x = torch.randn(batch, 96)
        assert packed.choose_path(batch) == ("fused" if fused else "tile")
        y, expected = packed(x), layer.double()(x.double())
        layer.float()
        assert (y - expected).abs().max() < 2e-6 * expected.std()  # float32 sums of 96 products
        packed.fused_rows = 0
        assert packed.choose_path(batch) == "tile"
        assert torch.equal(packed(x), layer(x))
        packed.fused_rows = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(600, 48), (289, 40), (513, 64)])
def test_tiles_have_the_bits_of_the_whole_matrix(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Rows that end in short tiles, and blocks and bytes that begin at few rows."""
    torch.manual_seed(0)
    for spec in ({"bits": 3, "block_size": 56}, {"bits": 5, "block_size": 24, "layout": "row"}, {"bits": 4}):
        layer = nn.Linear(shape[1], shape[0]).to(dtype)
        q = quantize(layer.weight, QuantSpec(**spec))
        packed = QuantizedLinear.from_codes(q, layer)
        packed.fused_rows = 0
        for batch in (1, 2, 5, 40):
            x = torch.randn(batch, shape[1]).to(dtype)
            assert torch.equal(packed(x), F.linear(x, q.dequantize(), layer.bias)), (spec, batch)


def test_the_gradient_reaches_the_inputs_and_the_bias() -> None:
    torch.manual_seed(0)
    layer, packed = make_layer(SPECS[0], out=300)
    assert packed.bias is not None
    for packed.fused_rows, rows in ((8, 4), (0, 20)):  # fused, tiles
        x = torch.randn(1, rows, 96, requires_grad=True)
        ours = torch.autograd.grad((packed(x) ** 2).sum(), [x, packed.bias])
        theirs = torch.autograd.grad((layer(x) ** 2).sum(), [x, layer.bias])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not packed.weight.requires_grad


def test_copies_and_dtypes_keep_every_bit() -> None:
    _, packed = make_layer(SPECS[5], outliers=True, input_scales=True)
    x = torch.randn(3, 96)
    before = packed(x)  # so that the kernels' view of the weight exists
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied(x), before)
        assert copied.weight.data_ptr() != packed.weight.data_ptr()
    moved = copy.deepcopy(packed).to(torch.bfloat16)
    assert torch.equal(moved.dequantize(), packed.dequantize())
    assert moved(x.bfloat16()).dtype == torch.bfloat16
    stream = io.BytesIO()
    torch.save(packed.state_dict(), stream)
    stream.seek(0)
    _, other = make_layer(SPECS[5], outliers=True, input_scales=True)
    other(x)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other(x), before)
    empty = QuantizedLinear(packed.layout, nn.Parameter(torch.empty(37)), device="meta").to_empty(device="cpu")
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(x), before)


def test_moved_or_changed_tensors_are_seen_and_old_ones_let_go() -> None:
    _, packed = make_layer(SPECS[0])
    scales = packed.get_buffer("scales").numpy().copy()
    packed.register_buffer("scales", torch.from_numpy(scales))
    old, x = weakref.ref(scales), torch.randn(1, 96)
    del scales
    packed(x)
    with torch.no_grad():
        packed.get_buffer("scales").copy_((packed.get_buffer("scales").view(torch.float16) * 2).view(torch.uint8))
    expected = F.linear(x, packed.dequantize(), packed.bias)
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-5)
    packed._apply(torch.clone)  # as a move to another device
    gc.collect()
    assert old() is None
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["embedding first", "head first"])
def test_a_tied_head_has_the_embedding_s_tensors_after_a_move(order: str) -> None:
    embedding = nn.Embedding(50, 64)
    packed = QuantizedEmbedding.from_codes(quantize(embedding.weight, QuantSpec(bits=4)), embedding)
    modules = [packed, packed.make_head()]
    both = nn.ModuleList(modules if order == "embedding first" else modules[::-1])
    for model in (both.to("meta"), copy.deepcopy(both).to("meta")):
        a, b = model
        assert a.weight is b.weight
        assert a.get_buffer("scales") is b.get_buffer("scales")
        assert b.get_buffer("scales").is_meta


def test_the_limit_of_the_fused_path_is_the_one_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa, text in (
        (AVX2, "fused up to 64 rows in float32, 256 in 16 bits"),
        (AVX512, "fused up to 32 rows in float32, 8 in 16 bits"),
        (GENERIC, "fused up to 8 rows"),
    ):
        monkeypatch.setattr(quantized_linear, "find_isa", lambda isa=isa: isa)
        _, packed = make_layer(SPECS[0])
        assert repr(packed).endswith(f"bias=True, {text})")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert [packed.choose_path(rows, dtype) for rows in (0, 1, 8, 9)] == ["tile", "fused", "fused", "tile"]
    assert packed.choose_path(1, torch.float64) == "tile"
    packed.fused_rows = 0
    assert repr(packed).endswith("bias=True, tiles only)")


def test_in_bfloat16_the_fused_path_does_not_round_the_weights() -> None:
    """One rounding of the result remains. Tiles have one of each weight as well."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 37).bfloat16()
    q = quantize(layer.weight, QuantSpec(bits=4, block_size=32))
    packed = QuantizedLinear.from_codes(q, layer)
    x = torch.randn(1, 96).bfloat16()
    unrounded = dataclasses.replace(q, dtype=torch.float32).dequantize().double()
    assert not torch.equal(unrounded, q.dequantize().double())
    bias = layer.bias.detach().double()
    exact, sums = F.linear(x.double(), unrounded, bias), x.double().abs() @ unrounded.abs().t()
    limit = 2.0**-8 * exact.abs() + 100 * 2.0**-24 * (sums + bias.abs())  # half of the last bit, and float32's sums
    assert packed.choose_path(1, torch.bfloat16) == "fused"
    assert ((packed(x).double() - exact).abs() <= limit).all()
    packed.fused_rows = 0
    tiles = (packed(x).double() - exact).abs()
    assert (tiles <= limit + 2.0**-8 * (sums + exact.abs() + bias.abs())).all()
    assert (tiles > limit).any()


def test_gradients_of_16_bits_are_summed_in_float32() -> None:
    """Ten tiles: one rounding of the result, and none of each tile's part."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 2560).bfloat16()
    packed = QuantizedLinear.from_codes(quantize(layer.weight, QuantSpec(bits=4)), layer)
    gradient = torch.randn(4, 2560).bfloat16()
    wide, weight = gradient.double(), packed.dequantize().double()
    exact, sums = wide @ weight, wide.abs() @ weight.abs()
    limit = 2.0**-8 * exact.abs() + (256 + 10) * 2.0**-24 * sums  # half of the last bit, and float32's sums
    assert ((packed.multiply_gradient(gradient).double() - exact).abs() <= limit).all()


def test_float16_on_the_cpu_is_computed_in_float32_unless_told_otherwise() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 64).half()  # rows that are no multiple of 16: tiles
    q = quantize(layer.weight, QuantSpec(bits=4))
    packed, x = QuantizedLinear.from_codes(q, layer), torch.randn(20, 40).half()
    wide = F.linear(x.float(), q.dequantize().float(), layer.bias.float())
    assert torch.equal(packed(x), wide.half())
    packed.fused_rows = 0
    assert torch.equal(packed(x), F.linear(x, q.dequantize(), layer.bias))


def test_what_does_not_fit_is_refused() -> None:
    _, packed = make_layer(SPECS[0])
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 95\) do not end in the layer's 96 inputs"):
        packed(torch.randn(2, 95))
    packed.weight = nn.Parameter(packed.weight[:-1], requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of a packed weight \(37, 96\) is uint8\[1775\], not uint8\[1776\]"):
        packed(torch.randn(1, 96))
    with pytest.raises(ValueError, match="do not fit a weight of"):
        packed.put(quantize(torch.randn(37, 96), QuantSpec(bits=3)))
    q = quantize(torch.randn(37, 96), QuantSpec(bits=4))
    strange = dataclasses.replace(q, codebook=q.codebook * 2)
    with pytest.raises(ValueError, match="the codebook of nf4 is not that of its spec"):
        QuantizedLinear.from_codes(strange, nn.Linear(96, 37))
    with pytest.raises(ValueError, match="is no matrix"):
        QuantizedLinear(PackedLayout(QuantSpec(), (2, 3, 4), torch.float32))


def test_an_embedding_gives_rows_and_is_one_tensor_with_its_head() -> None:
    for spec, size in ((SPECS[0], (50, 64)), ({"bits": 3, "block_size": 48}, (51, 20))):
        embedding = nn.Embedding(*size)
        q = quantize(embedding.weight, QuantSpec(**spec))
        packed = QuantizedEmbedding.from_codes(q, embedding)
        tokens = torch.tensor([[3, 49, 3], [0, 7, 49]])
        assert torch.equal(packed(tokens), q.dequantize()[tokens])
        assert packed(tokens[:0]).shape == (0, 3, size[1])
        with pytest.raises(IndexError, match=rf"a token is not in 0..{size[0] - 1}"):
            packed(torch.tensor([size[0]]))
        head = packed.make_head()
        assert head.weight is packed.weight
        assert head.get_buffer("scales").data_ptr() == packed.get_buffer("scales").data_ptr()
        head.fused_rows, x = 0, torch.randn(20, size[1])
        assert torch.equal(head(x), F.linear(x, q.dequantize()))


CALIBRATION = CalibrationConfig(samples=2, length=16, unseen="rtn")


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_logits_of_a_packed_model_are_those_of_fake_quantization(
    build_tiny: Callable[..., Any], tokenizer: Any, architecture: str, method: str
) -> None:
    model = build_tiny(architecture, vocab_size=1024)
    if architecture in ("mixtral", "gpt_oss"):
        model.set_experts_implementation("eager")
    include = r"\.\d+\..*|embed_tokens|lm_head|embed_in|embed_out|wte" if method == "rtn" else None
    fields: dict[str, Any] = {"include": include, "outlier_fraction": 0.02, "outlier_selection": "column"}
    fields["exclude"] = "norm|bias|ln_|router|mlp.gate.weight|wpe|sinks"
    config = QuantConfig(bits=4, data_type="nf", method=method, calibration=CALIBRATION, **fields)
    report = quantize_model(model, config, tokenizer, keep_codes=True)
    del model.kbit_quantized
    packed = copy.deepcopy(model)
    for tensor in report.tensors:
        if tensor.quantized:
            names, codes = tensor.name.split(" = "), report.codes[tensor.name.split(" = ")[0]]
            parts: Any = codes.experts if isinstance(codes, ExpertCodes) else (codes,)
            put_codes(packed, names, parts)
    kinds = {type(module) for module in packed.modules()}
    assert QuantizedLinear in kinds
    assert not kinds & {nn.Linear, Conv1D} or method != "rtn"
    assert (QuantizedExperts in kinds) == (architecture in ("mixtral", "gpt_oss"))
    tokens = torch.randint(0, 1024, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        fused = packed(tokens[:1, :8]).logits
        torch.testing.assert_close(fused, expected[:1, :8], rtol=0, atol=1e-4)
        assert torch.equal(fused.argmax(-1), expected[:1, :8].argmax(-1))
        for module in packed.modules():
            if isinstance(module, QuantizedLinear):
                module.fused_rows = 0
        assert torch.equal(packed(tokens).logits, expected)
