"""What QuantSpec and quantize refuse, and with which words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import kbit
from kbit.numerics.data_types import make_codebook
from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.spec import QuantSpec

HALF = torch.tensor([65504.0, -65504.0, 30.0]).half()


# Types are checked in the test run before the code sees a value, so what users meet is seen in another process.
WRONG_TYPES = [
    ("QuantSpec(bits=4.0)", "bits=4.0 is not an integer"),
    ("QuantSpec(bits='4')", "bits='4' is not an integer"),
    ("QuantSpec(bits=True)", "bits=True is not an integer"),
    ("QuantSpec(block_size=64.0)", "block_size=64.0 is not an integer"),
    ("QuantSpec(block_size=True)", "block_size=True is not an integer"),
    ("QuantSpec(exponent_bits='2')", "exponent_bits='2' is not an integer"),
    ("QuantSpec(seed=None)", "seed=None is not an integer"),
    ("QuantSpec(seed=-1)", "seed=-1 is not in 0..2^63 - 1"),
    ("QuantSpec(seed=2**64)", "is not in 0..2^63 - 1"),
    ("QuantSpec(centering='false')", "centering='false' is not one of: False, True"),
    ("QuantSpec(table=5)", "table=5 is not a list of numbers"),
    ("QuantSpec(table=('a', 'b'))", "table=('a', 'b') is not a list of numbers"),
    ("quantize([1.0, 2.0], QuantSpec())", "a list is neither a torch tensor nor a NumPy array"),
    ("fake_quantize(3.0, QuantSpec())", "a float is neither a torch tensor nor a NumPy array"),
    ("fake_quantize(np.float32(3), QuantSpec())", "a float32 is neither a torch tensor nor a NumPy array"),
    ("quantize(np.ones(3), {'bits': 4})", "a dict is no QuantSpec"),
]
PROGRAM = """
import sys
import numpy as np
from kbit import QuantSpec, fake_quantize, quantize
for expression in sys.argv[1:]:
    try:
        eval(expression)
        print("accepted")
    except (TypeError, ValueError) as error:
        print(error)
"""


def test_a_value_of_another_type_is_refused_by_name_and_value() -> None:
    command = [sys.executable, "-c", PROGRAM, *(expression for expression, _ in WRONG_TYPES)]
    messages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for (expression, expected), message in zip(WRONG_TYPES, messages, strict=True):
        assert expected in message, expression


def test_numpys_integers_become_pythons() -> None:
    spec = dataclasses.replace(QuantSpec())
    object.__setattr__(spec, "bits", np.int64(5))
    spec.__post_init__()
    assert spec == QuantSpec(bits=5)
    assert type(spec.bits) is int


def test_a_table_is_a_set_of_values() -> None:
    tables = [(-1.0, 0.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 0.0, 0.0, 1.0)]
    assert len({QuantSpec(data_type="table", table=table).canonical() for table in tables}) == 1


@pytest.mark.parametrize(
    ("x", "fields", "said"),
    [
        (HALF, {"scale_format": "bf16"}, ["scale_format=bf16", "65536", "float16", "65504"]),
        (HALF, {"scale_format": "bf16", "normalization": "signed_absmax"}, ["scale_format=bf16", "65536"]),
        (HALF, {"scale_format": "bf16", "data_type": "int", "normalization": "minmax"}, ["float16"]),
        (torch.tensor([3e38, -3e38, 1]), {"normalization": "minmax", "scale_format": "dq8"}, ["inf"]),
        (torch.tensor([7e4, 8e4]), {"centering": True, "scale_format": "fp32"}, ["mean", "75000", "65504"]),
        (torch.tensor([1.5e5, 1.6e5]), {"normalization": "minmax", "scale_format": "fp8"}, ["block offset", "fp16"]),
        (torch.tensor([1e300, 2], dtype=torch.float64), {}, ["float64", "float32"]),
        (torch.tensor([3.39e38, 1]), {"scale_format": "fp16"}, ["block scale", "fp16", "use scale_format=fp32"]),
        (torch.zeros(2, 2).to_sparse(), {}, ["sparse", "to_dense"]),
    ],
)
def test_what_would_not_stay_finite_is_refused(x: torch.Tensor, fields: dict[str, Any], said: list[str]) -> None:
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=said[0]) as raised:
            function(x, QuantSpec(**fields))
        for words in said:
            assert words in str(raised.value)


def test_the_largest_float16_stays_finite_where_its_scale_is_exact() -> None:
    for scale_format in ("fp16", "fp32"):
        assert fake_quantize(HALF, QuantSpec(scale_format=scale_format)).isfinite().all()


@pytest.mark.parametrize("scale_format", ["fp8", "dq8", "fp16", "bf16"])
def test_tiny_offsets_round_to_zero(scale_format: str) -> None:
    """An offset is rounded like any number; only a scale is kept from becoming 0."""
    x = torch.tensor([1.0, -0.5, 0.25]) * 1e-20
    spec = QuantSpec(bits=8, data_type="int", normalization="minmax", scale_format=scale_format)
    assert fake_quantize(x, spec).abs().max() <= 2.0**-24  # float16's smallest number, which the scale may be


@pytest.mark.parametrize("data_type", ["quantile", "learned"])
def test_codebooks_are_fitted_to_torch_tensors_too(data_type: str) -> None:
    x = torch.nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    expected = make_codebook(data_type, 4, tensor=x.detach().numpy())
    np.testing.assert_array_equal(make_codebook(data_type, 4, tensor=x), expected)


@pytest.mark.parametrize("data_type", ["quantile", "learned"])
@pytest.mark.parametrize("block_size", [None, 64])
def test_a_public_codebook_normalises_its_tensor(data_type: str, block_size: int | None) -> None:
    x = 20 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    codebook = kbit.codebook(data_type, 4, tensor=x, block_size=block_size)
    blocks = x.view(-1) if block_size is None else x
    scales = blocks.abs().amax(-1, keepdim=True).half().float()
    values = (blocks / scales).numpy() if data_type == "learned" else x.numpy()
    np.testing.assert_array_equal(codebook, make_codebook(data_type, 4, tensor=values))
    spec = kbit.QuantSpec(bits=4, data_type=data_type, block_size=block_size)
    np.testing.assert_array_equal(codebook, kbit.quantize(x, spec).codebook)
    np.testing.assert_array_equal(codebook, kbit.codebook(data_type, 4, tensor=x.numpy(), block_size=block_size))


def test_a_public_codebook_refuses_what_it_cannot_be_fitted_to() -> None:
    for tensor, message in ((None, "needs tensor="), (np.array([np.nan, 1.0]), "1 of 2 values are NaN or Inf")):
        with pytest.raises(ValueError, match=message):
            kbit.codebook("learned", 4, tensor=tensor)
