"""One step of an optimizer whose states are k-bit codes, on NVIDIA GPUs: the twin of kbit.kernels.cpu_states.

A thread takes eight neighbouring values, whose codes are whole bytes. Where both states have blocks of one size, a
power of two up to FUSED_BLOCK, a group of threads holds a block in registers and finds its peaks by shuffles, so that
all arrays are read and written once. Other block sizes take two passes: the first finds the peaks by atomic maxima, and
the second computes the states again and writes them.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from kbit.kernels.cpu_states import EXACT_BITS, NOT_RANDOM, Rule, State
from kbit.kernels.cuda_arrays import (
    KINDS,
    WORD_TYPES,
    DeviceArray,
    as_numba,
    count_steps,
    device_of,
    divide_up,
    launch_groups,
    mix_key,
    new_array,
    place_table,
    require_device,
)
from kbit.kernels.cuda_device import MOST_THREADS
from kbit.kernels.cuda_kernels import FIND_PEAKS, ONE_PASS, WRITE_STATES, make_step

FUSED_BLOCK: Final = 8 * MOST_THREADS


def take_step(p: DeviceArray, g: DeviceArray, momentum: State, variance: State, rule: Rule) -> None:
    """Change the parameters p and their states by a step with the gradient g. See kbit.kernels.cpu_states.

    The arrays of the states are on the device of p, but for their tables.
    """
    require_device()
    coded = [array for state in (momentum, variance) if _is_coded(state) for array in (state.codes, state.scales)]
    with device_of(p, g, *coded):
        states = [_fill_places(state, p) for state in (momentum, variance)]
        group = _choose_group([state for state in states if _is_coded(state)])
        scales = [as_numba(state.scales) for state in states]
        if group:
            _launch(ONE_PASS, group, p, g, states, scales, scales, rule)
            return
        found = [new_array(p, state.scales.shape[0], "float32") for state in states]
        for peaks in found:
            peaks[:] = 0
        for mode in (FIND_PEAKS, WRITE_STATES):
            _launch(mode, 1, p, g, states, scales, [as_numba(peaks) for peaks in found], rule)
        for state, peaks in zip(states, found, strict=True):
            state.scales[:] = peaks


def _is_coded(state: State) -> bool:
    return 0 < state.bits < EXACT_BITS


def _fill_places(state: State, p: DeviceArray) -> State:
    """Return the state with an array of the device in each place, also in those that it does not use."""
    unused = new_array(p, 1, "float32")
    if _is_coded(state):
        return state
    return state._replace(scales=unused, values=state.values if state.bits == EXACT_BITS else unused)


def _choose_group(coded: list[State]) -> int:
    """Return how many threads share a block in one pass, or 0 for two passes."""
    sizes = {state.block_size for state in coded}
    if not sizes:
        return 1
    size = min(sizes)
    fits = len(sizes) == 1 and 8 <= size <= FUSED_BLOCK and size & (size - 1) == 0
    return size // 8 if fits else 0


def _launch(
    mode: int, group: int, p: DeviceArray, g: DeviceArray, states: list[State], scales: Any, peaks: Any, rule: Rule
) -> None:
    words = as_numba(p)
    n, kind = words.size, KINDS[str(words.dtype)]
    steps = [count_steps(state.codebook[: state.levels]) for state in states]
    kernel = make_step(mode, group, kind, rule.kind, *(state.bits for state in states), *steps)
    arguments: list[Any] = [as_numba(x, WORD_TYPES[words.dtype.itemsize]) for x in (p, g)]
    for state, before, after in zip(states, scales, peaks, strict=True):
        table = place_table(state.codebook[: state.levels], state.thresholds[: state.levels - 1])
        seed = None if state.seed == NOT_RANDOM else state.seed
        values = state.codes if _is_coded(state) else state.values
        arguments += [as_numba(values), before, after.view(np.uint32), table, np.int64(state.block_size)]
        arguments += [state.levels - 1, mix_key(seed), seed is not None]
    arguments += [n, *rule[1:]]
    launch_groups(kernel, group, divide_up(n, 8 * group), *arguments)
