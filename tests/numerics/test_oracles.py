"""The quantizer against others: ml_dtypes' formats, bitsandbytes, and the definitions of MX and NVFP4."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
    spec = QuantSpec(bits=bits, exponent_bits=exponent_bits, layout="row", block_size=32, scale_format="e8m0")
    ours = fake_quantize(x, spec)
    ties = np.abs(np.abs(ours - x) - np.abs(expected - x)) < 1e-7  # they round ties to even, kbit away from zero
    assert ((ours == expected) | ties).all()
    assert (ours == expected).mean() > 0.999


def test_nvfp4_scales_are_e4m3_times_one_float32() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    q = quantize(x, QuantSpec(bits=4, exponent_bits=2, layout="row", block_size=16, scale_format="fp8"))
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
    np.testing.assert_allclose(np.sort(state.code.numpy()), codebook, rtol=1e-6)
    ours = fake_quantize(x, QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32"))
    # bitsandbytes' CPU search is not exactly nearest (up to 5% of the gap off), so ours may be nearer, never farther
    scale = x.view(-1, 256).abs().amax(dim=1).repeat_interleave(256)
    assert ((ours - x).abs() <= (theirs - x).abs() + scale * 2.0**-22).all()
    same_code = (ours - theirs).abs() <= scale * 2.0**-22
    assert same_code.float().mean() > 0.995


@pytest.mark.parametrize("preset", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"])
@settings(max_examples=30)
@given(data=st.data())
def test_gfloat_microscaling_agrees(preset: str, data: st.DataObject) -> None:
    """Scalars in float64, one after the other: another implementation of the OCP specification, ties away from zero."""
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    values = yaml.safe_load((files("kbit") / "conf" / "quant" / f"{preset}.yaml").read_text())
    spec = QuantSpec(**values)
    block = data.draw(hnp.arrays(np.float32, 32, elements=st.floats(-(2.0**40), 2.0**40, width=32)))
    block[np.abs(block) < 2.0**-60] = 0  # float32 holds each product of a code and such a scale
    exponents = values["exponent_bits"]
    name = f"format_info_mxfp{spec.bits}_e{exponents}m{spec.bits - 1 - exponents}"
    round_away = gfloat.RoundMode.TiesToAway
    theirs = gfloat.quantize_block(getattr(formats, name), block, gfloat.compute_scale_amax, round_away)
    np.testing.assert_array_equal(fake_quantize(block, spec), theirs)
