"""Any optimizer of torch, its states quantized after each step."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec
from kbit.optim import STATES, AdamW, quantize_states
from kbit.optim.post_step import count_state_bits

FOUR = STATES["4bit"]
optim: Any = torch.optim


def make_matrix() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))


def take_gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def step(p: torch.nn.Parameter, optimizer: Any, seed: int) -> None:
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def test_states_are_what_fake_quantize_makes_of_torchs_own() -> None:
    p, q = make_matrix(), make_matrix()
    quantized, exact = optim.AdamW([p]), optim.AdamW([q])
    quantize_states(quantized, FOUR.momentum, FOUR.variance)
    step(p, quantized, 1)
    step(q, exact, 1)
    assert torch.equal(p, q)
    assert FOUR.momentum is not None
    assert FOUR.variance is not None
    assert torch.equal(quantized.state[p]["exp_avg"], fake_quantize(exact.state[q]["exp_avg"], FOUR.momentum))
    assert torch.equal(quantized.state[p]["exp_avg_sq"], fake_quantize(exact.state[q]["exp_avg_sq"], FOUR.variance))
    step(p, quantized, 2)
    step(q, exact, 2)
    assert not torch.equal(p, q)


def test_it_is_near_the_kernel_that_stores_codes() -> None:
    """Codes flip where a value is within a rounding of a threshold, so that the two are near and not equal."""
    p, q = make_matrix(), make_matrix()
    simulated, stored = optim.AdamW([p]), AdamW([q])
    quantize_states(simulated, STATES["8bit"].momentum, STATES["8bit"].variance)
    for seed in range(20):
        step(p, simulated, seed)
        step(q, stored, seed)
    move = (q.detach() - make_matrix().detach()).abs().max()
    assert (p - q).abs().max() < 0.02 * move
    assert count_state_bits(simulated, STATES["8bit"]) == stored.count_state_bits()


@pytest.mark.parametrize(
    ("name", "options", "roles"),
    [
        ("SGD", {"momentum": 0.9}, "momentum"),
        ("RMSprop", {"momentum": 0.9}, "both"),
        ("RMSprop", {}, "variance"),
        ("Adagrad", {}, "variance"),
        ("Adadelta", {}, "variance"),
        ("Adamax", {}, "both"),
        ("NAdam", {}, "both"),
        ("RAdam", {}, "both"),
        ("Adam", {"amsgrad": True}, "both"),
        ("Muon", {}, "momentum"),
    ],
)
def test_the_states_of_torchs_optimizers_are_known(name: str, options: dict[str, Any], roles: str) -> None:
    p = make_matrix()
    optimizer = getattr(optim, name)([p], **options)
    momentum = FOUR.momentum if roles in ("momentum", "both") else None
    variance = FOUR.variance if roles in ("variance", "both") else None
    quantize_states(optimizer, momentum, variance)
    for seed in range(3):
        step(p, optimizer, seed)
    large = [value for value in optimizer.state[p].values() if torch.is_tensor(value) and value.numel() == p.numel()]
    levels = [max(len(block.unique()) for block in value.view(-1, 256)) for value in large]
    coded = [count for count in levels if count <= 16]
    assert len(coded) >= (2 if roles == "both" else 1)
    for role, spec in (("momentum", FOUR.momentum), ("variance", FOUR.variance)):
        if roles not in (role, "both"):
            other = getattr(optim, name)([q := make_matrix()], **options)
            quantize_states(other, **{role: spec})  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=f"{name} keeps no {role}: its states are "):
                step(q, other, 0)


def test_groups_of_32_bits_and_small_tensors_are_left_alone() -> None:
    p, q, small = make_matrix(), make_matrix(), torch.nn.Parameter(torch.randn(4095))
    optimizer = optim.SGD([{"params": [p], "state": "32bit"}, {"params": [q, small]}], momentum=0.9)
    quantize_states(optimizer, FOUR.momentum)
    for parameter in (p, q, small):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter in (p, small):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], take_gradient(parameter))
    assert not torch.equal(optimizer.state[q]["momentum_buffer"], take_gradient(q))


def test_states_of_a_parameter_have_random_numbers_of_their_own() -> None:
    """Two tensors of one role with equal values, then two roles with the values of equal decays and g = g^2."""
    spec = QuantSpec(bits=4, data_type="int", block_size=64, scale_format="fp32", rounding="stochastic")
    for options, names in (({"amsgrad": True}, ("exp_avg_sq", "max_exp_avg_sq")), ({}, ("exp_avg", "exp_avg_sq"))):
        p = make_matrix()
        optimizer = optim.Adam([p], betas=(0.5, 0.5), **options)
        quantize_states(optimizer, None if options else spec, spec)
        for seed in range(1 if options else 2):
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            p.grad = values if options else (values > 0).float()
            optimizer.step()
        first, second = (optimizer.state[p][name] for name in names)
        assert (first - second).abs().gt(1e-3 * first.abs().max()).float().mean() > 0.1


def test_an_optimizer_without_a_state_is_refused_at_its_step() -> None:
    p = make_matrix()
    optimizer = optim.SGD([p])
    quantize_states(optimizer, FOUR.momentum)
    optimizer.step()  # no gradient, so that nothing is known yet
    with pytest.raises(ValueError, match="SGD keeps no momentum: its states are none"):
        step(p, optimizer, 0)


def test_states_without_a_role_are_counted_as_they_are() -> None:
    for name, expected in (("Rprop", 2 * 32.0), ("Adadelta", 2 * (4 + 32 / 256))):
        optimizer = getattr(optim, name)([p := make_matrix()])
        step(p, optimizer, 0)
        assert count_state_bits(optimizer, FOUR) == expected * p.numel()


def test_random_rounding_goes_on_where_a_saved_optimizer_was() -> None:
    spec = QuantSpec(bits=2, data_type="int", block_size=64, scale_format="fp32", rounding="stochastic")
    p = make_matrix()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    quantize_states(optimizer, spec)
    step(p, optimizer, 1)
    q = torch.nn.Parameter(p.detach().clone())
    other = optim.SGD([q], lr=0.1, momentum=0.9)
    quantize_states(other, spec)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    for seed in (2, 3):
        step(p, optimizer, seed)
        step(q, other, seed)
    assert torch.equal(p, q)


def test_the_handle_ends_it_and_bad_quantizers_are_refused() -> None:
    p = make_matrix()
    optimizer = optim.SGD([p], momentum=0.9)
    quantize_states(optimizer, FOUR.momentum).remove()
    step(p, optimizer, 0)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], take_gradient(p))
    with pytest.raises(ValueError, match="neither momentum nor variance"):
        quantize_states(optimizer)
    with pytest.raises(ValueError, match=re.escape("momentum has scale_format=fp16")):
        quantize_states(optimizer, QuantSpec(bits=8, data_type="dynamic"))


def test_a_state_that_is_not_finite_is_left_to_be_seen() -> None:
    p = make_matrix()
    optimizer = optim.SGD([p], momentum=0.9)
    quantize_states(optimizer, FOUR.momentum)
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert p.isnan().all()
