"""kbit.optim: torch's numbers with exact states, and what k-bit states must keep to."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kbit
from kbit.numerics.backend import choose_backend
from kbit.numerics.spec import QuantSpec
from kbit.optim import SGD, STATES, Adam, AdamW, Lion, States
from kbit.optim.states import read_states

N = 10_000
MAKERS: dict[str, Callable[..., Any]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "lion": Lion}


def draw(n: int, seed: int, decades: float = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (decades * (torch.rand(n, generator=generator) - 1))
    return torch.randn(n, generator=generator) * spread


def make_parameter(n: int = N, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(draw(n, 0).to(dtype))


def train(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range, decades: float = 0) -> torch.Tensor:
    for step in steps:
        p.grad = draw(p.numel(), step + 1, decades).view(p.shape).to(p.dtype)
        optimizer.step()
    return p.detach().clone()


def make_spec(**fields: Any) -> QuantSpec:
    usual: dict[str, Any] = {"bits": 4, "data_type": "dynamic", "block_size": 256, "scale_format": "fp32"}
    return QuantSpec(**(usual | fields))


# ---- exact states ----


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (AdamW, torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
        (Adam, torch.optim.Adam, {"weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_with_exact_states_they_are_torchs(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    p, q = make_parameter(), make_parameter()
    moved = train(p, ours([p], lr=0.01, state="32bit", **options), range(20))
    expected = train(q, theirs([q], lr=0.01, **options), range(20))
    # 20 steps, each with a few roundings of numbers below 8: 20 x 4 x 2^-22
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5)
    assert (moved - draw(N, 0)).abs().max() > 0.1


def test_lion_is_its_formula() -> None:
    p = make_parameter()
    moved = train(p, Lion([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, state="32bit"), range(5))
    expected, m = draw(N, 0).double(), torch.zeros(N, dtype=torch.float64)
    for step in range(5):
        g = draw(N, step + 1).double()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    different = (moved - expected).abs() > 1e-5
    assert different.float().mean() <= 1e-3  # a mean within a rounding of 0 may take the other sign


# ---- k-bit states ----


@pytest.mark.parametrize("name", MAKERS)
def test_eight_bits_stay_near_exact_states(name: str) -> None:
    p, q = make_parameter(), make_parameter()
    lr = 0.001 if name == "lion" else 0.01
    moved = train(p, MAKERS[name]([p], lr=lr, state="8bit"), range(20))
    exact = train(q, MAKERS[name]([q], lr=lr, state="32bit"), range(20))
    move = (exact - draw(N, 0)).square().mean().sqrt()
    assert (moved - exact).square().mean().sqrt() < 0.15 * move


@pytest.mark.parametrize(
    "fields",
    [
        {"data_type": "int"}, {"data_type": "dynamic"}, {"data_type": "nf"}, {"data_type": "float"},
        {"data_type": "dynamic", "bits": 8}, {"data_type": "dynamic", "bits": 2},
        {"data_type": "table", "table": (-1.0, 0.0, 0.2, 1.0)},
    ],
    ids=str,
)  # fmt: skip
def test_what_never_has_a_gradient_never_moves(fields: dict[str, Any]) -> None:
    """Every second parameter, in blocks whose other half moves."""
    p, mask = torch.nn.Parameter(torch.zeros(4096)), torch.arange(4096) % 2
    variance = make_spec(data_type="dynamic", signed=False, zero=False)
    optimizer = AdamW([p], weight_decay=0, state=States(make_spec(**fields), variance))
    for step in range(500):
        p.grad = draw(4096, step) * mask
        optimizer.step()
    assert (p.detach()[mask == 0] == 0).all()
    assert (p.detach()[mask == 1] != 0).all()


@pytest.mark.parametrize(("bits", "data_type"), [(8, "dynamic"), (8, "int"), (4, "dynamic")])
def test_the_zero_of_the_variance_decides_whether_small_gradients_explode(bits: int, data_type: str) -> None:
    """Gradients over four decades in each block, 20 steps: the largest difference to exact states, in moves."""
    worst = {}
    for zero in (True, False):
        variance = make_spec(bits=bits, data_type=data_type, signed=False, zero=zero)
        p, q = make_parameter(), make_parameter()
        states = States(None, variance)
        moved = train(p, AdamW([p], weight_decay=0, state=states), range(20), decades=4)
        exact = train(q, AdamW([q], weight_decay=0, state="32bit"), range(20), decades=4)
        worst[zero] = float((moved - exact).abs().max() / (exact - draw(N, 0)).abs().max())
    assert worst[True] > 1
    assert worst[False] <= 1  # a variance that is too large makes the step smaller, never larger than Adam's


def test_states_take_the_bits_that_their_quantizers_count() -> None:
    p = make_parameter(N + 1)
    for name, states in STATES.items():
        optimizer: Any = (SGD if name.startswith("sgd") else AdamW)([p], state=name)
        train(p, optimizer, range(1))
        specs = [getattr(states, role) for role in optimizer.roles]
        bits = [32 * (N + 1) if spec is None else spec.count_bits((N + 1,)) for spec in specs]
        assert optimizer.count_state_bits() == sum(-(-b // 8) * 8 for b in bits)
    wide = AdamW([big := make_parameter(2**16)])
    train(big, wide, range(1))
    assert wide.count_state_bits() / 8 / 2**16 == 2 + 2 * 4 / 256


def test_small_parameters_and_groups_of_32_bits_keep_exact_states() -> None:
    small, embedding, large = make_parameter(4095), make_parameter(), make_parameter()
    groups: list[dict[str, Any]] = [{"params": [embedding], "state": "32bit"}, {"params": [small, large]}]
    optimizer = AdamW(groups, state="adam4bit")
    for p in (small, embedding, large):
        p.grad = draw(p.numel(), 1)
    optimizer.step()
    names = {"momentum", "variance", "step"}
    assert set(optimizer.state[small]) == set(optimizer.state[embedding]) == names
    assert set(optimizer.state[large]) == {f"{r}_{x}" for r in optimizer.roles for x in ("codes", "scales")} | {"step"}


def test_a_parameter_that_is_not_contiguous_moves_as_its_copy() -> None:
    p = torch.nn.Parameter(draw(N, 0).view(100, 100).t())
    q = torch.nn.Parameter(p.detach().contiguous())
    for parameter in (p, q):
        optimizer = AdamW([parameter])
        parameter.grad = draw(N, 1).view(100, 100)
        optimizer.step()
    assert not p.is_contiguous()
    assert torch.equal(p, q)


def test_a_step_evaluates_the_closure_and_tells_autograd_of_the_change() -> None:
    p = make_parameter()
    optimizer = AdamW([p])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = float(p.detach().square().sum())
    assert float(optimizer.step(closure)) == pytest.approx(before)
    assert float(p.detach().square().sum()) < before
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_momentum_and_variance_have_random_numbers_of_their_own() -> None:
    """Equal decays and gradients of 0 and 1 give both equal values: at the first step without a rounding."""
    for rounding, shared in (("nearest", True), ("stochastic", False)):
        spec = make_spec(data_type="int", rounding=rounding)
        optimizer = AdamW([p := make_parameter()], betas=(0.5, 0.5), state=States(spec, spec))
        for seed in (1, 2):
            p.grad = (draw(N, seed) > 0).float()
            optimizer.step()
        state = optimizer.state[p]
        assert torch.equal(state["momentum_scales"], state["variance_scales"])
        assert torch.equal(state["momentum_codes"], state["variance_codes"]) == shared


def test_the_device_decides_whose_kernel_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    gpu = dataclasses.replace(choose_backend(torch.device("cpu")), is_gpu=True)
    kernels = types.SimpleNamespace(take_step=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("kbit.optim.optimizers.choose_backend", lambda device: gpu)
    monkeypatch.setitem(sys.modules, "kbit.kernels.cuda_states", kernels)
    p = make_parameter()
    assert torch.equal(train(p, AdamW([p]), range(1)), draw(N, 0))
    assert len(calls) == 1


def test_a_gradient_of_another_type_is_refused() -> None:
    p = make_parameter(dtype=torch.bfloat16)
    p.grad = draw(N, 1).bfloat16()
    p.data = p.data.float()
    with pytest.raises(
        ValueError, match=r"gradient is torch\.bfloat16 \(10000,\) on cpu, and its parameter torch\.float32"
    ):
        AdamW([p]).step()


def test_the_quantizers_of_states_that_are_there_cannot_change() -> None:
    optimizer = AdamW([p := make_parameter()])
    optimizer.param_groups[0]["state"] = "4bit"  # nothing is stored yet
    train(p, optimizer, range(1))
    before = p.detach().clone()
    for state in ("8bit", "32bit", States(make_spec(data_type="int"), make_spec(signed=False))):
        optimizer.param_groups[0]["state"] = state
        with pytest.raises(ValueError, match="stored as momentum dynamic4 block 256, variance udynamic4-nonzero"):
            train(p, optimizer, range(1, 2))
    assert torch.equal(p, before)
    optimizer.param_groups[0]["state"] = "4bit"
    p.data = torch.zeros(2 * N)
    with pytest.raises(ValueError, match="a parameter of 20000 elements has the states"):
        train(p, optimizer, range(1, 2))


def test_a_parameter_without_elements_has_no_step() -> None:
    p = torch.nn.Parameter(torch.zeros(0, 4))
    train(p, optimizer := AdamW([p], min_size=0, state=States(make_spec(block_size=None))), range(1))
    assert not optimizer.state


# ---- saved and loaded ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["8bit", "4bit", "32bit", "stochastic"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name: str, state: str, dtype: torch.dtype) -> None:
    stochastic = States(make_spec(rounding="stochastic"), make_spec(rounding="stochastic", signed=False))
    states = stochastic if state == "stochastic" else STATES[state]
    p = make_parameter(dtype=dtype)
    optimizer = MAKERS[name]([p], state=states)
    middle = train(p, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    expected = train(p, optimizer, range(5, 8))
    file.seek(0)
    q = torch.nn.Parameter(middle)
    other = MAKERS[name]([q], lr=1.0, state=states)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(q, other, range(5, 8)), expected)
    for key, value in optimizer.state[p].items():
        loaded = other.state[q][key]
        assert torch.equal(value, loaded) and value.dtype == loaded.dtype if torch.is_tensor(value) else value == loaded


def test_states_of_other_quantizers_are_refused_when_loaded() -> None:
    p = make_parameter()
    optimizer = AdamW([p])
    train(p, optimizer, range(1))
    saved = optimizer.state_dict()
    for other, message in (
        (AdamW([p], state="adam4bit"), "state momentum dynamic8 block 256, variance udynamic8-nonzero block 256, and"),
        (AdamW([p], min_size=1), "min_size 4096, and this one 1"),
        (AdamW([make_parameter(N + 1)]), "momentum_codes of a parameter of shape (10001,), not torch.uint8 (10001,)"),
        (Adam([p]), "the saved optimizer has rule AdamW, and this one Adam: make it with the same"),
        (Lion([p]), "the saved optimizer has rule AdamW, and this one Lion"),
        (AdamW([p, make_parameter()]), "groups of [1] parameters, and this one of [2]"),
    ):
        other.param_groups[0]["lr"] = 0.125
        with pytest.raises(ValueError, match=re.escape(message)):
            other.load_state_dict(saved)
        assert other.param_groups[0]["lr"] == 0.125  # nothing is taken over
    with pytest.raises(ValueError, match="has no state: it is none of kbit"):
        AdamW([p]).load_state_dict(torch.optim.AdamW([p]).state_dict())


# ---- states in files ----


def read_memory() -> int:
    """Return the bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what backs a process' memory")
def test_states_in_files_take_no_memory_and_give_the_same_numbers(tmp_path: Path) -> None:
    n = 2**25  # glibc maps 32 MiB anew and never takes memory that earlier tests gave back
    grown: dict[Path | None, int] = {}
    results = []
    warm = make_parameter()
    train(warm, AdamW([warm]), range(1))  # compiles
    g = draw(n, 1)
    for paged in (None, None, tmp_path):  # twice, and the larger one, as the kernel may take pages of this process
        p = torch.nn.Parameter(torch.zeros(n))
        optimizer = AdamW([p], paged=paged)
        p.grad = g
        before = read_memory()
        optimizer.step()
        grown[paged] = max(grown.get(paged, 0), read_memory() - before)
        optimizer.step()
        results.append((p.detach(), optimizer.state_dict()))
    assert all(torch.equal(results[0][0], values) for values, _ in results[1:])
    assert grown[None] > 0.9 * 2 * n
    assert grown[tmp_path] < 0.1 * 2 * n
    assert list(tmp_path.iterdir()) == []
    again = AdamW([torch.nn.Parameter(results[0][0])], paged=tmp_path)
    again.load_state_dict(results[0][1])
    assert again.param_groups[0]["paged"] == str(tmp_path)
    codes = [state["momentum_codes"] for state in (*again.state.values(), *results[0][1]["state"].values())]
    assert torch.equal(*codes)


def test_a_full_disk_is_an_error_of_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fill, raising=False)
    with pytest.raises(OSError, match="No space left on device for a state in the folder of paged"):
        train(p := make_parameter(), AdamW([p], paged=str(tmp_path)), range(1))
    assert list(tmp_path.iterdir()) == []


# ---- what is refused ----


@pytest.mark.parametrize(
    ("momentum", "variance", "message"),
    [
        ({"signed": False, "data_type": "int"}, {}, "momentum has signed=False, but it has values below 0"),
        ({"data_type": "table", "table": (-1.0, -0.5, 0.5, 1.0)}, {}, "momentum has table4, whose table has no 0"),
        ({"scale_format": "fp16"}, {}, "momentum has scale_format=fp16: a state of an optimizer has scale_format=fp32"),
        ({}, {"layout": "row"}, "variance has layout=row"),
        ({}, {"data_type": "learned"}, "variance has data_type=learned, whose table is each tensor's own"),
        ({}, {"bits": 16}, "variance has bits=16: None keeps the state in float32"),
    ],
)
def test_quantizers_that_cannot_hold_a_state_are_refused(
    momentum: dict[str, Any], variance: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        States(make_spec(**momentum), make_spec(**variance))


def test_bad_options_are_refused_by_name() -> None:
    p = make_parameter()
    for make, message in (
        (lambda: AdamW([p], state="adam8bits"), "state='adam8bits' is not one of: 32bit, 8bit"),
        (lambda: AdamW([p], lr=-1), "lr=-1 is not >= 0"),
        (lambda: AdamW([p], betas=(0.9, 1.0)), "a decay of 1.0"),
        (lambda: SGD([p], momentum=0), "momentum=0 leaves no state"),
        (lambda: AdamW([p], min_size=-1), "min_size=-1"),
        (lambda: AdamW([p], paged="/no/such/folder"), "paged=/no/such/folder is no folder"),
        (lambda: AdamW([torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))]), "a parameter of torch.float64"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def test_a_sparse_gradient_is_refused() -> None:
    embedding = torch.nn.Embedding(1000, 16, sparse=True)
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo is not dense"):
        AdamW(embedding.parameters()).step()


def test_the_public_name_is_there() -> None:
    p = make_parameter()
    assert dataclasses.is_dataclass(kbit.optim.States)
    optimizer = kbit.optim.AdamW([p], state="adam8bit")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert read_states(optimizer.param_groups[0]["state"]) == STATES["adam8bit"]
    assert read_states(AdamW([p], state=None).param_groups[0]["state"]) == STATES["32bit"]
