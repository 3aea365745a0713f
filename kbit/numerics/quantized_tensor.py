"""A quantized tensor as it is stored (packed codes, scales, codebook): made, counted, decoded, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kbit.numerics.backend import Backend, DeviceArray, choose_backend, torch_threads_kept
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.scale_formats import Scales, Stored, name_dtype
from kbit.numerics.spec import BASELINE_BITS, CODEBOOK_VALUE_BITS, QuantSpec

if TYPE_CHECKING:
    from kbit.numerics.grid import QuantizationGrid


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized tensor as it is stored, on the device of the original: x ~ codebook[code] * scale + offset.

    The weights of a model may have two parts more. AWQ divides by the scale of each input. Outlier columns keep their
    16-bit values, so the codes in these columns mean nothing.

    Attributes:
        codes: uint8 [ceil(n bits / 8)], packed: see kbit.numerics.reference.pack.
        scales: the tensors that the format of scales stores, by name (kbit.numerics.scale_formats).
        offsets: the tensors that the format of offsets stores, by name. Only minmax has any.
        center: float16 [1], the mean that centering subtracted. It is empty without centering.
        codebook: float32 [values], sorted.
        shape: the shape of the original tensor. Weights are [..., out, in].
        dtype: the type of the original tensor, and of what dequantize returns.
        spec: how the tensor was quantized.
        input_scales: float16 [..., in], by which the decoded columns are divided, or None.
        outlier_columns: places in the last dimension of the columns that are not quantized, or None.
        outlier_values: [..., out, columns], the values of these columns in the original dtype, or in 16 bits.

    Raises:
        ValueError: a tensor has not the type or length that spec and shape ask for.
    """

    codes: UInt8[Tensor, " bytes"]
    scales: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    center: Float[Tensor, " mean"]
    codebook: Float32[Tensor, " values"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec
    input_scales: Float[Tensor, "*batch in"] | None = None
    outlier_columns: Int64[Tensor, " columns"] | None = None
    outlier_values: Float[Tensor, "*batch out columns"] | None = None

    def __post_init__(self) -> None:
        elements, blocks = math.prod(self.shape), self.spec.count_blocks(self.shape)
        _check_tensor("codes", self.codes, "uint8", [math.ceil(elements * self.spec.bits / 8)])
        _check_tensor("center", self.center, "float16", [int(self.spec.centering)])
        values = len(self.codebook) if 0 < len(self.codebook) <= 2**self.spec.bits else 2**self.spec.bits
        _check_tensor("codebook", self.codebook, "float32", [values])
        self.spec.scale_type.check_arrays(self.scales, blocks, "scales")
        if self.spec.normalization == "minmax":
            self.spec.offset_type.check_arrays(self.offsets, blocks, "offsets")
        if self.input_scales is not None:
            _check_tensor("input_scales", self.input_scales, "float16", [*self.shape[:-2], self.shape[-1]])
        if self.outlier_columns is not None and self.outlier_values is not None:
            _check_tensor("outlier_columns", self.outlier_columns, "int64", [len(self.outlier_columns)])
            shape = [*self.shape[:-1], len(self.outlier_columns)]
            kind = self.outlier_values.dtype
            kind = kind if kind in (torch.float16, torch.bfloat16) else self.dtype
            _check_tensor("outlier_values", self.outlier_values, name_dtype(kind), shape)

    def keep_columns(
        self, columns: Int64[Tensor, " columns"], values: Float[Tensor, "*batch out columns"]
    ) -> QuantizedTensor:
        """Return the tensor with columns that keep their values instead of what their codes stand for."""
        return dataclasses.replace(self, outlier_columns=columns, outlier_values=values)

    def count_bits(self) -> int:
        """Return the bits of everything that is stored.

        A value of a codebook of the tensor's own takes 16 bits. So does a value of an outlier column, whatever its
        dtype, like all weights that are not quantized. Its code is not stored. The places of outlier columns are not
        counted (QuantConfig.count_bits says why).
        """
        extra = [] if self.input_scales is None else [self.input_scales]
        whole = 8 * sum(part.nbytes for part in (*self.scales.values(), *self.offsets.values(), self.center, *extra))
        outliers = 0 if self.outlier_values is None else self.outlier_values.numel()
        own_codebook = CODEBOOK_VALUE_BITS * 2**self.spec.bits if self.spec.data_type in ADAPTIVE else 0
        codes = self.spec.bits * (math.prod(self.shape) - outliers)
        return codes + whole + own_codebook + BASELINE_BITS * outliers

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes: its bits, rounded up to whole bytes."""
        return math.ceil(self.count_bits() / 8)

    def unpack_codes(self) -> UInt8[Tensor, " n"]:
        """Return one code per element, in row-major order."""
        backend = choose_backend(self.codes.device)
        with torch_threads_kept():
            codes = backend.kernels.unpack(backend.view(self.codes), self.spec.bits, math.prod(self.shape))
        return backend.as_tensor(codes)

    def dequantize(self, device: torch.device | str | None = None) -> Tensor:
        """Return codebook[code] * scale + offset, computed in float32 and cast to the original dtype and shape.

        Columns are divided by their input scales in float32. Outlier columns are as they were.

        Args:
            device: the device that computes and holds the result. None is the device of the codes.
        """
        backend = choose_backend(self.codes.device if device is None else torch.device(device))
        dtype = find_computed_dtype(self.dtype) if self.input_scales is None else torch.float32
        result = backend.allocate(self.shape, dtype)
        self._decode_into(result.view(-1), backend)
        return self.finish_rows(result, slice(None))

    def finish_rows(
        self, values: Float[Tensor, "*batch rows in"], rows: slice | Tensor
    ) -> Float[Tensor, "*batch rows in"]:
        """Return decoded rows in the original dtype, divided by input scales and with their outlier columns."""
        if self.input_scales is not None:
            values /= self.input_scales.to(values.device).float().unsqueeze(-2)
        values = values.to(self.dtype)
        if self.outlier_columns is not None and self.outlier_values is not None:
            outliers = self.outlier_values if values.ndim == 1 else self.outlier_values[..., rows, :]
            values[..., self.outlier_columns.to(values.device)] = outliers.to(values.device, values.dtype)
        return values

    def decode_constants(self) -> tuple[Scales, Scales]:
        """Return the scale and the offset of each block."""
        scales = self.spec.decode_scales(_to_arrays(self.scales))
        return scales, self.spec.decode_offsets(_to_arrays(self.offsets), self.center.cpu().numpy(), scales)

    def _decode_into(self, flat: Tensor, backend: Backend) -> None:
        """Fill a flat tensor with codebook[code] * scale + offset."""
        scales, offsets = self.decode_constants()
        with torch_threads_kept():
            backend.kernels.dequantize(
                backend.view(self.codes.to(backend.device)), backend.put(scales), backend.put(offsets),
                self.codebook.cpu().numpy(), *self.spec.find_block_shape(self.shape), backend.view(flat),
                self.spec.bits,
            )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the tensor to a safetensors file, from which load gives it back bit for bit."""
        tensors = {"codes": self.codes, "center": self.center, "codebook": self.codebook}
        tensors |= {f"scales.{name}": tensor for name, tensor in self.scales.items()}
        tensors |= {f"offsets.{name}": tensor for name, tensor in self.offsets.items()}
        tensors |= {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}
        description = {"spec": asdict(self.spec), "shape": self.shape, "dtype": name_dtype(self.dtype)}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"kbit": json.dumps(description)},
        )

    @staticmethod
    def load(path: str | Path) -> QuantizedTensor:
        """Read what save wrote, onto the CPU.

        Raises:
            ValueError: a file that kbit did not write, or that was changed so that it is no quantized tensor.
            FileNotFoundError: there is no such file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                description = json.loads((file.metadata() or {})["kbit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return QuantizedTensor._assemble(tensors, description)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a quantized tensor written by kbit: {error!r}") from error

    @staticmethod
    def _assemble(tensors: dict[str, Tensor], description: dict[str, Any]) -> QuantizedTensor:
        if bad := [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
            raise ValueError(f"{bad[0]} holds NaN or Inf")
        return QuantizedTensor(
            tensors["codes"],
            {name.removeprefix("scales."): t for name, t in tensors.items() if name.startswith("scales.")},
            {name.removeprefix("offsets."): t for name, t in tensors.items() if name.startswith("offsets.")},
            tensors["center"],
            tensors["codebook"],
            tuple(description["shape"]),
            getattr(torch, description["dtype"]),
            QuantSpec.from_json(description["spec"]),
            **{name: tensors[name] for name in _OPTIONAL if name in tensors},
        )


_OPTIONAL = ("input_scales", "outlier_columns", "outlier_values")  # tensors that a file may lack


def combine(
    packed: DeviceArray, grid: QuantizationGrid, shape: Sequence[int], dtype: torch.dtype, backend: Backend
) -> QuantizedTensor:
    """Return the tensor of packed codes and of the scales and the codebook of a grid."""
    device = backend.device

    def place(stored: Stored) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(device) for name, array in stored.items()}

    center, codebook = (torch.tensor(array, device=device) for array in (grid.center, grid.codebook))
    return QuantizedTensor(
        backend.as_tensor(packed), place(grid.stored_scales), place(grid.stored_offsets), center, codebook,
        tuple(shape), dtype, grid.spec,
    )  # fmt: skip


def find_computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the kernels read and write for a tensor of this dtype."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def _to_arrays(stored: Mapping[str, Tensor]) -> Stored:
    return {name: tensor.cpu().numpy() for name, tensor in stored.items()}


def _check_tensor(name: str, tensor: Tensor, kind: str, shape: Sequence[int]) -> None:
    if name_dtype(tensor.dtype) != kind or list(tensor.shape) != list(shape):
        found, expected = f"{name_dtype(tensor.dtype)}{list(tensor.shape)}", f"{kind}{list(shape)}"
        raise ValueError(f"{name} of a quantized tensor is {found}, not {expected}")
