"""Where a tensor is quantized: on its own device, by that device's kernels, which have the same names on each.

A tensor's values and codes stay where they are. The scales of blocks and the codebook, which are small, are chosen on
the CPU in NumPy and travel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from kbit.kernels import cpu

DeviceArray = Any  # what a device's kernels take: a NumPy array on the CPU, a torch tensor on a GPU


@dataclass(frozen=True)
class Backend:
    """A device's kernels, and how arrays get to and from them.

    Attributes:
        device: the device that holds the values.
        kernels: the module kbit.kernels.cpu or kbit.kernels.cuda.
        is_gpu: whether it is the latter, which has fake_quantize_absmax and estimates quantile codebooks.
    """

    device: torch.device
    kernels: Any
    is_gpu: bool

    def view(self, flat: torch.Tensor) -> DeviceArray:
        """Return the memory of a flat tensor as the kernels take it. They take bfloat16 as its bits, uint16."""
        words = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
        return words.numpy() if self.device.type == "cpu" else words

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an empty tensor of float32, float16 or bfloat16 for a result.

        On the CPU, NumPy gets the memory. It asks for huge pages, which torch does not, and a fresh 64 MB tensor is
        filled three times faster.
        """
        if self.device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        words = torch.from_numpy(np.empty(tuple(shape), np.float32 if dtype == torch.float32 else np.uint16))
        return words.view(dtype)

    def put(self, array: NDArray[Any]) -> DeviceArray:
        """Return the array on the device."""
        return array if self.device.type == "cpu" else torch.tensor(array, device=self.device)

    def get(self, array: DeviceArray) -> NDArray[Any]:
        """Return the array on the CPU, when a GPU has computed it."""
        result: NDArray[Any] = array if isinstance(array, np.ndarray) else array.cpu().numpy()
        return result

    def as_tensor(self, array: DeviceArray) -> torch.Tensor:
        """Return what a kernel made as a tensor, in the same memory."""
        return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def choose_backend(device: torch.device) -> Backend:
    """Return the backend of a device.

    Raises:
        ValueError: a device without kernels. Nothing is moved to another device silently.
        ImportError: a GPU without numba-cuda (the extra kbit[cuda]).
        RuntimeError: a GPU that numba does not find.
    """
    match device.type:
        case "cpu":
            return Backend(device, cpu, is_gpu=False)
        case "cuda":
            cuda = import_module("kbit.kernels.cuda")  # on first use: without the extra the CPU's work as well
            cuda.require_device()
            return Backend(device, cuda, is_gpu=True)
        case _:
            raise ValueError(f"device {device} has no kernels: quantize on cpu or cuda, x.to('cpu')")


_LAUNCH: Final = threading.RLock()  # numba's workqueue of threads, where there is no OpenMP, serves one at a time
_first_process: list[int] = []  # the process in which a kernel ran first


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Run numba kernels on as many threads as torch uses, and leave torch's number as it was.

    Both use the same OpenMP runtime, and numba sets its thread count there at each launch: without this a model would
    compute on other threads after its first quantization than before, and sums differ in the last digits. Python's
    threads take turns.

    Raises:
        RuntimeError: this process was forked from one in which kernels ran. GNU's OpenMP would end it.
    """
    _check_process()
    with _LAUNCH:
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def _check_process() -> None:
    if not _first_process:
        _first_process.append(os.getpid())
    if _first_process[0] != os.getpid() and numba.threading_layer() == "omp":
        raise RuntimeError(
            f"process {os.getpid()} was forked from one in which kbit's kernels ran, whose threads it lacks: start it "
            "by multiprocessing's spawn or forkserver, or quantize in the new process alone"
        )
