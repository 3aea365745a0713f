"""GGUF's blocks of 32 weights, as llama.cpp stores them: [out, bytes], each block its scale and then its codes.

    Q4_0, Q5_0, Q8_0    weight = d (q - 2^(bits-1))      d float16, signed
    Q4_1, Q5_1          weight = d q + m                 d and m float16
    IQ4_NL              weight = d table[q]              a table of 16 integers

Codes of 4 bits lie as the low halves of 16 bytes and then the high halves. The fifth bits lie together in 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray

from kbit.checkpoints.formats.integers import as_float16, as_integers, assemble, decode_scales, find_levels
from kbit.checkpoints.formats.plain import NotExactError, find_row_block, require_plain, require_same
from kbit.numerics.quantized_tensor import QuantizedTensor

NAME: Final = "gguf"
BLOCK: Final = 32
ADVICE: Final = "use quant=int4_grid, int8_grid, gguf_q4_1, gguf_q5_0, gguf_q5_1 or gguf_iq4_nl"
IQ4_NL: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Kind:
    """A kind of blocks.

    Attributes:
        name: GGML's name.
        bits: bits of a code.
        has_offset: whether a block stores its offset.
        number: GGML's number of the kind in a file.
    """

    name: str
    bits: int
    has_offset: bool
    number: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.has_offset + BLOCK * self.bits // 8


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("Q4_0", 4, has_offset=False, number=2),
        Kind("Q4_1", 4, has_offset=True, number=3),
        Kind("Q5_0", 5, has_offset=False, number=6),
        Kind("Q5_1", 5, has_offset=True, number=7),
        Kind("Q8_0", 8, has_offset=False, number=8),
        Kind("IQ4_NL", 4, has_offset=False, number=20),
    )
}


def write(tensor: QuantizedTensor) -> tuple[Kind, UInt8[np.ndarray, "out bytes"]]:
    """Return the blocks of a quantized matrix and their kind.

    Raises:
        NotExactError: no kind of blocks holds the quantizer's values.
    """
    require_plain(tensor, NAME, ADVICE)
    if (block := find_row_block(tensor, NAME)) != BLOCK:
        raise NotExactError(f"{NAME} has blocks of {BLOCK} weights, not quant.block_size={block}; {ADVICE}")
    kind = _find_kind(tensor)
    halves, codes = _write_parts(tensor, kind)
    blocks = np.concatenate([*(half.reshape(-1, 1).view(np.uint8) for half in halves), _pack(codes, kind.bits)], axis=1)
    rows = blocks.reshape(tensor.shape[0], -1)
    require_same(tensor, read(rows, kind, tensor.dtype), f"{NAME} {kind.name}")
    return kind, rows


def _find_kind(tensor: QuantizedTensor) -> Kind:
    spec, codebook = tensor.spec, tensor.codebook.cpu().numpy()
    if spec.normalization == "minmax":
        if spec.bits in (4, 5) and _is_from_zero(codebook, spec.bits):
            return KINDS[f"Q{spec.bits}_1"]
    elif spec.bits in (4, 5, 8) and find_levels(codebook, spec.bits) is not None:
        return KINDS[f"Q{spec.bits}_0"]
    elif spec.bits == 4 and _find_iq4_sign(codebook):
        return KINDS["IQ4_NL"]
    raise NotExactError(
        f"{NAME} has no blocks with the values of {spec.label()} at {spec.bits} bits and normalization="
        f"{spec.normalization}; {ADVICE}"
    )


def _is_from_zero(codebook: NDArray[np.float32], bits: int) -> bool:
    levels = codebook * 2**bits
    return bool(levels[0] == 0 and (levels == np.rint(levels)).all() and levels[-1] < 2**bits)


def _find_iq4_sign(codebook: NDArray[np.float32]) -> int:
    """Return whether a codebook is IQ4_NL's table (1), or that turned round (-1), or neither (0)."""
    for sign in (1, -1):
        if np.array_equal(codebook, np.sort(np.array(IQ4_NL) * sign / 128).astype(np.float32)):
            return sign
    return 0


def _write_parts(
    tensor: QuantizedTensor, kind: Kind
) -> tuple[list[NDArray[np.float16]], UInt8[np.ndarray, "blocks 32"]]:
    """Return the float16 numbers of each block, and its codes."""
    form = f"{NAME} {kind.name}"
    if kind.name.endswith("_0"):
        integers = as_integers(tensor, form, ADVICE)
        return [integers.scales], (integers.levels + 2 ** (kind.bits - 1)).astype(np.uint8).reshape(-1, BLOCK)
    codes, codebook = tensor.unpack_codes().cpu().numpy().reshape(-1, BLOCK), tensor.codebook.cpu().numpy()
    scales = decode_scales(tensor)
    if kind.name == "IQ4_NL":
        sign = _find_iq4_sign(codebook)
        return [as_float16(scales * np.float32(sign / 128), form)], codes if sign > 0 else 15 - codes
    stored = {name: part.cpu().numpy() for name, part in tensor.offsets.items()}
    offsets = tensor.spec.decode_offsets(stored, np.empty(0, np.float16), scales)
    numbers = (codebook * 2**kind.bits).astype(np.uint8)
    return [as_float16(scales / np.float32(2**kind.bits), form), as_float16(offsets, form)], numbers[codes]


def read(rows: UInt8[np.ndarray, "out bytes"], kind: Kind, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Return the quantized matrix of GGUF's blocks.

    Raises:
        ValueError: rows are no whole number of blocks.
    """
    if rows.ndim != 2 or rows.shape[1] % kind.block_bytes or not rows.size:
        raise ValueError(f"rows {list(rows.shape)} are no whole blocks of {kind.block_bytes} bytes ({kind.name})")
    blocks = np.ascontiguousarray(rows).reshape(-1, kind.block_bytes)
    at = 2 + 2 * kind.has_offset
    halves = np.ascontiguousarray(blocks[:, :at]).view(np.float16).astype(np.float32)
    codes = _unpack(blocks[:, at:], kind.bits).reshape(rows.shape[0], -1)
    scales, half = halves[:, 0], 2 ** (kind.bits - 1)
    if kind.has_offset:
        table = np.arange(2 * half) / (2 * half)
        return assemble(codes, table, scales * np.float32(2 * half), halves[:, 1].copy(), BLOCK, dtype)
    if kind.name == "IQ4_NL":
        return assemble(codes, np.array(IQ4_NL) / 128, scales * np.float32(128), None, BLOCK, dtype)
    return assemble(codes, np.arange(-half, half) / half, scales * np.float32(half), None, BLOCK, dtype)


def _pack(codes: UInt8[np.ndarray, "blocks 32"], bits: int) -> UInt8[np.ndarray, "blocks bytes"]:
    if bits == 8:  # as signed bytes
        return codes ^ np.uint8(128)
    low, high = codes[:, :16] & 15, codes[:, 16:] & 15
    nibbles = low | high << 4
    if bits == 4:
        return nibbles
    return np.concatenate([np.packbits(codes >> 4, axis=1, bitorder="little"), nibbles], axis=1)


def _unpack(packed: UInt8[np.ndarray, "blocks bytes"], bits: int) -> UInt8[np.ndarray, "blocks 32"]:
    if bits == 8:
        return packed ^ np.uint8(128)
    nibbles = packed[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if bits == 4:
        return codes
    fifth: UInt8[np.ndarray, "blocks 32"] = np.unpackbits(packed[:, :4], axis=1, bitorder="little")
    whole: UInt8[np.ndarray, "blocks 32"] = codes | fifth << np.uint8(4)
    return whole
