"""QuantizedTensor: packed to the bit, and saved and loaded bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kbit import reference
from kbit.kernels import cpu
from kbit.quantizer import QuantizedTensor, dequantize, quantize
from kbit.spec import QuantSpec

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_dense_and_reversible(bits: int) -> None:
    for n in (1, 7, 8, 9, 4095, 4096, 4097, 20_001):
        codes = np.random.default_rng(n).integers(0, 2**bits, n).astype(np.uint8)
        packed = cpu.pack(codes, bits)
        assert packed.size == -(-n * bits // 8)
        np.testing.assert_array_equal(packed, reference.pack(codes, bits))
        np.testing.assert_array_equal(cpu.unpack(packed, bits, n), codes)
        np.testing.assert_array_equal(reference.unpack(packed, bits, n), codes)


@pytest.mark.parametrize(
    "preset",
    [
        {},
        {"data_type": "table", "table": (-1.0, 0.3, 0.5, 1.0)},
        {"scale_format": "dq8"},
        {"normalization": "minmax", "centering": True},
        {"data_type": "quantile"},
        {"scale_format": "bf16", "layout": "row"},
    ],
)
def test_a_saved_tensor_loads_bit_for_bit(preset: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = quantize(x, QuantSpec(**preset))
    q.save(tmp_path / "q.safetensors")
    loaded = QuantizedTensor.load(tmp_path / "q.safetensors")
    assert (loaded.spec, loaded.shape, loaded.dtype, loaded.nbytes) == (q.spec, q.shape, q.dtype, q.nbytes)
    assert torch.equal(dequantize(loaded), dequantize(q))
    np.testing.assert_array_equal(loaded.codes, q.codes)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a quantized tensor written by kbit"):
        QuantizedTensor.load(tmp_path / "x.safetensors")
