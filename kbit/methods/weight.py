"""A weight of a model as the methods see it: a matrix [out, in] to be replaced by one that takes fewer bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kbit.numerics.spec import QuantSpec


def _no_dimensions() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Weight:
    """One weight to quantize, in place.

    Attributes:
        name: of the parameter in the model.
        values: [..., out, in], the parameter's own memory: Conv1D's [in, out] is seen transposed.
        spec: the quantizer, with a seed of the weight's own.
        squared_error: sum (w - w')^2 of what put has changed so far.
        kept: input dimensions that stay at 16 bits (kbit.methods.outlier_columns). put leaves these columns as they are
            whatever it is given; a method quantizes the values with 0 in their place (kept_at_zero, take_matrix), so
            that they decide no block's scale. The zeros are part of the blocks, as in bitsandbytes: no block changes
            place or number.
        unseen: fused experts (0 of a plain matrix) whose inputs calibration did not see: they are rounded to nearest.
    """

    name: str
    values: Float[Tensor, "*batch out in"]
    spec: QuantSpec
    squared_error: float = 0.0
    kept: Int64[Tensor, " kept"] = field(default_factory=_no_dimensions)
    unseen: tuple[int, ...] = ()

    def take_matrix(self) -> Float[Tensor, "rows in"]:
        """Return a float32 copy of the values as a matrix, kept columns 0 so that no block scale sees them."""
        matrix = self.values.reshape(-1, self.values.shape[-1]).to(torch.float32, copy=True)
        matrix[:, self.kept] = 0
        return matrix

    @contextmanager
    def kept_at_zero(self) -> Iterator[Float[Tensor, "*batch out in"]]:
        """Yield the values with 0 in the kept columns, in the weight's own memory, which has them back afterwards."""
        kept = self.values[..., self.kept]  # indexing copies
        self.values[..., self.kept] = 0.0
        try:
            yield self.values
        finally:
            self.values[..., self.kept] = kept

    def put(self, quantized: Float[Tensor, "*batch out in"]) -> None:
        """Replace the weight but for its kept columns, in its own dtype and memory, and count the error.

        Raises:
            ValueError: a value that is beyond the weight's dtype; the weight is then lost.
        """
        before = self.values.to(torch.float32, copy=True)
        kept = self.values[..., self.kept]
        self.values.copy_(quantized)
        self.values[..., self.kept] = kept
        self.squared_error += sum_squares(before.sub_(self.values))
        if not math.isfinite(self.squared_error):
            raise ValueError(f"{self.name}: quantized values are beyond {self.values.dtype}: load a wider type")


def sum_squares(values: Tensor) -> float:
    """Return the sum of the squared values, added up in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
