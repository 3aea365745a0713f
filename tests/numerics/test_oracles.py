"""The quantizer against others: ml_dtypes' formats, bitsandbytes, and the definitions of MX and NVFP4."""

from __future__ import annotations

from fractions import Fraction
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from kbit.numerics.data_types import make_codebook
from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.spec import QuantSpec


@pytest.mark.parametrize(("exponent_bits", "bits", "name"), [(2, 4, "float4_e2m1fn"), (2, 6, "float6_e2m3fn"),
                                                             (3, 6, "float6_e3m2fn")])  # fmt: skip
def test_microscaling_equals_the_definition_with_ml_dtypes(exponent_bits: int, bits: int, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    element = getattr(ml_dtypes, name)
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    largest_exponent = int(np.floor(np.log2(float(ml_dtypes.finfo(element).max))))
    shared = 2.0 ** (np.floor(np.log2(np.abs(x).max(axis=1, keepdims=True))) - largest_exponent)  # OCP MX, section 6.3
    limit = float(ml_dtypes.finfo(element).max)
    expected = np.clip(x / shared, -limit, limit).astype(element).astype(np.float32) * shared
    spec = QuantSpec(
        bits, "float", exponent_bits, layout="row", block_size=32, scale_format="e8m0",
        rounding="nearest_even",
    )  # fmt: skip
    np.testing.assert_array_equal(fake_quantize(x, spec), expected)


def round_to_ocp(x: NDArray[np.float64], exponent_bits: int, fraction_bits: int) -> NDArray[np.float64]:
    """Round to an OCP element format without Inf and NaN, in float64: ties to even, beyond the largest number to it."""
    bias = 2 ** (exponent_bits - 1) - 1
    largest = (2 - 2.0**-fraction_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    exponents = np.maximum(np.frexp(x)[1] - 1, 1 - bias)  # below the least one numbers are subnormal
    step = np.ldexp(1.0, exponents - fraction_bits)
    rounded: NDArray[np.float64] = np.round(x / step) * step  # with ties to even
    return np.clip(rounded, -largest, largest)


def quantize_ocp(blocks: NDArray[np.float32], exponent_bits: int, fraction_bits: int) -> NDArray[np.float64]:
    """OCP Microscaling, section 6.3: a power of two for each row, from 2^-127 to 2^127, and elements times it."""
    wide = blocks.astype(np.float64)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    shared = np.frexp(np.where(largest > 0, largest, 1))[1] - 1 - 2 ** (exponent_bits - 1)
    scales = np.ldexp(1.0, np.clip(shared, -127, 127))
    values: NDArray[np.float64] = round_to_ocp(wide / scales, exponent_bits, fraction_bits) * scales
    return values


def list_ocp_blocks() -> NDArray[np.float32]:
    """All finite bfloat16 values, in their order and shuffled, and float32 values on grids and off them: rows of 32."""
    rng = np.random.default_rng(0)
    words = np.arange(2**16, dtype=np.uint32)
    every = (words[words & 0x7F80 != 0x7F80] << 16).view(np.float32)  # subnormal ones, too
    coarse = rng.integers(-64, 65, 2**15) / np.float32(2) ** rng.integers(0, 6, 2**15, dtype=np.int32)
    normal = rng.standard_normal(2**15) * 2.0 ** rng.integers(-8, 9, 2**15)
    tiny = rng.integers(-64, 65, 2**12) * 2.0**-133
    parts = [every, rng.permutation(every), coarse, normal, tiny]
    return np.concatenate([np.asarray(part, np.float32) for part in parts]).reshape(-1, 32)


@pytest.mark.parametrize("preset", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_microscaling_presets_are_ocps_bit_for_bit(preset: str, dtype: torch.dtype) -> None:
    values = yaml.safe_load((files("kbit") / "conf" / "quant" / f"{preset}.yaml").read_text())
    blocks = torch.from_numpy(list_ocp_blocks()).to(dtype)
    exponent_bits = values["exponent_bits"]
    expected = quantize_ocp(blocks.float().numpy(), exponent_bits, values["bits"] - 1 - exponent_bits)
    ours = fake_quantize(blocks, QuantSpec(**values)).float().numpy()
    np.testing.assert_array_equal(ours, torch.from_numpy(expected.astype(np.float32)).to(dtype).float().numpy())
    away = fake_quantize(blocks, QuantSpec(**values | {"rounding": "nearest"})).float().numpy()
    assert (away != ours).sum() > 1000  # there are ties enough to tell them apart


def test_nvfp4_is_the_published_format() -> None:
    """E2M1 of x / (block scale x tensor scale), ties to even. With a tensor scale of 2^-5 all of it is exact."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = yaml.safe_load((files("kbit") / "conf" / "quant" / "nvfp4.yaml").read_text())
    rng = np.random.default_rng(0)
    x = np.asarray(rng.integers(-24, 25, (4096, 16)) / 4 * 2.0 ** rng.integers(-3, 4, (4096, 1)), np.float32)
    x[0, 0] = 6 * 448 * 2.0**-5
    scales = np.abs(x).max(axis=1, keepdims=True) / 6 / 2.0**-5
    scales = np.maximum(scales, 2.0**-9).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**-5
    expected = round_to_ocp(x / scales, 2, 1) * scales
    np.testing.assert_array_equal(fake_quantize(x, QuantSpec(**values)), expected.astype(np.float32))


@pytest.mark.parametrize(("data_type", "bits"), [("int", 3), ("int", 8), ("float", 4), ("float", 6), ("nf", 4)])
@pytest.mark.parametrize("scale_format", ["fp16", "bf16", "e8m0"])
def test_ties_go_to_the_even_place_in_exact_arithmetic(data_type: str, bits: int, scale_format: str) -> None:
    """Every tie of a table at some scales, and the float32 numbers beside it, against fractions."""
    exponent_bits = 2 if data_type == "float" else None
    spec = QuantSpec(bits, data_type, exponent_bits=exponent_bits, scale_format=scale_format, rounding="nearest_even")
    codebook = spec.make_codebook()
    if data_type == "nf":
        exact = [Fraction(float(value)) for value in codebook]
    elif data_type == "int":
        exact = [Fraction(i, 2 ** (bits - 1) - 1) for i in range(1 - 2 ** (bits - 1), 2 ** (bits - 1))]
    else:
        whole = sorted({round_to_ocp(np.array(i / 2**12), 2, bits - 3).item() for i in range(2**15)})
        exact = [Fraction(value) / Fraction(whole[-1]) for value in [-value for value in whole[:0:-1]] + whole]
    peak = Fraction(float(codebook[-1]))
    places = [abs(i - exact.index(Fraction(0))) for i in range(len(exact))]
    thresholds = spec.make_thresholds(codebook)
    for j in range(len(exact) - 1):
        tie = np.float32(float((exact[j] + exact[j + 1]) / 2 * peak))
        beside = [np.nextafter(tie, np.float32(end)) for end in (-2, 2)]
        assert (tie >= thresholds).sum() == (j if places[j] % 2 == 0 else j + 1)
        assert [(value >= thresholds).sum() for value in beside] == [j, j + 1]


def test_nvfp4_scales_are_e4m3_times_one_float32() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    q = quantize(x, QuantSpec(4, "float", 2, layout="row", block_size=16, scale_format="fp8"))
    block_max = np.abs(x).reshape(-1, 16).max(axis=1)
    tensor_scale = np.float32(block_max.max() / 448)
    expected = (block_max / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(q.scales["scales"], expected.view(np.uint8))
    assert q.scales["tensor_scale"][0] == tensor_scale


def test_bitsandbytes_nf4_and_fp4_agree() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    pairs = [
        ("nf4", QuantSpec(bits=4, data_type="nf", scale_format="fp32")),
        ("fp4", QuantSpec(bits=4, data_type="float", exponent_bits=2, float_bias="paper", scale_format="fp32")),
    ]
    for quant_type, spec in pairs:
        packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=quant_type)
        theirs = functional.dequantize_4bit(packed, state).flatten()
        assert torch.equal(fake_quantize(x, spec), theirs)


def test_bitsandbytes_dynamic_8_bit_agrees() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    quantized, state = functional.quantize_blockwise(x, blocksize=256)
    theirs = functional.dequantize_blockwise(quantized, state)
    codebook = make_codebook("dynamic", 8)
    np.testing.assert_array_equal(np.sort(state.code.numpy()), codebook)
    ours = fake_quantize(x, QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32"))
    # bitsandbytes' CPU search is not exactly nearest (up to 5% of the gap off), so ours may be nearer, never farther
    scale = x.view(-1, 256).abs().amax(dim=1).repeat_interleave(256)
    assert ((ours - x).abs() <= (theirs - x).abs() + scale * 2.0**-22).all()
    same_code = (ours - theirs).abs() <= scale * 2.0**-22
    assert same_code.float().mean() > 0.995


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_type_is_bitsandbytes_map_bit_for_bit(bits: int) -> None:
    """Its edges are torch.linspace in float32, with the instructions of AVX2, which nearly all machines take."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without fused multiply-adds torch.linspace is rounded twice")
    published = functional.create_dynamic_map(True, bits - 1, bits).numpy()
    np.testing.assert_array_equal(np.unique(published), make_codebook("dynamic", bits))


@pytest.mark.parametrize("preset", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"])
@settings(max_examples=30)
@given(data=st.data())
def test_gfloat_microscaling_agrees(preset: str, data: st.DataObject) -> None:
    """Scalars in float64, one after the other: another implementation of the OCP specification."""
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    values = yaml.safe_load((files("kbit") / "conf" / "quant" / f"{preset}.yaml").read_text())
    spec = QuantSpec(**values)
    block = data.draw(hnp.arrays(np.float32, 32, elements=st.floats(-(2.0**40), 2.0**40, width=32)))
    block[np.abs(block) < 2.0**-60] = 0  # float32 holds each product of a code and such a scale
    exponents = values["exponent_bits"]
    name = f"format_info_mxfp{spec.bits}_e{exponents}m{spec.bits - 1 - exponents}"
    theirs = gfloat.quantize_block(getattr(formats, name), block, gfloat.compute_scale_amax)
    np.testing.assert_array_equal(fake_quantize(block, spec), theirs)
