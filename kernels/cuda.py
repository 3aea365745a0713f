"""Quantization kernels for NVIDIA GPUs: numba.cuda, the same functions as kbit.kernels.cpu, on device arrays.

A device array is anything with __cuda_array_interface__, one-dimensional and contiguous, such as a torch tensor;
bfloat16 comes as its bits, tensor.view(torch.uint16). Codebook and thresholds are small NumPy arrays. Kernels go to
torch's current stream and nothing here waits for them. In numba's simulator (NUMBA_ENABLE_CUDASIM=1) NumPy arrays take
the place of device arrays.

How it maps to the hardware. Quantization does little arithmetic for each byte it moves, so memory decides:

* Words. A thread reads and writes 64 bits at a time, four 16-bit values or two float32, and neighbouring threads
  neighbouring words, so that a warp's request is whole cache lines. If a block, a row or an address is no multiple of
  a word, a word is one value (`lanes` = 1): the same code, slower. Hence no word belongs to two blocks.
* Codes. Thresholds and codebook lie in shared memory, 2^k entries each. The code of v, the number of thresholds <= v,
  is found bit by bit from the top: k loads, no branches, so that the threads of a warp stay together. Missing
  thresholds are NaN, which no v passes.
* Fused. fake_quantize_absmax reads and writes each weight once. A group of threads, part of a warp for short blocks and
  a thread block for long ones, keeps a block in registers: it finds the maximum by shuffles, rounds it to the scale's
  format, and quantizes what it holds. Blocks of more than MAX_FUSED_BLOCK take two passes.
* Exactness. Multiplication, addition and division are the correctly rounded instructions and are never contracted into
  a fused multiply-add, so results equal kbit.reference bit for bit.

Word width, bits and group size are constants of a kernel: the _make_ functions compile one for each combination in use.
Primitives (below) state each hardware operation and what it means in NumPy, which is what the simulator runs.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from numba import config, cuda, types
from numba.cuda import libdevice
from numpy.typing import NDArray

_SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])  # numba reads NUMBA_ENABLE_CUDASIM when it is imported

DeviceArray = Any  # see the module's docstring; annotations below give its shape in words
Codebook = Float32[np.ndarray, " values"]
Thresholds = Float32[np.ndarray, " thresholds"]

_FLOAT32, _FLOAT16, _BFLOAT16 = 0, 1, 2
_KINDS = {"float32": _FLOAT32, "float16": _FLOAT16, "uint16": _BFLOAT16}
_WORD_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes

# kind, smallest positive and largest number of each scale format: kbit.scales
_SCALE_FORMATS = {
    "fp32": (_FLOAT32, np.float32(2.0**-149), np.float32(3.4028234663852886e38)),
    "fp16": (_FLOAT16, np.float32(2.0**-24), np.float32(65504.0)),
    "bf16": (_BFLOAT16, np.float32(2.0**-133), np.float32(3.3895313892515355e38)),
}

_THREADS_PER_BLOCK = 256
_MOST_THREADS = 1024  # of a thread block, by the hardware
_GROUP_WORDS = 4  # words that a thread of a group holds at most: loads in flight together, and few registers
_BLOCKS_PER_SM = 32  # several times what is resident, so that the last wave is a small part of all

MAX_FUSED_BLOCK = _GROUP_WORDS * _MOST_THREADS  # elements, where a word is one value

_NAN = np.float32(np.nan)
_NAN_WORD = np.uint64(0xFFFFFFFFFFFFFFFF)  # NaN in each of the formats
_ALL_BITS = np.uint32(0xFFFFFFFF)
_SIGN_BIT = np.uint32(0x80000000)


class _Layout(NamedTuple):
    """Where the blocks of an array lie, counted in words: see _plan."""

    kind: int
    lanes: int  # values in a word
    n: int
    row: int
    block: int
    shift: int  # log2 of block if word // block is the block and that is a power of two, else -1
    blocks: int


# ---- what is called ----


def block_extremes(x: DeviceArray, row: int, block_size: int) -> tuple[DeviceArray, DeviceArray]:
    """Return the least and the largest value of each block, float32; NaN or Inf where a block holds one.

    Many thread blocks share a block longer than MAX_FUSED_BLOCK: the extremes of its pieces first, then of those.
    """
    _require_device()
    block_size = min(block_size, row)
    if block_size > MAX_FUSED_BLOCK and (block_size == row or block_size % MAX_FUSED_BLOCK == 0):
        low, high = block_extremes(x, row, MAX_FUSED_BLOCK)
        pieces, in_block = _divide_up(row, MAX_FUSED_BLOCK), _divide_up(block_size, MAX_FUSED_BLOCK)
        return block_extremes(low, pieces, in_block)[0], block_extremes(high, pieces, in_block)[1]
    with _device_of(x):
        layout = _plan(x, row, block_size)
        low, high = _empty(x, layout.blocks, "float32"), _empty(x, layout.blocks, "float32")
        group = min(_group_size(layout.block), _THREADS_PER_BLOCK)  # it loops: fewer threads may use more registers
        kernel = _make_extremes(layout.kind, layout.lanes, group)
        _launch_groups(
            kernel, group, layout.blocks, _words(x, layout), *layout[2:5], layout.blocks, _view(low), _view(high)
        )
    return low, high


def quantize(
    x: DeviceArray,
    scales: DeviceArray,
    offsets: DeviceArray,
    codebook: Codebook,
    thresholds: Thresholds,
    row: int,
    block_size: int,
    seed: int | None = None,
) -> DeviceArray:
    """Return the code of each value, uint8. See kbit.reference.quantize."""
    _require_device()
    with _device_of(x):
        codes = _empty(x, _size(x), "uint8")
        layout = _plan(x, row, block_size, codes=codes)
        kernel = _make_encode(layout.kind, layout.lanes, _steps(codebook), seed is not None)
        _launch(
            kernel, layout.n, _words(x, layout), _view(scales), _view(offsets), _table(codebook, thresholds),
            codebook.size - 1, _key(seed), *layout[2:6], _view(codes, _WORD_TYPES[layout.lanes]),
        )  # fmt: skip
    return codes


def dequantize(
    codes: DeviceArray,
    scales: DeviceArray,
    offsets: DeviceArray,
    codebook: Codebook,
    row: int,
    block_size: int,
    out: DeviceArray,
) -> DeviceArray:
    """Fill out with codebook[code] * scale + offset. See kbit.reference.dequantize."""
    _require_device()
    with _device_of(out):
        layout = _plan(out, row, block_size, codes=codes)
        kernel = _make_decode(layout.kind, layout.lanes, _steps(codebook))
        _launch(
            kernel, layout.n, _view(codes, _WORD_TYPES[layout.lanes]), _view(scales), _view(offsets), _table(codebook),
            *layout[2:6], _words(out, layout),
        )  # fmt: skip
    return out


def fake_quantize(
    x: DeviceArray,
    scales: DeviceArray,
    offsets: DeviceArray,
    codebook: Codebook,
    thresholds: Thresholds,
    row: int,
    block_size: int,
    seed: int | None,
    out: DeviceArray,
) -> DeviceArray:
    """Fill out with dequantize(quantize(x)), without an array of codes. See kbit.reference.fake_quantize."""
    _require_device()
    with _device_of(x):
        layout = _plan(x, row, block_size, out)
        kernel = _make_encode_decode(layout.kind, layout.lanes, _steps(codebook), seed is not None)
        _launch(
            kernel, layout.n, _words(x, layout), _view(scales), _view(offsets), _table(codebook, thresholds),
            codebook.size - 1, _key(seed), *layout[2:6], _words(out, layout),
        )  # fmt: skip
    return out


def fake_quantize_absmax(
    x: DeviceArray,
    codebook: Codebook,
    thresholds: Thresholds,
    row: int,
    block_size: int,
    scale_format: str,
    out: DeviceArray,
) -> DeviceArray:
    """Fill out with fake_quantize(x) for normalization=absmax and offsets 0, without scales from outside.

    The scale is the block's largest |x| rounded to scale_format (fp16, bf16 or fp32) as kbit.scales does. A block that
    holds NaN or Inf, or whose maximum is beyond the format's range, becomes NaN throughout; nothing is raised, since
    the CPU would have to wait for the result.

    Raises:
        ValueError: another scale_format.
    """
    _require_device()
    if scale_format not in _SCALE_FORMATS:
        raise ValueError(f"scale_format={scale_format!r} is not one of: {', '.join(_SCALE_FORMATS)}")
    scale_arguments = _SCALE_FORMATS[scale_format]
    block_size = min(block_size, row)
    if block_size > MAX_FUSED_BLOCK:
        scales, high = block_extremes(x, row, block_size)
        with _device_of(x):
            offsets, blocks = high, _size(scales)  # the kernel turns the extremes into scales and zeros
            _launch(_make_absmax_scales(), blocks, blocks, *scale_arguments, _view(scales), _view(offsets))
        return fake_quantize(x, scales, offsets, codebook, thresholds, row, block_size, None, out)
    with _device_of(x):
        layout = _plan(x, row, block_size, out)
        group = _group_size(layout.block)
        kernel = _make_absmax(layout.kind, layout.lanes, _steps(codebook), group, _divide_up(layout.block, group))
        _launch_groups(
            kernel, group, layout.blocks, _words(x, layout), _table(codebook, thresholds), *scale_arguments,
            *layout[2:5], layout.blocks, _words(out, layout),
        )  # fmt: skip
    return out


def pack(codes: DeviceArray, bits: int) -> DeviceArray:
    """Write the codes one after the other, bits each. See kbit.reference.pack."""
    _require_device()
    with _device_of(codes):
        n = _size(codes)
        packed = _empty(codes, _divide_up(n * bits, 8), "uint8")
        _launch(_make_pack(), _divide_up(n, 8), _view(codes), bits, n, _view(packed))
    return packed


def unpack(packed: DeviceArray, bits: int, n: int) -> DeviceArray:
    """Return the n codes that pack wrote. See kbit.reference.unpack."""
    _require_device()
    with _device_of(packed):
        codes = _empty(packed, n, "uint8")
        _launch(_make_unpack(), _divide_up(n, 8), _view(packed), bits, n, _view(codes))
    return codes


# ---- arrays and launches ----


def _require_device() -> None:
    """Raise RuntimeError unless there is a GPU, or the simulator stands in for it."""
    if not _SIMULATED and not cuda.is_available():
        raise RuntimeError(
            "kbit.kernels.cuda needs a CUDA device and driver, and numba finds none: use kbit.kernels.cpu"
        )


@contextlib.contextmanager
def _device_of(x: DeviceArray) -> Iterator[None]:
    """Make the tensor's GPU the current one, for torch and for numba; leave it as it is for other arrays."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        yield
        return
    if not x.is_cuda:
        raise TypeError(f"kbit.kernels.cuda takes arrays in a GPU's memory, not on device {x.device}")
    with torch.cuda.device(x.device), cuda.gpus[x.device.index]:
        yield


def _plan(x: DeviceArray, row: int, block_size: int, *values: DeviceArray, codes: DeviceArray = None) -> _Layout:
    """Choose the words for x (and other values, and codes) so that they are aligned and none belongs to two blocks."""
    view = _view(x)
    kind, lanes, n, block = _KINDS[str(view.dtype)], 8 // view.dtype.itemsize, view.size, min(block_size, row)
    aligned = all(_address(array) % 8 == 0 for array in (x, *values))
    aligned &= codes is None or _address(codes) % lanes == 0
    if row % block == 0:
        row = n  # the blocks of all rows follow each other
    if not aligned or n % lanes or row % lanes or block % lanes:
        lanes = 1
    n, row, block = n // lanes, row // lanes, block // lanes
    power = row == n and block & (block - 1) == 0
    return _Layout(
        kind, lanes, n, row, block, block.bit_length() - 1 if power else -1, n // row * _divide_up(row, block)
    )


def _view(x: DeviceArray, dtype: Any = None) -> Any:
    """Return the array as numba's own, its memory as numbers of this dtype, without waiting for its stream."""
    if isinstance(x, np.ndarray) and _SIMULATED:
        return x.view(dtype or x.dtype)
    array = cuda.as_cuda_array(x.detach() if hasattr(x, "detach") else x, sync=False)
    return array if dtype is None else array.view(dtype)


def _words(x: DeviceArray, layout: _Layout) -> Any:
    return _view(x, _WORD_TYPES[layout.lanes * (4 if layout.kind == _FLOAT32 else 2)])


def _address(x: DeviceArray) -> int:
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.__cuda_array_interface__["data"][0])


def _size(x: DeviceArray) -> int:
    return int(_view(x).size)


def _empty(like: DeviceArray, n: int, dtype: str) -> DeviceArray:
    """Return a new array of the same kind (torch tensor, numba array) on the same device."""
    if isinstance(like, np.ndarray):
        return np.empty(n, dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(n, dtype=getattr(torch, dtype), device=like.device)
    return cuda.device_array(n, dtype)


def _steps(codebook: Codebook) -> int:
    """Return the bits of a code."""
    return int(codebook.size - 1).bit_length()


def _key(seed: int | None) -> np.uint64:
    """Return the mixed seed: see kbit.reference.uniform."""
    with np.errstate(over="ignore"):
        return np.uint64(0) if seed is None else _mix_seed(np.uint64(seed))


def _table(codebook: Codebook, thresholds: Thresholds | None = None) -> Any:
    """Return thresholds and codebook on the current device, as the kernels want them; the last few stay there."""
    device = 0 if _SIMULATED else cuda.current_context().device.id
    return _device_table(codebook.tobytes(), b"" if thresholds is None else thresholds.tobytes(), device)


@functools.lru_cache(maxsize=64)
def _device_table(codebook_bytes: bytes, thresholds_bytes: bytes, device: int) -> Any:
    """Fill 2^k places with NaN and, from the second on, the thresholds; then 2^k with the codebook (last repeated)."""
    codebook, thresholds = np.frombuffer(codebook_bytes, np.float32), np.frombuffer(thresholds_bytes, np.float32)
    half = 1 << _steps(codebook)
    table: NDArray[np.float32] = np.full(2 * half, np.nan, np.float32)
    table[1 : 1 + thresholds.size] = thresholds
    table[half:] = codebook[-1]
    table[half : half + codebook.size] = codebook
    return table if _SIMULATED else cuda.to_device(table)


def _group_size(block: int) -> int:
    """Return how many threads share a block of this many words: a power of two; at least 64 bytes are read together."""
    wanted = max(min(block, 8), _divide_up(block, _GROUP_WORDS))
    return min(1 << (wanted - 1).bit_length(), _MOST_THREADS)


def _launch_groups(kernel: Any, group: int, blocks: int, *args: Any) -> None:
    """Start a kernel in which a group of threads handles a block."""
    _launch(kernel, blocks * group, *args, threads=max(group, _thread_count()))


def _launch(kernel: Any, tasks: int, *args: Any, threads: int | None = None) -> None:
    """Start a kernel on torch's current stream; its threads loop, so that the grid need not cover the tasks."""
    threads = threads or _thread_count()
    grid = min(_divide_up(tasks, threads), _largest_grid())
    with warnings.catch_warnings():  # numba advises against small grids; a small tensor has no other
        warnings.filterwarnings("ignore", message="Grid size .* will likely")
        launcher = kernel[grid, threads, _current_stream()]
    launcher(*args)


def _thread_count() -> int:
    return 8 if _SIMULATED else _THREADS_PER_BLOCK  # a simulated thread is a thread of the CPU


def _largest_grid() -> int:
    return 2 if _SIMULATED else _BLOCKS_PER_SM * cuda.get_current_device().MULTIPROCESSOR_COUNT


def _current_stream() -> Any:
    """Return torch's current stream, or the default one without torch."""
    torch = sys.modules.get("torch")
    handle = torch.cuda.current_stream().cuda_stream if torch is not None and torch.cuda.is_available() else 0
    return cuda.external_stream(handle) if handle else 0


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


# ---- primitives: the hardware's operations, and their meaning in NumPy ----


def _device(function: Any) -> Any:
    """Compile the function for the device; simulated kernels call it as it is, which is much faster."""
    return function if _SIMULATED else cuda.jit(device=True)(function)


def _primitive(in_numpy: Any) -> Any:
    """Compile the function for the device; the simulator gets in_numpy instead."""
    return (lambda function: in_numpy) if _SIMULATED else _device


@_primitive(lambda a, b: np.float32(a) + np.float32(b))
def _add(a, b):
    return libdevice.fadd_rn(a, b)


@_primitive(lambda a, b: np.float32(a) - np.float32(b))
def _subtract(a, b):
    return libdevice.fsub_rn(a, b)


@_primitive(lambda a, b: np.float32(a) * np.float32(b))
def _multiply(a, b):
    return libdevice.fmul_rn(a, b)


@_primitive(lambda a, b: np.float32(a) / np.float32(b))
def _divide(a, b):
    return libdevice.fdiv_rn(a, b)


@_primitive(lambda bits: np.uint32(bits).view(np.float32))
def _as_float(bits):
    return libdevice.int_as_float(np.int32(bits))


@_primitive(lambda value: np.float32(value).view(np.uint32))
def _as_bits(value):
    return np.uint32(libdevice.float_as_int(value))


@_primitive(lambda half: np.float32(np.uint16(half).view(np.float16)))
def _half_to_float(half):
    return libdevice.half2float(np.int16(half))


@_primitive(lambda value: np.float32(value).astype(np.float16).view(np.uint16))
def _float_to_half(value):
    return np.uint16(libdevice.float2half_rn(value))


_EXCHANGE = np.zeros(_MOST_THREADS if _SIMULATED else 0, np.uint32)


def _simulated_shuffle(value, distance):
    """The simulator has no shuffles and runs one thread block at a time: exchange through memory, between barriers."""
    _EXCHANGE[cuda.threadIdx.x] = value
    cuda.syncthreads()
    value = _EXCHANGE[cuda.threadIdx.x ^ distance]
    cuda.syncthreads()
    return value


@_primitive(_simulated_shuffle)
def _shuffle(value, distance):
    """Return the value of the thread at this distance (xor) in the warp; all threads of the warp must call it."""
    return np.uint32(cuda.shfl_xor_sync(0xFFFFFFFF, np.int32(value), distance))


# ---- device functions: one word, one value ----


@_device
def _get_value(word, lane, kind):
    """Value number `lane` of a word, as float32."""
    if kind == _FLOAT32:
        return _as_float(np.uint32((word >> np.uint64(32 * lane)) & np.uint64(0xFFFFFFFF)))
    half = np.uint32((word >> np.uint64(16 * lane)) & np.uint64(0xFFFF))
    if kind == _FLOAT16:
        return _half_to_float(half)
    return _as_float(np.uint32(half << np.uint32(16)))


@_device
def _to_bits(value, kind):
    """Bits of a float32 rounded to the kind, to nearest, ties to even."""
    if kind == _FLOAT32:
        return np.uint64(_as_bits(value))
    if kind == _FLOAT16:
        return np.uint64(_float_to_half(value))
    bits = _as_bits(value)
    return np.uint64(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_device
def _find_code(v, table, steps):
    """The number of thresholds <= v; table[j] is threshold j - 1."""
    code = np.uint32(0)
    for step in range(steps):
        probe = np.uint32(code | np.uint32(1 << (steps - 1 - step)))
        code = probe if v >= table[probe] else code
    return code


@_device
def _round_up_at_random(v, code, table, steps, top, key, index):
    """Stochastic rounding: from the value below, up by one with the probability that makes it unbiased."""
    below = table[np.uint32((1 << steps) + code)]
    above = table[np.uint32((1 << steps) + min(np.int64(code) + 1, top))]
    share = _divide(_subtract(v, below), _subtract(above, below))
    bits = _mix(np.uint64(index) * np.uint64(0x9E3779B97F4A7C15) + key) >> np.uint64(40)
    uniform = _multiply(np.float32(np.uint32(bits)), np.float32(2.0**-24))
    return np.uint32(code + 1) if above > below and share > uniform else code


def _mix_seed(z):
    """The finalizer of splitmix64. See kbit.reference.uniform."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_mix = _device(_mix_seed)


@_device
def _encode(word, scale, offset, table, kind, lanes, steps, stochastic, top, key, index):
    """Codes of a word's values, 8 bits each; the word's first value is number index * lanes of the array."""
    codes = np.uint64(0)
    for lane in range(lanes):
        v = _divide(_subtract(_get_value(word, lane, kind), offset), scale)
        v = v if scale != np.float32(0) else np.float32(0)
        code = _find_code(v, table, steps)
        if stochastic:
            code = _round_up_at_random(v, code, table, steps, top, key, index * lanes + lane)
        codes |= np.uint64(code) << np.uint64(8 * lane)
    return codes


@_device
def _decode(codes, scale, offset, table, kind, lanes, steps):
    """The word of values that the codes stand for; NaN where the scale is."""
    word = np.uint64(0)
    for lane in range(lanes):
        code = (codes >> np.uint64(8 * lane)) & np.uint64((1 << steps) - 1)
        value = _add(_multiply(table[np.uint32((1 << steps) + np.uint32(code))], scale), offset)
        word |= _to_bits(value, kind) << np.uint64((32 if kind == _FLOAT32 else 16) * lane)
    return word if scale == scale else _NAN_WORD


@_device
def _word_peak(word, kind, lanes):
    """The largest magnitude in a word, as bits of its kind without the sign, which order as the numbers do."""
    peak = np.uint32(0)
    for lane in range(lanes):
        if kind == _FLOAT32:
            magnitude = np.uint32((word >> np.uint64(32 * lane)) & np.uint64(0x7FFFFFFF))
        else:
            magnitude = np.uint32((word >> np.uint64(16 * lane)) & np.uint64(0x7FFF))
        peak = max(peak, magnitude)
    return peak


@_device
def _to_ordered(value):
    """An unsigned integer that orders as the floats do, NaN outside +-Inf."""
    bits = _as_bits(value)
    return np.uint32(bits ^ (_ALL_BITS if bits >= _SIGN_BIT else _SIGN_BIT))


@_device
def _from_ordered(ordered):
    return _as_float(np.uint32(ordered ^ (_SIGN_BIT if ordered >= _SIGN_BIT else _ALL_BITS)))


@_device
def _round_scale(peak, scale_kind, smallest, largest):
    """Round a block's maximum to the scale's format: never to 0 unless it is 0, NaN beyond the range."""
    scale = _get_value(_to_bits(peak, scale_kind), 0, scale_kind)
    if scale == np.float32(0) and peak > np.float32(0):
        scale = smallest
    return scale if peak <= largest else _NAN


# ---- device functions: blocks and groups of threads ----


@_device
def _block_of(i, row, block, shift):
    """The block of word i."""
    if shift >= 0:
        return i >> shift
    r = i // row
    return r * ((row + block - 1) // block) + (i - r * row) // block


@_device
def _block_span(b, n, row, block):
    """The first word of block b and the number of its words, none or less after the last block."""
    if row == n:  # the usual case, without the divisions
        start = b * block
        return start, min(block, n - start)
    per_row = (row + block - 1) // block
    in_row = (b % per_row) * block
    start = (b // per_row) * row + in_row
    return start, min(block, row - in_row, n - start)


@_device
def _group_max(value, group):
    """The largest value of a group of threads, to each of them; all threads of the thread block must call it."""
    distance = min(group, 32) // 2
    while distance > 0:
        value = max(value, _shuffle(value, distance))
        distance //= 2
    if group > 32:  # the group is the thread block
        of_warps = cuda.shared.array(32, types.uint32)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32] = value
        cuda.syncthreads()
        for warp in range(group // 32):
            value = max(value, of_warps[warp])
        cuda.syncthreads()
    return value


@_device
def _load_table(source, table):
    """Copy thresholds and codebook to shared memory."""
    i = cuda.threadIdx.x
    while i < source.size:  # a range whose step is not a constant would cost a division
        table[i] = source[i]
        i += cuda.blockDim.x
    cuda.syncthreads()


# ---- kernels ----


@functools.cache
def _make_extremes(kind: int, lanes: int, group: int) -> Any:
    """Least and largest value of each block, by a group of threads that loops over it."""

    @cuda.jit
    def extremes(words, n, row, block, blocks, low, high):
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first = cuda.blockIdx.x * groups
        while first < blocks:  # the same for all threads, as the barriers and shuffles in it need
            b = first + cuda.threadIdx.x // group
            start, count = _block_span(b, n, row, block)
            least, most = np.uint32(0), np.uint32(0)  # least: the largest complement
            for i in range(member, count, group):
                for lane in range(lanes):
                    ordered = _to_ordered(_get_value(np.uint64(words[start + i]), lane, kind))
                    least, most = max(least, np.uint32(ordered ^ _ALL_BITS)), max(most, ordered)
            least, most = _group_max(least, group), _group_max(most, group)
            if member == 0 and b < blocks:
                low[b], high[b] = _from_ordered(np.uint32(least ^ _ALL_BITS)), _from_ordered(most)
            first += cuda.gridDim.x * groups

    return extremes


@functools.cache
def _make_encode(kind: int, lanes: int, steps: int, stochastic: bool) -> Any:
    """Values to codes, word by word."""
    size = 2 << steps

    @cuda.jit
    def encode(words, scales, offsets, tables, top, key, n, row, block, shift, codes):
        table = cuda.shared.array(size, types.float32)
        _load_table(tables, table)
        i = cuda.grid(1)
        while i < n:
            b = _block_of(i, row, block, shift)
            word = np.uint64(words[i])
            codes[i] = _encode(word, scales[b], offsets[b], table, kind, lanes, steps, stochastic, top, key, i)
            i += cuda.gridsize(1)

    return encode


@functools.cache
def _make_decode(kind: int, lanes: int, steps: int) -> Any:
    """Codes to values, word by word."""
    size = 2 << steps

    @cuda.jit
    def decode(codes, scales, offsets, tables, n, row, block, shift, words):
        table = cuda.shared.array(size, types.float32)
        _load_table(tables, table)
        i = cuda.grid(1)
        while i < n:
            b = _block_of(i, row, block, shift)
            words[i] = _decode(np.uint64(codes[i]), scales[b], offsets[b], table, kind, lanes, steps)
            i += cuda.gridsize(1)

    return decode


@functools.cache
def _make_encode_decode(kind: int, lanes: int, steps: int, stochastic: bool) -> Any:
    """Values to the values that their codes stand for, word by word."""
    size = 2 << steps

    @cuda.jit
    def encode_decode(words, scales, offsets, tables, top, key, n, row, block, shift, out):
        table = cuda.shared.array(size, types.float32)
        _load_table(tables, table)
        i = cuda.grid(1)
        while i < n:
            b = _block_of(i, row, block, shift)
            scale, offset, word = scales[b], offsets[b], np.uint64(words[i])
            codes = _encode(word, scale, offset, table, kind, lanes, steps, stochastic, top, key, i)
            out[i] = _decode(codes, scale, offset, table, kind, lanes, steps)
            i += cuda.gridsize(1)

    return encode_decode


@functools.cache
def _make_absmax(kind: int, lanes: int, steps: int, group: int, held: int) -> Any:
    """The fused kernel: a group of threads holds a block in registers, `held` words each."""
    size = 2 << steps

    @cuda.jit
    def absmax(words, tables, scale_kind, smallest, largest, n, row, block, blocks, out):
        table = cuda.shared.array(size, types.float32)
        _load_table(tables, table)
        kept = cuda.local.array(held, types.uint64)  # the loops over it are unrolled, so it is registers
        member, groups = cuda.threadIdx.x % group, cuda.blockDim.x // group
        first = cuda.blockIdx.x * groups
        while first < blocks:  # the same for all threads, as the barriers and shuffles in it need
            start, count = _block_span(first + cuda.threadIdx.x // group, n, row, block)
            for j in range(held):
                i = member + j * group
                kept[j] = np.uint64(words[start + i]) if i < count else np.uint64(0)
            peak = np.uint32(0)
            for j in range(held):
                peak = max(peak, _word_peak(kept[j], kind, lanes))
            peak = _get_value(np.uint64(_group_max(peak, group)), 0, kind)
            scale, offset = _round_scale(peak, scale_kind, smallest, largest), np.float32(0)
            for j in range(held):
                codes = _encode(kept[j], scale, offset, table, kind, lanes, steps, False, 0, np.uint64(0), 0)
                i = member + j * group
                if i < count:
                    out[start + i] = _decode(codes, scale, offset, table, kind, lanes, steps)
            first += cuda.gridDim.x * groups

    return absmax


@functools.cache
def _make_absmax_scales() -> Any:
    """Scales of blocks from their extremes, in place: low becomes the scale and high the offset 0."""

    @cuda.jit
    def absmax_scales(blocks, scale_kind, smallest, largest, low, high):
        for b in range(cuda.grid(1), blocks, cuda.gridsize(1)):
            magnitude = np.uint32(0x7FFFFFFF)  # on bits, so that NaN counts as the largest
            peak = max(np.uint32(_as_bits(low[b]) & magnitude), np.uint32(_as_bits(high[b]) & magnitude))
            low[b], high[b] = _round_scale(_as_float(peak), scale_kind, smallest, largest), np.float32(0)

    return absmax_scales


@functools.cache
def _make_pack() -> Any:
    """Eight codes fill exactly `bits` bytes: the work of a thread."""

    @cuda.jit
    def pack_codes(codes, bits, n, packed):
        for eight in range(cuda.grid(1), (n + 7) // 8, cuda.gridsize(1)):
            stream = np.uint64(0)
            for i in range(8 * eight, 8 * eight + 8):
                stream = (stream << np.uint64(bits)) | np.uint64(codes[i] if i < n else 0)
            for j in range(bits):
                if eight * bits + j < packed.size:
                    packed[eight * bits + j] = (stream >> np.uint64(8 * (bits - 1 - j))) & np.uint64(0xFF)

    return pack_codes


@functools.cache
def _make_unpack() -> Any:
    """The reverse of _make_pack."""

    @cuda.jit
    def unpack_codes(packed, bits, n, codes):
        for eight in range(cuda.grid(1), (n + 7) // 8, cuda.gridsize(1)):
            stream = np.uint64(0)
            for j in range(eight * bits, eight * bits + bits):
                stream = (stream << np.uint64(8)) | np.uint64(packed[j] if j < packed.size else 0)
            for j in range(8):
                if 8 * eight + j < n:
                    codes[8 * eight + j] = (stream >> np.uint64(bits * (7 - j))) & np.uint64((1 << bits) - 1)

    return unpack_codes
