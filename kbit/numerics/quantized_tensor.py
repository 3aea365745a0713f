"""A quantized tensor as it is stored: packed codes, scales, codebook; checked, counted, saved and loaded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kbit.kernels import cpu
from kbit.numerics.backend import torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE, Codebook
from kbit.numerics.scale_formats import Stored, check_stored
from kbit.numerics.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized tensor as it is stored, on the CPU: x ~ codebook[code] * scale + offset.

    Attributes:
        codes: uint8 [ceil(n bits / 8)], packed: see kbit.numerics.reference.pack.
        scales, offsets: what the formats store, by name (kbit.numerics.scale_formats); offsets is empty but for minmax.
        center: float16 [1], the mean that centering subtracted; empty without.
        codebook: float32 [values], sorted.
        shape, dtype: of the original tensor; dequantize returns it.
        spec: how it was quantized.

    Raises:
        ValueError: an array has not the type or length that spec and shape ask for.
    """

    codes: NDArray[np.uint8]
    scales: Stored
    offsets: Stored
    center: NDArray[np.float16]
    codebook: Codebook
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec

    def __post_init__(self) -> None:
        elements, blocks = math.prod(self.shape), self.spec.count_blocks(self.shape)
        _check_array("codes", self.codes, np.uint8, math.ceil(elements * self.spec.bits / 8))
        _check_array("center", self.center, np.float16, int(self.spec.centering))
        values = self.codebook.size if 0 < self.codebook.size <= 2**self.spec.bits else 2**self.spec.bits
        _check_array("codebook", self.codebook, np.float32, values)
        check_stored(self.scales, blocks, self.spec.scale_format, "scales")
        if self.spec.normalization == "minmax":
            check_stored(self.offsets, blocks, self.spec.offset_format, "offsets")

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes: spec.count_bits(shape), rounded up to whole bytes."""
        stored = [self.codes, *self.scales.values(), *self.offsets.values(), self.center]
        own_codebook = 2 * 2**self.spec.bits if self.spec.data_type in ADAPTIVE else 0  # float16 each
        return sum(array.nbytes for array in stored) + own_codebook

    def unpack_codes(self) -> NDArray[np.uint8]:
        """Return one code per element, uint8 [n], in row-major order."""
        with torch_threads_kept():
            return cpu.unpack(self.codes, self.spec.bits, int(np.prod(self.shape)))

    def save(self, path: str | Path) -> None:
        """Write the tensor to a safetensors file; load gives it back bit for bit."""
        tensors: dict[str, NDArray[Any]] = {"codes": self.codes, "center": self.center, "codebook": self.codebook}
        tensors |= {f"scales.{name}": array for name, array in self.scales.items()}
        tensors |= {f"offsets.{name}": array for name, array in self.offsets.items()}
        description = {"spec": asdict(self.spec), "shape": self.shape, "dtype": str(self.dtype).removeprefix("torch.")}
        save_file(tensors, path, metadata={"kbit": json.dumps(description)})

    @staticmethod
    def load(path: str | Path) -> QuantizedTensor:
        """Read what save wrote.

        Raises:
            ValueError: a file that kbit did not write, or that was changed so that it is no quantized tensor.
            FileNotFoundError: there is no such file.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                description = json.loads((file.metadata() or {})["kbit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return QuantizedTensor._assemble(tensors, description)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a quantized tensor written by kbit: {error!r}") from error

    @staticmethod
    def _assemble(tensors: dict[str, NDArray[Any]], description: dict[str, Any]) -> QuantizedTensor:
        if bad := [name for name, a in tensors.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]:
            raise ValueError(f"{bad[0]} holds NaN or Inf")
        return QuantizedTensor(
            tensors["codes"],
            {name.removeprefix("scales."): array for name, array in tensors.items() if name.startswith("scales.")},
            {name.removeprefix("offsets."): array for name, array in tensors.items() if name.startswith("offsets.")},
            tensors["center"],
            tensors["codebook"],
            tuple(description["shape"]),
            getattr(torch, description["dtype"]),
            QuantSpec.from_json(description["spec"]),
        )


def _check_array(name: str, array: NDArray[Any], kind: type[np.generic], size: int) -> None:
    if array.dtype != kind or array.shape != (size,):
        expected = f"{np.dtype(kind)}[{size}]"
        raise ValueError(f"{name} of a quantized tensor is {array.dtype}{list(array.shape)}, not {expected}")
