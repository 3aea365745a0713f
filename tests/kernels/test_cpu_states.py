"""The step over coded states: bit for bit the NumPy twin, for every number of bits, type, block and thread."""

from __future__ import annotations

import copy
from typing import Any

import numba
import numpy as np
import pytest
import torch
from state_cases import draw_gradients, make_rule, make_specs, start

from kbit.kernels import cpu_states
from kbit.kernels.cpu_chunks import CHUNK
from kbit.kernels.cpu_states import TASK, State
from kbit.numerics import reference

RAGGED = 2 * CHUNK + 37
TASKS = 2 * TASK + RAGGED  # three tasks for the threads, the last of them ragged
# name -> elements of the tensor, for a test of all blocks in little time
BLOCKS: dict[int | None, int] = {1: 613, 64: RAGGED, 100: RAGGED, 256: RAGGED, 1001: RAGGED, 2048: RAGGED, None: RAGGED}


def assert_equal_steps(kind: int, momentum: State, variance: State, n: int, *, steps: int = 3) -> None:
    """Take steps with both, and compare every bit of parameters, codes and scales after each."""
    ours, theirs = (copy.deepcopy([momentum, variance]) for _ in range(2))
    p = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    expected = p.copy()
    for step in range(1, steps + 1):
        rule, g = make_rule(kind, step, penalty=0.01 * (step % 2)), draw_gradients(n, step)
        cpu_states.take_step(p, g.copy(), ours[0], ours[1], rule)
        reference.take_step(expected, g, theirs[0], theirs[1], rule)
        np.testing.assert_array_equal(p.view(np.uint32), expected.view(np.uint32))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine.codes, other.codes)
            np.testing.assert_array_equal(mine.scales.view(np.uint32), other.scales.view(np.uint32))
            np.testing.assert_array_equal(mine.values.view(np.uint32), other.values.view(np.uint32))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """All sizes but that of the test of threads are one task."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize("data_type", ["int", "dynamic", "nf", "table"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_adam_equals_the_twin(bits: int, data_type: str) -> None:
    for block, n in BLOCKS.items():
        momentum, variance = make_specs(bits, data_type, block)
        assert_equal_steps(cpu_states.ADAM, start(momentum, n), start(variance, n), n)


@pytest.mark.parametrize(("bits", "block"), [(3, 100), (8, 256), (5, 1001), (4, None)])
def test_tasks_of_several_threads_equal_the_twin(bits: int, block: int | None) -> None:
    """One pass and two, with codes of whole bytes and of parts, and random numbers that go by the element."""
    threads = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if threads < 3:
        pytest.skip("NUMBA_NUM_THREADS allows no 3 threads")
    numba.set_num_threads(3)
    for rounding in ("nearest", "stochastic"):
        momentum, variance = make_specs(bits, "int", block, rounding)
        assert_equal_steps(cpu_states.ADAM, start(momentum, TASKS), start(variance, TASKS), TASKS, steps=2)


@pytest.mark.parametrize("kind", [cpu_states.SGD, cpu_states.LION])
def test_rules_with_one_state_equal_the_twin(kind: int) -> None:
    for bits, data_type in ((2, "dynamic"), (4, "nf"), (8, "int")):
        for block, n in BLOCKS.items():
            assert_equal_steps(kind, start(make_specs(bits, data_type, block)[0], n), cpu_states.ABSENT, n)


def test_states_of_different_kinds_go_together() -> None:
    momentum, variance = make_specs(4, "dynamic", 256)
    for first, second in ((None, None), (momentum, None), (None, variance), (momentum, make_specs(8, "int", None)[1])):
        assert_equal_steps(cpu_states.ADAM, start(first, RAGGED), start(second, RAGGED), RAGGED)
    for n in (1, 7, 9):
        assert_equal_steps(cpu_states.ADAM, start(momentum, n), start(variance, n), n)


@pytest.mark.parametrize("rounding", ["stochastic", "truncate", "nearest_even"])
def test_other_roundings_equal_the_twin(rounding: str) -> None:
    for bits, block in ((2, 256), (8, None)):
        momentum, variance = (start(spec, RAGGED) for spec in make_specs(bits, "int", block, rounding))
        assert_equal_steps(cpu_states.ADAM, momentum, variance, RAGGED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    n = RAGGED
    p = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    g = torch.from_numpy(draw_gradients(n, 0)).to(dtype)
    states = [start(spec, n) for spec in make_specs(4, "dynamic", 256)]
    expected, others, rule = p.float().numpy(), copy.deepcopy(states), make_rule(cpu_states.ADAM, 1)
    words = [(x.view(torch.uint16) if dtype == torch.bfloat16 else x).numpy() for x in (p, g)]
    cpu_states.take_step(words[0], words[1], states[0], states[1], rule)
    reference.take_step(expected, g.float().numpy(), others[0], others[1], rule)
    assert torch.equal(p, torch.from_numpy(expected).to(dtype))
    np.testing.assert_array_equal(states[0].codes, others[0].codes)


@pytest.mark.parametrize("kind", [cpu_states.ADAM, cpu_states.SGD, cpu_states.LION])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_to_be_seen(kind: int, bad: float) -> None:
    """Its block is lost in the same step or in the next, and no other block is touched."""
    n, (momentum, variance) = 1024, make_specs(8, "dynamic", 256)
    states = start(momentum, n), start(variance, n) if kind == cpu_states.ADAM else cpu_states.ABSENT
    p, g = np.zeros(n, np.float32), np.full(n, 0.5, np.float32)
    g[300] = bad
    with np.errstate(all="ignore"):
        for step in (1, 2):
            cpu_states.take_step(p, g, *states, make_rule(kind, step))
    assert not np.isfinite(p[256:512]).all()
    assert np.isfinite(p[:256]).all()
    assert np.isfinite(p[512:]).all()
