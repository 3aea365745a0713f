"""Scale formats: rounding against NumPy, torch and ml_dtypes, bits against bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kbit.numerics.scale_formats import SCALE_FORMATS


def many_scales() -> np.ndarray:
    """Positive float32 of every magnitude up to float16's largest, and the edges of the formats."""
    words = np.random.default_rng(0).integers(1, 0x477FE000, 200_000).astype(np.uint32)
    edges = [2.0**-24, 2.0**-25, 2.0**-14, 65504, 2.0**-133, 2.0**-134, 2.0**-149, 0]
    return np.concatenate([words.view(np.float32), np.array(edges, np.float32)])


@pytest.mark.parametrize(
    ("scale_format", "dtype", "smallest"),
    [("fp16", torch.float16, 2.0**-24), ("bf16", torch.bfloat16, 2.0**-133), ("fp32", torch.float32, 2.0**-149)],
)
def test_floats_round_as_torch_does_but_never_to_zero(scale_format: str, dtype: torch.dtype, smallest: float) -> None:
    x = many_scales()
    for sign in (1, -1):
        rounded = torch.from_numpy(sign * x).to(dtype).float().numpy()
        expected = np.where((rounded == 0) & (x > 0), np.float32(sign * smallest), rounded)
        np.testing.assert_array_equal(
            SCALE_FORMATS[scale_format].decode(SCALE_FORMATS[scale_format].encode(sign * x)), expected
        )


def test_fp8_rounds_as_ml_dtypes_does() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.append(np.random.default_rng(0).uniform(0, 448, 100_000), [448, 1e-3, 17, 19, 21, 2.0**-10]).astype(
        np.float32
    )
    stored = SCALE_FORMATS["fp8"].encode(x)
    assert stored["tensor_scale"][0] == 1
    expected = x.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(stored["scales"], np.maximum(expected.view(np.uint8), 1))
    nonzero = expected.astype(np.float32) > 0
    np.testing.assert_array_equal(SCALE_FORMATS["fp8"].decode(stored)[nonzero], expected.astype(np.float32)[nonzero])


def test_fp8_keeps_signs() -> None:
    x = np.array([448, -448, -3, 0], np.float32)
    np.testing.assert_array_equal(SCALE_FORMATS["fp8"].decode(SCALE_FORMATS["fp8"].encode(x)), x)


def test_powers_of_two_are_exact() -> None:
    x = 2.0 ** np.arange(-126, 127, dtype=np.float32)
    np.testing.assert_array_equal(SCALE_FORMATS["e8m0"].decode(SCALE_FORMATS["e8m0"].encode(x)), x)


def test_double_quantization_is_the_8_bit_dynamic_type_about_the_mean() -> None:
    x = np.random.default_rng(0).uniform(1, 3, 700).astype(np.float32)
    stored = SCALE_FORMATS["dq8"].encode(x)
    assert stored["second_scales"].size == 3
    assert stored["mean"][0] == pytest.approx(x.mean(), rel=1e-6)
    # the dynamic type's widest gap is 0.9/64 of the block's maximum; -0.993 is its lowest value
    half_gap = 0.9 / 64 / 2 * np.repeat(stored["second_scales"], 256)[:700]
    assert (np.abs(SCALE_FORMATS["dq8"].decode(stored) - x) <= half_gap * 1.001).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(5))
def test_a_double_quantized_scale_is_never_lost(seed: int, sign: int) -> None:
    """Weak blocks among strong ones: the mean added to the rounded difference is often 0 or less."""
    rng = np.random.default_rng(seed)
    x = (np.exp(rng.normal(0, 3, 2000)) * rng.choice([1, 1e-3, 1e-9], 2000)).astype(np.float32)
    x[::7] = 0
    x[::3] *= sign
    decoded = SCALE_FORMATS["dq8"].decode(SCALE_FORMATS["dq8"].encode(x))
    assert (decoded[x != 0] != 0).all()
    assert (decoded[x > 0] > 0).all() or sign < 0
    assert (decoded[x == 0] == 0).all()
    widest = 0.9 / 64 * np.repeat(np.abs(SCALE_FORMATS["dq8"].encode(x)["second_scales"]), 256)[:2000]
    assert (np.abs(decoded - x) <= widest * 1.001).all()  # half of it where nothing had to be raised


def test_rounding_to_a_power_of_two_is_to_the_nearest() -> None:
    x = np.array([0, 0.74, 0.76, 1, 1.49, 1.5, 1.9999, 2, 2.0**-126, 3.4e38], np.float32)
    np.testing.assert_array_equal(
        SCALE_FORMATS["e8m0"].round_to_nearest(x), [0, 0.5, 1, 1, 1, 2, 2, 2, 2.0**-126, 2.0**127]
    )


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_bits_are_what_is_stored(scale_format: str, blocks: int) -> None:
    stored = SCALE_FORMATS[scale_format].encode(np.ones(blocks, np.float32))
    assert 8 * sum(array.nbytes for array in stored.values()) == SCALE_FORMATS[scale_format].count_bits(blocks)


def test_a_scale_beyond_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a block scale of 100000 is beyond fp16 \(largest 65504\)"):
        SCALE_FORMATS["fp16"].check_range(1e5)
