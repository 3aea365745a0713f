"""The quantizers of an optimizer's states, and the arrays that hold a state."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from kbit.checks import check_choice
from kbit.kernels import cpu_states
from kbit.kernels.cpu_states import State
from kbit.numerics.spec import QuantSpec, check_state

EXACT_STATE_BITS: Final = 32  # of a value that is not quantized
MIN_SIZE: Final = 4096  # parameters with fewer elements keep exact states (Dettmers et al. 2022)
ROLES: Final = ("momentum", "variance")


@dataclass(frozen=True)
class States:
    """How an optimizer stores its states. None is float32.

    Both quantizers have blocks of the flattened parameter and float32 scales. A scale with fewer bits could not hold
    the squares of small gradients.

    Attributes:
        momentum: the quantizer of gradients' running mean. Its table has a 0, so that a parameter without a gradient
            does not move.
        variance: the quantizer of the squares' running mean. Tables without a sign and without a 0 are best
            (signed=False, zero=False): where a second moment becomes 0, Adam's step is as large as its momentum allows.

    Raises:
        ValueError: a quantizer that cannot hold the state, named with what is allowed.
    """

    momentum: QuantSpec | None = None
    variance: QuantSpec | None = None

    def __post_init__(self) -> None:
        for role in ROLES:
            if (spec := getattr(self, role)) is not None:
                check_state(role, spec)

    @staticmethod
    def from_name(name: str) -> States:
        """Return the named states, one of STATES.

        Raises:
            ValueError: there is no such name.
        """
        check_choice("state", name, tuple(STATES))
        return STATES[name]

    def as_text(self) -> str:
        """Return JSON, which torch.save writes and torch.load(weights_only=True) reads. read_states reads it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def label(self) -> str:
        """Return a short description, such as 'momentum dynamic8 block 256, variance 32-bit'."""
        return ", ".join(f"{role} {_describe(getattr(self, role))}" for role in ROLES)


@functools.lru_cache(maxsize=64)
def read_states(state: str | States | None) -> States:
    """Return the states of a name, or of what States.as_text wrote. None is float32.

    Raises:
        ValueError: there is no such name.
    """
    if state is None or isinstance(state, States):
        return state or States()
    if not str(state).startswith("{"):
        return States.from_name(state)
    fields = json.loads(state)
    return States(**{role: None if fields[role] is None else QuantSpec.from_json(fields[role]) for role in ROLES})


def _describe(spec: QuantSpec | None) -> str:
    return "32-bit" if spec is None else f"{spec.label()} block {spec.block_size or 'whole'}"


def _make_states(bits: int, block_size: int = 256) -> States:
    """Return dynamic exponents for both states. The variance has no 0."""
    momentum = QuantSpec(bits=bits, data_type="dynamic", block_size=block_size, scale_format="fp32")
    return States(momentum, dataclasses.replace(momentum, signed=False, zero=False))


# What `state` may be by name. The published 8-bit states (Dettmers et al. 2022) have a 0 in the variance's table.
STATES: Final[Mapping[str, States]] = MappingProxyType(
    {"32bit": States()}
    | {f"{prefix}{bits}bit": _make_states(bits) for bits in (8, 4) for prefix in ("", "adam", "sgd", "lion")}
)


def start_state(
    role: str, spec: QuantSpec | None, elements: int, device: torch.device, folder: str | None
) -> dict[str, Tensor]:
    """Return the tensors of a state of zeros, by the names that the optimizer's state has for them.

    Args:
        role: momentum or variance.
        spec: the quantizer. None has float32 values.
        elements: elements of the parameter.
        device: the parameter's device.
        folder: where the tensors lie in files, or None for memory.
    """
    sizes = _count_values(role, spec, elements)
    dtypes = {name: torch.uint8 if name.endswith("_codes") else torch.float32 for name in sizes}
    return {name: _allocate(size, dtypes[name], device, folder) for name, size in sizes.items()}


def _count_values(role: str, spec: QuantSpec | None, elements: int) -> dict[str, int]:
    """Return the sizes of a state's tensors by their names. Any code of a block of scale 0 is 0."""
    if spec is None:
        return {role: elements}
    codes, scales = math.ceil(elements * spec.bits / 8), spec.count_blocks((elements,))
    return {f"{role}_codes": codes, f"{role}_scales": scales}


def _allocate(count: int, dtype: torch.dtype, device: torch.device, folder: str | None) -> Tensor:
    """Return zeros, in memory or in a file that has no name any more and ends with the tensor.

    Pages of a file need no swap space: the system writes them to the file and reads them again as needed. The disk's
    space is taken at once, because a disk that is full later would end the process by a signal.

    Raises:
        OSError: the disk has too little space.
    """
    if folder is None:
        return torch.zeros(count, dtype=dtype, device=device)
    handle, path = tempfile.mkstemp(dir=folder, prefix="kbit-state-")
    try:
        if hasattr(os, "posix_fallocate"):  # macOS and Windows lack it
            os.posix_fallocate(handle, 0, count * dtype.itemsize)
        return torch.from_file(path, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} for a state in the folder of paged", path) from error
    finally:
        os.close(handle)
        Path(path).unlink()


def view_state(role: str, spec: QuantSpec | None, tensors: Mapping[str, Any], elements: int, seed: int) -> State:
    """Return a state as the kernels take it.

    Args:
        role, spec, elements: see start_state.
        tensors: the arrays of the optimizer's state on the device, by name.
        seed: seed of stochastic rounding in this step.

    Raises:
        ValueError: the arrays are not those of this quantizer and this number of elements.
    """
    held = None if role in tensors else spec  # a small parameter has exact states
    wanted = _count_values(role, held, elements)
    if (found := {name: tensors[name].shape[0] for name in wanted if name in tensors}) != wanted:
        raise ValueError(f"a parameter of {elements} elements has the states {found}, and its group asks for {wanted}")
    if held is None or spec is None:
        return cpu_states.EXACT._replace(values=tensors[role])
    state = _make_template(spec)._replace(codes=tensors[f"{role}_codes"], scales=tensors[f"{role}_scales"])
    if spec.block_size is None:
        state = state._replace(block_size=elements)
    return state._replace(seed=seed) if spec.rounding == "stochastic" else state


@functools.lru_cache(maxsize=64)
def _make_template(spec: QuantSpec) -> State:
    codebook = spec.make_codebook()
    return cpu_states.make_state(spec.bits, spec.block_size or 1, codebook, spec.make_thresholds(codebook))


def mix_seed(seed: int, name: str, number: int, step: int) -> int:
    """Return the seed of stochastic rounding of one tensor of a parameter's state in one step.

    The states of a parameter must not share random numbers: their errors would depend on each other.
    """
    own = hashlib.blake2b(f"{name}/{number}/{step}".encode(), digest_size=8).digest()
    return (seed + int.from_bytes(own, "big")) % 2**63
