"""Numba's CUDA simulator, made to run many small kernels: for processes that start with NUMBA_ENABLE_CUDASIM=1."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


def prepare_simulator() -> None:
    """Keep the simulator from losing shared arrays, and let its threads take turns quickly."""
    importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared.array = find_shared_array
    if hasattr(os, "sched_setaffinity"):  # Linux. The simulated threads take turns: on several cores, four times slower
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.setswitchinterval(1e-5)  # seconds; the simulator polls its threads, and would keep them waiting for 5 ms
    warnings.simplefilter("ignore")  # NumPy's, of overflow in integers that are meant to wrap


def find_shared_array(shared: Any, shape: int, dtype: Any) -> NDArray[Any]:
    """Return a thread block's array for the line that calls this, the same one to all of its threads.

    Takes the place of the simulator's own, which looks the array up and stores a new one in two steps: threads that
    come at the same time each keep an array of their own there. dict.setdefault is one step.
    """
    caller = sys._getframe(1)
    line = caller.f_code.co_filename, caller.f_lineno
    array: NDArray[Any] = shared._allocations.setdefault(line, np.empty(shape, numba.np.numpy_support.as_dtype(dtype)))
    return array
