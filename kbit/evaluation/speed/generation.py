"""The one place that times a model: a prompt goes through it, then steps of one token for each sequence."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from kbit.evaluation.speed.timing import Clock
from kbit.models.inference import find_cache_name
from kbit.models.parameters import count_embedded

_QUIET: Final = ("KINETO_LOG_LEVEL", "6")  # no lines on standard error when a profiler starts and stops


@dataclass(frozen=True)
class Generation:
    """How long one generation took.

    Attributes:
        prompt_seconds: the prompt of all sequences, and its last token's logits.
        step_seconds: all steps.
    """

    prompt_seconds: float
    step_seconds: float

    def find_ms_per_token(self, work: Workload) -> float:
        """Return the milliseconds of a step by its number of sequences."""
        return 1e3 * self.step_seconds / (work.new * work.batch)


@dataclass(frozen=True)
class Workload:
    """What is generated.

    Attributes:
        batch: the number of sequences.
        prompt: the tokens of each prompt.
        new: the number of steps.
    """

    batch: int
    prompt: int
    new: int

    def draw_tokens(self, model: Any) -> Tensor:
        """Return the tokens [batch, prompt + new] that the model gets: the same for every variant of a model."""
        source = torch.Generator().manual_seed(self.batch)
        shape = (self.batch, self.prompt + self.new)
        return torch.randint(count_embedded(model), shape, generator=source).to(model.device)


@torch.no_grad()
def generate(model: Any, work: Workload, tokens: Tensor, clock: Clock) -> Generation:
    """Let a model read the prompt and take the steps, with its cache of keys and values, and return the times.

    The tokens are given beforehand, so that every variant does the same work. What a step would choose, the largest
    logit, is computed all the same.

    Raises:
        ValueError: the model keeps no cache.
    """
    options = find_options(type(model).forward)
    start = clock()
    output = model(tokens[:, : work.prompt], use_cache=True, **options.last_logits)
    output.logits[:, -1].argmax(-1)
    read = clock()
    cache = getattr(output, options.cache, None)
    if cache is None:
        raise ValueError(f"{type(model).__name__} keeps no cache of keys and values: its steps cannot be measured")
    kept = {options.cache: cache, "use_cache": True}
    for place in range(work.prompt, work.prompt + work.new):
        output = model(tokens[:, place : place + 1], **kept)
        output.logits[:, -1].argmax(-1)
    return Generation(read - start, clock() - read)


@dataclass(frozen=True)
class Options:
    """What a model's forward calls its arguments.

    Attributes:
        cache: its cache of keys and values, which had another name before transformers 5.24.
        last_logits: the argument that asks for the last token's logits alone, as transformers' generate does, if the
            model has it.
    """

    cache: str
    last_logits: dict[str, int]


@functools.cache
def find_options(forward: Callable[..., Any]) -> Options:
    """Return what this forward function calls its arguments."""
    names = inspect.signature(forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    return Options(find_cache_name(forward), last)


def prepare(model: Any, work: Workload, clock: Clock) -> Callable[[], Generation]:
    """Return the call that generates. It draws its tokens before the clock runs, where lack of memory is its own."""
    return lambda: generate(model, work, work.draw_tokens(model), clock)


def measure_allocated(model: Any, work: Workload) -> int:
    """Return the most bytes that torch had allocated at once, beyond those before: cache, states and logits.

    The whole context, but for its last token, is the prompt here, and one step follows. So the number is that of the
    longest cache and of the largest states. On the CPU torch's profiler tells each allocation. What kernels allocate
    outside of torch, which is a product's outputs at most, is not in it.
    """
    whole = Workload(work.batch, work.prompt + work.new - 1, 1)
    call = functools.partial(generate, model, whole, whole.draw_tokens(model), clock=float)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        call()
        return torch.cuda.max_memory_allocated(model.device) - before
    return find_peak(call)


def find_peak(call: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated on the CPU at once during a call."""
    os.environ.setdefault(*_QUIET)  # which the profiler reads when it is first used
    with profile(profile_memory=True) as profiler:
        call()
    results: Any = profiler.kineto_results
    held = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
