"""The host's side of kbit.kernels.cuda: arrays as words, tables on the device, launches on torch's stream."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from numba import cuda
from numpy.typing import NDArray

from kbit.kernels.cuda_device import BFLOAT16, FLOAT16, FLOAT32, MOST_THREADS, SIMULATED, mix_seed

DeviceArray = Any  # see the module's docstring. Annotations below give its shape in words
Codebook = Float32[np.ndarray, " values"]
Thresholds = Float32[np.ndarray, " thresholds"]

KINDS = {"float32": FLOAT32, "float16": FLOAT16, "uint16": BFLOAT16}
WORD_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes

THREADS_PER_BLOCK = 256
GROUP_WORDS = 4  # words that a thread of a group holds at most: loads in flight together, and few registers
_BLOCKS_PER_SM = 32  # several times what is resident, so that the last wave is a small part of all


class Layout(NamedTuple):
    """Where the blocks of an array lie, counted in words: see plan_words."""

    kind: int
    lanes: int  # values in a word
    n: int
    row: int
    block: int
    shift: int  # log2 of block if word // block is the block and that is a power of two, else -1
    blocks: int


def require_device() -> None:
    """Raise RuntimeError unless there is a GPU, or the simulator stands in for it."""
    if not SIMULATED and not cuda.is_available():
        raise RuntimeError(
            "kbit.kernels.cuda needs a CUDA device and driver, and numba finds none: use kbit.kernels.cpu"
        )


@contextlib.contextmanager
def device_of(x: DeviceArray, *others: DeviceArray) -> Iterator[None]:
    """Make the tensor's GPU the current one, for torch and for numba. Leave it as it is for other arrays.

    Arrays become numba's within this block alone: numba asks the current GPU for their memory.

    Raises:
        TypeError: a tensor is in the CPU's memory.
        ValueError: tensors are on several devices. A kernel would read an address that its GPU does not have.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        yield
        return
    devices = {array.device for array in (x, *others) if isinstance(array, torch.Tensor)}
    found = ", ".join(sorted(map(str, devices)))
    if not all(device.type == "cuda" for device in devices):
        raise TypeError(f"kbit.kernels.cuda takes arrays in a GPU's memory, not on device {found}")
    if len(devices) > 1:
        raise ValueError(f"kbit.kernels.cuda takes arrays of one device, not of {found}: move them to {x.device}")
    with torch.cuda.device(x.device), cuda.gpus[x.device.index]:
        yield


def plan_words(x: DeviceArray, row: int, block_size: int, *values: DeviceArray, codes: DeviceArray = None) -> Layout:
    """Choose the words for x (and other values, and codes) so that they are aligned and none belongs to two blocks."""
    view = as_numba(x)
    kind, lanes, n, block = KINDS[str(view.dtype)], 8 // view.dtype.itemsize, view.size, min(block_size, row)
    aligned = all(_address(array) % 8 == 0 for array in (x, *values))
    aligned &= codes is None or _address(codes) % lanes == 0
    if n == 0:
        return Layout(kind, 1, 0, 1, 1, 0, 0)
    if row % block == 0:
        row = n  # the blocks of all rows follow each other
    if not aligned or n % lanes or row % lanes or block % lanes:
        lanes = 1
    n, row, block = n // lanes, row // lanes, block // lanes
    power = row == n and block & (block - 1) == 0
    return Layout(kind, lanes, n, row, block, block.bit_length() - 1 if power else -1, n // row * divide_up(row, block))


def as_numba(x: DeviceArray, dtype: Any = None) -> Any:
    """Return the array as numba's own, its memory as numbers of this dtype, without waiting for its stream.

    Raises:
        ValueError: the address is no multiple of a number's bytes. A GPU would end the process' use of it.
    """
    if dtype is not None and _address(x) % np.dtype(dtype).itemsize:
        name = np.dtype(dtype).name
        raise ValueError(f"an array at address {_address(x):#x} cannot be read as {name}: copy it, x.clone()")
    if isinstance(x, np.ndarray) and SIMULATED:
        return x.view(dtype or x.dtype)
    array = cuda.as_cuda_array(x.detach() if hasattr(x, "detach") else x, sync=False)
    return array if dtype is None else array.view(dtype)


def as_words(x: DeviceArray, layout: Layout) -> Any:
    return as_numba(x, WORD_TYPES[layout.lanes * (4 if layout.kind == FLOAT32 else 2)])


def _address(x: DeviceArray) -> int:
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.__cuda_array_interface__["data"][0])


def count_values(x: DeviceArray) -> int:
    return int(x.numel() if hasattr(x, "numel") else x.size)


def new_array(like: DeviceArray, n: int, dtype: str) -> DeviceArray:
    """Return a new array of the same kind (torch tensor, numba array) on the same device."""
    if isinstance(like, np.ndarray):
        return np.empty(n, dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(n, dtype=getattr(torch, dtype), device=like.device)
    return cuda.device_array(n, dtype)


def count_steps(codebook: Codebook) -> int:
    """Return the bits of a code."""
    return int(codebook.size - 1).bit_length()


def mix_key(seed: int | None) -> np.uint64:
    """Return the mixed seed: see kbit.numerics.reference.uniform."""
    with np.errstate(over="ignore"):
        return np.uint64(0) if seed is None else mix_seed(np.uint64(seed))


def place_table(codebook: Codebook, thresholds: Thresholds | None = None) -> Any:
    """Return thresholds and codebook on the current device, as the kernels want them. The last few stay there."""
    device = 0 if SIMULATED else cuda.current_context().device.id
    return _device_table(codebook.tobytes(), b"" if thresholds is None else thresholds.tobytes(), device)


@functools.lru_cache(maxsize=64)
def _device_table(codebook_bytes: bytes, thresholds_bytes: bytes, device: int) -> Any:
    """Fill 2^k places with NaN and, from the second on, the thresholds, then 2^k with the codebook (last repeated)."""
    codebook, thresholds = np.frombuffer(codebook_bytes, np.float32), np.frombuffer(thresholds_bytes, np.float32)
    half = 1 << count_steps(codebook)
    table: NDArray[np.float32] = np.full(2 * half, np.nan, np.float32)
    table[1 : 1 + thresholds.size] = thresholds
    table[half:] = codebook[-1]
    table[half : half + codebook.size] = codebook
    if SIMULATED:
        return table
    device_table = cuda.to_device(table)
    cuda.default_stream().synchronize()  # the copy may be under way there, and torch's streams do not wait for it
    return device_table


def group_size(block: int) -> int:
    """Return how many threads, a power of two, share a block of so many words. They read 64 bytes or more together."""
    wanted = max(min(block, 8), divide_up(block, GROUP_WORDS))
    return min(1 << (wanted - 1).bit_length(), MOST_THREADS)


def launch_groups(kernel: Any, group: int, blocks: int, *args: Any) -> None:
    """Start a kernel in which a group of threads handles a block."""
    launch(kernel, blocks * group, *args, threads=max(group, thread_count()))


def launch(kernel: Any, tasks: int, *args: Any, threads: int | None = None) -> None:
    """Start a kernel on torch's current stream. Its threads loop, so the grid need not cover the tasks.

    Without tasks nothing starts, since a GPU refuses an empty grid. A GPU reports what goes wrong in a kernel at any
    later call, of torch's too. If CUDA_LAUNCH_BLOCKING is 1, this waits for the kernel, and the error names it.
    """
    if not tasks:
        return
    threads = threads or thread_count()
    grid, stream = min(divide_up(tasks, threads), _largest_grid()), _current_stream()
    with warnings.catch_warnings():  # numba advises against small grids, but a small tensor has no other
        warnings.filterwarnings("ignore", message="Grid size .* will likely")
        launcher = kernel[grid, threads, stream]
    is_blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1" and not SIMULATED
    try:
        launcher(*args)
        if is_blocking:
            stream.synchronize()
    except Exception as error:
        name = f"kbit's CUDA kernel {kernel.__name__} ({grid} x {threads} threads)"
        cause = "failed" if is_blocking else "or one before it failed: CUDA_LAUNCH_BLOCKING=1 tells which"
        error.add_note(f"{name} {cause}")
        raise


def thread_count() -> int:
    return 8 if SIMULATED else THREADS_PER_BLOCK  # a simulated thread is a thread of the CPU


def _largest_grid() -> int:
    return 2 if SIMULATED else _BLOCKS_PER_SM * cuda.get_current_device().MULTIPROCESSOR_COUNT


def _current_stream() -> Any:
    """Return torch's current stream, or the default one without torch.

    Torch's default stream is the legacy one, also where numba is told to take a stream of each thread for its own.
    """
    if SIMULATED:
        return 0
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return cuda.default_stream()
    return _find_stream(torch.cuda.current_stream().cuda_stream)


@functools.lru_cache(maxsize=64)
def _find_stream(handle: int) -> Any:
    """Return numba's object for a stream, the same one each time: numba keeps what a launch needs by it."""
    return cuda.external_stream(handle) if handle else cuda.legacy_default_stream()


def divide_up(a: int, b: int) -> int:
    return -(-a // b)
