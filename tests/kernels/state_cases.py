"""Rules, states and gradients for tests of the step over coded states, and its CUDA kernels against the NumPy twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.kernels import cpu_states
from kbit.kernels.cpu_states import Rule, State
from kbit.numerics import reference
from kbit.numerics.spec import QuantSpec

Array = NDArray[Any]
TABLE = (-1.0, -0.31, -0.02, 0.0, 0.001, 0.04, 0.5)


def make_rule(kind: int, step: int, **changes: Any) -> Rule:
    """Return a rule with numbers of usual size."""
    numbers = {
        "rate": 1e-3 / (1 - 0.9**step), "beta1": 0.9, "rest1": 0.1, "beta2": 0.95, "rest2": 0.05,
        "root": 1 / (1 - 0.95**step) ** 0.5, "eps": 1e-8, "decay": 0.9999, "penalty": 0.0,
    }  # fmt: skip
    is_nesterov = kind == cpu_states.SGD and step % 2 == 0
    fields: list[Any] = [kind, *map(np.float32, (numbers | changes).values()), is_nesterov]
    return Rule(*fields)


def start(spec: QuantSpec | None, n: int) -> State:
    """Return a state of zeros."""
    if spec is None:
        return cpu_states.EXACT._replace(values=np.zeros(n, np.float32))
    codebook, block_size = spec.make_codebook(), spec.block_size or n
    template = cpu_states.make_state(spec.bits, block_size, codebook, spec.make_thresholds(codebook))
    codes, scales = np.zeros(-(-n * spec.bits // 8), np.uint8), np.zeros(-(-n // block_size), np.float32)
    seed = spec.seed if spec.rounding == "stochastic" else cpu_states.NOT_RANDOM
    return template._replace(codes=codes, scales=scales, seed=seed)


def make_specs(bits: int, data_type: str, block: int | None, rounding: str = "nearest") -> tuple[QuantSpec, QuantSpec]:
    """Return quantizers of momentum and variance."""
    fields: dict[str, Any] = {"bits": bits, "data_type": data_type, "block_size": block, "scale_format": "fp32"}
    fields |= {"rounding": rounding, "seed": 11, "table": TABLE[: 2**bits] if data_type == "table" else None}
    unsigned = {"signed": False, "zero": False} if data_type in ("int", "dynamic") else {}
    return QuantSpec(**fields), QuantSpec(**(fields | unsigned))


def draw_gradients(n: int, step: int) -> Array:
    """Return gradients over four decades, 0 in a stretch, and of one sign in another."""
    rng = np.random.default_rng(step)
    g = (rng.standard_normal(n) * 10.0 ** rng.uniform(-4, 0, n)).astype(np.float32)
    g[n // 8 : n // 4] = 0
    g[n // 2 : n // 2 + n // 8] = np.abs(g[n // 2 : n // 2 + n // 8])
    return g


# rule, elements, dtype, momentum and variance: bits, data type, block size and rounding, or None for exact states
Coding = tuple[int, str, int | None, str] | None
Case = tuple[int, int, str, Coding, Coding]
STEPS: tuple[Case, ...] = (
    (cpu_states.ADAM, 203, "float32", (8, "dynamic", 64, "nearest"), (8, "dynamic", 64, "nearest")),
    (cpu_states.ADAM, 96, "bfloat16", (4, "dynamic", 16, "nearest"), (4, "int", 16, "nearest")),
    (cpu_states.ADAM, 75, "float32", (3, "nf", 8, "nearest"), None),
    (cpu_states.ADAM, 75, "float32", None, (2, "int", None, "stochastic")),  # two passes, as the next ones
    (cpu_states.ADAM, 203, "float32", (5, "table", 100, "nearest"), (7, "dynamic", 1, "nearest")),
    (cpu_states.ADAM, 50, "float32", None, None),
    (cpu_states.SGD, 96, "float16", (6, "int", 32, "truncate"), None),
    (cpu_states.LION, 203, "float32", (4, "nf", 64, "nearest"), None),
)


def find_wrong_steps(
    put: Callable[[Array], Any], get: Callable[[Any], Array], cases: Sequence[Case] = STEPS
) -> list[str]:
    """Return how two steps on the device differ from the twin's. put and get copy an array there and back."""
    from kbit.kernels import cuda_states

    return [wrong for case in cases for wrong in _find_wrong(case, cuda_states.take_step, put, get)]


def find_wrong_empty_steps(put: Callable[[Array], Any], get: Callable[[Any], Array]) -> list[str]:
    """Take a step of no parameters, in one pass and in two, and return what came of them."""
    from kbit.kernels import cuda_states

    p, wrong = put(np.zeros(0, np.float32)), []
    for blocks in ((64, 64), (64, 100)):
        made = [start(make_specs(8, "dynamic", block)[role], 0) for role, block in enumerate(blocks)]
        states = [state._replace(codes=put(state.codes), scales=put(state.scales)) for state in made]
        cuda_states.take_step(p, p, states[0], states[1], make_rule(cpu_states.ADAM, 1))
        wrong += [f"{blocks}: {state}" for state in states if get(state.codes).size or get(state.scales).size]
    return wrong


def _find_wrong(case: Case, take_step: Any, put: Any, get: Any) -> Iterator[str]:
    kind, n, dtype, *codings = case
    ours = [_start_coded(coding, n, role) for role, coding in enumerate(codings)]
    if kind != cpu_states.ADAM:
        ours[1] = cpu_states.ABSENT
    theirs = copy.deepcopy(ours)
    on_device = [s._replace(codes=put(s.codes), scales=put(s.scales), values=put(s.values)) for s in ours]
    p = torch.from_numpy(np.random.default_rng(0).standard_normal(n).astype(np.float32)).to(getattr(torch, dtype))
    device_p, expected = put(_as_words(p)), p.float().numpy().copy()
    for step in (1, 2):
        g, rule = torch.from_numpy(draw_gradients(n, step)).to(p.dtype), make_rule(kind, step, penalty=0.01)
        take_step(device_p, put(_as_words(g)), *on_device, rule)
        reference.take_step(expected, g.float().numpy(), theirs[0], theirs[1], rule)
        rounded = torch.from_numpy(expected).to(p.dtype)
        expected = rounded.float().numpy().copy()
        pairs = [("p", get(device_p), _as_words(rounded))]
        for name in ("codes", "scales", "values"):
            pairs += [(name, get(getattr(a, name)), getattr(b, name)) for a, b in zip(on_device, theirs, strict=True)]
        yield from (f"{case} step {step}: {name}" for name, a, b in pairs if a.tobytes() != b.tobytes())


def _start_coded(coding: Coding, n: int, role: int) -> State:
    return start(None if coding is None else make_specs(*coding)[role], n)


def _as_words(tensor: torch.Tensor) -> Array:
    words: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return words
