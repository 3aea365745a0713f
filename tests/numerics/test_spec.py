"""QuantSpec: what is the same quantizer, what it costs, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kbit.numerics.spec import QuantSpec


def test_fields_without_effect_do_not_distinguish() -> None:
    assert QuantSpec(data_type="int", exponent_bits=2).canonical() == QuantSpec(data_type="int").canonical()
    assert QuantSpec(bits=16, data_type="nf", block_size=32).canonical() == QuantSpec(bits=16).canonical()
    paper = QuantSpec(data_type="float").canonical()
    assert QuantSpec(data_type="float", exponent_bits=3).canonical() == paper  # 3 is the paper's choice at 4 bits
    assert QuantSpec(data_type="float", float_bias="paper").canonical() == paper  # E3M0 has no subnormals


def test_fields_with_effect_do() -> None:
    base = QuantSpec(bits=5, data_type="float")
    changes: list[dict[str, Any]] = [{"exponent_bits": 2}, {"float_bias": "paper"}, {"block_size": 32}]
    changes += [{"scale_format": "fp32"}, {"data_type": "int"}, {"bits": 6}]
    others = [dataclasses.replace(base, **fields) for fields in changes]
    assert len({spec.canonical() for spec in [base, *others]}) == 7


@pytest.mark.parametrize(
    ("spec", "elements", "bits"),
    [
        (QuantSpec(bits=4, data_type="int", block_size=64), 6400, 6400 * 4 + 100 * 16),  # 4.25 bits per parameter
        (QuantSpec(bits=4, data_type="int", block_size=64), 65, 65 * 4 + 2 * 16),  # a short block has a whole scale
        (QuantSpec(bits=3, data_type="nf", block_size=None), 1000, 3000 + 16),
        (QuantSpec(bits=8, data_type="int", block_size=1, scale_format="fp32"), 10, 80 + 320),
        (QuantSpec(bits=4, data_type="quantile", block_size=64), 6400, 6400 * 4 + 100 * 16 + 16 * 16),  # its own table
        (QuantSpec(bits=16), 1000, 16000),
        (QuantSpec(), 0, 0),
    ],
)
def test_bits_are_counted(spec: QuantSpec, elements: int, bits: int) -> None:
    assert spec.count_bits((elements,)) == bits


def test_labels_for_people() -> None:
    specs = [QuantSpec(bits=3, data_type="nf"), QuantSpec(), QuantSpec(data_type="float"), QuantSpec(bits=16)]
    assert [spec.label() for spec in specs] == ["nf3", "nf4", "float4-e3m0", "16-bit"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, r"bits=1 is not in 2\.\.8, nor 16"),
        ({"bits": 9}, r"bits=9 is not in 2\.\.8, nor 16"),
        ({"data_type": "fp"}, "data_type='fp' is not one of: int, float, dynamic, quantile, nf, af, learned, table"),
        (
            {"bits": 4, "data_type": "float", "exponent_bits": 7},
            r"exponent_bits=7 does not fit bits=4: allowed are 1\.\.3",
        ),
        ({"block_size": 0}, "block_size=0 is not >= 1"),
        ({"float_bias": "intel"}, "float_bias='intel' is not one of"),
        ({"scale_format": "int8"}, "scale_format='int8' is not one of: fp16, fp32, bf16, e8m0, fp8, dq8"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)  # type: ignore[arg-type]
