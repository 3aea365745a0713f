"""A block of zeros gives exact zeros: in every format of scales, with every data type, between strong blocks."""

from __future__ import annotations

import numpy as np
import pytest

from kbit.numerics.quantizer import dequantize, fake_quantize, quantize
from kbit.numerics.scale_formats import SCALE_FORMATS
from kbit.numerics.spec import NORMALIZATIONS, ROUNDINGS, QuantSpec

WITHOUT_ZERO = (-1.0, -0.3, 0.4, 1.0)
BLOCK = 8


def make_blocks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of very different sizes, and which of them lie in blocks of zeros."""
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((600, BLOCK)).astype(np.float32) * np.float32(10.0) ** rng.integers(-3, 3, (600, 1))
    is_zero = rng.random(600) < (0.3, 0.99)[seed % 2]
    is_zero[-1] = True
    blocks[is_zero] = 0
    return np.abs(blocks) if seed % 3 == 0 else blocks, is_zero


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_blocks_of_zeros_are_zeros(scale_format: str, normalization: str) -> None:
    if scale_format == "e8m0" and normalization != "absmax":
        pytest.skip("e8m0 has neither sign nor fraction")
    kinds = [("table", 2), ("nf", 4), ("int", 3), ("float", 4), ("dynamic", 8), ("quantile", 4), ("learned", 3)]
    for seed, (data_type, bits) in enumerate(kinds * 2):
        x, is_zero = make_blocks(seed)
        spec = QuantSpec(
            bits, data_type, table=WITHOUT_ZERO if data_type == "table" else None, block_size=BLOCK,
            normalization=normalization, scale_format=scale_format, rounding=ROUNDINGS[seed % 4],
        )  # fmt: skip
        for values in (fake_quantize(x, spec), dequantize(quantize(x, spec)).numpy()):
            assert (values[is_zero] == 0).all(), spec
            assert (values[~is_zero] != 0).any() or data_type in ("quantile", "learned"), spec  # made of the zeros


def test_a_tensor_of_zeros_is_zeros() -> None:
    for scale_format in SCALE_FORMATS:
        spec = QuantSpec(2, "table", table=WITHOUT_ZERO, block_size=BLOCK, scale_format=scale_format)
        assert (fake_quantize(np.zeros(100, np.float32), spec) == 0).all()
