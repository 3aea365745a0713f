"""Linear layers whose matrix products are in int8, summed in int32 (Dettmers et al. 2022, "LLM.int8()").

X [tokens, in] and W [out, in] become integers, X at run time. Schemes (kbit.layers.int8_schemes) differ in what shares
a constant (the whole tensor, or a row: a token of X, an output of W), in whether values are shifted by a zero point,
and in whether input dimensions with large activations are taken out and multiplied at 16 bits (section 3.2):

    X W^T  ~  X[:, O] W[:, O]^T  +  s_X s_W (Q_X Q_W^T),     O = {i: some |X[t, i]| > threshold}

The left product takes the 16-bit weights, as in the paper, so it needs them in memory. bitsandbytes takes the
dequantized int8 ones. The tokens that share a constant or decide O are those of one call, so kbit gives models with
such products (kbit.layers.run_time.forwards) one text at a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8, Int32, Int64
from torch import Tensor, nn

from kbit.layers.int8_schemes import ZERO_POINT_BITS, Scheme
from kbit.layers.run_time.forwards import Forward, list_forwards

OUTLIER_BITS: Final = 16  # a value that is not quantized
LEVELS: Final = 127  # codes are -127..127: symmetric, so that -x has the code of x negated
# What torch._int_mm asks of (rows, inner and outer columns): multiples of the second, and at least the first of rows
GEMM_SHAPES: Final = {"cpu": (1, 1), "cuda": (24, 8)}


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in int8: x ~ (codes + zero) * scale, but for its outlier columns.

    Attributes:
        codes: [rows, columns], -127..127.
        scale: scale of each row, or one for all.
        zero: zero point of each row, or one for all. None is 0.
        outlier_columns: columns that are not quantized, or None. Their codes mean nothing.
        outlier_values: [rows, outliers], the values of these columns.
    """

    codes: Int8[Tensor, "rows columns"]
    scale: Float[Tensor, "constants 1"]
    zero: Int64[Tensor, "constants 1"] | None = None
    outlier_columns: Int64[Tensor, " outliers"] | None = None
    outlier_values: Float[Tensor, "rows outliers"] | None = None

    def keep_columns(self, columns: Int64[Tensor, " outliers"], values: Float[Tensor, "rows outliers"]) -> Int8Matrix:
        """Return the matrix with columns that keep their values instead of what their codes stand for."""
        return dataclasses.replace(self, outlier_columns=columns, outlier_values=values)

    def count_bits(self) -> int:
        """Return the bits of everything that is stored.

        A zero point is an integer in -127..127 and takes 8 bits. A value of an outlier column takes 16 bits, whatever
        its dtype, and its code is not stored.
        """
        outliers = 0 if self.outlier_values is None else self.outlier_values.numel()
        zero_points = 0 if self.zero is None else ZERO_POINT_BITS * self.zero.numel()
        return 8 * (self.codes.nbytes - outliers + self.scale.nbytes) + zero_points + OUTLIER_BITS * outliers

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """Return the values that the codes stand for, float32."""
        values = (self.codes if self.zero is None else self.codes + self.zero) * self.scale
        if self.outlier_columns is not None and self.outlier_values is not None:
            values[:, self.outlier_columns] = self.outlier_values.to(values.dtype)
        return values


def quantize_int8(x: Float[Tensor, "rows columns"], *, by_row: bool, zero_point: bool = False) -> Int8Matrix:
    """Quantize a matrix to int8, in float32, ties to even.

    absmax      scale = max |x| / 127,           code = round(x / scale)
    zero point  scale = (max x - min x) / 254,   code = round(x / scale) - zero,   zero = round(min x / scale) + 127

    The range of a zero point always contains 0, which is exact then (a ReLU's zeros, dimensions taken out). All zeros
    give zeros. NaN or Inf in x makes the scale, and so whatever is computed of it, NaN or Inf.

    Args:
        x: the matrix.
        by_row: a scale (and zero point) for each row, else one for all.
        zero_point: see above.
    """
    x = x.float()
    if not by_row:
        whole = quantize_int8(x.reshape(1, -1), by_row=True, zero_point=zero_point)
        return Int8Matrix(whole.codes.view(x.shape), whole.scale, whole.zero)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if not zero_point:
        scale = _positive(torch.maximum(-low, high) / LEVELS)
        # a scale among float32's last subnormals is itself rounded, by up to a half
        return Int8Matrix((x / scale).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _positive((high - low) / (2 * LEVELS))
    zero = (low / scale).round() + LEVELS
    # the range is 254 steps to within rounding: its upper end may come out as 128
    codes = (x / scale).round_().sub_(zero).clamp_(-LEVELS, LEVELS)
    return Int8Matrix(codes.to(torch.int8), scale, zero.to(torch.int64))


def multiply_int8(a: Int8[Tensor, "m k"], b: Int8[Tensor, "n k"]) -> Int32[Tensor, "m n"]:
    """Return a b^T exactly, summed in int32: no overflow below 2^31 / 127^2 = 133,144 columns.

    Raises:
        ValueError: a device without an int8 matrix product.
    """
    device = a.device.type
    if device not in GEMM_SHAPES:
        raise ValueError(f"there is no int8 matrix product on {device}; there is on: {', '.join(GEMM_SHAPES)}")
    (m, k), n = a.shape, len(b)
    rows, multiple = GEMM_SHAPES[device]
    inner, outer = -k % multiple, -n % multiple
    a = F.pad(a, (0, inner, 0, max(0, rows - m))) if inner or m < rows else a
    b = F.pad(b, (0, inner, 0, outer)) if inner or outer else b
    product: Tensor = torch._int_mm(a, b.t())
    return product[:m, :n]


def multiply_quantized(a: Int8Matrix, b: Int8Matrix) -> Float[Tensor, "m n"]:
    """Return dequantize(a) dequantize(b)^T, float32, with the sum over columns in integers.

    sum (q_a + z_a) (q_b + z_b) = sum q_a q_b + z_a sum q_b + z_b sum q_a + columns z_a z_b
    """
    total = multiply_int8(a.codes, b.codes)
    if a.zero is not None and b.zero is not None:
        sum_a, sum_b = a.codes.sum(1, keepdim=True), b.codes.sum(1, keepdim=True)  # int64
        zero_b = b.zero.t()
        total = total + a.zero * sum_b.t() + sum_a * zero_b + a.codes.shape[1] * a.zero * zero_b
    return total.float().mul_(a.scale).mul_(b.scale.t())


class Int8Linear(Forward):
    """The forward of a linear layer whose product is in int8: takes the place of module.forward.

    Attributes:
        weight: the quantized weight [out, in], with 0 in the outlier columns.
        wide: [out, in], the 16-bit weight, for the input dimensions that are not multiplied in int8, or None.
        bias: the layer's bias.
        scheme: how the product is computed.
        threshold: magnitude above which activations are multiplied at 16 bits, if the scheme decomposes.
        outlier_columns: input dimensions that always stay at 16 bits.
        met: bool [in], dimensions that stayed at 16 bits in any call so far.
    """

    def __init__(
        self,
        weight: Int8Matrix,
        wide: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        scheme: Scheme,
        threshold: float,
        outlier_columns: Int64[Tensor, " outliers"],
    ) -> None:
        self.weight, self.scheme, self.threshold, self.outlier_columns = weight, scheme, threshold, outlier_columns
        self.bias = None if bias is None else bias.detach()
        needs_wide = scheme.decomposes or len(outlier_columns) > 0
        self.wide = wide.clone(memory_format=torch.contiguous_format) if needs_wide else None
        self.met: Bool[Tensor, " in"] = torch.zeros(wide.shape[-1], dtype=torch.bool, device=outlier_columns.device)
        self.met[self.outlier_columns] = True

    @property
    def sees_whole_input(self) -> bool:
        """Whether tokens of one call share a constant, or decide together what stays at 16 bits."""
        return self.scheme.sees_whole_input

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x W^T + bias in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        outliers = self._find_outliers(rows)
        rest = rows.index_fill(1, outliers, 0.0) if len(outliers) else rows
        inputs = quantize_int8(rest, by_row=self.scheme.input_rows, zero_point=self.scheme.zero_point)
        result = multiply_quantized(inputs, self.weight)
        if len(outliers) and self.wide is not None:
            result += F.linear(rows[:, outliers], self.wide[:, outliers])
        if self.bias is not None:
            result += self.bias
        return result.to(x.dtype).view(*x.shape[:-1], -1)

    def _find_outliers(self, rows: Float[Tensor, "tokens in"]) -> Int64[Tensor, " outliers"]:
        """Return the input dimensions to multiply at 16 bits."""
        if not self.scheme.decomposes:
            return self.outlier_columns
        is_outlier = torch.maximum(rows.amax(0), -rows.amin(0)) > self.threshold
        is_outlier[self.outlier_columns] = True
        self.met |= is_outlier
        return is_outlier.nonzero().flatten()


def list_products(model: nn.Module) -> list[tuple[str, Int8Linear]]:
    """Return the int8 products, with the names of their layers."""
    return [(name, forward) for name, forward in list_forwards(model) if isinstance(forward, Int8Linear)]


def _positive(scale: Tensor) -> Tensor:
    """Return the scale with 1 for 0. NaN stays NaN."""
    return scale.masked_fill_(scale == 0, 1.0)
