"""AdamW, Adam, SGD and Lion whose states are codes: decoded, moved and encoded again in one pass of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from kbit.kernels import cpu_states
from kbit.kernels.cpu_states import Rule
from kbit.numerics.backend import choose_backend, torch_threads_kept
from kbit.optim.states import MIN_SIZE, ROLES, States, mix_seed, read_states, start_state, view_state

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_USED = "used_state"  # a group's `state` from its first step on, so that state_dict has it


class CodedOptimizer(Optimizer):
    """What the optimizers have in common: a step over the kernels, and states that are saved and loaded bit for bit.

    A group of parameters may have a `state`, `min_size` and `paged` of its own, such as state="32bit" for embeddings.
    """

    rule: ClassVar[str]  # its name, which tells saved states of one rule from those of another
    roles: ClassVar[tuple[str, ...]] = ROLES

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, see torch.optim.Optimizer.

        Raises:
            ValueError: an option or a dtype that does not go. The message names it.
        """
        group = self.defaults | param_group
        param_group.pop(_USED, None)  # of another optimizer's group
        param_group["state"], param_group["rule"] = read_states(group["state"]).as_text(), self.rule
        param_group["paged"] = None if group["paged"] is None else str(group["paged"])
        if group["min_size"] < 0:
            raise ValueError(f"min_size={group['min_size']} is not >= 0")
        if group["paged"] is not None and not Path(group["paged"]).is_dir():
            raise ValueError(f"paged={group['paged']} is no folder: make it first")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in _DTYPES:
                raise ValueError(f"a parameter of {p.dtype} is none of float32, float16, bfloat16")
            if group["paged"] is not None and p.device.type != "cpu":
                raise ValueError(
                    f"paged={group['paged']} keeps states in files, which a parameter on {p.device} cannot use: on a "
                    "GPU use bitsandbytes.optim.PagedAdamW8bit"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change every parameter that has a gradient. The loss of the closure, if there is one, is returned.

        Raises:
            ValueError: a sparse gradient, one of another type than its parameter, or a group whose `state` was changed
                after its first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        with torch_threads_kept():
            for group in self.param_groups:
                states = _read_unchanged(group)
                for p in group["params"]:
                    if p.grad is not None and p.numel():
                        self._step_parameter(p, group, states, number)
                    number += 1
        return loss

    def _step_parameter(self, p: Tensor, group: dict[str, Any], states: States, number: int) -> None:
        if p.grad is None or p.grad.layout != torch.strided:
            raise ValueError(f"a gradient of layout {p.grad.layout if p.grad is not None else None} is not dense")
        if (p.grad.dtype, p.grad.shape, p.grad.device) != (p.dtype, p.shape, p.device):
            raise ValueError(
                f"the gradient is {p.grad.dtype} {tuple(p.grad.shape)} on {p.grad.device}, and its parameter {p.dtype} "
                f"{tuple(p.shape)} on {p.device}: convert one of them"
            )
        if not self.state[p]:
            self.state[p].update(self._start(p, group, states))
        state = self.state[p]
        state["step"] += 1
        backend, elements = choose_backend(p.device), p.numel()
        arrays = {name: backend.view(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
        views = [cpu_states.ABSENT] * len(ROLES)
        for place, role in enumerate(self.roles):
            spec = getattr(states, role)
            seed = mix_seed(spec.seed if spec else 0, role, number, state["step"])
            views[place] = view_state(role, spec, arrays, elements, seed)
        flat, gradient = p.detach().contiguous().view(-1), p.grad.detach().contiguous().view(-1)
        kernels = import_module("kbit.kernels.cuda_states") if backend.is_gpu else cpu_states
        kernels.take_step(backend.view(flat), backend.view(gradient), *views, self.make_rule(group, state["step"]))
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))
        torch.autograd.graph.increment_version(p)

    def _start(self, p: Tensor, group: dict[str, Any], states: States) -> dict[str, Any]:
        """Return a parameter's state before its first step."""
        is_small = p.numel() < group["min_size"]
        state: dict[str, Any] = {"step": 0}
        for role in self.roles:
            spec = None if is_small else getattr(states, role)
            state |= start_state(role, spec, p.numel(), p.device, group["paged"])
        return state

    def make_rule(self, group: dict[str, Any], step: int) -> Rule:
        """Return the numbers of step 1, 2, ... for a group of parameters."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over options and states from a state_dict, bit for bit.

        torch's own would cast codes and scales to the parameter's dtype.

        Raises:
            ValueError: the states are of another rule, of other quantizers or of other parameters. Nothing is changed
                then.
        """
        own, saved_groups = [dict(group) for group in self.param_groups], state_dict["param_groups"]
        counts = [[len(group["params"]) for group in groups] for groups in (saved_groups, own)]
        if counts[0] != counts[1]:
            raise ValueError(f"the saved optimizer has groups of {counts[0]} parameters, and this one of {counts[1]}")
        restored = {}
        for mine, saved in zip(own, saved_groups, strict=True):
            _check_same_states(mine, saved)
            for number, p in zip(saved["params"], mine["params"], strict=True):
                if state := state_dict["state"].get(number):
                    restored[p] = self._restore(p, mine, state)
        super().load_state_dict(state_dict | {"state": {}})
        for group, mine in zip(self.param_groups, own, strict=True):
            group["paged"] = mine["paged"]
        self.state.update(restored)

    def _restore(self, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        state = self._start(p, group, read_states(group["state"]))
        if extra := sorted(saved.keys() - state.keys()):
            raise ValueError(f"the saved state has {', '.join(extra)}, which this optimizer has not")
        for name, made in state.items():
            if not isinstance(made, Tensor):
                state[name] = saved[name]
            elif name not in saved or (saved[name].shape, saved[name].dtype) != (made.shape, made.dtype):
                found = "nothing" if name not in saved else f"{saved[name].dtype} {tuple(saved[name].shape)}"
                raise ValueError(
                    f"the saved state has {found} as {name} of a parameter of shape {tuple(p.shape)}, not {made.dtype} "
                    f"{tuple(made.shape)}: it was saved by another optimizer"
                )
            else:
                made.copy_(saved[name])
        return state

    def count_state_bits(self) -> int:
        """Return the bits of all states, as they are stored."""
        return 8 * sum(
            value.nbytes for state in self.state.values() for value in state.values() if isinstance(value, Tensor)
        )


def _check_same_states(mine: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in ("state", "min_size", "rule"):
        if name not in saved:
            raise ValueError(f"the saved optimizer has no {name}: it is none of kbit.optim")
        theirs, ours = (read_states(group[name]) if name == "state" else group[name] for group in (saved, mine))
        if ours != theirs:
            labels = [x.label() if isinstance(x, States) else x for x in (theirs, ours)]
            raise ValueError(
                f"the saved optimizer has {name} {labels[0]}, and this one {labels[1]}: make it with the same"
            )


def _read_unchanged(group: dict[str, Any]) -> States:
    """Return the states of a group, and keep them in mind: codes that are there would mean other values in others."""
    states = read_states(group["state"])
    used = read_states(group.setdefault(_USED, group["state"]))
    if states != used:
        raise ValueError(
            f"a group's state is {states.label()}, and its states are stored as {used.label()} since its first step: "
            "make another optimizer"
        )
    return states


class AdamW(CodedOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as torch.optim.AdamW.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: the learning rate.
        betas: the decay of the running means of gradients and of their squares.
        eps: is added to the root of the variance.
        weight_decay: share of lr by which a step shrinks the parameters.
        state: how states are stored. A name of kbit.optim.STATES, or kbit.optim.States. None is float32.
        min_size: parameters with fewer elements have float32 states.
        paged: a folder on a disk in whose files the states lie, so that the system can take their memory. None is
            memory. The files have no names and end with the optimizer.

    Raises:
        ValueError: a value outside its range, or a parameter that is no float32, float16 or bfloat16.
    """

    rule = "AdamW"
    is_decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: str | States | None = "adam8bit",
        min_size: int = MIN_SIZE,
        paged: str | Path | None = None,
    ) -> None:
        _check_numbers(lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"state": state, "min_size": min_size, "paged": paged})

    def make_rule(self, group: dict[str, Any], step: int) -> Rule:
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        return _round(
            cpu_states.ADAM, rate=lr / (1 - beta1**step), beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2,
            root=1 / math.sqrt(1 - beta2**step), eps=group["eps"], decay=1 - lr * decay if self.is_decoupled else 1,
            penalty=0 if self.is_decoupled else decay,
        )  # fmt: skip


class Adam(AdamW):
    """Adam (Kingma & Ba 2015), as torch.optim.Adam: weight decay is added to the gradient. See AdamW for arguments."""

    rule = "Adam"
    is_decoupled = False

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state: str | States | None = "adam8bit",
        min_size: int = MIN_SIZE,
        paged: str | Path | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, state=state, min_size=min_size, paged=paged)


class SGD(CodedOptimizer):
    """Gradient descent with momentum, as torch.optim.SGD without dampening. See AdamW for the other arguments.

    Args:
        momentum: the decay of the gradients' running sum, > 0.
        nesterov: whether the step looks ahead by one momentum.
    """

    rule = "SGD"
    roles = ("momentum",)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        state: str | States | None = "sgd8bit",
        min_size: int = MIN_SIZE,
        paged: str | Path | None = None,
    ) -> None:
        _check_numbers(lr=lr, weight_decay=weight_decay, betas=(momentum,))
        if momentum == 0:
            raise ValueError("momentum=0 leaves no state to quantize: use torch.optim.SGD")
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, options | {"state": state, "min_size": min_size, "paged": paged})

    def make_rule(self, group: dict[str, Any], step: int) -> Rule:
        return _round(
            cpu_states.SGD, rate=float(group["lr"]), beta1=group["momentum"], rest1=1, penalty=group["weight_decay"],
            nesterov=group["nesterov"],
        )  # fmt: skip


class Lion(CodedOptimizer):
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms"). See AdamW for the arguments.

    Its step is the sign of beta1 m + (1 - beta1) g, and m decays by beta2. Weight decay is decoupled.
    """

    rule = "Lion"
    roles = ("momentum",)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state: str | States | None = "lion8bit",
        min_size: int = MIN_SIZE,
        paged: str | Path | None = None,
    ) -> None:
        _check_numbers(lr=lr, weight_decay=weight_decay, betas=betas)
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, options | {"state": state, "min_size": min_size, "paged": paged})

    def make_rule(self, group: dict[str, Any], step: int) -> Rule:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        return _round(
            cpu_states.LION, rate=lr, beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2,
            decay=1 - lr * group["weight_decay"],
        )  # fmt: skip


def _round(
    kind: int,
    rate: float,
    beta1: float,
    rest1: float,
    beta2: float = 0,
    rest2: float = 0,
    root: float = 1,
    eps: float = 0,
    decay: float = 1,
    penalty: float = 0,
    nesterov: bool = False,
) -> Rule:
    """Return a rule whose numbers, computed in float64, are rounded once."""
    numbers = map(np.float32, (rate, beta1, rest1, beta2, rest2, root, eps, decay, penalty))
    fields: list[Any] = [kind, *numbers, bool(nesterov)]
    return Rule(*fields)


def _check_numbers(betas: tuple[float, ...], **numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name}={number} is not >= 0")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"a decay of {beta} (betas or momentum) is not in [0, 1)")
