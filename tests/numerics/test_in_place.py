"""fake_quantize_ gives what fake_quantize gives, in the memory of its tensor."""

from __future__ import annotations

import pytest
import torch

from kbit.numerics.quantizer import fake_quantize, fake_quantize_
from kbit.numerics.spec import QuantSpec

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
NF4 = QuantSpec(bits=4, data_type="nf", block_size=64)


def make_weight(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(48, 40, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_same_values_in_the_same_memory(dtype: torch.dtype, transposed: bool) -> None:
    weight = make_weight(dtype)
    x = weight.t() if transposed else weight
    expected, memory = fake_quantize(x, NF4), weight.data_ptr()
    assert fake_quantize_(x, NF4) is x
    assert x.data_ptr() == memory
    assert torch.equal(x.double(), expected.double())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_parameter_stays_one(transposed: bool) -> None:
    weight = make_weight(torch.float32)
    parameter = torch.nn.Parameter(weight.t() if transposed else weight)
    expected = fake_quantize(parameter, NF4)
    fake_quantize_(parameter, NF4)
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert torch.equal(parameter.detach(), expected)


def test_a_refused_tensor_is_not_changed() -> None:
    weight = make_weight(torch.float32)
    weight[7, 3] = torch.inf
    before = weight.clone()
    with pytest.raises(ValueError, match="1 of 1920 values are NaN or Inf"):
        fake_quantize_(weight, NF4)
    assert torch.equal(weight, before)
