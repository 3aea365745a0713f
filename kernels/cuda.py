"""Quantization kernels for NVIDIA GPUs: numba.cuda, the same functions as kbit.kernels.cpu, on device arrays.

A device array is anything with __cuda_array_interface__, one-dimensional and contiguous, such as a torch tensor.
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
  a fused multiply-add, so results equal kbit.numerics.reference bit for bit.

Word width, bits and group size are constants of a kernel: one is compiled for each combination in use (cuda_kernels).
cuda_device has the device code, cuda_arrays what the host does around a launch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from kbit.kernels.cuda_arrays import (
    GROUP_WORDS,
    THREADS_PER_BLOCK,
    WORD_TYPES,
    Codebook,
    DeviceArray,
    Thresholds,
    as_numba,
    as_words,
    count_steps,
    count_values,
    device_of,
    divide_up,
    group_size,
    launch,
    launch_groups,
    mix_key,
    new_array,
    place_table,
    plan_words,
    require_device,
)
from kbit.kernels.cuda_device import BFLOAT16, FLOAT16, FLOAT32, MOST_THREADS
from kbit.kernels.cuda_kernels import (
    make_absmax,
    make_absmax_scales,
    make_decode,
    make_encode,
    make_encode_decode,
    make_extremes,
)

# kind, smallest positive and largest number of each scale format: kbit.numerics.scale_formats
FUSED_SCALE_FORMATS = {
    "fp32": (FLOAT32, np.float32(2.0**-149), np.float32(3.4028234663852886e38)),
    "fp16": (FLOAT16, np.float32(2.0**-24), np.float32(65504.0)),
    "bf16": (BFLOAT16, np.float32(2.0**-133), np.float32(3.3895313892515355e38)),
}

MAX_FUSED_BLOCK = GROUP_WORDS * MOST_THREADS  # elements, where a word is one value


def block_extremes(x: DeviceArray, row: int, block_size: int) -> tuple[DeviceArray, DeviceArray]:
    """Return the least and the largest value of each block, float32, NaN or Inf where a block holds one.

    Many thread blocks share a block longer than MAX_FUSED_BLOCK: the extremes of its pieces first, then of those.
    """
    require_device()
    block_size = min(block_size, row)
    if block_size > MAX_FUSED_BLOCK and (block_size == row or block_size % MAX_FUSED_BLOCK == 0):
        low, high = block_extremes(x, row, MAX_FUSED_BLOCK)
        pieces, in_block = divide_up(row, MAX_FUSED_BLOCK), divide_up(block_size, MAX_FUSED_BLOCK)
        return block_extremes(low, pieces, in_block)[0], block_extremes(high, pieces, in_block)[1]
    with device_of(x):
        layout = plan_words(x, row, block_size)
        low, high = new_array(x, layout.blocks, "float32"), new_array(x, layout.blocks, "float32")
        group = min(group_size(layout.block), THREADS_PER_BLOCK)  # it loops: fewer threads may use more registers
        kernel = make_extremes(layout.kind, layout.lanes, group)
        launch_groups(
            kernel, group, layout.blocks, as_words(x, layout), *layout[2:5], layout.blocks, as_numba(low),
            as_numba(high),
        )  # fmt: skip
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
    bits: int = 8,
) -> DeviceArray:
    """Return the code of each value, packed at `bits` each (8: one code a byte). See kbit.numerics.reference."""
    require_device()
    with device_of(x, scales, offsets):
        codes = new_array(x, count_values(x), "uint8")
        layout = plan_words(x, row, block_size, codes=codes)
        kernel = make_encode(layout.kind, layout.lanes, count_steps(codebook), seed is not None)
        launch(
            kernel, layout.n, as_words(x, layout), as_numba(scales), as_numba(offsets),
            place_table(codebook, thresholds), codebook.size - 1, mix_key(seed), *layout[2:6],
            as_numba(codes, WORD_TYPES[layout.lanes]),
        )  # fmt: skip
    return codes if bits == 8 else pack(codes, bits)


def dequantize(
    codes: DeviceArray,
    scales: DeviceArray,
    offsets: DeviceArray,
    codebook: Codebook,
    row: int,
    block_size: int,
    out: DeviceArray,
    bits: int = 8,
) -> DeviceArray:
    """Fill out with codebook[code] * scale + offset, of packed codes. See kbit.numerics.reference.dequantize."""
    require_device()
    if bits != 8:
        codes = unpack(codes, bits, count_values(out))
    with device_of(out, codes, scales, offsets):
        layout = plan_words(out, row, block_size, codes=codes)
        kernel = make_decode(layout.kind, layout.lanes, count_steps(codebook))
        launch(
            kernel, layout.n, as_numba(codes, WORD_TYPES[layout.lanes]), as_numba(scales), as_numba(offsets),
            place_table(codebook), *layout[2:6], as_words(out, layout),
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
    """Fill out with dequantize(quantize(x)), without codes. See kbit.numerics.reference.fake_quantize."""
    require_device()
    with device_of(x, scales, offsets, out):
        layout = plan_words(x, row, block_size, out)
        kernel = make_encode_decode(layout.kind, layout.lanes, count_steps(codebook), seed is not None)
        launch(
            kernel, layout.n, as_words(x, layout), as_numba(scales), as_numba(offsets),
            place_table(codebook, thresholds), codebook.size - 1, mix_key(seed), *layout[2:6], as_words(out, layout),
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
    refused: DeviceArray,
) -> DeviceArray:
    """Fill out with fake_quantize(x) for normalization=absmax and offsets 0, without scales from outside.

    The scale is the block's largest |x| rounded to scale_format (fp16, bf16 or fp32) as kbit.numerics.scale_formats
    does. A block that holds NaN or Inf, or whose maximum is beyond the format's range, becomes NaN throughout, and
    refused, uint8 [1], becomes 1. Nothing is raised, since the CPU would have to wait for the result.

    Raises:
        ValueError: another scale_format.
    """
    require_device()
    if scale_format not in FUSED_SCALE_FORMATS:
        raise ValueError(f"scale_format={scale_format!r} is not one of: {', '.join(FUSED_SCALE_FORMATS)}")
    scale_arguments = FUSED_SCALE_FORMATS[scale_format]
    block_size = min(block_size, row)
    if block_size > MAX_FUSED_BLOCK:
        scales, high = block_extremes(x, row, block_size)
        with device_of(x, refused):
            offsets, blocks = high, count_values(scales)  # the kernel turns the extremes into scales and zeros
            launch(
                make_absmax_scales(),
                blocks,
                blocks,
                *scale_arguments,
                as_numba(scales),
                as_numba(offsets),
                as_numba(refused),
            )
        return fake_quantize(x, scales, offsets, codebook, thresholds, row, block_size, None, out)
    with device_of(x, out, refused):
        layout = plan_words(x, row, block_size, out)
        group = group_size(layout.block)
        kernel = make_absmax(layout.kind, layout.lanes, count_steps(codebook), group, divide_up(layout.block, group))
        launch_groups(
            kernel, group, layout.blocks, as_words(x, layout), place_table(codebook, thresholds), *scale_arguments,
            *layout[2:5], layout.blocks, as_words(out, layout), as_numba(refused),
        )  # fmt: skip
    return out


def pack(codes: DeviceArray, bits: int) -> DeviceArray:
    """Write the codes one after the other, bits each. See kbit.numerics.reference.pack."""
    require_device()
    with device_of(codes):
        n = count_values(codes)
        packed = new_array(codes, divide_up(n * bits, 8), "uint8")
        launch(make_pack(), divide_up(n, 8), as_numba(codes), bits, n, as_numba(packed))
    return packed


def unpack(packed: DeviceArray, bits: int, n: int) -> DeviceArray:
    """Return the n codes that pack wrote. See kbit.numerics.reference.unpack."""
    require_device()
    with device_of(packed):
        codes = new_array(packed, n, "uint8")
        launch(make_unpack(), divide_up(n, 8), as_numba(packed), bits, n, as_numba(codes))
    return codes


@functools.cache
def make_pack() -> Any:
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
def make_unpack() -> Any:
    """The reverse of make_pack."""

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
