"""Quantized tensors in the formats of other tools: each tool's own code decodes them to the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.checkpoints.formats import bitsandbytes, compressed_tensors, gguf, gptq
from kbit.checkpoints.formats.integers import find_levels, pack_words, unpack_words
from kbit.checkpoints.formats.plain import NotExactError
from kbit.methods.config import QuantConfig
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.quantizer import quantize
from kbit.numerics.spec import QuantSpec

SHAPE = (96, 256)
GGUF_KINDS = {
    **{"int4_grid": "Q4_0", "gguf_q4_1": "Q4_1", "gguf_q5_0": "Q5_0"},
    **{"gguf_q5_1": "Q5_1", "int8_grid": "Q8_0", "gguf_iq4_nl": "IQ4_NL"},
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> QuantizedTensor:
    """A matrix of normal weights with a block of zeros, quantized by a preset."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    weights[3, 64:128] = 0
    return quantize(weights.to(dtype), dataclasses.replace(QuantConfig.from_name(name).spec, **changes))


def quantize_by_bitsandbytes(kind: str, *, nested: bool) -> tuple[Any, torch.Tensor, Any]:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type=kind, compress_statistics=nested)
    return functional, packed, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "fp4_bnb"])
def test_bitsandbytes_decodes_what_was_written(name: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    tensor = make(name, dtype)
    parts = bitsandbytes.write(tensor)
    others = {part: value for part, value in parts.items() if part}
    state = functional.QuantState.from_dict(others, device=torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(parts[""].clone(), state), tensor.dequantize())
    assert torch.equal(bitsandbytes.read(parts).codes, tensor.codes)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_own_tensors_are_read(kind: str, nested: bool) -> None:
    functional, packed, state = quantize_by_bitsandbytes(kind, nested=nested)
    tensor = bitsandbytes.read({"": packed, **state.as_dict(packed=True)})
    assert torch.equal(tensor.dequantize(), functional.dequantize_4bit(packed, state))


def test_a_nested_table_that_is_not_kbits_gives_the_scales_it_means() -> None:
    _, packed, state = quantize_by_bitsandbytes("nf4", nested=True)
    parts = {"": packed, **state.as_dict(packed=True)}
    parts["nested_quant_map"] = parts["nested_quant_map"] * 1.01
    tensor = bitsandbytes.read(parts)
    scales = parts["nested_quant_map"][parts["absmax"].long()] * parts["nested_absmax"] + state.offset
    assert tensor.spec.scale_format == "fp32"
    assert torch.equal(tensor.scales["scales"], scales)


@pytest.mark.parametrize(("name", "kind"), GGUF_KINDS.items())
def test_gguf_decodes_what_was_written(name: str, kind: str) -> None:
    library = pytest.importorskip("gguf", reason="needs gguf")
    tensor = make(name)
    found, rows = gguf.write(tensor)
    decoded = library.quants.dequantize(rows, library.GGMLQuantizationType[kind])
    assert found.name == kind
    assert rows.nbytes == library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]][1] * SHAPE[0] * SHAPE[1] // 32
    assert np.array_equal(decoded, tensor.dequantize().numpy())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(gguf.KINDS)), st.integers(0, 2**32 - 1))
def test_any_gguf_block_is_read_as_gguf_decodes_it(name: str, seed: int) -> None:
    library = pytest.importorskip("gguf", reason="needs gguf")
    kind = gguf.KINDS[name]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (6, kind.block_bytes), np.uint8)
    halves = random.normal(size=(6, 1 + kind.has_offset)).astype(np.float16)
    halves[:, :1] = np.abs(halves[:, :1]) if kind.has_offset else halves[:, :1]  # else max < min
    blocks[:, : 2 * halves.shape[1]] = halves.view(np.uint8)
    rows = blocks.reshape(2, -1)
    expected = library.quants.dequantize(rows, library.GGMLQuantizationType[name])
    tensor = gguf.read(rows, kind)
    assert np.array_equal(tensor.dequantize().numpy(), expected)
    found, written = gguf.write(tensor)
    assert np.array_equal(library.quants.dequantize(written, library.GGMLQuantizationType[found.name]), expected)


@pytest.mark.parametrize("name", ["int4_grid", "int8_grid"])
def test_compressed_tensors_unpacks_what_was_written(name: str) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="needs compressed-tensors"
    )
    tensor = make(name, torch.float16)
    bits = tensor.spec.bits
    parts = compressed_tensors.write(tensor)
    levels = helpers.unpack_from_int32(parts["weight_packed"], bits, torch.Size(SHAPE))
    decoded = levels.to(torch.float16) * parts["weight_scale"].repeat_interleave(32, 1)
    assert torch.equal(helpers.pack_to_int32(levels, bits), parts["weight_packed"])
    assert torch.equal(decoded, tensor.dequantize())
    assert torch.equal(compressed_tensors.read(parts, bits, torch.float16).dequantize(), decoded)


def decode_gptq(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """GPTQ's layout as its papers' code has it, one bit at a time: (q - (zero + 1)) scale."""
    qweight, scales = parts["qweight"].numpy().view(np.uint32), parts["scales"].numpy()
    inputs, out = len(parts["g_idx"]), scales.shape[1]

    def read(words: Any, number: int) -> int:
        return sum(
            ((int(words[b // 32]) >> (b % 32)) & 1) << i
            for i, b in enumerate(range(number * bits, number * bits + bits))
        )

    values = torch.empty(out, inputs, dtype=torch.float16)
    for o in range(out):
        for i in range(inputs):
            group = int(parts["g_idx"][i])
            zero = read(parts["qzeros"].numpy().view(np.uint32)[group], o) + 1
            values[o, i] = float(read(qweight[:, o], i) - zero) * float(scales[group, o])
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqs_layout_is_that_of_its_definition(bits: int) -> None:
    half = 2 ** (bits - 1)
    spec = QuantSpec(
        bits=bits, data_type="table", table=tuple(q / half for q in range(-half, half)), block_size=32, layout="row"
    )
    weights = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).half()
    tensor = quantize(weights, spec)
    parts = gptq.write(tensor)
    assert torch.equal(decode_gptq(parts, bits), tensor.dequantize())
    assert torch.equal(gptq.read(parts, bits, torch.float16).dequantize(), tensor.dequantize())


def test_gptqs_own_zeros_become_offsets() -> None:
    parts = gptq.write(make("int4_grid", torch.float16))
    parts["scales"] = parts["scales"].abs()
    parts["qzeros"] = torch.from_numpy(pack_words(np.random.default_rng(0).integers(0, 15, (8, 96)), 4))
    small = {"qweight": parts["qweight"][:, :4], "scales": parts["scales"][:, :4], "g_idx": parts["g_idx"]}
    zeros = unpack_words(parts["qzeros"], 4, 96)[:, :4]
    expected = decode_gptq({**small, "qzeros": torch.from_numpy(pack_words(zeros, 4))}, 4)
    read = gptq.read(parts, 4, torch.float16)
    assert read.spec.normalization == "minmax"
    assert torch.equal(read.dequantize()[:4], expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 99))
def test_words_are_unpacked_as_they_were_packed(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (3, count))
    assert np.array_equal(unpack_words(torch.from_numpy(pack_words(values, bits)), bits, count), values)


def test_a_grid_is_known_by_its_values() -> None:
    assert find_levels(QuantConfig.from_name("int4_grid").spec.make_codebook(), 4) is not None
    levels = find_levels(QuantConfig.from_name("bfp4").spec.make_codebook(), 4)  # int with power-of-two scales
    assert levels is not None
    assert (levels[0].tolist(), levels[1]) == (list(range(-7, 8)), 4)
    assert find_levels(QuantSpec(data_type="int").make_codebook(), 4) is None  # sevenths


@pytest.mark.parametrize(
    ("write", "tensor", "message"),
    [
        (bitsandbytes.write, make("int4"), r"holds NF4 and FP4.*not int4.*use quant=nf4, nf4_dq or fp4_bnb"),
        (bitsandbytes.write, make("nf4", block_size=48), r"256 inputs and quant\.block_size=48"),
        (bitsandbytes.write, make("nf4", block_size=16), r"has blocks of 32.*not quant\.block_size=16"),
        (gptq.write, make("int4"), r"no integers times a power of two; use quant=int4_grid or int8_grid"),
        (gptq.write, make("gguf_q5_0"), r"has 2, 3, 4, 8 bits, not quant\.bits=5"),
        (compressed_tensors.write, make("gguf_q4_1"), r"no offsets: normalization=minmax.*int4_grid"),
        (compressed_tensors.write, make("nf4", centering=True), r"no place for the mean.*centering=false"),
        (compressed_tensors.write, make("int4_grid", scale_format="fp32"), r"none \(the smallest.*scale_format=bf16"),
        (gguf.write, make("nf4"), r"has blocks of 32 weights, not quant\.block_size=64"),
        (gguf.write, make("nf4", block_size=32, layout="row"), r"no blocks with the values of nf4.*gguf_iq4_nl"),
        (gptq.write, make("quantile4"), r"one table for all tensors, and data_type=quantile"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(write: Any, tensor: QuantizedTensor, message: str) -> None:
    with pytest.raises(NotExactError, match=message):
        write(tensor)


@pytest.mark.parametrize("shape", [(64, 96), (48, 128)])
def test_shapes_that_bitsandbytes_decodes_wrongly_are_refused(shape: tuple[int, int]) -> None:
    """Its dequantize_4bit on AVX-512 gives other values, without an error, of rows of half a block."""
    tensor = quantize(torch.randn(shape), QuantSpec(bits=4, data_type="nf", block_size=32))
    with pytest.raises(NotExactError, match=r"decodes wrong values.*quant\.exclude"):
        bitsandbytes.write(tensor)


def test_parts_that_no_format_has_are_refused() -> None:
    tensor = make("int4_grid")
    scaled = dataclasses.replace(tensor, input_scales=torch.ones(256, dtype=torch.float16))
    kept = tensor.keep_columns(torch.tensor([1]), torch.zeros(96, 1))
    for odd, message in ((scaled, "method=awq stores"), (kept, "columns at 16 bits")):
        for write in (bitsandbytes.write, gptq.write, compressed_tensors.write, gguf.write):
            with pytest.raises(NotExactError, match=message):
                write(odd)


def test_damaged_parts_are_refused() -> None:
    parts = bitsandbytes.write(make("nf4"))
    with pytest.raises(ValueError, match="12287 bytes of codes are no 24576 codes"):
        bitsandbytes.read(parts | {"": parts[""][:-1]})
    with pytest.raises(ValueError, match="quant_map is not the table"):
        bitsandbytes.read(parts | {"quant_map": torch.zeros(16)})
    with pytest.raises(ValueError, match=r"absmax|scales"):
        bitsandbytes.read(parts | {"absmax": parts["absmax"][1:]})
    packed = gptq.write(make("int4_grid"))
    with pytest.raises(ValueError, match="another order"):
        gptq.read(packed | {"g_idx": packed["g_idx"].flip(0)}, 4, torch.float16)
    with pytest.raises(ValueError, match="packed codes are"):
        gptq.read(packed | {"qzeros": packed["qzeros"][:, :-1]}, 4, torch.float16)
    other = compressed_tensors.write(make("int4_grid"))
    with pytest.raises(ValueError, match="packed codes are"):
        compressed_tensors.read(other | {"weight_shape": torch.tensor([96, 512])}, 4, torch.float16)
    for read, found, name in ((gptq.read, packed, "scales"), (compressed_tensors.read, other, "weight_scale")):
        with pytest.raises(ValueError, match=f"^{name} is float32 and holds no float16 numbers"):
            read(found | {name: found[name].float() * 1.0001}, 4, torch.float16)
    order = torch.arange(256) // 32
    assert torch.equal(
        compressed_tensors.read(other | {"weight_g_idx": order}, 4, torch.float16).codes,
        compressed_tensors.read(other, 4, torch.float16).codes,
    )
    with pytest.raises(ValueError, match="weight_g_idx takes the inputs in another order"):
        compressed_tensors.read(other | {"weight_g_idx": order.flip(0)}, 4, torch.float16)
    blocks = np.full((1, 20), 0xFF, np.uint8)
    blocks[0, :4] = np.array([-1, 0], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="below 0 beside an offset"):
        gguf.read(blocks, gguf.KINDS["Q4_1"])
    with pytest.raises(ValueError, match="no whole blocks"):
        gguf.read(np.zeros((2, 17), np.uint8), gguf.KINDS["Q4_0"])
