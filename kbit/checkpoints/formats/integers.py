"""Tensors whose values are integers times a float16 scale for each block: what GPTQ, compressed-tensors and GGUF store.

    weight[o, i] = level[o, i] * scale[o, i // block],    -2^(k-1) <= level < 2^(k-1)

A codebook is such a grid if its values are whole numbers of a power of two. Then level and scale are exact: the scale
differs from the stored one by that power, and by its sign where the codebook has +2^(k-1) instead of -2^(k-1). The
codebook of int is none, since it divides by 2^(k-1) - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float16, Int16, Int32, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kbit.checkpoints.formats.plain import NotExactError, find_row_block, require_plain
from kbit.kernels import cpu
from kbit.numerics.codebooks import as_codebook
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.spec import QuantSpec

_LARGEST_FLOAT16: Final = 65504.0
WORD_BITS: Final = 32
GRID_ADVICE: Final = "use quant=int4_grid or int8_grid"


@dataclass(frozen=True)
class Integers:
    """A matrix as integers and float16 scales.

    Attributes:
        bits: bits of an integer, 2..8.
        levels: [out, in], -2^(bits-1) .. 2^(bits-1) - 1.
        scales: [out, blocks].
    """

    bits: int
    levels: Int16[np.ndarray, "out in"]
    scales: Float16[np.ndarray, "out blocks"]

    @property
    def block(self) -> int:
        """Elements of a block."""
        return int(self.levels.shape[1] // self.scales.shape[1])


def find_levels(codebook: NDArray[np.float32], bits: int) -> tuple[NDArray[np.int64], int] | None:
    """Return a codebook's values as integers of `bits` bits and the number that they were multiplied by, or None.

    The number is a power of two. It is negative where the codebook has to be turned round.
    """
    half = 2 ** (bits - 1)
    for power in range(bits + 1):
        for factor in (2**power, -(2**power)):
            levels = codebook.astype(np.float64) * factor
            if (levels == np.rint(levels)).all() and levels.min() >= -half and levels.max() < half:
                return levels.astype(np.int64), factor
    return None


def require_bits(tensor: QuantizedTensor, form: str, bits: Sequence[int]) -> None:
    """Raise NotExactError unless a format has integers of the tensor's bits."""
    if tensor.spec.bits not in bits:
        there = ", ".join(map(str, bits))
        raise NotExactError(f"{form} has {there} bits, not quant.bits={tensor.spec.bits}; {GRID_ADVICE}")


def as_integers(tensor: QuantizedTensor, form: str, advice: str) -> Integers:
    """Return a tensor as integers and scales.

    Raises:
        NotExactError: the tensor is no such grid, its scales are beyond float16, or its rows are no whole blocks.
    """
    require_plain(tensor, form, advice)
    spec = tensor.spec
    if spec.normalization == "minmax":
        raise NotExactError(f"{form} has scales and no offsets: normalization=minmax cannot be written; {advice}")
    found = find_levels(tensor.codebook.cpu().numpy(), spec.bits)
    if found is None:
        raise NotExactError(
            f"{form} stores integers of {spec.bits} bits times a scale, and the values of {spec.label()} are no "
            f"integers times a power of two; {advice}"
        )
    levels, factor = found
    out, inputs = tensor.shape
    block = find_row_block(tensor, form)
    codes = tensor.unpack_codes().cpu().numpy().reshape(out, inputs)
    scales = decode_scales(tensor) / np.float32(factor)
    return Integers(spec.bits, levels[codes].astype(np.int16), as_float16(scales, form).reshape(out, inputs // block))


def decode_scales(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """Return the float32 scale of each block."""
    return tensor.spec.decode_scales({name: part.cpu().numpy() for name, part in tensor.scales.items()})


def as_float16(values: NDArray[np.float32], form: str) -> NDArray[np.float16]:
    """Return float32 values as float16.

    Raises:
        NotExactError: a value is no float16 number.
    """
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if wrong := int((halves.astype(np.float32) != values).sum()):
        least = float(np.abs(values[values != 0]).min())
        raise NotExactError(
            f"{form} stores float16 numbers, and {wrong} of its {values.size} scales or offsets are none (the smallest "
            f"is {least:.3g}): use quant.scale_format=bf16 or fp16, or leave the tensor at 16 bits by quant.exclude"
        )
    return halves


def from_integers(integers: Integers, dtype: torch.dtype, zeros: NDArray[Any] | None = None) -> QuantizedTensor:
    """Return the tensor that integers stand for: (level - zero) * scale.

    Args:
        integers: the integers and their scales.
        dtype: the dtype of the decoded weights.
        zeros: integers [out, blocks], or None for 0.
    """
    half = 2 ** (integers.bits - 1)
    scales = (integers.scales.astype(np.float32) * half).ravel()
    codebook = np.arange(-half, half) / half
    codes = (integers.levels + half).astype(np.uint8)
    if zeros is None or not zeros.any():
        return assemble(codes, codebook, scales, None, integers.block, dtype)
    offsets = -(zeros * integers.scales.astype(np.float32)).astype(np.float32).ravel()  # exact: 8 bits times 11
    return assemble(codes, codebook, scales, offsets, integers.block, dtype)


def assemble(
    codes: UInt8[np.ndarray, "out in"],
    codebook: NDArray[Any],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32] | None,
    block: int,
    dtype: torch.dtype,
) -> QuantizedTensor:
    """Return the tensor of codes into a table, with a scale (and an offset) for each block of a row.

    Scales and offsets that are float16 numbers are stored so, and others as float32.

    Raises:
        ValueError: a scale is below 0 beside an offset, which no quantizer of kbit has.
    """
    if offsets is not None and (scales < 0).any():
        raise ValueError(f"{int((scales < 0).sum())} scales are below 0 beside an offset")
    small = all(_fits_float16(part) for part in (scales, offsets) if part is not None)
    kind = torch.float16 if small else torch.float32
    spec = QuantSpec(
        bits=max(2, int(len(codebook) - 1).bit_length()),
        data_type="table",
        table=tuple(codebook.tolist()),
        block_size=block,
        layout="row",
        normalization="signed_absmax" if offsets is None else "minmax",
        scale_format="fp16" if small else "fp32",
    )
    stored = [{} if part is None else {"scales": torch.from_numpy(part).to(kind)} for part in (scales, offsets)]
    center = torch.empty(0, dtype=torch.float16)
    table = torch.from_numpy(as_codebook(np.asarray(codebook)).copy())
    packed = torch.from_numpy(cpu.pack(codes.ravel(), spec.bits))
    return QuantizedTensor(packed, stored[0], stored[1], center, table, codes.shape, dtype, spec)


def _fits_float16(values: NDArray[np.float32]) -> bool:
    if float(np.abs(values).max(initial=0)) > _LARGEST_FLOAT16:
        return False
    return bool((values.astype(np.float16).astype(np.float32) == values).all())


def read_scales(stored: Tensor, name: str) -> Tensor:
    """Return a checkpoint's scales as float16.

    Raises:
        ValueError: they are no float16 numbers, which rounding would change.
    """
    scales = stored.to(torch.float16)
    if not torch.equal(scales.float(), stored.float()):
        raise ValueError(f"{name} is {str(stored.dtype).removeprefix('torch.')} and holds no float16 numbers")
    return scales


def check_order(index: Tensor | None, name: str, inputs: int, groups: int) -> None:
    """Raise ValueError unless the inputs of each group lie together, in the groups' order.

    Args:
        index: the group of each input, or None. A single -1 for all means the same as None.
        name: the tensor's name for messages.
        inputs, groups: how many there are.
    """
    if index is None or bool((index == -1).all()):
        return
    if not torch.equal(index.long(), torch.arange(inputs) // (inputs // groups)):
        raise ValueError(f"{name} takes the inputs in another order, which a QuantizedTensor has no place for")


def pack_words(values: NDArray[Any], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Pack values 0 .. 2^bits - 1 along each row, the lowest bit first and without gaps, into words of 32 bits."""
    rows, count = values.shape
    spread = np.unpackbits(values.astype(np.uint8)[..., None], axis=2, bitorder="little")[..., :bits]
    words = -(-count * bits // WORD_BITS)
    stream = np.zeros((rows, words * WORD_BITS), np.uint8)
    stream[:, : count * bits] = spread.reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def unpack_words(words: Tensor, bits: int, count: int) -> Int16[np.ndarray, "rows count"]:
    """Return the values that pack_words packed.

    Raises:
        ValueError: the words are no int32, or fewer or more than so many values take.
    """
    expected = -(-count * bits // WORD_BITS)
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != expected:
        raise ValueError(
            f"packed codes are {words.dtype} {list(words.shape)}, and {count} values of {bits} bits take rows of "
            f"{expected} int32 words"
        )
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    values = np.packbits(stream.reshape(len(words), count, bits), axis=2, bitorder="little")
    return values[..., 0].astype(np.int16)
