"""A quantized weight as the state of a module: codes, scales and all else that stands for it, as tensors of bytes.

The codes are the parameter `weight`, since model code reads a layer's parameter of this name. Everything else is a
buffer. All are bytes, so that moving a model to another dtype, which rounds floating-point tensors, leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.spec import QuantSpec


@dataclass(frozen=True)
class PackedLayout:
    """What decides which tensors a packed weight has, and how long they are.

    Attributes:
        spec: how the weight was quantized.
        shape: the weight's shape, [..., out, in].
        dtype: the weight's dtype before.
        outlier_columns: how many columns keep their 16-bit values.
        has_input_scales: whether each column is divided by a scale.
        column_dtype: the dtype of the columns that keep their values. None is the weight's.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    outlier_columns: int = 0
    has_input_scales: bool = False
    column_dtype: torch.dtype | None = None

    @staticmethod
    def of(q: QuantizedTensor) -> PackedLayout:
        """Return the layout of a quantized tensor."""
        columns = 0 if q.outlier_columns is None else len(q.outlier_columns)
        kind = None if q.outlier_values is None or not columns else q.outlier_values.dtype
        column_dtype = None if kind == q.dtype else kind
        return PackedLayout(q.spec, q.shape, q.dtype, columns, q.input_scales is not None, column_dtype)

    def list_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the type and the shape of each tensor, by its name in the module's state. `weight` holds the codes."""
        spec, blocks = self.spec, self.spec.count_blocks(self.shape)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        found["weight"] = (torch.uint8, (math.ceil(math.prod(self.shape) * spec.bits / 8),))
        found |= dict(_list_constants("scales", spec.scale_type.list_arrays(blocks)))
        if spec.normalization == "minmax":
            found |= dict(_list_constants("offsets", spec.offset_type.list_arrays(blocks)))
        if spec.centering:
            found["center"] = (torch.float16, (1,))
        if spec.data_type in ADAPTIVE:
            found["codebook"] = (torch.float32, (2**spec.bits,))
        if self.has_input_scales:
            found["input_scales"] = (torch.float16, (*self.shape[:-2], self.shape[-1]))
        if self.outlier_columns:
            found["outlier_columns"] = (torch.int64, (self.outlier_columns,))
            found["outlier_values"] = (self.column_dtype or self.dtype, (*self.shape[:-1], self.outlier_columns))
        return found


class PackedWeight(nn.Module):
    """A weight in k bits.

    Attributes:
        layout: what the weight is, and how it is stored.
        weight: uint8 parameter, the packed codes.
    """

    weight: nn.Parameter

    def __init__(self, layout: PackedLayout, device: torch.device | str | None = None) -> None:
        """Make a weight whose tensors are still to be filled, by `put` or from a state_dict."""
        super().__init__()
        self.layout = layout
        for name, (dtype, shape) in layout.list_tensors().items():
            tensor = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    def put(self, q: QuantizedTensor) -> Self:
        """Take over the tensors of a quantized tensor of the same layout, without a copy.

        Raises:
            ValueError: the layout is another, or the codebook is not that of the spec.
        """
        if PackedLayout.of(q) != self.layout:
            raise ValueError(f"codes of {PackedLayout.of(q)} do not fit a weight of {self.layout}")
        for name, tensor in _list_parts(q):
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            if name == "weight":
                self.weight = nn.Parameter(raw, requires_grad=False)
            else:
                self.register_buffer(name, raw)
        return self

    def share(self, other: PackedWeight) -> None:
        """Take over the tensors of another weight of the same layout, which stay its own too."""
        for name in self.layout.list_tensors():
            if name == "weight":
                self.weight = other.weight
            else:
                self.register_buffer(name, getattr(other, name))

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a quantized tensor, in the same memory.

        Raises:
            ValueError: a tensor of the module has not the length that the layout asks for.
        """
        parts = {name: self._view(name, *expected) for name, expected in self.layout.list_tensors().items()}
        spec = self.layout.spec
        center = parts.get("center", torch.empty(0, dtype=torch.float16))
        codebook = parts["codebook"] if "codebook" in parts else torch.from_numpy(spec.make_codebook().copy())
        optional = {
            name: parts[name] for name in ("input_scales", "outlier_columns", "outlier_values") if name in parts
        }
        return QuantizedTensor(
            parts["weight"], _pick(parts, "scales"), _pick(parts, "offsets"), center, codebook, self.layout.shape,
            self.layout.dtype, spec, **optional,
        )  # fmt: skip

    def dequantize(self) -> Tensor:
        """Return the values that the weight stands for, in its dtype before."""
        return self.quantized.dequantize()

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        raw: Tensor = getattr(self, name).detach()
        expected = math.prod(shape) * dtype.itemsize
        if raw.dtype != torch.uint8 or raw.shape != (expected,):
            found = f"{str(raw.dtype).removeprefix('torch.')}{list(raw.shape)}"
            raise ValueError(f"{name} of a packed weight {self.layout.shape} is {found}, not uint8[{expected}]")
        return raw.view(dtype).view(shape)

    def extra_repr(self) -> str:
        """Return what the weight is, for print(model)."""
        spec = self.layout.spec
        return f"{list(self.layout.shape)}, {spec.label()}, block_size={spec.block_size}"


def _list_constants(
    prefix: str, arrays: Mapping[str, tuple[type[np.generic], int]]
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    for name, (kind, size) in arrays.items():
        dtype: Any = getattr(torch, np.dtype(kind).name)
        yield _join(prefix, name), (dtype, (size,))


def _join(prefix: str, name: str) -> str:
    """Return the name of an array of scales or offsets in the module's state."""
    return prefix if name == "scales" else f"{prefix}_{name}"


def _pick(parts: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the arrays of the scales or the offsets, by the names of their format."""
    others = {n.removeprefix(f"{prefix}_"): t for n, t in parts.items() if n.startswith(f"{prefix}_")}
    return ({"scales": parts[prefix]} if prefix in parts else {}) | others


def _list_parts(q: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a packed weight, by their names in the module's state."""
    yield "weight", q.codes
    yield from ((_join("scales", name), tensor) for name, tensor in q.scales.items())
    yield from ((_join("offsets", name), tensor) for name, tensor in q.offsets.items())
    if q.spec.centering:
        yield "center", q.center
    if q.spec.data_type in ADAPTIVE:  # fewer values than codes: the last one again, to which no code points
        yield "codebook", torch.cat([q.codebook, q.codebook[-1:].expand(2**q.spec.bits - len(q.codebook))])
    elif not np.array_equal(q.codebook.cpu().numpy(), q.spec.make_codebook()):
        raise ValueError(f"the codebook of {q.spec.label()} is not that of its spec: it cannot be packed")
    if q.input_scales is not None:
        yield "input_scales", q.input_scales
    if q.outlier_columns is not None and q.outlier_values is not None and len(q.outlier_columns):
        yield "outlier_columns", q.outlier_columns
        yield "outlier_values", q.outlier_values
