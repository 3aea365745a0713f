"""8-bit AdamW beside torchao, run eagerly, and where bitsandbytes' CPU path differs from the published quantizer."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import kbit
from kbit.numerics.spec import QuantSpec
from kbit.optim import AdamW, States

N, STEPS = 16_384, 20
PUBLISHED = States(  # with a 0 in the variance's table, as Dettmers et al. 2022 and torchao have it
    QuantSpec(8, "dynamic", block_size=256, scale_format="fp32"),
    QuantSpec(8, "dynamic", block_size=256, scale_format="fp32", signed=False),
)


@pytest.mark.parametrize("decades", [0, 2, 4])
def test_twenty_steps_have_torchaos_codes(decades: int) -> None:
    """The two round products and sums in another order, so that a value next to a threshold may take the other code.

    One such code moves a parameter by about a hundredth of a step, and few take it. With gradients over four decades
    both explode, by the zeros of the variance, and stay together.
    """
    single_param_adam = pytest.importorskip("torchao.optim.adam").single_param_adam
    make_state = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit.zeros
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(N, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), start.clone()
    optimizer = AdamW([ours], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, state=PUBLISHED)
    m, v = (make_state(start.shape, signed, 256, "cpu", torch.float32) for signed in (True, False))
    for step in range(1, STEPS + 1):
        spread = 10 ** (decades * (torch.rand(N, generator=generator) - 1))
        g = torch.randn(N, generator=generator) * spread
        ours.grad = g.clone()
        optimizer.step()
        numbers = (torch.tensor(1e-3), 0.9, 0.95, 0.1, 1e-8)
        single_param_adam(theirs, g, torch.tensor(float(step)), m, v, None, *numbers, True, False)
    move, apart = (theirs - start).abs().max(), (ours.detach() - theirs).abs()
    assert (move > 0.1) == (decades == 4)  # twenty steps of 1e-3 move by 0.02
    assert apart.max() <= 0.02 * move
    assert (apart > 1e-4 * move).float().mean() <= 0.005
    for name, state in (("momentum", m), ("variance", v)):
        assert (optimizer.state[ours][f"{name}_codes"] == state.codes).float().mean() >= 0.999


def quantize_by_bitsandbytes(x: torch.Tensor, *, signed: bool) -> torch.Tensor:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = functional.create_dynamic_map(signed=signed)
        codes, state = functional.quantize_blockwise(x, code=code, blocksize=256)
        values: torch.Tensor = functional.dequantize_blockwise(codes, state)
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_on_a_cpu_has_no_zero(signed: bool) -> None:
    """What is below 2e-5 of its block's maximum becomes positive there, 0 and small negative values included.

    The nearest value of the table, which kbit takes, is 0 for the smallest of them.
    """
    x = torch.zeros(256)
    x[:5] = torch.tensor([1.0, 0.0, 1e-7, 1e-6, -1e-8 if signed else 1e-8])
    spec = QuantSpec(8, "dynamic", block_size=256, scale_format="fp32", signed=signed)
    ours, theirs = kbit.fake_quantize(x, spec), quantize_by_bitsandbytes(x, signed=signed)
    assert ours[0] == theirs[0] == 1
    assert (ours[[1, 2, 4]] == 0).all()
    assert (theirs[1:] > 0).all()
    np.testing.assert_allclose(theirs[1:], 2.12e-5 if signed else 1.56e-5, rtol=0.01)


def test_bitsandbytes_on_a_cpu_moves_what_never_had_a_gradient() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    mask, moved = torch.arange(4096) % 2, {}
    for name, make in (("bitsandbytes", bnb.optim.AdamW8bit), ("kbit", AdamW)):
        p = torch.nn.Parameter(torch.zeros(4096))
        optimizer = make([p], lr=1e-3, weight_decay=0.0)
        for step in range(100):
            p.grad = torch.randn(4096, generator=torch.Generator().manual_seed(step)) * mask
            optimizer.step()
        moved[name] = float(p.detach()[mask == 0].abs().max())
    assert moved["kbit"] == 0
    assert moved["bitsandbytes"] > 1e-4
