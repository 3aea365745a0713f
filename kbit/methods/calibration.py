"""Calibration: what each weight's inputs look like on a text, block by block through the model.

A block runs on the calibration windows with everything before it quantized already. Its weights are handed out with
H = 2/n sum x x^T over their n inputs x (tokens). When the caller has replaced them, the block runs again, and its new
outputs are the inputs of the next block. So the memory holds, beyond the model, the windows' hidden states and the
Hessians of one block.

The inputs of a weight are seen where it is multiplied (torch.nn.functional.linear, addmm for GPT-2's Conv1D, matmul for
GPT-OSS' experts). A weight is recognised by its memory. This one mechanism serves linear layers, Conv1D, and experts
that are slices of one parameter.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lm_eval.models.utils import resolve_max_length
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kbit.data.windows import Windows, make_windows
from kbit.methods.options import TOKENS_AT_ONCE
from kbit.methods.weight import Weight
from kbit.models.config import MAX_WINDOW
from kbit.models.transformers_private import experts_one_by_one

if TYPE_CHECKING:
    from kbit.methods.config import QuantConfig

_MATMULS: Final = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_CHOICE: Final = 8  # windows of the text's beginning for each sample that is drawn from them


@dataclass
class _Sums:
    """Sums over the inputs of one weight."""

    weight: Weight
    squares: Float[Tensor, "in in"]
    tokens: int = 0

    @staticmethod
    def of(weight: Weight) -> _Sums:
        inputs = weight.values.shape[-1]
        return _Sums(weight, torch.zeros(inputs, inputs, device=weight.values.device))

    def add(self, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self.squares.addmm_(x.T, x)
        self.tokens += len(x)

    def finish(self) -> Float[Tensor, "in in"]:
        """Return H, an identity if there were no inputs, with which GPTQ and AWQ round to nearest.

        Raises:
            ValueError: inputs that are NaN or Inf.
        """
        if self.tokens == 0:
            return torch.eye(len(self.squares), device=self.squares.device)
        hessian = self.squares * (2 / self.tokens)
        if not torch.isfinite(hessian).all():
            raise ValueError(f"{self.weight.label}: its inputs on the calibration text hold NaN or Inf")
        basis = self.weight.basis
        return hessian if basis is None else basis.turn_square(hessian)


class _Recorder(TorchFunctionMode):
    """While it is active, adds up the inputs of some weights."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__()
        self._sums = sorted(map(_Sums.of, weights), key=lambda sums: sums.weight.values.data_ptr())
        self._starts = [sums.weight.values.data_ptr() for sums in self._sums]
        self._weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (F.linear, torch.addmm):
            inputs, matrix = args[:2] if func is F.linear else args[1:3]
            self._record(inputs, matrix)
        elif func in _MATMULS and len(args) == 2 and args[1].ndim == 2:
            self._record(*args)
        return func(*args, **(kwargs or {}))

    def _record(self, inputs: Tensor, matrix: Tensor) -> None:
        found = bisect.bisect_right(self._starts, matrix.data_ptr()) - 1
        if found < 0:
            return
        values = self._sums[found].weight.values
        if matrix.device == values.device and matrix.data_ptr() < values.data_ptr() + values.nbytes:
            self._sums[found].add(inputs)

    def finish(self, unseen: str) -> Iterator[tuple[Weight, Float[Tensor, "in in"]]]:
        """Yield each weight with its H, and forget the sums. Note in the weight whether it saw no input.

        Raises:
            ValueError: a weight without inputs, if unseen=error, or with inputs that are NaN or Inf.
        """
        sums_of = {sums.weight.label: sums for sums in self._sums}
        self._sums = []
        for weight in self._weights:
            weight.is_unseen = sums_of[weight.label].tokens == 0
        if unseen == "error":
            _check_seen(self._weights)
        for weight in self._weights:
            yield weight, sums_of.pop(weight.label).finish()


def _check_seen(weights: Sequence[Weight]) -> None:
    """Raise ValueError if a weight saw no input."""
    unseen = [weight for weight in weights if weight.is_unseen]
    if not unseen:
        return
    name = unseen[0].name
    experts, missed = ([w.expert for w in group if w.name == name] for group in (weights, unseen))
    if len(missed) == len(experts):
        raise ValueError(
            f"{name} is in no product on the calibration text, or in none whose inputs are seen (linear, addmm, "
            "matmul with one matrix), as biases, norms and embeddings are not: leave it out (quant.exclude), or "
            "round it to nearest (quant.calibration.unseen=rtn)"
        )
    raise ValueError(
        f"{name} (experts {missed} of {len(experts)}) saw no input from the calibration text: use more of "
        "it (quant.calibration.samples), leave the weight out (quant.exclude), or round it to nearest "
        "(quant.calibration.unseen=rtn)"
    )


@dataclass(frozen=True)
class _Block:
    """A transformer block, and how the model calls it.

    Attributes:
        module: takes hidden states and returns them, alone or first of a tuple.
        args, kwargs: everything else it is called with, the same for all windows.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, hidden: Tensor) -> Tensor:
        return _first(self.module(hidden, *self.args, **self.kwargs))


def calibrate(
    model: nn.Module, weights: Sequence[Weight], quant: QuantConfig, windows: Windows
) -> Iterator[tuple[Weight, Float[Tensor, "in in"]]]:
    """Yield each weight with the Hessian of its inputs (one for each of fused experts), to be replaced before the next.

    Raises:
        ValueError: blocks that do not form a chain, or a weight without inputs or with inputs that are NaN or Inf.
    """
    # as many windows in every pass, so that the masks made for one serve all
    most = max(1, TOKENS_AT_ONCE // windows.tokens.shape[1])
    size = max(n for n in range(1, most + 1) if len(windows.tokens) % n == 0)
    batches = torch.split(windows.tokens.to(weights[0].values.device), size)
    by_block = _group_by_block(weights)
    outside = by_block.pop("", [])
    if by_block:
        names, modules = _find_chain(model, by_block)
        blocks, hidden = _trace_blocks(model, modules, batches)
        for name, block in zip(tqdm(names, quant.method, leave=False, disable=None), blocks, strict=True):
            yield from _calibrate_part(model, by_block.pop(name, []), block.run, hidden, quant)
            if not by_block:  # that was the last block to quantize
                break
            hidden = [_run(block.run, states.to(batches[0].device)).cpu() for states in hidden]
    yield from _calibrate_part(model, outside, model, batches, quant)


def draw_windows(model: Any, quant: QuantConfig, tokenizer: PreTrainedTokenizerBase | None) -> Windows:
    """Return the calibration windows: drawn without overlap, by seed, from the first eight times as many of the text.

    Raises:
        ValueError: no tokenizer, a text that is shorter than asked, or windows longer than the model's context.
    """
    config = quant.calibration
    if tokenizer is None:
        needs = "method" if quant.traits.needs_text else "allocation.objective"
        value = quant.method if quant.traits.needs_text else quant.allocation.objective
        raise ValueError(f"quant.{needs}={value} calibrates on a text: quantize_model needs the model's tokenizer")
    context = resolve_max_length(model.config, tokenizer)
    length = config.length or min(MAX_WINDOW, context)
    if length > context:
        raise ValueError(f"quant.calibration.length={length} is beyond the model's context of {context} tokens")
    windows = make_windows(config.text, tokenizer, context=length, max_windows=_CHOICE * config.samples)
    there = len(windows.tokens)
    if there < config.samples:
        raise ValueError(
            f"quant.calibration.text={config.text!r} has {there} windows of {length} tokens, less than "
            f"quant.calibration.samples={config.samples}"
        )
    drawn = torch.randperm(there, generator=torch.Generator().manual_seed(config.seed))[: config.samples]
    return Windows(windows.name, windows.sha256, windows.tokens[drawn], windows.bytes_per_token)


def describe_calibration(windows: Windows, weights: Sequence[Weight]) -> dict[str, Any]:
    """Return what the record says of the calibration data, and of the experts (0 of a plain matrix) that it missed."""
    samples, length = windows.tokens.shape
    text = {"text": windows.name, "sha256": windows.sha256, "samples": samples, "length": length}
    unseen: dict[str, list[int]] = {}
    for weight in weights:
        if weight.is_unseen:
            unseen.setdefault(weight.name, []).append(weight.expert or 0)
    return {"calibration": text, "unseen": unseen}


def _calibrate_part(
    model: nn.Module,
    weights: Sequence[Weight],
    run: Callable[[Tensor], Any],
    inputs: Sequence[Tensor],
    quant: QuantConfig,
) -> Iterator[tuple[Weight, Float[Tensor, "in in"]]]:
    """Run a part of the model on all inputs and yield its weights with their Hessians."""
    if weights:
        with experts_one_by_one(model), _Recorder(weights) as recorder:
            for batch in inputs:
                _run(run, batch.to(weights[0].values.device))
        yield from recorder.finish(quant.calibration.unseen)


@torch.no_grad()
def _run(function: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    return function(inputs)


def _group_by_block(weights: Sequence[Weight]) -> dict[str, list[Weight]]:
    """Return the weights by the name of their transformer block (gpt_neox.layers.0), "" for those outside of all."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        match = re.match(r"(.*?\.\d+)\.", weight.name)
        groups.setdefault(match[1] if match else "", []).append(weight)
    return groups


def _find_chain(model: nn.Module, names: Mapping[str, Any]) -> tuple[list[str], list[nn.Module]]:
    """Return the names and modules of the list that the blocks are members of, all of them, in order.

    Raises:
        ValueError: there are several such lists.
    """
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1:
        raise ValueError(f"blocks of several lists, {', '.join(sorted(parents))}, are not one chain to calibrate along")
    (parent,) = parents
    modules = list(model.get_submodule(parent).named_children())
    return [f"{parent}.{name}" for name, _ in modules], [module for _, module in modules]


def _trace_blocks(
    model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[_Block], list[Tensor]]:
    """Return how each block is called, and the hidden states that enter the first one, for each batch.

    Raises:
        ValueError: a block does not take what the one before it returns, or is called differently for another batch.
    """
    blocks, first = _trace(model, modules, batches[0])
    hidden = [first]
    for number, batch in enumerate(batches[1:]):
        if number == 0:  # once is enough to see whether what the blocks get depends on the text
            again, states = _trace(model, modules, batch)
            if not all(_equal((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(blocks, again, strict=True)):
                raise ValueError("the model hands its blocks more of the text than hidden states: not supported")
        else:
            states = _catch_first(model, modules[0], batch)
        hidden.append(states)
    return blocks, [states.cpu() for states in hidden]


def _trace(model: nn.Module, modules: Sequence[nn.Module], tokens: Tensor) -> tuple[list[_Block], Tensor]:
    """Run the model and return how each block is called, and the hidden states that enter the first."""
    blocks: list[_Block] = []
    passed: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *others = args or (kwargs["hidden_states"],)
        if passed and not torch.equal(passed[-1], hidden):
            raise ValueError(
                f"block {len(blocks)} does not take what the one before it returns: no chain to calibrate along"
            )
        passed.append(hidden)
        blocks.append(_Block(module, tuple(others), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passed[1:] = [_first(output)]

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(leave) for module in modules]
    try:
        _run(lambda ids: model(ids, use_cache=False), tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if [block.module for block in blocks] != list(modules):
        raise ValueError(f"the model runs {len(blocks)} blocks, not its {len(modules)} in their order")
    return blocks, passed[0]


class _Caught(Exception):
    """The hidden states are there, and the rest of the forward pass is of no use."""


def _catch_first(model: nn.Module, block: nn.Module, tokens: Tensor) -> Tensor:
    """Return the hidden states that enter a block."""
    caught: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Caught

    hook = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        _run(lambda ids: model(ids, use_cache=False), tokens)
    except _Caught:
        pass
    finally:
        hook.remove()
    return caught[0]


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _equal(a: Any, b: Any) -> bool:
    """Whether two structures of arguments are equal, tensors by their values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or isinstance(a, Tensor) or not isinstance(a, str | int | float) or a == b)
