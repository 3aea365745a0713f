"""A weight of a model as the methods see it: a matrix [out, in] to be replaced by one that takes fewer bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kbit.layers.run_time.rotation import Basis
from kbit.models.parameters import label_matrix
from kbit.numerics.spec import QuantSpec

if TYPE_CHECKING:
    from kbit.methods.config import QuantConfig


class Codes(Protocol):
    """What a method makes of a weight: a QuantizedTensor, or another class that can do this."""

    def keep_columns(self, columns: Int64[Tensor, " columns"], values: Float[Tensor, "*batch out columns"]) -> Codes:
        """Return the codes with columns that keep their 16-bit values."""

    def count_bits(self) -> int:
        """Return the bits of everything that is stored."""

    def dequantize(self) -> Float[Tensor, "*batch out in"]:
        """Return the values that the codes stand for."""


@dataclass(frozen=True)
class ExpertCodes:
    """The codes of a parameter that holds fused experts: those of each expert, in order."""

    experts: tuple[Codes, ...]

    def count_bits(self) -> int:
        """Return the bits of everything that is stored."""
        return sum(codes.count_bits() for codes in self.experts)

    def dequantize(self) -> Float[Tensor, "experts *batch in"]:
        """Return the values that the codes stand for."""
        return torch.stack([codes.dequantize() for codes in self.experts])


def _no_columns() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Weight:
    """One weight to quantize, in place: a parameter, or one expert of a parameter that holds several.

    Attributes:
        name: the parameter's name in the model.
        values: [..., out, in], the parameter's own memory. Conv1D's [in, out] is seen transposed.
        spec: the quantizer, with a seed of the weight's own.
        squared_error: sum (w - w')^2 of everything that replace has changed so far.
        outlier_columns: input dimensions that stay at 16 bits (kbit.methods.selection.outlier_columns). A method
            quantizes the values with 0 in their place (outliers_at_zero, copy_matrix), so that they decide no block's
            scale. The zeros are part of the blocks, as in bitsandbytes: no block changes place or number.
        expert: the number of the expert, or None of a parameter that is one weight.
        method: the method that a rule names for it. None is the configuration's own.
        is_unseen: whether calibration did not see its inputs, so that it is rounded to nearest.
        basis: what the weight is turned by before it is quantized, or None. The values are those of the model in each
            case. What methods see, and return, is turned.
    """

    name: str
    values: Float[Tensor, "*batch out in"]
    spec: QuantSpec
    squared_error: float = 0.0
    outlier_columns: Int64[Tensor, " columns"] = field(default_factory=_no_columns)
    expert: int | None = None
    method: str | None = None
    is_unseen: bool = False
    basis: Basis | None = None

    @property
    def label(self) -> str:
        """The name for messages, and of random numbers of its own: the parameter's, with the expert's number."""
        return label_matrix(self.name, self.expert)

    def copy_matrix(self) -> Float[Tensor, "rows in"]:
        """Return a float32 copy of the values as a matrix. Outlier columns are 0, so that no block scale sees them."""
        matrix = self.values.reshape(-1, self.values.shape[-1]).to(torch.float32, copy=True)
        if self.basis is not None:
            matrix = self.basis.turn_weight(matrix)
        matrix[:, self.outlier_columns] = 0
        return matrix

    @contextmanager
    def outliers_at_zero(self) -> Iterator[Float[Tensor, "*batch out in"]]:
        """Yield the weight's own values with 0 in the outlier columns, and put these back afterwards.

        What is yielded of a turned weight is a copy. It has no outlier columns.
        """
        if self.basis is not None:
            yield self.basis.turn_weight(self.values)
            return
        outliers = self.copy_outliers()
        self.values[..., self.outlier_columns] = 0.0
        try:
            yield self.values
        finally:
            self.values[..., self.outlier_columns] = outliers

    def copy_outliers(self) -> Float[Tensor, "*batch out columns"]:
        """Return a copy of the outlier columns."""
        return self.values[..., self.outlier_columns]  # indexing by numbers copies

    def turn_back(self, quantized: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """Return quantized values as the model multiplies them: turned back."""
        return quantized if self.basis is None else self.basis.turn_weight_back(quantized)

    def sum_squares(self, values: Float[Tensor, "*batch out in"]) -> float:
        """Return the squared norm of values of this weight, or of a difference of them, as the quantizer sees them.

        A gain that a turned weight has taken up is part of it: an error counts by what its input is multiplied with.
        Turning alone changes no norm.
        """
        has_gain = self.basis is not None and self.basis.gain is not None
        return sum_squares(self.basis.turn_weight(values) if self.basis is not None and has_gain else values)

    def replace(self, quantized: Float[Tensor, "*batch out in"]) -> None:
        """Write quantized values into the weight, in its own dtype and memory, and count the error.

        Raises:
            ValueError: a value that is beyond the weight's dtype. The weight is then lost.
        """
        before = self.values.to(torch.float32, copy=True)
        self.values.copy_(self.turn_back(quantized))
        self.squared_error += self.sum_squares(before.sub_(self.values))
        if not math.isfinite(self.squared_error):
            raise ValueError(f"{self.label}: quantized values are beyond {self.values.dtype}: load a wider type")


@dataclass(frozen=True)
class Job:
    """What a method is given to quantize a model.

    Attributes:
        model: the model that the weights belong to.
        weights: the weights to quantize, in the order of the model.
        quant: the configuration: the method and its options.
        tokenizer: the model's tokenizer, or None, which methods that need a text refuse.
        notes: the method's own record for the report, with values fit for JSON.
    """

    model: nn.Module
    weights: Sequence[Weight]
    quant: QuantConfig
    tokenizer: PreTrainedTokenizerBase | None
    notes: dict[str, Any] = field(default_factory=dict)


def sum_squares(values: Tensor) -> float:
    """Return the sum of the squared values, added up in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
