"""Where the stages of the GPU day run: a card, or the CPU with numba's simulator while the scripts are checked."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

torch_cuda: Any = torch.cuda  # partly annotated
Call = Callable[[int], Any]  # of the number of the tensor

PAUSE_CYCLES = 100_000_000  # about 50 ms: longer than it takes to queue the calls
WARM_UP = 3
PACKAGES = ("torch", "transformers", "numba", "numba-cuda", "lm-eval", "numpy", "bitsandbytes")


@dataclass(frozen=True)
class Timing:
    """How long a call takes, in microseconds: on the card, and for Python to queue it."""

    microseconds: float
    queued: float


@dataclass(frozen=True)
class Card:
    """A device and how to use it. On the CPU, streams and pauses are nothing.

    Attributes:
        device: a GPU, or the CPU in whose memory the simulator's arrays are.
    """

    device: torch.device

    @property
    def is_real(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch_cuda.get_device_name(self.device) if self.is_real else "numba's simulator"

    def make_model(self, config: transformers.PretrainedConfig, dtype: torch.dtype) -> Any:
        """Return a random causal language model, made on the device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
            return model.eval()

    def put(self, array: NDArray[Any]) -> Any:
        """Return a copy of the array as the kernels take it."""
        return torch.from_numpy(np.array(array)).to(self.device) if self.is_real else np.array(array)

    def get(self, array: Any) -> NDArray[Any]:
        result: NDArray[Any] = np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array)
        return result

    def view(self, tensor: torch.Tensor) -> Any:
        """Return the memory of a tensor as the kernels take it: bfloat16 as its bits."""
        words = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        return words if self.is_real else words.numpy()

    def list_others(self) -> list[Card]:
        """Return all cards but this one. The simulator stands in for the other, too."""
        if not self.is_real:
            return [self]
        count = torch_cuda.device_count()
        return [Card(torch.device("cuda", i)) for i in range(count) if i != self.device.index]

    def on_side_stream(self) -> AbstractContextManager[Any]:
        """Make another stream the current one, and let it wait for what is queued."""
        if not self.is_real:
            return contextlib.nullcontext()
        stream = torch_cuda.Stream(self.device)
        stream.wait_stream(torch_cuda.current_stream(self.device))
        context: AbstractContextManager[Any] = torch_cuda.stream(stream)
        return context

    def pause(self) -> None:
        """Keep the current stream busy for a while."""
        if self.is_real:
            torch_cuda._sleep(PAUSE_CYCLES)

    def wait(self) -> None:
        if self.is_real:
            torch_cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        if self.is_real:
            torch_cuda.reset_peak_memory_stats(self.device)

    def read_peak(self) -> int:
        """Return the largest number of bytes that torch's tensors took since reset_peak. It is 0 on the CPU."""
        return int(torch_cuda.max_memory_allocated(self.device)) if self.is_real else 0

    def time(self, call: Call, tensors: int, repeats: int) -> Timing:
        """Return the median times of a call, which takes the numbers of the tensors in turn.

        Calls are queued behind a pause, so that CUDA's events measure the card and not Python. On the CPU both times
        are those of the call.
        """
        for i in range(WARM_UP if self.is_real else 0):
            call(i % tensors)
        self.wait()
        if not self.is_real:
            seconds = list(_list_seconds(call, tensors, repeats))
            return Timing(1e6 * statistics.median(seconds), 1e6 * statistics.median(seconds))
        events = [[torch_cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        queued = []
        self.pause()
        for i, (start, end) in enumerate(events):
            before = time.perf_counter()
            start.record()
            call(i % tensors)
            end.record()
            queued.append(time.perf_counter() - before)
        self.wait()
        taken = [float(start.elapsed_time(end)) for start, end in events]
        return Timing(1e3 * statistics.median(taken), 1e6 * statistics.median(queued))

    def time_copy(self, n: int, dtype: torch.dtype, repeats: int) -> float:
        """Return the GB/s, read and written, at which torch copies n values."""
        tensors = [torch.ones(n, dtype=dtype, device=self.device) for _ in range(6)]
        microseconds = self.time(lambda i: tensors[i].copy_(tensors[i + 3]), 3, repeats).microseconds
        return 2 * n * dtype.itemsize / microseconds / 1000


def _list_seconds(call: Call, tensors: int, repeats: int) -> Iterator[float]:
    for i in range(repeats):
        start = time.perf_counter()
        call(i % tensors)
        yield time.perf_counter() - start


class Report:
    """The rows of a stage, in a JSON file that is whole after each row: a stage that is stopped leaves what it has."""

    def __init__(self, folder: Path, stage: str, card: Card, summarize: Callable[[list[Any]], Iterable[str]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stage}.json"
        self.header: dict[str, Any] = {"stage": stage, "device": card.name, "state": "stopped by its time limit"}
        self.header["versions"] = find_versions()
        self.summarize = summarize
        self.rows: list[dict[str, Any]] = []
        self._start = time.perf_counter()
        self._write()

    def add(self, **row: Any) -> None:
        """Keep a row, and the seconds since the start. `wrong`, if it is not empty, says what is wrong."""
        self.rows.append(row | {"at": round(time.perf_counter() - self._start, 2)})
        print(", ".join(f"{name}={_shorten(value)}" for name, value in row.items()), flush=True)
        self._write()

    def finish(self, error: str = "") -> bool:
        """Note that the stage came to its end, or which error ended it. Return whether nothing is wrong."""
        wrong = sum(bool(row.get("wrong")) for row in self.rows)
        self.header["state"] = error or (f"{wrong} wrong" if wrong else "done")
        self._write()
        return not error and not wrong

    def _write(self) -> None:
        seconds = round(time.perf_counter() - self._start, 2)
        summary = list(self.summarize(self.rows))
        record = self.header | {"seconds": seconds, "summary": summary, "rows": self.rows}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(self.path)


def _shorten(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def find_versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
