"""Times that can be compared: taken in turns, with the median and its interval, beside a fixed product's.

Other work on a machine slows what is measured while it runs. So calls take turns, and each is judged by the median of
its repetitions. A clock is any function that returns seconds, so that tests bring their own.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, TypeVar

import torch

from kbit.evaluation.measurement import Measurement
from kbit.evaluation.token_budget import is_out_of_memory

Clock = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)
Done = TypeVar("Done")

OUT_OF_MEMORY: Final = "oom"
_OUTSIDE: Final = 0.025  # on each side of a 95% interval
_PRODUCT: Final = 768  # rows and columns: 0.9 billion operations
_READ_BYTES: Final = 128 * 2**20  # several times the last cache of a core complex (32 MB), so that memory is read
_LEAST_SECONDS: Final = 0.005  # of one trial
_MOST_CALLS: Final = 512
_TRIALS: Final = 3


def make_clock(device: torch.device | str) -> Clock:
    """Return the clock of a device. That of a GPU waits until the GPU is done."""
    if torch.device(device).type != "cuda":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def interleave(
    calls: Mapping[Name, Callable[[], Done]], repetitions: int
) -> tuple[dict[Name, list[Done]], dict[Name, str]]:
    """Return what each call returned in each round, and the reason of each that ran out of memory.

    All calls take turns in each round. Each round begins with the next call, so that none is always first. The first
    round, in which kernels compile and caches fill, is left out. A call that ran out of memory has a reason and no
    results.
    """
    done: dict[Name, list[Done]] = {name: [] for name in calls}
    reasons: dict[Name, str] = {}
    order = list(calls.items())
    for repetition in range(-1, repetitions):
        for name, call in order:
            if name not in reasons:
                result = attempt(call)
                if result is None:
                    reasons[name] = OUT_OF_MEMORY
                elif repetition >= 0:
                    done[name].append(result)
        order = [*order[1:], *order[:1]]
    return {name: results for name, results in done.items() if name not in reasons}, reasons


def attempt(call: Callable[[], Done]) -> Done | None:
    """Return what a call returns, or None if memory runs out."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # This stands after the except block, whose error holds the frames of the call and so its tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def measure_median(task: str, metric: str, values: Sequence[float]) -> Measurement:
    """Return the median with the distribution-free 95% interval of its order statistics (the sign test's).

    The interval from the (r + 1)th smallest to the (r + 1)th largest of n values holds the median with probability
    1 - 2 P[Binomial(n, 1/2) <= r]. r is the largest for which that is 95% or more. Fewer than 6 values have none: NaN.
    """
    ordered, n = sorted(values), len(values)
    tail, cut = 0.0, -1
    while (tail := tail + math.comb(n, cut + 1) / 2**n) <= _OUTSIDE:
        cut += 1
    low, high = (math.nan, math.nan) if cut < 0 else (ordered[cut], ordered[n - 1 - cut])
    return Measurement(task, metric, median(ordered), low, high, n)


@dataclass(frozen=True)
class Ceilings:
    """What a machine does now in two fixed pieces of work, which a model's own kernels and dtypes may exceed.

    Attributes:
        gigaflops: 10^9 operations per second in a product of float32 matrices with 768 rows and columns.
        gigabytes_per_second: 10^9 bytes per second of 128 MB that are read. Larger caches hold part of them.
    """

    gigaflops: float
    gigabytes_per_second: float


def measure_ceilings(device: torch.device | str, clock: Clock) -> Ceilings:
    """Return the speeds of a device, by the fastest of a few trials of fixed work."""
    a, b = torch.full((2, _PRODUCT, _PRODUCT), 0.5, device=device)
    read = torch.ones(_READ_BYTES // 4, device=device)
    product = min(_time(functools.partial(torch.mm, a, b), clock) for _ in range(_TRIALS))
    reading = min(_time(functools.partial(torch.sum, read), clock) for _ in range(_TRIALS))
    return Ceilings(2 * _PRODUCT**3 / product / 1e9, read.nbytes / reading / 1e9)


def _time(call: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of a call, of so many in a row that a clock with pauses, as a card's, tells them well."""
    calls = 1
    while True:
        start = clock()
        for _ in range(calls):
            call()
        seconds = clock() - start
        if seconds >= _LEAST_SECONDS or calls >= _MOST_CALLS:
            return seconds / calls
        calls *= 8
