"""Quantization-aware training beside torchao's, for evenly spaced codes: the same values, gradients and weights."""

from __future__ import annotations

import copy
from typing import Any, Final

import pytest
import torch
from torch import nn

from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.training.rounding import rounded_weights

GROUP: Final = 32
STEPS: Final = 20


def make_torchao_layer(layer: nn.Linear, bits: int) -> Any:
    """torchao's layer with the weights of another, whose scales refresh_scales sets before each use."""
    qat: Any = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    linear: Any = pytest.importorskip("torchao.quantization.qat.linear")
    dtype = torch.int8 if bits == 8 else getattr(torch, f"int{bits}")
    config = qat.IntxFakeQuantizeConfig(dtype, group_size=GROUP, is_symmetric=True, is_dynamic=False)
    theirs = linear.FakeQuantizedLinear(
        layer.in_features, layer.out_features, bias=True, activation_config=None, weight_config=config
    )
    theirs.load_state_dict(layer.state_dict())
    return theirs


def refresh_scales(layer: Any, bits: int) -> None:
    """Give torchao kbit's grid: 2^(bits-1) - 1 steps up to a group's largest magnitude.

    torchao's own is half a step longer, so that it has one more code below zero and the magnitude itself has none.
    """
    peaks = layer.weight.detach().view(len(layer.weight), -1, GROUP).abs().amax(-1)
    quantizer = layer.weight_fake_quantizer
    quantizer.scale, quantizer.zero_point = peaks / (2 ** (bits - 1) - 1), torch.zeros_like(peaks, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_training_with_rounded_weights_is_torchaos(bits: int) -> None:
    """Twenty steps end with the same weights, but for the rounding of sums. Unrounded ones end elsewhere."""
    spec = QuantSpec(bits=bits, data_type="int", block_size=GROUP, layout="row", scale_format="fp32")
    torch.manual_seed(bits)
    ours = nn.Linear(64, 16)
    theirs, plain, start = make_torchao_layer(ours, bits), copy.deepcopy(ours), ours.weight.detach().clone()
    refresh_scales(theirs, bits)
    rounded = theirs.weight_fake_quantizer(theirs.weight)
    torch.testing.assert_close(fake_quantize(start, spec), rounded.detach(), rtol=1e-6, atol=0)
    model = nn.Sequential(ours)
    with rounded_weights(model, spec, ["0.weight"]):
        for layer in (model, theirs, plain):
            optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(step)
                x, y = torch.randn(32, 64, generator=generator), torch.randn(32, 16, generator=generator)
                if layer is theirs:
                    refresh_scales(theirs, bits)
                (layer(x) - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    own, found, unrounded = (layer.weight.detach() for layer in (ours, theirs, plain))
    move = (found - start).abs().max()
    assert (own - found).abs().max() <= 1e-3 * move
    assert (unrounded - found).abs().max() >= (0.1 if bits < 8 else 1e-3) * move
