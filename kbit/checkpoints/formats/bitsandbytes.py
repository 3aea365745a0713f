"""bitsandbytes' 4-bit tensors: NF4 and FP4, with float32 or double-quantized scales, as its Linear4bit saves them.

    weight                      uint8 [bytes, 1], two codes a byte, the first in the high bits
    weight.absmax               float32 [blocks], or the uint8 codes of double quantization
    weight.quant_map            float32 [16], the value of each code
    weight.nested_absmax, weight.nested_quant_map     of double quantization, in blocks of 256
    weight.quant_state.bitsandbytes__nf4              JSON as bytes: block size, shape, dtype, offset

NF4's codes are kbit's. FP4's are a permutation of kbit's, and have a second 0. Blocks run over the flattened tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kbit.checkpoints.formats.integers import decode_scales
from kbit.checkpoints.formats.plain import NotExactError, find_row_block, require_plain, require_same
from kbit.kernels import cpu
from kbit.numerics.codebooks import dynamic_codebook
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.scale_formats import name_dtype
from kbit.numerics.spec import QuantSpec

NAME: Final = "bitsandbytes"
ADVICE: Final = "use quant=nf4, nf4_dq or fp4_bnb"
BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Its CPU code pads rows to so many outputs, and reads rows as whole blocks. Beyond that it decodes wrong values.
OUTPUTS: Final = 32
_NESTED_BLOCK: Final = 256
_STATE: Final = "quant_state.bitsandbytes__"
# The magnitude of FP4's code c, 0..7, is the n-th smallest one. Codes 8..15 are the same below 0.
_FP4_ORDER: Final = np.array([0, 1, 6, 7, 4, 5, 2, 3])
_KINDS: Final = {
    "nf4": QuantSpec(bits=4, data_type="nf"),
    "fp4": QuantSpec(bits=4, data_type="float", exponent_bits=2, float_bias="paper"),
}


def write(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors that bitsandbytes stores for a quantized matrix, by what follows its name.

    Raises:
        NotExactError: the quantizer is not one of bitsandbytes', or its CPU code would decode the shape wrongly.
    """
    require_plain(tensor, NAME, ADVICE)
    kind = _find_kind(tensor.spec)
    block = _check_shape(tensor)
    codes = tensor.unpack_codes().cpu().numpy()
    if kind == "fp4":
        codes = _list_fp4_codes()[codes]
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": name_dtype(tensor.dtype)}
    state |= {"shape": list(tensor.shape)}
    parts, more = _write_scales(tensor)
    parts |= {
        "": torch.from_numpy(cpu.pack(codes, 4))[:, None],
        "quant_map": torch.from_numpy(_make_map(kind)),
        f"{_STATE}{kind}": torch.tensor(list(json.dumps(state | more).encode()), dtype=torch.uint8),
    }
    require_same(tensor, read(parts), NAME)
    return parts


def _find_kind(spec: QuantSpec) -> str:
    asked = (spec.bits, spec.data_type, spec.canonical().exponent_bits, spec.canonical().float_bias)
    for kind, own in _KINDS.items():
        if asked == (own.bits, own.data_type, own.exponent_bits, own.canonical().float_bias):
            if spec.normalization != "absmax" or spec.scale_type.holds_only_powers:
                break
            return kind
    raise NotExactError(
        f"{NAME} holds NF4 and FP4 with a positive scale for each block, not {spec.label()} with "
        f"scale_format={spec.scale_format} and normalization={spec.normalization}: {ADVICE}"
    )


def _check_shape(tensor: QuantizedTensor) -> int:
    """Return the block size that bitsandbytes decodes rightly on every device."""
    block = find_row_block(tensor, NAME)
    if block not in BLOCK_SIZES:
        raise NotExactError(f"{NAME} has blocks of {', '.join(map(str, BLOCK_SIZES))}, not quant.block_size={block}")
    out, inputs = tensor.shape
    if inputs % max(block, 64) or out % OUTPUTS:
        raise NotExactError(
            f"{NAME}'s CPU code decodes wrong values, without an error, of a matrix [{out}, {inputs}] whose inputs are "
            f"no multiple of {max(block, 64)} or whose outputs are no multiple of {OUTPUTS}: leave it at 16 bits by "
            "quant.exclude"
        )
    return block


def _write_scales(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of scales, and what the state says of them."""
    if tensor.spec.scale_format != "dq8":
        return {"absmax": torch.from_numpy(decode_scales(tensor).copy())}, {}
    scales = tensor.scales
    parts = {
        "absmax": scales["scales"].cpu(),
        "nested_absmax": scales["second_scales"].abs().cpu(),  # the sign marks blocks of zeros, which stay zeros
        "nested_quant_map": torch.from_numpy(dynamic_codebook(8).copy()),
    }
    nested = {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(scales["mean"][0])}
    return parts, nested


def read(parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """Return the quantized matrix that bitsandbytes stored.

    Double-quantized scales stay so if their table is kbit's own, and else become the float32 scales that they mean.

    Args:
        parts: the tensors, by what follows the weight's name and a dot. The codes' own name is empty.

    Raises:
        ValueError: a part is missing, has another length than the shape asks for, or is of another table.
    """
    kind, state = _read_state(parts)
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    elements, table = int(np.prod(shape)), _make_map(kind)
    if parts[""].numel() != -(-elements // 2) or parts[""].dtype != torch.uint8:
        raise ValueError(f"{parts[''].numel()} bytes of codes are no {elements} codes of 4 bits of shape {list(shape)}")
    if not np.array_equal(parts["quant_map"].float().numpy(), table):
        raise ValueError(f"quant_map is not the table of {kind}")
    packed = parts[""].reshape(-1)
    if kind == "fp4":
        packed = torch.from_numpy(cpu.pack(_list_places()[cpu.unpack(packed.numpy(), 4, elements)], 4))
    scale_format, scales = _read_scales(parts, state)
    own = _KINDS[kind]
    spec = QuantSpec(
        bits=4, data_type=own.data_type, exponent_bits=own.exponent_bits, float_bias=own.float_bias, block_size=block,
        scale_format=scale_format,
    )  # fmt: skip
    codebook, center = torch.from_numpy(spec.make_codebook().copy()), torch.empty(0, dtype=torch.float16)
    return QuantizedTensor(packed, scales, {}, center, codebook, shape, getattr(torch, state["dtype"]), spec)


def _read_state(parts: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    kinds = [name.removeprefix(_STATE) for name in parts if name.startswith(_STATE)]
    if len(kinds) != 1 or kinds[0] not in _KINDS or not {"", "absmax", "quant_map"} <= parts.keys():
        raise ValueError(f"tensors {sorted(parts)} are no NF4 or FP4 matrix of {NAME}")
    state: dict[str, Any] = json.loads(bytes(parts[f"{_STATE}{kinds[0]}"].tolist()))
    if not {"shape", "blocksize", "dtype"} <= state.keys() or not hasattr(torch, str(state["dtype"])):
        raise ValueError(f"quant_state {state} lacks the shape, the block size or a dtype")
    return kinds[0], state


def _read_scales(parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    if "nested_absmax" not in parts:
        return "fp32", {"scales": parts["absmax"].float().reshape(-1)}
    table, second = parts["nested_quant_map"].float().numpy(), parts["nested_absmax"].float().reshape(-1)
    mean, codes = np.float32(state["nested_offset"]), parts["absmax"].reshape(-1)
    nested_block = int(state["nested_blocksize"])
    if nested_block == _NESTED_BLOCK and np.array_equal(table, dynamic_codebook(8)):
        return "dq8", {"scales": codes, "second_scales": second, "mean": torch.tensor([mean])}
    if len(second) * nested_block < len(codes) or len(table) != 256:
        raise ValueError(f"{len(second)} nested scales of {nested_block} do not cover {len(codes)} blocks")
    each = np.repeat(second.numpy(), nested_block)[: len(codes)]
    return "fp32", {"scales": torch.from_numpy(table[codes.numpy()] * each + mean)}


def _make_map(kind: str) -> NDArray[np.float32]:
    """Return the value of each of bitsandbytes' codes."""
    codebook = _KINDS[kind].make_codebook()
    return codebook.copy() if kind == "nf4" else codebook[_list_places()]


def _list_places() -> NDArray[np.uint8]:
    """Return the place in kbit's sorted codebook of each of FP4's 16 codes, whose two zeros share one place."""
    return np.concatenate([7 + _FP4_ORDER, 7 - _FP4_ORDER]).astype(np.uint8)


def _list_fp4_codes() -> NDArray[np.uint8]:
    """Return FP4's code for each place in kbit's codebook. The zero is code 0."""
    codes = np.zeros(15, np.uint8)
    for code, place in reversed(list(enumerate(_list_places()))):
        codes[place] = code
    return codes
