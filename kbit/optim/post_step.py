"""Any optimizer of torch with k-bit states: after each step its state tensors are quantized, as values.

The memory stays that of float32. The numbers are those of states that are stored in codes, which is what a study of
precision needs. kbit.optim.AdamW and its siblings store the codes themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kbit.numerics.quantizer import fake_quantize_
from kbit.numerics.spec import QuantSpec
from kbit.optim.states import MIN_SIZE, States, mix_seed

# What torch's optimizers call their states. A variance is never below 0.
STATE_NAMES: Final = {
    "momentum": ("exp_avg", "momentum_buffer", "grad_avg"),
    "variance": (
        "exp_avg_sq",
        "square_avg",
        "sum",
        "exp_inf",
        "max_exp_avg_sq",
        "row_var",
        "col_var",
        "variance",
        "acc_delta",
    ),
}
_COUNT: Final = "quantized_steps"  # in the first group of parameters, so that state_dict has it


def quantize_states(
    optimizer: Optimizer,
    momentum: QuantSpec | None = None,
    variance: QuantSpec | None = None,
    *,
    min_size: int = MIN_SIZE,
) -> RemovableHandle:
    """Quantize the states of an optimizer after each of its steps. Return the handle that ends it.

    A group of parameters with state="32bit" keeps exact states. So does a tensor with NaN or Inf, which makes the
    parameters NaN in the next step.

    Args:
        optimizer: any of torch.optim, or one whose states have the same names.
        momentum: the quantizer of running means of gradients, see kbit.optim.States. None leaves them as they are.
        variance: the quantizer of running means of squares.
        min_size: states with fewer elements stay as they are.

    Raises:
        ValueError: a quantizer that cannot hold its state. At a step: the optimizer has no state of a role.
    """
    states = States(momentum, variance)  # checks them
    if momentum is None and variance is None:
        raise ValueError("neither momentum nor variance has a quantizer: nothing would be quantized")

    def quantize_all(stepped: Optimizer, *arguments: Any) -> None:
        first = stepped.param_groups[0]
        first[_COUNT] = first.get(_COUNT, 0) + 1
        for role, names in STATE_NAMES.items():
            if (spec := getattr(states, role)) is not None:
                _quantize_role(stepped, role, names, spec, min_size, first[_COUNT])

    return optimizer.register_step_post_hook(quantize_all)


def _quantize_role(
    optimizer: Optimizer, role: str, names: tuple[str, ...], spec: QuantSpec, min_size: int, step: int
) -> None:
    number, has_role, has_stepped, known = 0, False, False, set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            number += 1
            has_stepped |= p.grad is not None
            known |= set(optimizer.state.get(p, {}))
            for name, tensor in list_tensors(optimizer, p, names).items():
                has_role = True
                if tensor.numel() >= min_size and group.get("state") != "32bit" and bool(tensor.isfinite().all()):
                    seeded = dataclasses.replace(spec, seed=mix_seed(spec.seed, name, number, step))
                    fake_quantize_(tensor, seeded if spec.rounding == "stochastic" else spec)
    if (known or has_stepped) and not has_role:
        others = ", ".join(sorted(known - {"step"})) or "none"
        raise ValueError(f"{type(optimizer).__name__} keeps no {role}: its states are {others}")


def list_tensors(optimizer: Optimizer, p: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the state tensors of a parameter that have one of these names, or all, by their names."""
    return {
        name: value
        for name, value in optimizer.state.get(p, {}).items()
        if (names is None or name in names) and isinstance(value, Tensor) and value.dtype.is_floating_point
    }


def count_state_bits(optimizer: Optimizer, states: States, min_size: int = MIN_SIZE) -> int:
    """Return the bits that an optimizer's states would take, were they stored as codes where they are quantized."""
    specs = {name: getattr(states, role) for role, names in STATE_NAMES.items() for name in names}
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, tensor in list_tensors(optimizer, p).items():
                if name not in specs and tensor.ndim == 0:
                    continue  # a count of steps
                spec = specs.get(name)
                is_exact = spec is None or tensor.numel() < min_size or group.get("state") == "32bit"
                total += 8 * tensor.nbytes if is_exact or spec is None else spec.count_bits((tensor.numel(),))
    return total
