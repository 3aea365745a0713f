"""QuantizedTensor: packed to the bit, and saved and loaded bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from kbit.kernels import cpu
from kbit.numerics import reference
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.quantizer import dequantize, quantize
from kbit.numerics.spec import QuantSpec

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
    assert torch.equal(loaded.codes, q.codes)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a quantized tensor written by kbit"):
        QuantizedTensor.load(tmp_path / "x.safetensors")


def spoil_codes(tensors: dict[str, Any]) -> None:
    tensors["codes"] = tensors["codes"][:5]


def spoil_type(tensors: dict[str, Any]) -> None:
    tensors["codes"] = tensors["codes"].astype(np.float32)


def spoil_scales(tensors: dict[str, Any]) -> None:
    tensors["scales.scales"] = tensors["scales.scales"][:2]


def spoil_scale(tensors: dict[str, Any]) -> None:
    tensors["scales.scales"][1] = np.nan


def spoil_codebook(tensors: dict[str, Any]) -> None:
    tensors["codebook"] = np.zeros(17, np.float32)


def remove_scales(tensors: dict[str, Any]) -> None:
    del tensors["scales.scales"]


@pytest.mark.parametrize("spoil", [spoil_codes, spoil_type, spoil_scales, spoil_scale, spoil_codebook, remove_scales])
def test_a_file_whose_arrays_do_not_fit_is_refused(spoil: Any, tmp_path: Path) -> None:
    """Kernels trust lengths: what they were given here would be read beyond its end."""
    path = tmp_path / "q.safetensors"
    quantize(torch.randn(40, 100), QuantSpec()).save(path)
    with safe_open(str(path), framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    spoil(tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"q\.safetensors is not a quantized tensor written by kbit"):
        QuantizedTensor.load(path)


def test_a_replaced_array_is_checked_too() -> None:
    q = quantize(torch.ones(100), QuantSpec())
    with pytest.raises(ValueError, match=r"codes of a quantized tensor is uint8\[3\], not uint8\[50\]"):
        dataclasses.replace(q, codes=q.codes[:3])
    assert q == q  # by identity: arrays have no one truth
