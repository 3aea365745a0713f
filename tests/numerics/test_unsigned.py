"""Tables without negative values, and without 0: for states of optimizers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import kbit
from kbit.methods.config import QuantConfig
from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.spec import QuantSpec

UNSIGNED: list[dict[str, Any]] = [
    {"data_type": "int"},
    {"data_type": "int", "zero": False},
    {"data_type": "dynamic"},
    {"data_type": "dynamic", "zero": False},
]


def published_dynamic_map(bits: int) -> np.ndarray[Any, Any]:
    """The published construction (Dettmers et al. 2022), in float64: decades, each cut into twice as many bins."""
    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (i + 1) + 1)
        values += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - (bits - 2))).tolist()
    return np.sort(values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_table_is_the_published_one(bits: int) -> None:
    table = kbit.codebook("dynamic", bits, signed=False)
    assert len(table) == 2**bits
    np.testing.assert_allclose(table, published_dynamic_map(bits), rtol=2.0**-22, atol=0)  # float32 edges and products


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_dynamic_table_is_bitsandbytes(bits: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=False, max_exponent_bits=bits - 1, total_bits=bits)
    np.testing.assert_array_max_ulp(np.unique(theirs.numpy()), kbit.codebook("dynamic", bits, signed=False), maxulp=1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_evenly_spaced(bits: int) -> None:
    with_zero = kbit.codebook("int", bits, signed=False)
    without = kbit.codebook("int", bits, signed=False, zero=False)
    top = 2**bits
    np.testing.assert_array_equal(with_zero, (np.arange(top) / (top - 1)).astype(np.float32))
    np.testing.assert_array_equal(without, (np.arange(1, top + 1) / top).astype(np.float32))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("fields", UNSIGNED)
def test_values_lie_within_reach_and_the_zero_is_as_asked(bits: int, fields: dict[str, Any]) -> None:
    table = QuantSpec(bits=bits, signed=False, **fields).make_codebook()
    assert table.min() >= 0
    assert table.max() == 1
    assert (0 in table) == fields.get("zero", True)
    assert 2 ** (bits - 1) < len(table) <= 2**bits


@pytest.mark.parametrize("rounding", ["nearest", "nearest_even", "truncate", "stochastic"])
@pytest.mark.parametrize("fields", UNSIGNED)
def test_each_value_takes_the_nearest_of_the_table(fields: dict[str, Any], rounding: str) -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4
    spec = QuantSpec(bits=4, block_size=64, scale_format="fp32", signed=False, rounding=rounding, **fields)
    blocks = torch.nn.functional.pad(x, (0, 24)).view(-1, 64)
    scales = blocks.amax(dim=1, keepdim=True)
    table = torch.from_numpy(spec.make_codebook().copy()).double()
    normal = (blocks / scales).double()
    distance = (normal[..., None] - table).abs()
    taken = (fake_quantize(x, spec).double() / scales.double().repeat_interleave(64)[:1000]).view(-1)
    gap = (taken[:, None] - table).abs().min(dim=1).values
    assert gap.max() < 1e-6
    error = (taken - normal.view(-1)[:1000]).abs()
    if rounding.startswith("nearest"):
        assert (error <= distance.min(dim=-1).values.view(-1)[:1000] + 1e-6).all()
    elif rounding == "truncate" and fields.get("zero", True):
        assert (taken <= normal.view(-1)[:1000] + 1e-6).all()


@pytest.mark.parametrize("fields", UNSIGNED)
def test_a_block_of_zeros_stays_so(fields: dict[str, Any]) -> None:
    x = torch.cat([torch.zeros(64), torch.rand(64, generator=torch.Generator().manual_seed(0))])
    values = fake_quantize(x, QuantSpec(bits=4, signed=False, **fields))
    assert (values[:64] == 0).all()
    assert (values[64:] > 0).any()
    assert (values[64:] > 0).all() or fields.get("zero", True)


def test_what_is_stored_comes_back() -> None:
    x = torch.rand(200, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=8, data_type="dynamic", block_size=64, signed=False, zero=False)
    quantized = quantize(x, spec)
    assert torch.equal(quantized.dequantize(), fake_quantize(x, spec))
    assert QuantSpec.from_json({"bits": 8, "data_type": "dynamic"}).signed  # a record of before
    assert spec.label() == "udynamic8-nonzero"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_type": "nf", "signed": False}, "signed=false is for int, dynamic, table: data_type=nf"),
        ({"data_type": "int", "zero": False}, "zero=false is for tables without values below 0: it needs signed=false"),
        ({"data_type": "int", "signed": False, "centering": True}, "centering=True"),
        ({"data_type": "int", "signed": False, "normalization": "minmax"}, "normalization=minmax"),
        ({"data_type": "int", "signed": False, "scale_format": "e8m0"}, "scale_format=e8m0"),
        ({"data_type": "table", "table": (-1.0, 1.0), "signed": False}, "outside [0, 1]"),
        ({"data_type": "table", "table": (0.0, 1.0), "signed": False, "zero": False}, "has a 0, which zero=false"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantSpec(**fields)


def test_negative_values_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="2 of 4 values are below 0, which signed=false"):
        quantize(torch.tensor([1.0, -1.0, -0.5, 2.0]), QuantSpec(data_type="int", signed=False))
    with pytest.raises(ValueError, match=r"quant\.signed=false"):
        QuantConfig(data_type="int", signed=False)
